"""Ragged rows times their experts' weights: one function, one gradient, a backend for each kind of device."""

import functools
import importlib
import importlib.util

import jax

from qwen_moe_jax.config import GroupedMatmul
from qwen_moe_jax.moe.kernels import cpu
from qwen_moe_jax.moe.kernels.cpu import tile_rows
from qwen_moe_jax.nn.matmul import matmul_precision
from qwen_moe_jax.nn.quantised import Quantised, Weight
from qwen_moe_jax.rounding import round_up

#: A backend is a module with `ragged` and `outer`, as `kernels/cpu.py` describes them, and `select_layer`.
BACKENDS: dict[GroupedMatmul, str] = {
    "blocks": "qwen_moe_jax.moe.kernels.cpu",
    "megablox": "qwen_moe_jax.moe.kernels.tpu",
    "triton": "qwen_moe_jax.moe.kernels.nvidia",
}


def buffer_rows(rows: int) -> int:
    """The size of a buffer for this many real rows: whole tiles, and one more that the last tile may reach into."""
    return round_up(rows, tile_rows(rows)) + tile_rows(rows)


def grouped_matmul(
    rows_RI: jax.Array,
    weights: Weight,
    sizes_E: jax.Array,
    backend: GroupedMatmul,
    layer: jax.Array | None = None,
) -> jax.Array:
    """Each row times the transpose of its expert's matrix, accumulated in float32.

    `jax.lax.ragged_dot` would be the obvious choice; it is dense over the experts on CPUs and NVIDIA GPUs, and in jax
    0.10 in its weight gradient on TPUs (`benchmarks/compile_kernels.py`).

    Args:
        rows_RI: rows sorted by expert, R of `buffer_rows`.
        weights: the experts' matrices in the Hub's [out, in] order, [E, O, I], or [L, E, O, I] with a `layer`; in the
            dtype of the rows; or, with "blocks", quantised ones, which have no gradient.
        sizes_E: int32, rows of each expert. Rows past their sum are the buffer's unused end.
        backend: one of `BACKENDS`.
        layer: int32 []; which of the stacked layers, where nothing is differentiated. None where they are not stacked.

    Returns:
        [R, O] in the dtype of the rows. Rows past the sum of the sizes mean nothing, and have no part in a gradient.
    """
    if layer is not None and backend == "blocks":  # without a copy of the layer; nothing is differentiated here
        weights, first = cpu.select_layer(weights, layer)
        with matmul_precision(rows_RI.dtype):
            return cpu.ragged(rows_RI, weights, sizes_E, transposed=True, first=first)
    if layer is not None:
        weights, sizes_E = _module(backend).select_layer(weights, sizes_E, layer, len(rows_RI))
    return _grouped_matmul(rows_RI, weights, sizes_E, backend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(rows_RI: jax.Array, weights_EOI: Weight, sizes_E: jax.Array, backend: GroupedMatmul) -> jax.Array:
    with matmul_precision(rows_RI.dtype):
        return _module(backend).ragged(rows_RI, weights_EOI, sizes_E, transposed=True)


def _forward(rows_RI: jax.Array, weights_EOI: Weight, sizes_E: jax.Array, backend: GroupedMatmul):
    return _grouped_matmul(rows_RI, weights_EOI, sizes_E, backend), (rows_RI, weights_EOI, sizes_E)


def _backward(backend: GroupedMatmul, saved: tuple[jax.Array, Weight, jax.Array], gradient_RO: jax.Array):
    rows_RI, weights_EOI, sizes_E = saved
    with matmul_precision(rows_RI.dtype):
        of_rows_RI = _module(backend).ragged(gradient_RO, weights_EOI, sizes_E, transposed=False)
        if isinstance(weights_EOI, Quantised):
            return of_rows_RI.astype(rows_RI.dtype), None, None
        of_weights_EOI = _module(backend).outer(gradient_RO, rows_RI, sizes_E)
    return of_rows_RI.astype(rows_RI.dtype), of_weights_EOI.astype(weights_EOI.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


def _module(backend: GroupedMatmul):
    return importlib.import_module(BACKENDS[backend])
