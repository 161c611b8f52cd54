"""The forms in which folders hold the same tensors → one form: per-expert names with the `model.` prefix."""

import re

import numpy as np

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.huggingface.tensors import renamer
from qwen_moe_jax.storage.tensor import StoredTensor, TensorSlice, blocks

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: How the names of a decoder saved by itself begin (AutoModel's, without `model.`).
_BARE = ("embed_tokens.", "layers.", "norm.")
#: Bytes that are compared at a time.
_COMPARED = 64 << 20
_FUSED = re.compile(r"(.+\.mlp\.experts)\.(gate_up|down)_proj")


def in_hub_form(tensors: dict[str, StoredTensor], config: ModelConfig) -> tuple[dict[str, StoredTensor], list[str]]:
    """A folder's tensors under the names that the family's published checkpoints have; and what is wrong with them."""
    rename = renamer(config.model_type)
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for name, tensor in tensors.items():
        prefixed = f"model.{name}" if name.startswith(_BARE) else name
        fused = _FUSED.fullmatch(prefixed)
        each = [(prefixed, tensor)]
        if fused is not None and config.moe is not None:
            expected = _fused_shape(config, fused[2])
            if tensor.shape != expected:
                problems.append(
                    f"shape: {prefixed} is {list(tensor.shape)} in {tensor.source}, expected {list(expected)}"
                )
                continue
            each = _unfused(fused[1], fused[2], tensor)
        for own, part in each:
            own = rename(own)
            if own in found:
                problems.append(f"duplicated: {own} stands in {found[own].source} and, as {name}, in {tensor.source}")
            found[own] = part
    return found, problems


def _fused_shape(config: ModelConfig, kind: str) -> tuple[int, ...]:
    """What transformers 5 holds the experts of a layer in: gate rows and then up rows of each, or down rows."""
    experts, width, inner = config.moe.num_experts, config.hidden_size, config.moe.moe_intermediate_size
    return (experts, width, inner) if kind == "down" else (experts, 2 * inner, width)


def _unfused(experts: str, kind: str, tensor: StoredTensor) -> list[tuple[str, StoredTensor]]:
    """One tensor an expert, where the experts of a layer stand fused: transformers 5 writes them so when told to."""
    count, rows, _ = tensor.shape
    kinds = ("down",) if kind == "down" else ("gate", "up")
    each = rows // len(kinds)
    return [
        (
            f"{experts}.{expert}.{own}_proj.weight",
            TensorSlice(tensor, (expert, slice(number * each, (number + 1) * each))),
        )
        for expert in range(count)
        for number, own in enumerate(kinds)
    ]


def tied(tensors: dict[str, StoredTensor], *, readable: bool) -> tuple[dict[str, StoredTensor], bool]:
    """The tensors of a checkpoint whose config ties the head to the embedding; and whether they really are tied.

    As in transformers 5.23: where only one of the two is there, it is both; where both are and differ, the file is
    believed and not the config. PyTorch's own files always hold both.

    Args:
        tensors: of the checkpoint.
        readable: False where the files are damaged: then nothing is read to compare the two.
    """
    if HEAD not in tensors:
        return tensors, True
    if EMBEDDING in tensors and readable and not _equal(tensors[EMBEDDING], tensors[HEAD]):
        return tensors, False
    one = {EMBEDDING: tensors[HEAD]} | {name: tensor for name, tensor in tensors.items() if name != HEAD}
    return one, True


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    parts = blocks(one.shape, np.dtype(one.dtype).itemsize, _COMPARED)
    return all(one.read(part).tobytes() == other.read(part).tobytes() for part in parts)  # NaN is equal to itself
