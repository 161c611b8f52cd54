"""Low-rank adapters in PEFT's layout: a folder with adapter_config.json and adapter_model.safetensors (or .bin).

`adapter_layouts` says how PEFT names and stacks the tensors, `adapter_export` how they are written. One rule holds for
adapters that are loaded next to the weights and for those that are merged into them: every matrix gets the adapter that
PEFT would give it, or the folder is refused.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import jax
import numpy as np

from qwen_moe_jax.config import LoraConfig, ModelConfig
from qwen_moe_jax.errors import CheckpointError, ConfigError
from qwen_moe_jax.huggingface.adapter_config import CONFIG, AdapterConfig, read_adapter_config
from qwen_moe_jax.huggingface.adapter_export import ExpertLayout, adapter_files
from qwen_moe_jax.huggingface.adapter_layouts import LowRank, low_rank_pairs
from qwen_moe_jax.huggingface.adapter_rows import in_model_rows
from qwen_moe_jax.huggingface.checkpoint import Checkpoint, stacked_tensor
from qwen_moe_jax.huggingface.generation_config import read_generation_config
from qwen_moe_jax.huggingface.hub import adapter_folder
from qwen_moe_jax.huggingface.layouts import EMBEDDING, HEAD, equal
from qwen_moe_jax.huggingface.low_bit import float_parameters
from qwen_moe_jax.huggingface.save import readable_tensors, write_configs
from qwen_moe_jax.huggingface.target import checkpoint_folder, is_companion
from qwen_moe_jax.huggingface.tensors import HubParameter, hub_parameters
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.model.lora import add_lora, is_adapter, matrices
from qwen_moe_jax.sharding.distributed import is_process_zero
from qwen_moe_jax.storage.arrays import ArrayTensor, read_arrays, write_arrays
from qwen_moe_jax.storage.placement import DeviceTensor, local_bytes, place
from qwen_moe_jax.storage.progress import bytes_bar
from qwen_moe_jax.storage.tensor import CastTensor, Index, StoredTensor, TensorSlice, ZeroPaddedTensor
from qwen_moe_jax.storage.torch_file import open_torch_file

TENSORS, TORCH_TENSORS = "adapter_model.safetensors", "adapter_model.bin"
_LISTED = 20


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An opened adapter folder.

    Attributes:
        folder: the folder.
        config: ranks and scalings.
        pairs: adapters by the name of their matrix in `hub_parameters`, as "model.layers.0.self_attn.q_proj.weight".
        bases: weights of embeddings that PEFT saved along with their adapters, by the same names.
        source: file name of the tensors, for messages.
    """

    folder: Path
    config: AdapterConfig
    pairs: Mapping[str, LowRank]
    bases: Mapping[str, np.ndarray]
    source: str


def save_adapter(
    model: Model, folder: str | PathLike[str], *, base: str = "", experts: ExpertLayout | None = None
) -> None:
    """Writes a model's adapters without its weights. Under several processes all call it.

    Args:
        model: with adapters (`add_lora`).
        folder: to write, under a temporary name first. Other files in it (a tokenizer) are kept; those that are no
            tokenizer, template or licence are named on stderr.
        base: name or folder of the checkpoint that they were trained on, for `base_model_name_or_path`.
        experts: "separate" is a pair (A, B) per expert, as transformers 4 and vLLM name them; PEFT over transformers 5
            converts it for Mixtral and Qwen3-MoE, where all three matrices have adapters, and else drops it. "fused" is
            a pair for all experts of a layer, what PEFT itself writes since 0.18. None is "separate" where PEFT
            converts it, and else "fused".

    Raises:
        ConfigError: the model has no adapters; with "fused", only one of gate_proj and up_proj has them.
        CheckpointError: `folder` is a file, a mount point or a folder of other files.
    """
    if model.lora is None:
        raise ConfigError(
            "the model has no low-rank adapters: add_lora gives it some, save_pretrained saves the model."
        )
    model.require_weights()
    parameters = [parameter for parameter in hub_parameters(model) if is_adapter(parameter.path)]
    target = checkpoint_folder(Path(folder), stale=_is_stale, expected=_is_expected)
    with target as new, readable_tensors(parameters, scratch=new) as tensors:
        if is_process_zero():
            arrays = {name: tensor.read() for name, tensor in tensors.items()}
            config, named = adapter_files(model, arrays, base=base, experts=experts)
            write_configs(new, {CONFIG: config})
            write_arrays(new / TENSORS, named)


