"""A table of a checkpoint's parameters, from headers or from a config.json; no weights are read."""

import dataclasses
import re
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import numpy as np

from qwen_moe_jax.config import LayerKind, ModelConfig
from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.huggingface.checkpoint import Checkpoint, head_of, non_finite, open_checkpoint, problems_of
from qwen_moe_jax.huggingface.config import read_config
from qwen_moe_jax.huggingface.fields import read_json
from qwen_moe_jax.huggingface.hub import local_folder
from qwen_moe_jax.huggingface.quantisation import DequantizedTensor
from qwen_moe_jax.huggingface.tensors import HubParameter, hub_parameters, natural_order
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.storage.progress import bytes_bar
from qwen_moe_jax.storage.tensor import StoredTensor, nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Tensors of one kind.

    Attributes:
        names: their Hub names, with ranges of numbers in braces: `model.layers.{0-47}.input_layernorm.weight`.
        shape: of each.
        count: number of tensors.
        dtype: in the file, several joined by a comma; of a config.json alone, its dtype.
        parameters: in all of them.
        nbytes: in the file.
    """

    names: str
    shape: tuple[int, ...]
    count: int
    dtype: str
    parameters: int
    nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """A checkpoint without its weights.

    Attributes:
        where: the folder, or the config.json.
        form: "Hub folder", "native folder" or "config alone".
        model_type, head: family and class.
        layers: kinds of the layers, a line.
        parameters, active_parameters: of the model; those that one token uses.
        rows: in the order of the layers.
        tensors: (name, shape) of every tensor of the model, in the same order.
        ignored: names of tensors that no forward pass reads.
        problems: why it does not load, a line each.
    """

    where: str
    form: str
    model_type: str
    head: str
    layers: str
    parameters: int
    active_parameters: int
    rows: tuple[Row, ...]
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    ignored: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in the files."""
        return sum(row.nbytes for row in self.rows)


def summarize(source: str | PathLike[str], *, check_finite: bool = False) -> Summary:
    """Summarises a checkpoint without reading its weights.

    Args:
        source: a folder, a config.json, or a name on the Hub, which is downloaded if it is not cached.
        check_finite: reads the weights, too, and reports tensors with infinities or NaN as problems.

    Raises:
        ConfigError: config.json is missing or not supported.
        CheckpointError: no such folder.
    """
    path = Path(source)
    if path.is_file():
        return _of_config(path)
    folder = local_folder(source)
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:  # without weights, the config is still summarised
        return dataclasses.replace(_of_config(folder / "config.json"), where=str(folder), problems=(str(error),))
    model = checkpoint.head(checkpoint.config, rngs=None)
    problems = problems_of(checkpoint, hub_parameters(model))
    if check_finite:
        size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        with bytes_bar(f"Checking {folder.name}", size) as advance:
            problems += non_finite(checkpoint.tensors, advance)
    form = "native folder" if checkpoint.native else "Hub folder"
    return _summary(str(folder), form, model, checkpoint, problems)


def _of_config(path: Path) -> Summary:
    config = read_config(path)
    return _summary(str(path), "config alone", head_of(read_json(path))(config, rngs=None), None, [])


def _summary(where: str, form: str, model: Model, checkpoint: Checkpoint | None, problems: Iterable[str]) -> Summary:
    config = model.config
    parameters = sorted(hub_parameters(model), key=lambda parameter: natural_order(str(parameter.names.flat[0])))
    named = [(str(name), parameter.tensor_shape) for parameter in parameters for name in parameter.names.flat]
    return Summary(
        where=where,
        form=form,
        model_type=config.model_type,
        head=type(model).__name__,
        layers=_layers(config),
        parameters=sum(parameter.leaf.size for parameter in parameters),
        active_parameters=sum(_active(parameter, config) for parameter in parameters),
        rows=tuple(_row(parameter, checkpoint) for parameter in parameters),
        tensors=tuple(sorted(named, key=lambda entry: natural_order(entry[0]))),
        ignored=() if checkpoint is None else checkpoint.ignored,
        problems=tuple(problems),
    )


def _active(parameter: HubParameter, config: ModelConfig) -> int:
    if parameter.names.ndim < 2:  # not of routed experts
        return parameter.leaf.size
    return parameter.leaf.size // config.moe.num_experts * config.moe.num_experts_per_tok


def _row(parameter: HubParameter, checkpoint: Checkpoint | None) -> Row:
    names = [str(name) for name in parameter.names.flat]
    stored = [] if checkpoint is None else [checkpoint.tensors[name] for name in names if name in checkpoint.tensors]
    if checkpoint is None:
        dtypes = {str(parameter.leaf.dtype)}
        size = nbytes(parameter.leaf.shape, str(parameter.leaf.dtype))
    else:
        dtypes, size = {_stored(tensor).dtype for tensor in stored}, sum(_stored(tensor).nbytes for tensor in stored)
    return Row(
        names=_pattern(parameter.names),
        shape=parameter.tensor_shape,
        count=len(names),
        dtype=", ".join(sorted(dtypes)),
        parameters=parameter.leaf.size,
        nbytes=size,
    )


def _stored(tensor: StoredTensor) -> StoredTensor:
    """The tensor as stored: float8 of a dequantised one."""
    return tensor.weight if isinstance(tensor, DequantizedTensor) else tensor


def _pattern(names: np.ndarray) -> str:
    """One name for all: the numbers of layers and experts, where there are several, in braces."""
    pattern = str(names.flat[0])
    for word in ("layers", "experts"):
        numbers = sorted({int(found[1]) for name in names.flat if (found := re.search(rf"\b{word}\.(\d+)\.", name))})
        if len(numbers) > 1:
            pattern = re.sub(rf"\b{word}\.\d+\.", f"{word}.{{{_ranges(numbers)}}}.", pattern, count=1)
    return pattern


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as 0-2,5; every other one as 0,2,…,46."""
    steps = {after - before for before, after in zip(numbers, numbers[1:], strict=False)}
    if steps == {1}:
        return f"{numbers[0]}-{numbers[-1]}"
    if len(steps) == 1 and len(numbers) > 3:
        return f"{numbers[0]},{numbers[1]},…,{numbers[-1]}"
    return ",".join(map(str, numbers))


def _layers(config: ModelConfig) -> str:
    def describe(kind: LayerKind) -> str:
        attention = "full attention"
        if kind.mixer == "sliding":
            attention = f"attention over {config.attention.sliding_window:,} tokens"
        if kind.mlp == "dense":
            return f"dense, {attention}"
        shared = ", one shared" if config.moe.shared_expert_intermediate_size else ""
        return f"{config.moe.num_experts} experts, {config.moe.num_experts_per_tok} a token{shared}, {attention}"

    kinds = dict.fromkeys(config.layers)
    counted = [(sum(layer == kind for layer in config.layers), describe(kind)) for kind in kinds]
    return "; ".join(f"{count} layers: {text}" if count > 1 else f"1 layer: {text}" for count, text in counted)
