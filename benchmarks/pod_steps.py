"""The training steps whose plans `plan_drafts.py` and `plan_table.py` make: models, lengths of a row, and chips.

A step is named MODEL-LENGTH-CHIP: `30b-32k-v6e`. It is a recipe of configs/train with another model, mesh and length: a
row a device, or, of rows longer than 4,096 tokens, one on the eight devices of a `context` axis.
"""

import dataclasses
from pathlib import Path

from qwen_moe_jax.plan.compile import chip_for, group_of, target_mesh, target_of
from qwen_moe_jax.plan.draft import Draft, Outline, draft_of
from qwen_moe_jax.plan.targets import parse_target
from train.config import load_config
from train.plan import planned_model, training_step
from train.program import assemble

RECIPES = Path(__file__).parents[1] / "configs" / "train"

#: Chip → devices → target.
TARGETS = {
    "v5p": {64: "tpu:v5p:4x4x4", 128: "tpu:v5p:4x4x8", 256: "tpu:v5p:4x8x8"},
    "v6e": {64: "tpu:v6e:8x8", 128: "tpu:v6e:8x16", 256: "tpu:v6e:16x16"},
    "h200": {64: "gpu:h200:64", 128: "gpu:h200:128", 256: "gpu:h200:256"},
}
LENGTHS = {"4k": 4096, "32k": 32768, "128k": 131072}
#: From the one that keeps most to the one that keeps least.
REMATS = "dots", "experts", "full"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and its devices.

    Attributes:
        recipe: a file of configs/train.
        source: the model's name on the Hub.
        devices: how many train it.
        expert: devices of the `expert` axis; the rest are `fsdp`, or `context` for rows longer than 4,096.
    """

    recipe: str
    source: str
    devices: int
    expert: int


MODELS = {
    "30b": Model("qwen3-30b-a3b-sft.toml", "Qwen/Qwen3-30B-A3B", 64, 8),
    "35b": Model("qwen3.5-35b-a3b-sft.toml", "Qwen/Qwen3.5-35B-A3B", 64, 8),
    "57b": Model("qwen3-30b-a3b-sft.toml", "Qwen/Qwen2-57B-A14B", 128, 8),
    "8x22b": Model("qwen3-30b-a3b-sft.toml", "mistralai/Mixtral-8x22B-Instruct-v0.1", 128, 8),
    "235b": Model("qwen3-235b-a22b.toml", "Qwen/Qwen3-235B-A22B", 256, 32),
    "397b": Model("qwen3.5-35b-a3b-sft.toml", "Qwen/Qwen3.5-397B-A17B", 256, 32),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step.

    Attributes:
        name: MODEL-LENGTH-CHIP.
        config: the recipe's path.
        target: of the plan.
        changes: of the recipe, as on the command line, without `execution.remat`.
    """

    name: str
    config: Path
    target: str
    changes: tuple[str, ...]


def steps() -> list[Step]:
    """All of them, model by model."""
    return [
        _step(f"{name}-{label}-{chip}", model, length, targets[model.devices])
        for name, model in MODELS.items()
        for label, length in LENGTHS.items()
        for chip, targets in TARGETS.items()
    ]


def _step(name: str, model: Model, length: int, target: str) -> Step:
    context = 1 if length == LENGTHS["4k"] else 8
    rules = ("--sharding.rules=expert+fsdp+context",) if context > 1 else ()
    changes = (
        f"--run.model_name_or_path={model.source}",
        f"--data.seq_len={length}",
        f"--data.batch_size={model.devices // context}",
        f"--mesh.fsdp={model.devices // model.expert // context}",
        f"--mesh.expert={model.expert}",
        f"--mesh.context={context}",
        "--run.max_steps=1000",
        *rules,
    )
    return Step(name, RECIPES / model.recipe, target, changes)


def draft(step: Step, remat: str) -> Draft:
    """The step's estimate, by arithmetic."""
    config = load_config(step.config, [*step.changes, f"--execution.remat={remat}"])
    request = parse_target(step.target)
    model_config, name = planned_model(config)
    mesh = target_mesh(request, config.mesh.sizes)
    training = training_step(config, assemble(config, model_config, mesh), name)
    groups = tuple(group_of(group, tree) for group, tree in training.groups.items())
    outline = Outline(config=training.config, work=training.work, flops=training.model_flops, groups=groups)
    chip = chip_for(request, mesh.devices.flatten().tolist(), training.work.dtype, None)
    assert chip is not None
    return draft_of(outline, dict(mesh.shape), target_of(request, mesh, chip), chip.networks)


def first_that_fits(step: Step) -> tuple[str | None, Draft]:
    """The first remat of `REMATS` under which the step may fit, with its estimate; None with that of the last one."""
    for remat in REMATS:
        found = draft(step, remat)
        if found.fits:
            return remat, found
    return None, found
