"""Products of a few tokens with weights that stay in the stack of all layers, as decoding needs them on CPUs.

The arrays are explicitly sharded, and nothing is differentiated.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.nn.bits import rows_at
from qwen_moe_jax.nn.kernels import cpu
from qwen_moe_jax.nn.quantised import Weight
from qwen_moe_jax.sharding.rules import spec_of

AnyWeight = TypeVar("AnyWeight", bound=Any)

#: Tokens up to which a product is bound by reading the weights.
FEW_TOKENS = 32


def reads_in_place(x: jax.Array, weights: Sequence[Weight]) -> bool:
    """Whether `stacked_matmul` can multiply these activations [..., I] with these stacks [L, O, I].

    It can on a single CPU; see `kernels.cpu.reads_in_place`.
    """
    return (
        math.prod(x.shape[:-1]) <= FEW_TOKENS
        and jax.sharding.get_abstract_mesh().size == 1
        and cpu.reads_in_place(x.dtype, weights)
    )


def stacked_matmul(x_BTI: jax.Array, weights: Sequence[Weight], layer: jax.Array, outs: Sequence[P]) -> list[jax.Array]:
    """The activations times the transpose of one layer of each stack, read where it is stored.

    Args:
        x_BTI: activations that `reads_in_place`.
        weights: stacks [L, O, I].
        layer: int32 []; which of the layers.
        outs: shardings of the results.

    Returns:
        float32 [B, T, O] for each stack.
    """

    def local(x_BTI: jax.Array, weights: list[Weight], layer: jax.Array) -> list[jax.Array]:
        x_RI = x_BTI.reshape(-1, x_BTI.shape[-1]).astype(jnp.float32)
        sizes_G = jnp.full(1, len(x_RI), jnp.int32)
        stacks = [cpu.arrays_of(weight) for weight in weights]
        products = cpu.picked_matmul(x_RI, stacks, layer[None], sizes_G, cpu.format_of(weights[0]))
        return [y_RO.reshape(*x_BTI.shape[:-1], -1) for y_RO in products]

    specs = spec_of(x_BTI), jax.tree.map(spec_of, list(weights)), P()
    mapped = jax.shard_map(local, in_specs=specs, out_specs=list(outs), check_vma=False)
    return mapped(x_BTI, list(weights), layer)


def layer_at(weight: AnyWeight, index: jax.Array) -> AnyWeight:
    """One layer of a stack, copied."""
    return jax.tree.map(lambda array: rows_at(array, index, 1)[0], weight)
