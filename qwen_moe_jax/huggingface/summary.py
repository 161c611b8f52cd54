"""A table of a checkpoint's parameters, from headers or from a config.json; no weights are read."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen_moe_jax.config import LayerKind, ModelConfig
from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.huggingface.checkpoint import MTP, Checkpoint, head_of, non_finite, open_checkpoint, problems_of
from qwen_moe_jax.huggingface.config import read_config
from qwen_moe_jax.huggingface.fields import read_json
from qwen_moe_jax.huggingface.files import Files
from qwen_moe_jax.huggingface.hub import hub_model, is_hub_name, local_folder
from qwen_moe_jax.huggingface.linear_rows import in_published_order, published_name
from qwen_moe_jax.huggingface.quantised.dequantise import Dequantised
from qwen_moe_jax.huggingface.remote import header_folder, remote_files
from qwen_moe_jax.huggingface.tensors import HubParameter, hub_parameters, natural_order
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.storage.progress import bytes_bar
from qwen_moe_jax.storage.tensor import PickedRows, StoredTensor, TensorSlice, nbytes


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
        parameters, active_parameters: of the model without its next-token head; those that one token uses.
        mtp_parameters: of the next-token head, embedding and output head aside; 0 without one.
        rows: in the order of the layers.
        tensors: (name, shape) of every tensor of the model, in the same order.
        ignored: names of tensors that no forward pass reads.
        problems: why it does not load, a line each.
        fetched: bytes of the model's files that were fetched for it from the Hub; None if its files were local.
    """

    where: str
    form: str
    model_type: str
    head: str
    layers: str
    parameters: int
    active_parameters: int
    mtp_parameters: int
    rows: tuple[Row, ...]
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    ignored: tuple[str, ...]
    problems: tuple[str, ...]
    fetched: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in the files."""
        return sum(row.nbytes for row in self.rows)


def summarize(source: str | PathLike[str], *, check_finite: bool = False) -> Summary:
    """Summarises a checkpoint without reading its weights.

    Args:
        source: a folder, a config.json, or a name on the Hub, of whose safetensors the headers are fetched.
        check_finite: reads the weights, too, and reports tensors with infinities or NaN as problems; those of a name on
            the Hub are downloaded.

    Raises:
        ConfigError: config.json is missing or not supported.
        CheckpointError: no such folder.
    """
    path = Path(source)
    if path.is_file():
        return _of_config(path)
    if not path.exists() and is_hub_name(str(source)) and not check_finite:
        model = hub_model(source)
        folder = header_folder(model)
        if (found := remote_files(model, folder)) is not None:
            return dataclasses.replace(_of_files(folder, found[0]), where=str(model), fetched=found[1])
    folder = local_folder(source)
    return _of_files(folder, check_finite=check_finite)


def _of_files(folder: Path, files: Files | None = None, *, check_finite: bool = False) -> Summary:
    """Of a folder, with its own files or these."""
    try:
        checkpoint = open_checkpoint(folder, files=files)
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
    own = hub_parameters(model)
    parameters = sorted(_published(own, config), key=lambda parameter: natural_order(str(parameter.names.flat[0])))
    named = [(str(name), parameter.tensor_shape) for parameter in parameters for name in parameter.names.flat]
    tensors = {} if checkpoint is None else in_published_order(checkpoint.tensors, config)
    head = [parameter for parameter in own if parameter.path.startswith(MTP)]
    trunk = [parameter for parameter in own if not parameter.path.startswith(MTP)]
    return Summary(
        where=where,
        form=form,
        model_type=config.model_type,
        head=type(model).__name__,
        layers=_layers(config),
        parameters=sum(parameter.leaf.size for parameter in trunk),
        active_parameters=sum(_active(parameter, config) for parameter in trunk),
        mtp_parameters=sum(parameter.leaf.size for parameter in head),
        rows=tuple(_row(parameter, None if checkpoint is None else tensors) for parameter in parameters),
        tensors=tuple(sorted(named, key=lambda entry: natural_order(entry[0]))),
        ignored=() if checkpoint is None else checkpoint.ignored,
        problems=tuple(problems),
    )


def _published(parameters: list[HubParameter], config: ModelConfig) -> list[HubParameter]:
    """The parameters as a table of the family's files has them.

    Several of one matrix of the files are one, and those of one name and shape in all layers of a kind are one.
    """
    found: dict[str, HubParameter] = {}
    for parameter in parameters:
        names = np.array([published_name(str(name), config) for name in parameter.names.flat], object)
        names = names.reshape(parameter.names.shape)
        first = str(names.flat[0])
        joined = _joined([*([found[first]] if first in found else []), parameter], parameter.names.ndim)
        found[first] = dataclasses.replace(joined, names=names)
    kinds: dict[Any, list[HubParameter]] = {}
    for first, parameter in found.items():
        layer = re.match(r"model\.layers\.(\d+)\.(.+)", first)
        key = (layer[2], config.layers[int(layer[1])], parameter.tensor_shape) if layer else first
        kinds.setdefault(key, []).append(parameter)
    return [
        dataclasses.replace(_joined(same, 0), names=np.concatenate([parameter.names for parameter in same]))
        if len(same) > 1
        else same[0]
        for same in kinds.values()
    ]


def _joined(parameters: list[HubParameter], axis: int) -> HubParameter:
    """Abstract parameters, one after the other along an axis, under the names of the first."""
    first = parameters[0]
    shape = list(first.leaf.shape)
    shape[axis : axis + 1] = [sum(parameter.leaf.shape[axis] for parameter in parameters)] if shape else []
    leaf = jax.ShapeDtypeStruct(tuple(shape), first.leaf.dtype)
    return HubParameter(first.path, leaf, leaf.shape, first.names)


def _active(parameter: HubParameter, config: ModelConfig) -> int:
    if parameter.names.ndim < 2:  # not of routed experts
        return parameter.leaf.size
    return parameter.leaf.size // config.moe.num_experts * config.moe.num_experts_per_tok


def _row(parameter: HubParameter, tensors: Mapping[str, StoredTensor] | None) -> Row:
    """A row of the table; `tensors` are those of the checkpoint, None of a config alone."""
    names = [str(name) for name in parameter.names.flat]
    if tensors is None:
        dtypes = {str(parameter.leaf.dtype)}
        size = nbytes(parameter.leaf.shape, str(parameter.leaf.dtype))
    else:
        stored = [(tensors[name].shape, *_stored(tensors[name])) for name in names if name in tensors]
        dtypes, size = {dtype for _, dtype, _ in stored}, sum(math.prod(shape) * bits // 8 for shape, _, bits in stored)
    return Row(
        names=_pattern(parameter.names),
        shape=parameter.tensor_shape,
        count=len(names),
        dtype=", ".join(sorted(dtypes)),
        parameters=parameter.leaf.size,
        nbytes=size,
    )


def _stored(tensor: StoredTensor) -> tuple[str, int]:
    """The dtype in the file, and its bits: those of the codes of a quantised tensor, or of the part that is sliced."""
    if isinstance(tensor, PickedRows):
        return _stored(tensor.runs[0][0])
    if isinstance(tensor, TensorSlice):
        return _stored(tensor.tensor)
    if isinstance(tensor, Dequantised):
        return tensor.stored_dtype, tensor.stored_bits
    return tensor.dtype, 8 * np.dtype(tensor.dtype).itemsize


def _pattern(names: np.ndarray) -> str:
    """One name for all: the numbers of layers and experts, where there are several, in braces."""
    pattern = str(names.flat[0])
    for word in ("layers", "experts"):
        numbers = sorted({int(found[1]) for name in names.flat if (found := re.search(rf"\b{word}\.(\d+)\.", name))})
        if len(numbers) > 1:
            pattern = re.sub(rf"\b{word}\.\d+\.", f"{word}.{{{_ranges(numbers)}}}.", pattern, count=1)
    return pattern


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as 0-2,5; every other one as 0,2,…,46; three of four as 0-2,4-6,…,44-46."""
    first = [number for number in numbers if number - 1 not in numbers]
    last = [number for number in numbers if number + 1 not in numbers]
    runs = [f"{start}-{stop}" if stop > start else str(start) for start, stop in zip(first, last, strict=True)]
    is_periodic = len(set(np.diff(first))) == len({*np.subtract(last, first)}) == 1
    return ",".join([*runs[:2], "…", runs[-1]] if is_periodic and len(runs) > 3 else runs)


def _layers(config: ModelConfig) -> str:
    def describe(kind: LayerKind) -> str:
        attention = "gated full attention" if config.attention.output_gate else "full attention"
        if kind.mixer == "sliding":
            attention = f"attention over {config.attention.sliding_window:,} tokens"
        if kind.mixer == "linear":
            attention = "gated delta rule"
        if kind.mlp == "dense":
            return f"dense, {attention}"
        shared = ", one shared" if config.moe.shared_expert_intermediate_size else ""
        return f"{config.moe.num_experts} experts, {config.moe.num_experts_per_tok} a token{shared}, {attention}"

    kinds = dict.fromkeys(config.layers)
    counted = [(sum(layer == kind for layer in config.layers), describe(kind)) for kind in kinds]
    return "; ".join(f"{count} layers: {text}" if count > 1 else f"1 layer: {text}" for count, text in counted)
