"""The forms in which folders hold the same tensors → one form: per-expert names with the `model.` prefix."""

import re

import numpy as np

from qwen_moe_jax.huggingface.tensors import renamer
from qwen_moe_jax.storage.tensor import Part, Tensor, blocks

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: How the names of a decoder saved by itself begin (AutoModel's, without `model.`).
_BARE = ("embed_tokens.", "layers.", "norm.")
#: Bytes that are compared at a time.
_COMPARED = 64 << 20
_FUSED = re.compile(r"(.+\.mlp\.experts)\.(gate_up|down)_proj")


def in_hub_form(tensors: dict[str, Tensor], model_type: str) -> tuple[dict[str, Tensor], list[str]]:
    """A folder's tensors under the names that the family's published checkpoints have; and what stands there twice."""
    rename = renamer(model_type)
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, tensor in tensors.items():
        prefixed = f"model.{name}" if name.startswith(_BARE) else name
        for own, part in _unfused(prefixed, tensor):
            own = rename(own)
            if own in found:
                problems.append(f"duplicated: {own} stands in {found[own].where} and, as {name}, in {tensor.where}")
            found[own] = part
    return found, problems


def _unfused(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """One tensor an expert, where the experts of a layer stand fused.

    transformers 5 holds them as `mlp.experts.gate_up_proj` [E, 2F, D] (gate rows first) and `mlp.experts.down_proj`
    [E, D, F], and writes them so when told not to save in the original format.
    """
    fused = _FUSED.fullmatch(name)
    if fused is None or len(tensor.shape) != 3:
        return [(name, tensor)]
    experts, rows, _ = tensor.shape
    kinds = ("down",) if fused[2] == "down" else ("gate", "up")
    each = rows // len(kinds)
    return [
        (f"{fused[1]}.{expert}.{kind}_proj.weight", Part(tensor, (expert, slice(number * each, (number + 1) * each))))
        for expert in range(experts)
        for number, kind in enumerate(kinds)
    ]


def tied(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a checkpoint whose config ties the head to the embedding; and whether they really are tied.

    As in transformers 5.23: where only one of the two is there, it is both; where both are and differ, the file is
    believed and not the config. PyTorch's own files always hold both.
    """
    if HEAD not in tensors:
        return tensors, True
    if EMBEDDING in tensors and not _equal(tensors[EMBEDDING], tensors[HEAD]):
        return tensors, False
    one = {EMBEDDING: tensors[HEAD]} | {name: tensor for name, tensor in tensors.items() if name != HEAD}
    return one, True


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    parts = blocks(one.shape, np.dtype(one.dtype).itemsize, _COMPARED)
    return all(np.array_equal(one.read(part), other.read(part)) for part in parts)