def load_adapter(model: Model, folder: str | PathLike[str]) -> None:
    """Adds the adapters of a folder to a model; float32, sharded as the matrices they belong to.

    The layers of a matrix share one array, so that layers without an adapter, and ranks below the largest, are filled
    with zeros. They stay zero in training: their gradients are. A generation_config.json in the folder, with the
    stop tokens that they were trained with, replaces the model's.

    Args:
        model: with weights, without adapters.
        folder: as `save_adapter` and PEFT write it; or a name on the Hub.

    Raises:
        ConfigError: the adapter is of another kind, or the model has adapters already.
        CheckpointError: the tensors do not fit this model; all problems in one message.
    """
    adapter = open_adapter(folder, model.config)
    parameters = {parameter.path: parameter for parameter in hub_parameters(model)}
    weights = {
        str(name): TensorSlice(DeviceTensor(parameter.leaf), parameter.window(index))
        for parameter in float_parameters([*parameters.values()])
        for index, name in np.ndenumerate(parameter.names)
    }
    _require_fit(adapter, weights, model.config)
    found: dict[str, list[LowRank]] = {}
    for matrix in matrices(model):
        names = parameters[matrix.parameter_path].names.flat
        found.setdefault(matrix.path, []).extend(adapter.pairs[name] for name in names if name in adapter.pairs)
    config = _lora_config(adapter.config, {path: pairs for path, pairs in found.items() if pairs})
    add_lora(model, config, rngs=None)
    wanted = [parameter for parameter in hub_parameters(model) if is_adapter(parameter.path)]
    scalings = {matrix.lora_path: matrix.lora.scaling for matrix in matrices(model) if matrix.lora is not None}
    placed = _place(adapter, wanted, scalings)
    for matrix in matrices(model):
        if matrix.lora is not None:
            for name in ("lora_A", "lora_B"):
                getattr(matrix.lora, name).set_value(placed[f"{matrix.lora_path}.{name}"])
    if (adapter.folder / "generation_config.json").is_file():
        model.generation_config = read_generation_config(adapter.folder, model.config)


def open_adapter(folder: str | PathLike[str], model: ModelConfig) -> Adapter:
    """Opens an adapter's folder, or one on the Hub.

    Args:
        folder: of the adapter.
        model: config of the model that it is for.

    Raises:
        ConfigError: adapter_config.json is missing or asks for more than low-rank adapters of matrices.
        CheckpointError: the tensors are missing or damaged, or are not adapters.
    """
    folder = adapter_folder(folder)
    config = read_adapter_config(folder / CONFIG)
    source = TENSORS if (folder / TENSORS).exists() or not (folder / TORCH_TENSORS).exists() else TORCH_TENSORS
    if source == TENSORS:
        arrays = read_arrays(folder / TENSORS)
    else:
        tensors, problems = open_torch_file(folder / TORCH_TENSORS)
        if problems:
            raise CheckpointError(f"{folder}: {problems[0]}.")
        arrays = {name: tensor.read() for name, tensor in tensors.items()}
    pairs, bases, problems = low_rank_pairs(arrays, config, model)
    pairs, misshapen = in_model_rows(pairs, model)
    problems += misshapen
    if not pairs and not problems:
        problems = ["there are no adapters in it"]
    adapter = Adapter(folder, config, pairs, bases, source)
    _refuse(adapter, problems)
    return adapter


def merged(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """A checkpoint with the adapters added to its matrices, computed when they are read.

    An adapter of the token table does not act on a head that is tied to it: the two are untied.

    Raises:
        CheckpointError: an adapter belongs to no tensor of the checkpoint, or has other sizes.
    """
    _require_fit(adapter, checkpoint.tensors, checkpoint.config)
    tensors = dict(checkpoint.tensors)
    config = checkpoint.config
    if config.tie_word_embeddings and EMBEDDING in adapter.pairs:
        tensors[HEAD] = tensors[EMBEDDING]
        config = dataclasses.replace(config, tie_word_embeddings=False)
    for name, pair in adapter.pairs.items():
        tensors[name] = _MergedTensor(tensors[name], pair)
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)


@dataclasses.dataclass(frozen=True)
class _MergedTensor(StoredTensor):
    """`weight + scaling · b @ a` in float32; the reader rounds it once."""

    weight: StoredTensor
    pair: LowRank

    dtype = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def source(self) -> str:
        return self.weight.source

    def read_into(self, index: Index, out: np.ndarray) -> None:
        rows, columns = index
        a, b = self.pair.a[:, columns].astype(np.float32), self.pair.b[rows].astype(np.float32)
        out[...] = self.weight.read(index).astype(np.float32) + np.float32(self.pair.scaling) * (b @ a)


