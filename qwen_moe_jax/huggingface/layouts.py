"""The layouts that Hub folders have → one layout: a tensor per expert, names with the `model.` prefix."""

import re

import numpy as np

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.huggingface.linear_rows import in_model_order
from qwen_moe_jax.huggingface.tensors import renamer
from qwen_moe_jax.storage.tensor import StoredTensor, TensorSlice, blocks

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: First words of tensor names in a decoder saved without a head (AutoModel), which have no `model.` prefix.
_BARE = ("embed_tokens.", "layers.", "norm.")
#: What multimodal folders have before the names of the text model's tensors, once `model.` is taken for granted.
_TEXT_PART = re.compile(r"^(model\.language_model\.|language_model\.model\.|language_model\.)")
#: Bytes per block of a comparison.
_COMPARED = 64 << 20
_FUSED = re.compile(r"(.+\.mlp\.experts)\.(gate_up|down)_proj")


def in_hub_form(tensors: dict[str, StoredTensor], config: ModelConfig) -> tuple[dict[str, StoredTensor], list[str]]:
    """A folder's tensors under the names of `hub_parameters`; and the problems found, a line each.

    Experts are one by one, and the rows of linear layers in the model's order (see `linear_rows`).
    """
    rename = renamer(config.model_type)
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for name, tensor in tensors.items():
        with_prefix = prefixed(name)
        fused = _FUSED.fullmatch(with_prefix)
        each = [(with_prefix, tensor)]
        if fused is not None and config.moe is not None:
            expected = _fused_shape(config, fused[2])
            if tensor.shape != expected:
                problems.append(
                    f"shape: {with_prefix} is {list(tensor.shape)} in {tensor.source}, expected {list(expected)}"
                    + _transposed(tensor.shape, expected)
                )
                continue
            each = _unfused(fused[1], fused[2], tensor)
        for own, part in each:
            own = rename(own)
            if own in found:
                problems.append(f"duplicated: {own} is in {found[own].source} and, as {name}, in {tensor.source}")
            found[own] = part
    found, disordered = in_model_order(found, config)
    return found, problems + disordered


def prefixed(name: str) -> str:
    """The name with the prefix `model.`, of a decoder saved without a head and of the text part of a multimodal one."""
    name = _TEXT_PART.sub("", name)
    return f"model.{name}" if name.startswith(_BARE) else name


def _transposed(shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """A remark on the fused experts of Qwen3-VL-MoE, whose matrices are [in, out]."""
    swapped = (*expected[:-2], expected[-1], expected[-2])
    return " (its matrices are transposed, as Qwen3-VL-MoE stores them)" if shape == swapped else ""


def _fused_shape(config: ModelConfig, kind: str) -> tuple[int, ...]:
    """Shape of the fused experts of a layer in transformers 5: gate rows, then up rows of each expert; or down rows."""
    experts, width, inner = config.moe.num_experts, config.hidden_size, config.moe.moe_intermediate_size
    return (experts, width, inner) if kind == "down" else (experts, 2 * inner, width)


def _unfused(experts: str, kind: str, tensor: StoredTensor) -> list[tuple[str, StoredTensor]]:
    """One tensor per expert from the fused experts of a layer, which transformers 5 can be configured to save."""
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


def tied(
    tensors: dict[str, StoredTensor], *, readable: bool, rows: int | None = None
) -> tuple[dict[str, StoredTensor], bool]:
    """The tensors of a checkpoint whose config ties the head to the embedding; and whether they are tied in the files.

    As in transformers 5.23: if the files have only one of the two, it serves as both; if they have both with different
    values, they are not tied, whatever the config says. PyTorch's own files always have both.

    Args:
        tensors: of the checkpoint.
        readable: False for damaged files, of which no values are read.
        rows: compare so many of the vocabulary alone; None compares all.
    """
    if HEAD not in tensors:
        return tensors, True
    if EMBEDDING in tensors and readable and not equal(tensors[EMBEDDING], tensors[HEAD], rows):
        return tensors, False
    one = {EMBEDDING: tensors[HEAD]} | {name: tensor for name, tensor in tensors.items() if name != HEAD}
    return one, True


def equal(one: StoredTensor, other: StoredTensor, rows: int | None = None) -> bool:
    """Whether two tensors have the same bits, block by block; of the first `rows` rows, if given."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    shape = one.shape if rows is None else (min(rows, one.shape[0]), *one.shape[1:])
    parts = blocks(shape, np.dtype(one.dtype).itemsize, _COMPARED)
    return all(one.read(part).tobytes() == other.read(part).tobytes() for part in parts)  # NaN is equal to itself
