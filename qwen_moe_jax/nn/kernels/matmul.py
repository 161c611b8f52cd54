"""Products of many rows with matrices, and their gradients, on CPUs: XLA's own pack a matrix anew for every few rows.

LLVM compiles C functions that XLA calls (`grouped.py`), one for each product and dtype. bfloat16 is multiplied in pairs
where the processor has an instruction for it. Without llvmlite (`pip install 'qwen-moe-jax[cpu]'`) callers use XLA's
own products.
"""

import functools
import importlib.util
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from qwen_moe_jax.nn.kernels import LANES
from qwen_moe_jax.nn.kernels.cpu import WORTH_A_CALL, on_cpu, register

if TYPE_CHECKING:
    from qwen_moe_jax.nn.kernels.functions.grouped import Product

#: The dtypes that there are functions for, and of what the sizes of their matrices are multiples.
MULTIPLES = {"float32": LANES, "bfloat16": 2 * LANES}


def is_available(dtype: jax.typing.DTypeLike, outputs: int, inputs: int) -> bool:
    """Whether rows can be multiplied with matrices [O, I] of a dtype like this: llvmlite is installed, on CPUs.

    Call it while tracing under the model's mesh: that says what the devices are.
    """
    multiple = MULTIPLES.get(jnp.dtype(dtype).name)
    divides = multiple is not None and outputs % multiple == inputs % multiple == 0
    return divides and on_cpu() and importlib.util.find_spec("llvmlite") is not None


def is_worth_it(dtype: jax.typing.DTypeLike, outputs: int, inputs: int) -> bool:
    """Whether `is_available`, for matrices that are not so small that a call takes longer than the product."""
    return outputs * inputs >= WORTH_A_CALL and is_available(dtype, outputs, inputs)


def ragged_matmul(
    rows_RK: jax.Array, matrices: jax.Array, sizes_G: jax.Array, *, transposed: bool, first: jax.Array | int = 0
) -> jax.Array:
    """Each row times its group's matrix, accumulated in float32. Nothing here can be differentiated.

    The arrays are those of one device: of a program for one, or inside a `jax.shard_map`.

    Args:
        rows_RK: rows sorted by group.
        matrices: [M, N, K] if `transposed` (a row is multiplied with the transpose), else [M, K, N]; in the dtype of
            the rows, one for which `is_available`.
        sizes_G: int32; rows of each group.
        first: int32 []; of the M matrices, that of the first group. The others' follow it.

    Returns:
        [R, N] in the dtype of the rows. Rows past the sum of the sizes are zeros.
    """
    result = jax.ShapeDtypeStruct((len(rows_RK), matrices.shape[1 if transposed else 2]), rows_RK.dtype)
    target = _target("transposed" if transposed else "plain", rows_RK.dtype.name)
    call = jax.ffi.ffi_call(target, result, vmap_method="sequential")
    return call(rows_RK, matrices, sizes_G.astype(jnp.int32), jnp.asarray(first, jnp.int32)[None])


def ragged_outer(left_RO: jax.Array, right_RI: jax.Array, sizes_G: jax.Array) -> jax.Array:
    """Each group's sum of outer products of its rows, accumulated in float32: the gradient of its matrix.

    Args:
        left_RO, right_RI: rows sorted by group, of one dtype.
        sizes_G: int32; rows of each group.

    Returns:
        [G, O, I] in the dtype of the rows; zeros for a group without rows.
    """
    shape = len(sizes_G), left_RO.shape[1], right_RI.shape[1]
    result = jax.ShapeDtypeStruct(shape, left_RO.dtype)
    call = jax.ffi.ffi_call(_target("outer", left_RO.dtype.name), result, vmap_method="sequential")
    return call(left_RO, right_RI, sizes_G.astype(jnp.int32))


def _target(product: "Product", dtype: str) -> str:
    """The name under which XLA knows the C function for a product."""
    from qwen_moe_jax.nn.kernels import compiled

    return _registered(product, *compiled.tiles_of(dtype))


@functools.cache
def _registered(product: "Product", numbers: str, height: int, vectors: int) -> str:
    from qwen_moe_jax.nn.kernels import compiled

    name = f"qwen_moe_jax_{product}_matmul_{numbers.replace(' ', '_')}_{height}x{vectors}"
    register(name, functools.partial(compiled.grouped_matmul, product, numbers, height, vectors))
    return name