def _lora_config(config: AdapterConfig, found: Mapping[str, list[LowRank]]) -> LoraConfig:
    """The config of the model's adapters: of each matrix path, the largest rank and the first scaling."""
    ranks, alphas = [], []
    for path, pairs in found.items():
        rank, scaling = max(pair.rank for pair in pairs), pairs[0].scaling
        if rank != config.r:
            ranks.append((re.escape(path), rank))
        if scaling != config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank):
            alphas.append((re.escape(path), scaling * (math.sqrt(rank) if config.use_rslora else rank)))
    return LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        target_modules=tuple(found),
        rank_pattern=tuple(ranks),
        alpha_pattern=tuple(alphas),
    )


def _place(adapter: Adapter, wanted: list[HubParameter], scalings: Mapping[str, float]) -> dict[str, jax.Array]:
    """The adapters' arrays on the devices, by path.

    Args:
        adapter: the folder.
        wanted: parameters of the model's adapters.
        scalings: of the model's adapters, by their path.
    """
    tensors: dict[str, StoredTensor] = {}
    for parameter in wanted:
        owner, _, side = parameter.path.rpartition(".")
        for name in map(str, parameter.names.flat):
            pair = adapter.pairs.get(re.sub(r"\.lora_[AB]\.weight$", ".weight", name))
            if pair is None:
                values = np.zeros((1, 1), np.float32)[:0, :0]
            elif side == "lora_A":
                values = pair.a
            else:
                ratio = pair.scaling / scalings[owner]
                values = pair.b if ratio == 1 else pair.b.astype(np.float32) * np.float32(ratio)
            tensor = ArrayTensor(values, adapter.source)
            fits = tensor.shape == parameter.tensor_shape
            tensors[name] = tensor if fits else ZeroPaddedTensor(tensor, parameter.tensor_shape)
    abstract = [parameter.leaf for parameter in wanted]
    with bytes_bar(f"Loading {adapter.folder.name}", local_bytes(abstract)) as advance:
        arrays = place([stacked_tensor(parameter, tensors) for parameter in wanted], abstract, advance)
    return {parameter.path: array for parameter, array in zip(wanted, arrays, strict=True)}


def _require_fit(adapter: Adapter, weights: Mapping[str, StoredTensor], config: ModelConfig) -> None:
    """Refuses adapters of other matrices or sizes than the weights', and saved embeddings with other values."""
    problems = []
    for name, pair in adapter.pairs.items():
        size = (pair.b.shape[0], pair.a.shape[1])
        if name == HEAD and config.tie_word_embeddings:
            problems.append(f"unexpected: {name} is tied to the token table, and cannot have an adapter of its own")
        elif name not in weights:
            problems.append(f"unexpected: an adapter of {name}, which the model does not have")
        elif size != weights[name].shape:
            problems.append(f"shape: the adapter of {name} is for {list(size)}, expected {list(weights[name].shape)}")
    for name, array in adapter.bases.items():
        weight = weights.get(EMBEDDING if name == HEAD and config.tie_word_embeddings else name)
        if isinstance(weight, TensorSlice) and not _is_addressable(weight.tensor):
            problems.append(
                f"unknown: {name} cannot be compared with the base's under several processes; merge it first"
            )
        elif weight is not None and not _same_weight(weight, ArrayTensor(array, adapter.source)):
            problems.append(f"changed: {name} in {adapter.source} is not the base's: the adapter is of another base")
    _refuse(adapter, problems)


def _is_addressable(tensor: StoredTensor) -> bool:
    return not isinstance(tensor, DeviceTensor) or tensor.array.is_fully_addressable


def _same_weight(weight: StoredTensor, saved: StoredTensor) -> bool:
    if weight.shape != saved.shape:
        return False
    # Either may have been saved in fewer bits.
    narrow = min((weight.dtype, saved.dtype), key=lambda dtype: np.dtype(dtype).itemsize)
    return equal(CastTensor(weight, narrow), CastTensor(saved, narrow))


def _refuse(adapter: Adapter, problems: list[str]) -> None:
    if not problems:
        return
    more = [f"… and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    listed = "\n  ".join(problems[:_LISTED] + more)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise CheckpointError(
        f"{adapter.folder}: {adapter.source} does not fit this model and {CONFIG} ({count}):\n  {listed}\n"
        "Check that the adapter was trained on this model."
    )


def _is_stale(name: str) -> bool:
    return name in (CONFIG, TENSORS, TORCH_TENSORS)


def _is_expected(name: str) -> bool:
    """Whether a file of this name is kept with the adapters: `load_adapter` reads a generation_config.json."""
    return is_companion(name) or name == "generation_config.json"
