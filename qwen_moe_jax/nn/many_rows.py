"""Products of many tokens with weights on a single CPU, with gradients, by the C functions of `kernels.matmul`.

The arrays are explicitly sharded, over one device.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.nn.kernels import matmul
from qwen_moe_jax.sharding.rules import spec_of

#: Tokens from which on these functions are faster than XLA's.
MANY_TOKENS = 32


def multiplies(x: jax.Array, weight: jax.Array) -> bool:
    """Whether `many_rows_matmul` should multiply these activations with this weight.

    It does on a single CPU, where the rows are many and the weight is not small.
    """
    return jax.sharding.get_abstract_mesh().size == 1 and multiplies_local(x, weight)


def multiplies_local(x: jax.Array, weight: jax.Array) -> bool:
    """Whether `local_matmul` should multiply these arrays of one device."""
    return (
        x.dtype == weight.dtype
        and math.prod(x.shape[:-1]) >= MANY_TOKENS * math.prod(weight.shape[:-2])
        and matmul.is_worth_it(x.dtype, *weight.shape[-2:])
    )


@jax.custom_vjp
def local_matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`many_rows_matmul` of the arrays of one device, inside a `jax.shard_map`."""
    return _rows(x, weight)


def _local_backward(saved: tuple[jax.Array, jax.Array], of_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    return _rows(of_y, weight, transposed=False), _outer(of_y, x, shape=weight.shape)


local_matmul.defvjp(lambda x, weight: (_rows(x, weight), (x, weight)), _local_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def many_rows_matmul(x: jax.Array, weight: jax.Array, out: P) -> jax.Array:
    """Activations [..., I] times the transpose of a weight [O, I]; or, for each e, [E, ..., I] of [E, O, I].

    Args:
        x: activations for which it `multiplies`.
        weight: in their dtype.
        out: sharding of the result.

    Returns:
        [..., O], accumulated in float32, in the dtype of the activations.
    """
    return _on_the_device(_rows, out, x, weight)


def _forward(x: jax.Array, weight: jax.Array, out: P):
    return many_rows_matmul(x, weight, out), (x, weight)


def _backward(out: P, saved: tuple[jax.Array, jax.Array], of_y: jax.Array):
    x, weight = saved
    of_x = _on_the_device(functools.partial(_rows, transposed=False), spec_of(x), of_y, weight)
    return of_x, _on_the_device(_outer, spec_of(weight), of_y, x, shape=weight.shape)


many_rows_matmul.defvjp(_forward, _backward)


def _on_the_device(local, out: P, *arrays: jax.Array, **settings) -> jax.Array:
    specs = tuple(spec_of(array) for array in arrays)
    local = functools.partial(local, **settings)
    return jax.shard_map(local, in_specs=specs, out_specs=out, check_vma=False)(*arrays)


def _rows(x: jax.Array, weight: jax.Array, transposed: bool = True) -> jax.Array:
    matrices = weight.reshape(-1, *weight.shape[-2:])
    rows = x.reshape(-1, x.shape[-1])
    y = matmul.ragged_matmul(rows, matrices, _sizes(len(rows), len(matrices)), transposed=transposed)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _outer(left: jax.Array, right: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    left, right = (x.reshape(-1, x.shape[-1]) for x in (left, right))
    return matmul.ragged_outer(left, right, _sizes(len(left), math.prod(shape[:-2]))).reshape(shape)


def _sizes(rows: int, groups: int) -> jax.Array:
    return jnp.full(groups, rows // groups, jnp.int32)
