"""Sorting items by a few keys on CPUs: XLA compares them pair by pair, and looks up where each key begins in a loop.

LLVM compiles a C function that XLA calls (`counting_sort.py`).
"""

import importlib.util

import jax
import jax.numpy as jnp

from qwen_moe_jax.nn.kernels.cpu import on_cpu, register

_NAME = "qwen_moe_jax_counting_sort"


def is_available() -> bool:
    """Whether `counting_sort` can be used: llvmlite is installed, on one CPU. Call it as `cpu.is_available`."""
    one = jax.sharding.get_abstract_mesh().size <= 1
    return one and on_cpu() and importlib.util.find_spec("llvmlite") is not None


def counting_sort(keys_N: jax.Array, num_keys: int, num_rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows sorted by key, for one key in the order of the items.

    Args:
        keys_N: int32, at least 0; an item whose key is `num_keys` or more gets no row.
        num_keys: K.
        num_rows: R, at least the number of items that get one.

    Returns:
        The item of each row, int32 [R], N where there is none; the row of each item, int32 [N], R where there is none;
        how many items each key has, int32 [K].
    """
    from qwen_moe_jax.nn.kernels import compiled

    register(_NAME, compiled.counting_sort)
    results = [jax.ShapeDtypeStruct((size,), jnp.int32) for size in (num_rows, len(keys_N), num_keys)]
    item_R, row_N, size_K = jax.ffi.ffi_call(_NAME, results, vmap_method="sequential")(keys_N.astype(jnp.int32))
    return item_R, row_N, size_K
