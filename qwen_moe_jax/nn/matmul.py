"""Multiplying activations with weights as they are stored."""

import functools
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.nn.many_rows import many_rows_matmul, multiplies
from qwen_moe_jax.nn.quantised import Quantised, Weight, quantised_einsum
from qwen_moe_jax.sharding.rules import gather_for_matmul

#: The names that remat policies know these products by; the second are those of routed experts.
WEIGHT_MATMUL, EXPERT_MATMUL = "weight_matmul", "expert_matmul"


#: Products of rows with one weight, or with one of each expert, as `many_rows_matmul` takes them.
_PRODUCTS = "BTI,OI->BTO", "EGCD,EFD->EGCF", "EGCF,EDF->EGCD"


def matmul_name(axes: tuple[str, ...]) -> str:
    """By which of the two names a remat policy knows the product with a weight of these logical axes."""
    return EXPERT_MATMUL if axes[0] == "expert" else WEIGHT_MATMUL


def matmul_precision(dtype: jax.typing.DTypeLike) -> AbstractContextManager:
    """Context of the matmul precision for a dtype: float32 is multiplied in float32.

    Accelerators would otherwise multiply it in bfloat16 or TF32. A custom gradient enters it again: the backward pass
    is traced outside the context of the forward.
    """
    return jax.default_matmul_precision("highest" if jnp.dtype(dtype) == jnp.float32 else None)


def weight_einsum(
    letters: str,
    x: jax.Array,
    weight: Weight,
    axes: tuple[str, ...],
    out: P,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """`einsum(letters, x, weight)` in the dtype of `x`, with the weight cast and gathered over fsdp on the way.

    The backward pass gathers it again instead of keeping it: kept, the scan over the layers would hold the whole
    weights of all of them at once, and fully sharded training would save nothing (ZeRO-3, arXiv 1910.02054).

    Args:
        letters: einsum letters of (activations, weight) -> result.
        x: activations.
        weight: as stored; integers are multiplied by `quantised_einsum`, and have no gradient.
        axes: its logical axes.
        out: sharding of the result.
        preferred_element_type: of the result; None is that of `x`.
    """

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def multiply(x: jax.Array, weight: Weight) -> jax.Array:
        if isinstance(weight, Quantised):
            return quantised_einsum(letters, x, weight.gathered(axes), out, preferred_element_type)
        weight = weight.astype(x.dtype)
        if letters in _PRODUCTS and preferred_element_type is None and multiplies(x, weight):
            return many_rows_matmul(x, weight, out)
        used = gather_for_matmul(weight, *axes)
        return jnp.einsum(letters, x, used, out_sharding=out, preferred_element_type=preferred_element_type)

    return checkpoint_name(multiply(x, weight), matmul_name(axes))
