"""Ragged rows times their experts' weights: one function, one gradient, a backend for each kind of device."""

import functools
import importlib
import importlib.util

import jax

from qwen_moe_jax.config import GroupedMatmul
from qwen_moe_jax.moe.kernels.cpu import tile_rows
from qwen_moe_jax.nn.matmul import as_precise_as
from qwen_moe_jax.rounding import round_up

#: A backend is a module with `ragged` and `outer`; see `kernels/blocks.py` for what they promise.
BACKENDS: dict[GroupedMatmul, str] = {
    "blocks": "qwen_moe_jax.moe.kernels.cpu",
    "megablox": "qwen_moe_jax.moe.kernels.tpu",
    "triton": "qwen_moe_jax.moe.kernels.nvidia",
}


def buffer_rows(rows: int) -> int:
    """The size of a buffer for this many real rows: whole tiles, and a spare one for every backend's reach."""
    return round_up(rows, tile_rows(rows)) + tile_rows(rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(rows_RI: jax.Array, weights_EOI: jax.Array, sizes_E: jax.Array, backend: GroupedMatmul) -> jax.Array:
    """Each row times the transpose of its expert's matrix, accumulated in float32.

    `jax.lax.ragged_dot` would be the obvious choice; it is dense over the experts on CPUs and NVIDIA GPUs, and in jax
    0.10 in its weight gradient on TPUs (`benchmarks/compile_kernels.py`).

    Args:
        rows_RI: rows sorted by expert, R of `buffer_rows`.
        weights_EOI: the experts' matrices in the Hub's [out, in] order, in the dtype of the rows.
        sizes_E: int32, rows of each expert. Rows past their sum are room that was not needed.
        backend: one of `BACKENDS`.

    Returns:
        [R, O] in the dtype of the rows. Rows past the sum of the sizes mean nothing, and have no part in a gradient.
    """
    with as_precise_as(rows_RI.dtype):
        return _module(backend).ragged(rows_RI, weights_EOI, sizes_E, transposed=True)


def _forward(rows_RI: jax.Array, weights_EOI: jax.Array, sizes_E: jax.Array, backend: GroupedMatmul):
    return grouped_matmul(rows_RI, weights_EOI, sizes_E, backend), (rows_RI, weights_EOI, sizes_E)


def _backward(backend: GroupedMatmul, saved: tuple[jax.Array, jax.Array, jax.Array], gradient_RO: jax.Array):
    rows_RI, weights_EOI, sizes_E = saved
    with as_precise_as(rows_RI.dtype):
        of_rows_RI = _module(backend).ragged(gradient_RO, weights_EOI, sizes_E, transposed=False)
        of_weights_EOI = _module(backend).outer(gradient_RO, rows_RI, sizes_E)
    return of_rows_RI.astype(rows_RI.dtype), of_weights_EOI.astype(weights_EOI.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _module(backend: GroupedMatmul):
    return importlib.import_module(BACKENDS[backend])
