"""What a run is: frozen dataclasses, filled from a short TOML file, overridden by `--section.key value`.

This module imports the standard library only, so that `--help` and a misspelt key answer at once.
"""

import dataclasses
import difflib
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin


def _key(default: Any, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices stand along each mesh axis."""

    data: int = _key(1, "devices that share the batch and hold a copy of everything else")
    fsdp: int = _key(1, "devices that share the batch and split the weights")
    expert: int = _key(1, "devices that share the batch and split the experts")
    tensor: int = _key(1, "devices that split the width of heads and feed-forward layers")
    simulated: bool = _key(False, "pretend that this machine's CPU is data x fsdp x expert x tensor devices")

    @property
    def batch_shards(self) -> int:
        """How many parts the batch axis is cut into."""
        return self.data * self.fsdp * self.expert

    @property
    def devices(self) -> int:
        """How many devices the mesh needs."""
        return self.batch_shards * self.tensor


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings:
    """How the numbers are computed; the fields of `qwen_moe_jax.ExecutionConfig` that belong to training.

    None is the package's own choice for the model and the mesh. On held-out text no token is ever dropped.
    """

    dtype: str = _key("float32", "of activations and matrix products")
    param_dtype: str = _key("float32", "of the weights and of the optimizer's moments")
    router_dtype: str | None = _key(None, "of the router's matrix product; left out, that of the activations")
    dispatch: str = _key("capacity", "how tokens reach their experts while training: capacity, dropless or dense")
    capacity_factor: float = _key(1.25, "capacity: room per expert, as a multiple of a perfectly even load")
    min_capacity: int = _key(4, "capacity: room that every expert has at least, in tokens of a group")
    group_size: int | None = _key(None, "capacity: tokens that share the room; small groups drop more")
    drop_policy: str = _key(
        "position", "capacity: which tokens are dropped: position (the last ones) or probs (the least probable)"
    )
    capacity_by: str | None = _key(None, "capacity: tokens move by einsum or by index; the same tokens either way")
    buffer_factor: float = _key(
        2.0,
        "dropless: room per device, as a multiple of a perfectly even load; inf for the worst case, no drops at all",
    )
    exchange: str | None = _key(None, "dropless: how tokens travel: all_gather, all_to_all or ragged_all_to_all")
    grouped_matmul: str | None = _key(None, "dropless: what multiplies: blocks, megablox (TPU) or triton (NVIDIA)")
    routing: str = _key("learned", "learned, or balanced: to experts in turn, which measures speed and teaches nothing")
    attention: str | None = _key(
        None, "what attends: blocks (any device) or splash (TPU), whose scores stay on the chip"
    )
    remat: str = _key(
        "dots",
        "what the backward pass recomputes to save memory: none, dots (all but attention and products with weights), "
        "exchange (all but what came over the expert axis) or full",
    )


@dataclass(frozen=True, kw_only=True)
class ShardingSettings:
    """Where weights, gradients and moments lie at rest: a table of rules, and what this run has otherwise."""

    rules: str = _key(
        "expert+fsdp",
        "what is gathered for a layer: expert+fsdp (dense weights over both, no weight twice but over data), fsdp or "
        "expert (over one of them, with copies along the other), expert+tensor (nothing, copies of dense weights)",
    )
    embed: tuple[str, ...] | None = _key(None, "mesh axes that cut the hidden axis of dense weights, outermost first")
    expert_embed: tuple[str, ...] | None = _key(None, "those of routed experts' hidden axis")
    vocab: tuple[str, ...] | None = _key(None, "those of the vocabulary; tensor first")
    heads: tuple[str, ...] | None = _key(None, "those of the attention heads; tensor first")
    ffn: tuple[str, ...] | None = _key(None, "those of the width of MLPs and experts; tensor first")


#: The values of loss.balance.
BALANCE_LOSSES = ("pooled", "global_batch", "sequence")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What keeps the load of the experts even, and scores small."""

    balance: str = _key(
        "pooled",
        "where the load should be even: pooled (over all layers together, as in transformers), global_batch (in each "
        "layer) or sequence (in each layer, within each row)",
    )
    balance_coef: float | None = _key(None, "weight of that loss; left out, the model's router_aux_loss_coef")
    z_coef: float = _key(0.0, "weight of the mean squared logsumexp of the model's logits (z-loss; 1e-4 in PaLM)")
    router_z_coef: float = _key(0.0, "weight of the mean squared logsumexp of the router's logits (z-loss)")
    balancing_bias_rate: float = _key(
        0.0, "above 0, routers have a bias on whom they choose, moved by this much a step; it needs run.export = false"
    )


#: The values of data.format, and which files of a folder are read when data.pattern is left out.
FORMATS = {"text": "*.py", "docstrings": "*.py", "jsonl": "*.jsonl", "tokens": "*.npy", "datasets": "*.parquet"}


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Where documents come from."""

    folder: str = _key("", "where the documents are, a folder or one file; empty: Python's own standard library")
    pattern: str | None = _key(
        None, "which file names in the folder are read; left out, *.py, *.jsonl, *.npy or *.parquet, by format"
    )
    format: str = _key(
        "text",
        "text (a document per file), docstrings (of Python files: conversations that ask what a name is or does and "
        "answer with the start of its docstring), jsonl (one per line, with `text` or `messages`), tokens (.npy of "
        "ids, documents split by the end id) or datasets (Hugging Face's: a folder of save_to_disk or of parquet, or a "
        "Hub name)",
    )
    split: str = _key("train", "datasets: which split is read")


@dataclass(frozen=True, kw_only=True)
class SourceConfig(TextConfig):
    """One source of a mixture."""

    weight: float = _key(1.0, "its share of the rows, as a multiple of the others' weights")


@dataclass(frozen=True, kw_only=True)
class DataConfig(TextConfig):
    """The text, its tokenizer and the shape of a batch."""

    sources: tuple[SourceConfig, ...] = _key(
        (), "a mixture instead of one source: tables of folder, pattern, format, split and weight"
    )
    megabytes: float = _key(6.0, "of each source, stop reading after this much text; inf for all of it")
    tokenizer: str = _key("", "a folder with tokenizer.json, or a model's name on the Hub; empty: trained on the text")
    vocab_size: int = _key(4096, "entries of the byte-level BPE that is trained on the text, and of the model")
    seq_len: int = _key(256, "tokens in a row, T")
    batch_size: int = _key(16, "rows in a step, B; a multiple of data x fsdp x expert")
    heldout_fraction: float = _key(0.05, "of the documents of each source, kept out of training")
    heldout_rows: int = _key(64, "rows of them, evenly spread, on which the held-out loss is taken")

    @property
    def mixture(self) -> tuple[SourceConfig, ...]:
        """What is read, whichever way it was written."""
        own = SourceConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TextConfig)})
        return self.sources or (own,)


#: The values of optimizer.schedule.
SCHEDULES = ("cosine", "linear", "wsd")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a descent."""

    learning_rate: float = _key(3e-3, "at the top, after the warm-up")
    final_learning_rate: float = _key(3e-4, "at the last step")
    warmup_steps: int = _key(40, "steps from zero to the top")
    schedule: str = _key("cosine", "after the warm-up: down a cosine, linear, or wsd (stay at the top, then linear)")
    decay_steps: int | None = _key(None, "wsd: steps of the way down, the last ones of the run")
    weight_decay: float = _key(0.1, "of matrices; norms and biases are left alone")
    beta1: float = _key(0.9, "memory of the gradient's mean")
    beta2: float = _key(0.95, "memory of the gradient's square")
    clip_norm: float = _key(1.0, "gradients longer than this, over all parameters, are shortened to it")
    moment_dtype: str | None = _key(
        None, "of the memory of the gradient's mean, float32 or bfloat16; left out, that of the weights"
    )
    frozen: tuple[str, ...] = _key(
        (), "regular expressions; parameters with such names on the Hub are not trained and have no moments"
    )


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters instead of the weights: the fields of `qwen_moe_jax.LoraConfig`, whose names are PEFT's."""

    r: int = _key(
        0, "rank of low-rank adapters (LoRA), which are trained instead of the weights; 0: none, the weights are"
    )
    lora_alpha: float = _key(32.0, "the adapters are multiplied with lora_alpha / r")
    target_modules: tuple[str, ...] = _key(
        ("all-linear",),
        "which matrices have one: names as q_proj, down_proj, experts, shared_expert, mlp.shared_expert.up_proj, or "
        "all-linear, which is all but the routers and the head",
    )
    use_rslora: bool = _key(False, "multiply with lora_alpha / sqrt(r) instead, for high ranks")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long to train, what to keep and what to show."""

    folder: str = _key("runs/default", "receives config.toml, metrics.jsonl, checkpoints/ and hub/")
    steps: int = _key(500, "optimizer steps in all")
    seed: int = _key(0, "of the first weights and of the order of the data")
    init_from: str = _key(
        "",
        "a checkpoint to go on from, a folder or a name on the Hub, instead of a [model] table and fresh weights; its "
        "tokenizer is the data's, unless data.tokenizer names one",
    )
    accumulation_steps: int = _key(
        1,
        "micro-batches that a step's rows are cut into, to save memory: one step of the optimizer, with the loss and "
        "the gradient of all rows together. Of the balance losses, pooled becomes the mean over micro-batches, as in "
        "transformers; global_batch stays exact, for one more pass through the layers",
    )
    nonfinite: str = _key(
        "stop", "where the loss or the gradient is no finite number, that step changes nothing: stop there, or skip it"
    )
    max_skipped: int = _key(10, "skip: more such steps than this since the start, and the run stops after all")
    log_every: int = _key(
        10, "steps between two progress lines, and between two records of what every expert was given"
    )
    eval_every: int = _key(100, "steps between two looks at the held-out loss")
    checkpoint_every: int = _key(200, "steps between two checkpoints; the last step always has one")
    keep_checkpoints: int = _key(2, "of them, the newest so many stay on disk")
    sample_prompt: str = _key("def", "the model continues this text, now and then and in the end")
    sample_tokens: int = _key(96, "how many tokens it adds")
    sample_every: int | None = _key(
        None, "steps between two such samples; left out, with every held-out loss; 0: only in the end"
    )
    export: bool = _key(
        True,
        "write hub/, for transformers, in the end; adapters are added to its weights, and always written to adapter/",
    )
    tensorboard: bool = _key(False, "write TensorBoard's events to tensorboard/ as well (extra `tensorboard`)")
    profile: str = _key("", "first:end, as 10:13 for steps 10, 11 and 12: write jax's trace of them to profile/")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run, whole. `model` is a Hub `config.json` as a table; every other field is a section of typed keys."""

    model: dict[str, Any]
    mesh: MeshConfig = MeshConfig()
    execution: ExecutionSettings = ExecutionSettings()
    sharding: ShardingSettings = ShardingSettings()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraSettings = LoraSettings()
    run: RunConfig = RunConfig()


SECTIONS: dict[str, type] = {
    "mesh": MeshConfig,
    "execution": ExecutionSettings,
    "sharding": ShardingSettings,
    "data": DataConfig,
    "loss": LossConfig,
    "optimizer": OptimizerConfig,
    "lora": LoraSettings,
    "run": RunConfig,
}


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """Reads a TOML file and lays `--section.key value` words over it.

    Args:
        path: the TOML file.
        overrides: `["--run.steps=20", "--mesh.expert=4"]`, as `split_overrides` gives them.

    Raises:
        ConfigError: the file is missing or no TOML; a section or key is unknown; a value has the wrong type or is out
          of range. The message names the file and the key, what was found and what was expected.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        near = sorted(str(other) for other in path.parent.glob("*.toml"))
        _refuse(f"{path}: there is no such file." + (f" In that folder: {', '.join(near)}." if near else ""))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        _refuse(f"{path}: this is no TOML: {error}.")
    return build_config(tables, overrides or [], source=str(path))


def build_config(tables: dict[str, Any], overrides: list[str], source: str) -> TrainConfig:
    """`load_config` on tables that were read already; `source` is named in messages. Raises ConfigError as it does."""
    for name, table in tables.items():
        if name != "model" and name not in SECTIONS:
            _unknown(f"{source}: unknown section [{name}]", name, ["model", *SECTIONS])
        if not isinstance(table, dict):
            _refuse(f"{source}: {name} should be a section, [{name}], and is {_describe(table)}.")
    # One flat table of (section, key) → value: the file's, then the command line's on top of it.
    values = {
        (name, key): (value, f"{source}: {name}.{key}")
        for name, table in tables.items()
        for key, value in table.items()
    }
    for override in overrides:
        where, _, word = override.partition("=")
        name, _, key = where.removeprefix("--").partition(".")
        if name == "model":
            values[name, key] = (_override_model(tables.get("model", {}), key, word, where), where)
        elif name in SECTIONS:
            values[name, key] = (_from_word(word, _field_types(name).get(key)), where)
        else:
            _unknown(f"{where}: unknown section [{name}]", name, ["model", *SECTIONS])

    sections: dict[str, dict[str, Any]] = {name: {} for name in ["model", *SECTIONS]}
    for (name, key), (value, where) in values.items():
        if name != "model":
            value = _check_type(value, name, key, where)
        sections[name][key] = value
    model = sections.pop("model")
    config = TrainConfig(model=model, **{name: SECTIONS[name](**keys) for name, keys in sections.items()})
    init_from = config.run.init_from
    if bool(model) == bool(init_from):
        found = "both a [model] table and run.init_from" if model else "neither a [model] table nor run.init_from"
        _refuse(
            f"{source}: found {found}, expected one of them: the keys of a Hub config.json, model_type first, or a "
            "checkpoint to begin with, whose config it is then."
        )
    if init_from and not config.data.tokenizer:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=init_from))
    _check_values(config, source)
    return config


def differences(old: TrainConfig, new: TrainConfig, sections: tuple[str, ...]) -> list[str]:
    """The keys of these sections that two configs disagree about, each as `section.key: old → new`."""
    lines = []
    for name in sections:
        before, after = _as_table(getattr(old, name)), _as_table(getattr(new, name))
        for key in [*before, *(key for key in after if key not in before)]:
            if before.get(key) != after.get(key):
                lines.append(f"{name}.{key}: {before.get(key)!r} → {after.get(key)!r}")
    return lines


def to_toml(config: TrainConfig) -> str:
    """The whole config, defaults included, as TOML that `load_config` reads back to an equal config."""
    parts = []
    for name in ["model", *SECTIONS]:
        table = {key: value for key, value in _as_table(getattr(config, name)).items() if value is not None}
        parts.append("\n".join([f"[{name}]", *(f"{key} = {_toml_value(value)}" for key, value in table.items())]))
    return "\n\n".join(parts) + "\n"


def profile_steps(text: str, source: str = "run") -> range:
    """The steps, counted from 1, that `run.profile` asks a trace of; none if it is empty.

    Raises:
        ConfigError: it is no `first:end`, or there are no steps in it. `source` is named in the message.
    """
    if not text:
        return range(0)
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and 1 <= int(first) < int(end)):
        _refuse(f"{source}: run.profile: found {text!r}, expected first:end, as 10:13 for steps 10, 11 and 12.")
    return range(int(first), int(end))


def describe_keys() -> str:
    """Every typed key with its type, default and meaning: the second half of `--help`."""
    lines = ["[model] takes the keys of a Hub config.json; --model.KEY VALUE changes one that the file sets."]
    for name, section in SECTIONS.items():
        lines.append("")
        for field in dataclasses.fields(section):
            default = "optional" if field.default is None else f"default {_toml_value(field.default)}"
            kind = "tables" if field.name == "sources" else _type_name(_given_type(field))
            lines.append(f"  --{name}.{field.name} {kind.upper()}  ({default})")
            lines.append(f"        {field.metadata['meaning']}")
    return "\n".join(lines)


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Takes the `--section.key value` words out of a command line.

    Returns:
        the overrides, each as one word `--section.key=value`, and all other words, both in their order.

    Raises:
        ConfigError: a value is missing.
    """
    overrides, others = [], []
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if not (option.startswith("--") and "." in option):
            others.append(word)
            continue
        if not equals:
            value = next(rest, None)
            if value is None:
                _refuse(f"{option}: a value should follow.")
        overrides.append(f"{option}={value}")
    return overrides, others


def _from_word(word: str, kind: type | None) -> Any:
    """A command line word as the type that its key has; left as it is, for `_check_type` to refuse, if it cannot be."""
    if kind is str or kind is None:
        return word
    try:
        value = tomllib.loads(f"value = {word}")["value"]
    except tomllib.TOMLDecodeError:
        return word
    return value


def _override_model(table: dict[str, Any], key: str, word: str, where: str) -> Any:
    # A Hub config may hold many keys that no list here knows. Only the ones that the file sets can be changed from the
    # command line, so that a slip of the finger cannot pass as a new key.
    if key not in table:
        _unknown(f"{where}: the file's [model] table does not set this key", key, list(table), "keys it sets")
    old = table[key]
    new = _from_word(word, type(old))
    if type(new) is not type(old) and not (type(old) is float and type(new) is int):
        _refuse(f"{where}: found {_describe(new)}, expected {_type_name(type(old))} as in the file ({old!r}).")
    return type(old)(new)


def _field_types(section: str) -> dict[str, type]:
    return {field.name: _given_type(field) for field in dataclasses.fields(SECTIONS[section])}


def _given_type(field: dataclasses.Field) -> type:
    """What a value has to be if there is one: TOML knows no None, a key that is None is left out."""
    optional = type(None) in get_args(field.type)
    kind = next(kind for kind in get_args(field.type) if kind is not type(None)) if optional else field.type
    return get_origin(kind) or kind


def _check_type(value: Any, section: str, key: str, where: str) -> Any:
    types = _field_types(section)
    if key not in types:
        _unknown(f"{where}: unknown key", key, list(types))
    return _check_sources(value, where) if key == "sources" else _as_type(value, types[key], where)


def _check_sources(value: Any, where: str) -> tuple[SourceConfig, ...]:
    if not isinstance(value, list) or not all(isinstance(table, dict) for table in value):
        _refuse(f"{where}: found {_describe(value)}, expected tables, each headed [[{where.split(': ')[-1]}]].")
    types = {field.name: _given_type(field) for field in dataclasses.fields(SourceConfig)}
    sources = []
    for number, table in enumerate(value, start=1):
        for key in table:
            if key not in types:
                _unknown(f"{where}, number {number}: unknown key {key!r}", key, list(types))
        checked = {key: _as_type(item, types[key], f"{where}, number {number}: {key}") for key, item in table.items()}
        sources.append(SourceConfig(**checked))
    return tuple(sources)


def _as_type(value: Any, expected: type, where: str) -> Any:
    if expected is float and type(value) is int:
        return float(value)
    if expected is tuple and type(value) is list and all(type(item) is str for item in value):
        return tuple(value)
    if type(value) is not expected:
        _refuse(f"{where}: found {_describe(value)}, expected {_type_name(expected)}.")
    return value


def _check_values(config: TrainConfig, source: str) -> None:
    data, run, optimizer, mesh, loss = config.data, config.run, config.optimizer, config.mesh, config.loss
    at_least_one = {
        **{f"mesh.{axis}": getattr(mesh, axis) for axis in ("data", "fsdp", "expert", "tensor")},
        **{f"data.{key}": getattr(data, key) for key in ("batch_size", "heldout_rows")},
        **{
            f"run.{key}": getattr(run, key)
            for key in (
                "steps",
                "accumulation_steps",
                "log_every",
                "eval_every",
                "checkpoint_every",
                "keep_checkpoints",
                "sample_tokens",
            )
        },
    }
    for key, value in at_least_one.items():
        if value < 1:
            _refuse(f"{source}: {key}: found {value}, expected at least 1.")
    above_zero = {
        "data.megabytes": data.megabytes,
        "optimizer.learning_rate": optimizer.learning_rate,
        "optimizer.clip_norm": optimizer.clip_norm,
    }
    for key, value in above_zero.items():
        if not value > 0:
            _refuse(f"{source}: {key}: found {value}, expected more than 0.")
    not_negative = {
        "loss.balance_coef": loss.balance_coef or 0.0,
        "loss.z_coef": loss.z_coef,
        "loss.router_z_coef": loss.router_z_coef,
        "loss.balancing_bias_rate": loss.balancing_bias_rate,
        "run.max_skipped": run.max_skipped,
        "run.sample_every": run.sample_every or 0,
    }
    for key, value in not_negative.items():
        if not value >= 0:
            _refuse(f"{source}: {key}: found {value}, expected 0 or more.")
    if config.lora.r < 0:
        _refuse(f"{source}: lora.r: found {config.lora.r}, expected a rank of 1 or more, or 0 for no adapters.")
    if config.lora.r and (optimizer.frozen or loss.balancing_bias_rate):
        key = "optimizer.frozen" if optimizer.frozen else "loss.balancing_bias_rate"
        _refuse(f"{source}: {key}: with lora.r above 0 nothing but the adapters changes. Leave one of the two out.")
    if loss.balance not in BALANCE_LOSSES:
        _unknown(f"{source}: loss.balance: found {loss.balance!r}, no balance loss", loss.balance, [*BALANCE_LOSSES])
    if optimizer.schedule not in SCHEDULES:
        _unknown(f"{source}: optimizer.schedule: found {optimizer.schedule!r}", optimizer.schedule, [*SCHEDULES])
    if (optimizer.schedule == "wsd") != (optimizer.decay_steps is not None):
        _refuse(
            f"{source}: optimizer.decay_steps: found {optimizer.decay_steps} with schedule = {optimizer.schedule!r}: "
            'it belongs to "wsd", which needs it, and to no other.'
        )
    if optimizer.decay_steps is not None and not 1 <= optimizer.decay_steps <= run.steps - optimizer.warmup_steps:
        _refuse(
            f"{source}: optimizer.decay_steps: found {optimizer.decay_steps}, expected at least 1 and no more than "
            f"run.steps - optimizer.warmup_steps ({run.steps - optimizer.warmup_steps})."
        )
    if optimizer.moment_dtype not in (None, "float32", "bfloat16"):
        known = ["float32", "bfloat16"]
        _unknown(f"{source}: optimizer.moment_dtype: found {optimizer.moment_dtype!r}", optimizer.moment_dtype, known)
    if run.nonfinite not in ("stop", "skip"):
        _unknown(f"{source}: run.nonfinite: found {run.nonfinite!r}", run.nonfinite, ["stop", "skip"])
    if loss.balancing_bias_rate > 0 and run.export:
        _refuse(
            f"{source}: loss.balancing_bias_rate: found {loss.balancing_bias_rate} together with run.export = true: a "
            "Hub folder cannot hold a balancing bias. Set run.export to false (the checkpoints hold the model), or the "
            "rate to 0."
        )
    if loss.balancing_bias_rate > 0 and run.init_from:
        _refuse(
            f"{source}: loss.balancing_bias_rate: found {loss.balancing_bias_rate} together with run.init_from: the "
            "routers of a Hub checkpoint have no bias to move. Leave one of them out."
        )
    if not 0 < data.heldout_fraction < 1:
        _refuse(f"{source}: data.heldout_fraction: found {data.heldout_fraction}, expected between 0 and 1.")
    if data.seq_len < 2:
        _refuse(f"{source}: data.seq_len: found {data.seq_len}, expected at least 2, a token and the one after it.")
    if data.vocab_size < 259:
        _refuse(
            f"{source}: data.vocab_size: found {data.vocab_size}, expected at least 259: all bytes, the end of a text, "
            "and the two marks around a message."
        )
    if not run.sample_prompt:
        _refuse(f"{source}: run.sample_prompt: found an empty text, expected at least one character to go on from.")
    profile_steps(run.profile, source)
    if not 0 <= optimizer.warmup_steps < run.steps:
        _refuse(
            f"{source}: optimizer.warmup_steps: found {optimizer.warmup_steps}, expected 0 or more and fewer than "
            f"run.steps ({run.steps})."
        )
    if data.batch_size % mesh.batch_shards:
        _refuse(
            f"{source}: data.batch_size: found {data.batch_size}, expected a multiple of {mesh.batch_shards}, the "
            f"mesh's data x fsdp x expert ({mesh.data} x {mesh.fsdp} x {mesh.expert}), which share the rows evenly."
        )
    if data.batch_size % (mesh.batch_shards * run.accumulation_steps):
        _refuse(
            f"{source}: run.accumulation_steps: found {run.accumulation_steps}, expected a divisor of "
            f"{data.batch_size // mesh.batch_shards}, the rows of data.batch_size ({data.batch_size}) that each of the "
            f"mesh's data x fsdp x expert ({mesh.batch_shards}) has."
        )
    _check_mixture(data, source)
    if not data.tokenizer and config.model.get("vocab_size", data.vocab_size) != data.vocab_size:
        _refuse(
            f"{source}: model.vocab_size: found {config.model['vocab_size']}, expected it to be left out: the "
            f"tokenizer decides it, and data.vocab_size is {data.vocab_size}."
        )


def _check_mixture(data: DataConfig, source: str) -> None:
    own = [field.name for field in dataclasses.fields(TextConfig) if getattr(data, field.name) != field.default]
    if data.sources and own:
        _refuse(
            f"{source}: data.{own[0]}: found together with data.sources, expected one of the two. Give each source of "
            f"the mixture its own {own[0]}."
        )
    for number, one in enumerate(data.mixture, start=1):
        where = f"{source}: data.sources, number {number}: " if data.sources else f"{source}: data."
        if one.format not in FORMATS:
            _unknown(f"{where}format: found {one.format!r}, no format", one.format, list(FORMATS))
        if not 0 < one.weight < math.inf:
            _refuse(f"{where}weight: found {one.weight}, expected a number above 0.")
        if one.format not in ("text", "docstrings") and not one.folder:
            _refuse(f"{where}folder: found none, expected the file or folder to read as {one.format}.")
        if one.format == "tokens" and not data.tokenizer:
            _refuse(f"{where}format: token ids mean nothing without their tokenizer: name it in data.tokenizer.")


def _as_table(section: Any) -> dict[str, Any]:
    return section if isinstance(section, dict) else dataclasses.asdict(section)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A TOML basic string knows these escapes and wants every control character escaped.
        short = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
        return '"' + "".join(short.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in value) + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        given = {key: item for key, item in value.items() if item is not None}
        return "{" + ", ".join(f"{_toml_value(key)} = {_toml_value(item)}" for key, item in given.items()) + "}"
    return repr(value)


def _type_name(kind: type) -> str:
    names = {bool: "true or false", int: "integer", float: "number", str: "string", tuple: "list of strings"}
    return names.get(kind, kind.__name__)


def _describe(value: Any) -> str:
    return f"{value!r} ({_type_name(type(value))})"


def _unknown(message: str, name: str, known: list[str], title: str = "known") -> NoReturn:
    near = difflib.get_close_matches(name, known, n=1)
    _refuse(f"{message}; " + (f"did you mean {near[0]!r}? " if near else "") + f"{title}: {', '.join(known)}.")


def _refuse(message: str) -> NoReturn:
    from qwen_moe_jax.errors import ConfigError  # only when it is needed: the package may import jax

    raise ConfigError(message) from None
