"""The tensors of a hybrid's layers in a GGUF file: llama.cpp's order of rows, and what it wants computed before.

Letters of this file: `g` key head; the rest as in the package.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from qwen_moe_jax.config import LinearAttentionConfig, ModelConfig
from qwen_moe_jax.huggingface.linear_rows import BA, CONV, QKV, A, B, Z, in_published_order
from qwen_moe_jax.storage.picked import Picked
from qwen_moe_jax.storage.tensor import Index, StoredTensor, TensorView

_LINEAR = "linear_attn"


def hybrid_tensors(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """A model's tensors with rows and values as llama.cpp has them, under names of the published files.

    - The weights of zero-centred norms are those by which it multiplies: one larger.
    - `A_log` is -exp(A_log).
    - A convolution's weights are [channels, tokens].
    - Where value heads share key heads, Qwen3.5's value heads are in the order in which key heads are repeated there:
      the first of each key head, then the second of each. Qwen3-Next's are not, and its `in_proj_ba` is the published.

    Args:
        tensors: by the names of `hub_parameters`.
        config: of the model.
    """
    linear = config.linear_attention
    joined = config.model_type == "qwen3_next"
    order = np.arange(linear.num_value_heads) if joined else _repeated_order(linear)
    published = in_published_order(tensors, config)
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        layer, inside, rest = name.partition(f".{_LINEAR}.")
        if not inside:
            is_norm = name.endswith("norm.weight") and config.zero_centered_norm
            found[name] = Computed(tensor, _plus_one) if is_norm else tensor
        elif not (joined and rest.startswith((f"{A}.", f"{B}."))):
            found[name] = _in_order(rest, tensor, linear, order)
    if joined:
        found |= {name: tensor for name, tensor in published.items() if f".{_LINEAR}.{BA}." in name}
    return found


def _repeated_order(linear: LinearAttentionConfig) -> np.ndarray:
    """Value heads [num_value_heads] in the order of a repetition of all key heads."""
    return np.arange(linear.num_value_heads).reshape(linear.num_key_heads, -1).T.reshape(-1)


def _in_order(name: str, tensor: StoredTensor, linear: LinearAttentionConfig, order: np.ndarray) -> StoredTensor:
    """One tensor of a linear layer, by its name behind `linear_attn.`."""
    rows = _rows(order, linear.value_head_dim)
    if name == "A_log":
        return Computed(Picked(tensor, 0, order), _negative_exponential)
    if name == "dt_bias" or name.startswith((f"{A}.", f"{B}.")):
        return Picked(tensor, 0, order)
    if name.startswith(f"{Z}."):
        return Picked(tensor, 0, rows)
    if name.startswith("out_proj."):
        return Picked(tensor, 1, rows)
    if name.startswith(f"{QKV}."):
        return Picked(tensor, 0, _all_queries_first(linear, order))
    if name.startswith(f"{CONV}."):
        return Computed(Picked(tensor, 0, _all_queries_first(linear, order)), _without_middle, axes=(0, 2))
    return tensor


def _rows(heads: np.ndarray, size: int) -> np.ndarray:
    """The rows of heads of so many rows each."""
    return (heads[:, None] * size + np.arange(size)).reshape(-1)


def _all_queries_first(linear: LinearAttentionConfig, order: np.ndarray) -> np.ndarray:
    """Rows that are grouped by key head as all q, all k, then v of the value heads in this order."""
    key = linear.key_head_dim
    grouped = np.arange(2 * linear.key_dim + linear.num_value_heads * linear.value_head_dim)
    of_group = grouped.reshape(linear.num_key_heads, -1)
    value_rows = of_group[:, 2 * key :].reshape(linear.num_value_heads, -1)
    parts = (of_group[:, :key], of_group[:, key : 2 * key], value_rows[order])
    return np.concatenate([part.reshape(-1) for part in parts])


def _plus_one(values: np.ndarray) -> np.ndarray:
    return values + 1


def _negative_exponential(values: np.ndarray) -> np.ndarray:
    return -np.exp(values)


def _without_middle(values: np.ndarray) -> np.ndarray:
    return values[:, 0]


@dataclasses.dataclass(frozen=True)
class Computed(TensorView):
    """A function of another tensor's values, in float32.

    Attributes:
        tensor: the other one.
        function: of a block of its values.
        axes: its axes that remain, of an axis of size one that the function drops; None if all do.
    """

    tensor: StoredTensor
    function: Callable[[np.ndarray], np.ndarray]
    axes: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.tensor.shape
        return shape if self.axes is None else tuple(shape[axis] for axis in self.axes)

    @property
    def dtype(self) -> str:
        return "float32"

    def read_into(self, index: Index, out: np.ndarray) -> None:
        whole = list(index)
        if self.axes is not None:
            whole = [slice(0, size) for size in self.tensor.shape]
            for axis, part in zip(self.axes, index, strict=True):
                whole[axis] = part
        out[...] = self.function(self.tensor.read(tuple(whole)).astype(np.float32))
