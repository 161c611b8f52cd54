"""`python -m train CONFIG --plan TARGET`: the train step of the run, compiled for hardware that need not be present."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

import qwen_moe_jax as qmj
from qwen_moe_jax.errors import ConfigError, ShardingError
from qwen_moe_jax.huggingface.hub import config_file
from qwen_moe_jax.plan.calibration import Calibration
from qwen_moe_jax.plan.compile import Step, group_of, plan_step, target_mesh
from qwen_moe_jax.plan.flops import training_flops_per_token
from qwen_moe_jax.plan.inference import decode_step_of
from qwen_moe_jax.plan.mesh_search import find_mesh
from qwen_moe_jax.plan.result import Plan
from qwen_moe_jax.plan.search import Search
from qwen_moe_jax.plan.search_table import print_progress
from qwen_moe_jax.plan.settings import (
    ACCUMULATION,
    ACTIVATIONS,
    MEMORY_KIND,
    OFFLOADED,
    RULES,
    VARIED,
    Settings,
    of_execution,
)
from qwen_moe_jax.plan.targets import parse_target
from qwen_moe_jax.plan.work import work_of
from train.config import TrainConfig
from train.config.toml import toml_value
from train.parameters import merge
from train.program import Program, assemble

#: Published configs, by the lower-case names of their models.
PUBLISHED = Path(__file__).parent.parent / "configs" / "models"


def plan_training(config: TrainConfig, target: str, calibration: Calibration | None = None) -> Plan:
    """The plan of one step. No text, tokenizer or weights are read, and no folder is created.

    Raises:
        ConfigError: no such target, or its compiler is missing; the model's config cannot be found.
        ShardingError: the mesh has not as many devices as the target, or does not divide the model.
    """
    request, config = parse_target(target), _with_any_length(config)
    model_config, name = planned_model(config)
    mesh = target_mesh(request, config.mesh.sizes)
    return plan_step(training_step(config, assemble(config, model_config, mesh), name), request, mesh, calibration)


def plan_rollout(config: TrainConfig, target: str, calibration: Calibration | None = None) -> Plan:
    """The plan of a token of every completion that a [grpo] run samples at a time, next to its optimizer state.

    Raises:
        ConfigError, ShardingError: as `plan_training`.
    """
    request, config = parse_target(target), _with_any_length(config)
    model_config, name = planned_model(config)
    mesh = target_mesh(request, config.mesh.sizes)
    return plan_step(rollout_step(config, assemble(config, model_config, mesh), name), request, mesh, calibration)


def rollout_step(config: TrainConfig, program: Program, name: str) -> Step:
    """The decoding of completions to plan."""
    assert config.grpo is not None
    model = nnx.merge(program.eval_graph, merge(program.state.params, program.fixed))
    rows = config.grpo.rollout_batch_size or config.data.batch_size
    step = decode_step_of(model, name, rows=rows, max_length=config.data.seq_len)
    return dataclasses.replace(step, groups={**step.groups, **_kept_by_optimizer(program)})


def _kept_by_optimizer(program: Program) -> dict[str, Any]:
    state = program.state
    average = {} if state.ema is None else {"averaged weights": state.ema}
    return {"optimizer state": (state.optimizer, state.step), **average}


#: What a search varies next to the mesh, by the keys of a run.
KEYS = {
    ACCUMULATION: "run.gradient_accumulation_steps",
    RULES: "sharding.rules",
    MEMORY_KIND: "optimizer.memory_kind",
    **{name: f"execution.{name}" for name in VARIED if name not in (ACCUMULATION, RULES, MEMORY_KIND)},
}


def search_training(
    config: TrainConfig, target: str, given: Collection[str] = (), calibration: Calibration | None = None
) -> Search:
    """The plans of one step on the most promising meshes under the most promising settings.

    The config's own mesh, rules, remat, micro-batches, exchange and buffer are not used, but for those in `given`.

    Args:
        config: of the run.
        target: the hardware.
        given: keys that keep the config's values, those of the command line: "execution.remat", "mesh.tensor".
        calibration: measured speeds; without, a chip's published ones.

    Raises:
        ConfigError: as `plan_training`.
        ShardingError: no mesh of the target's devices divides the model and the batch.
    """
    request, config = parse_target(target), _with_any_length(config)
    model_config, name = planned_model(config)

    def step_on(mesh: Mesh, settings: Settings) -> Step:
        chosen = with_choice(config, mesh.shape, settings) if settings else config
        return training_step(chosen, assemble(chosen, model_config, mesh), name)

    fixed = [setting for setting, key in KEYS.items() if key in given]
    fixed += [RULES] if any(key.startswith("sharding.") for key in given) else []
    # CPUs keep activations in one memory, and JAX names none for arguments on GPUs that are only compiled for.
    own = {*fixed, *{"cpu": [ACTIVATIONS], "gpu": [MEMORY_KIND]}.get(request.platform, [])}
    axes = {axis: size for axis, size in config.mesh.sizes.items() if f"mesh.{axis}" in given}
    dtype = str(config.execution.dtype or model_config.dtype or "float32")
    return find_mesh(
        step_on,
        request,
        fixed=fixed,
        axes=axes,
        last_resorts=[one for one in OFFLOADED if one.keys().isdisjoint(own)],
        dtype=dtype,
        calibration=calibration,
        progress=print_progress,
    )


def with_choice(config: TrainConfig, sizes: Mapping[str, int], settings: Settings) -> TrainConfig:
    """The run on a mesh under settings.

    Raises:
        ShardingError: they have no meaning in this run.
    """
    kind = settings.get(MEMORY_KIND, config.optimizer.memory_kind)
    execution = {**of_execution(settings), "sharding": settings.get(RULES, config.execution.sharding)}
    mesh: dict[str, Any] = {axis: int(size) for axis, size in sizes.items()}
    steps = settings.get(ACCUMULATION, config.run.gradient_accumulation_steps)
    try:
        return dataclasses.replace(
            config,
            mesh=dataclasses.replace(config.mesh, **mesh),
            execution=dataclasses.replace(config.execution, **execution),
            optimizer=dataclasses.replace(config.optimizer, memory_kind=kind),
            run=dataclasses.replace(config.run, gradient_accumulation_steps=steps),
        )
    except ConfigError as error:
        raise ShardingError(str(error)) from None


def paste(sizes: Mapping[str, int], settings: Settings) -> tuple[str, str]:
    """A mesh and settings as overrides of a command line, and as tables of a run's file.

    All axes are listed, since the file may set any of them.
    """
    values = {f"mesh.{axis}": size for axis, size in sizes.items()}
    values |= {KEYS[name]: value for name, value in settings.items()}
    tables: dict[str, list[str]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, []).append(f"{name} = {toml_value(value)}")
    lines = "".join("\n".join([f"[{section}]", *rows]) + "\n" for section, rows in tables.items())
    return " ".join(f"--{key} {_as_word(value)}" for key, value in values.items()), lines


def _as_word(value: Any) -> str:
    """A value of a command line; true and false are written as in TOML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def training_step(config: TrainConfig, program: Program, name: str) -> Step:
    """The training step to plan."""
    model, rows, seq_len = program.model, config.data.batch_size, config.data.seq_len
    trained = group_of("parameters", program.state.params)
    return Step(
        function=program.train_step,
        arguments=(program.state, program.fixed, program.batch),
        groups={
            "parameters": merge(program.state.params, program.fixed),
            **_kept_by_optimizer(program),
            "batch": program.batch,
        },
        config=model.config,
        name=name,
        work=work_of(
            model,
            "train",
            rows=rows,
            tokens_per_row=seq_len,
            accumulation_steps=config.run.gradient_accumulation_steps,
        ),
        model_flops=rows * seq_len * training_flops_per_token(model.config, seq_len, program.trained_share),
        gradient_bytes=trained.bytes,
    )


def planned_model(config: TrainConfig) -> tuple[qmj.ModelConfig, str]:
    """The model's config and its display name.

    The config of the [model] table, or of the checkpoint to start from: from its folder, else from configs/models, else
    from the Hub, of which only config.json is fetched.

    Raises:
        ConfigError: it cannot be found, or is no config of a known family.
    """
    source = config.run.model_name_or_path
    if not source:
        hub_config = {"eos_token_id": 0, "vocab_size": config.data.vocab_size, **config.model}
        return qmj.ModelConfig.from_pretrained(hub_config), Path(config.run.output_dir).name
    published = PUBLISHED / f"{source.split('/')[-1].lower()}.json"
    found = published if not Path(source).exists() and published.is_file() else config_file(source)
    model_config = qmj.ModelConfig.from_pretrained(found)
    if config.run.drop_mtp:
        model_config = dataclasses.replace(model_config, num_mtp_layers=0)
    return model_config, source


def _with_any_length(config: TrainConfig) -> TrainConfig:
    """The config with a number of steps, on which the cost of a step does not depend; an epoch is not known here."""
    return config.with_steps_of(rows=10**12)
