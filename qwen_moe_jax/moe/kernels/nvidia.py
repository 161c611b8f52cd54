"""Grouped matmuls on NVIDIA GPUs, Ampere and later: two kernels in Pallas' Triton dialect.

There `jax.lax.ragged_dot` multiplies every row with every expert under a mask. These kernels give each program one tile
of one expert's rows, so that only the last tile of an expert is partly empty.

JAX has deprecated this dialect since 0.11, without having removed it: compiling for a GPU warns. The library to replace
these kernels would be tokamax. Its 0.0.12, the last for Python 3.11, has a Triton kernel that gives a gradient to
experts without rows, and a slow one for Hopper; 0.0.17 needs the Triton package beside it. Both copy the weights to
transpose them.
"""

import math

import jax
import jax.numpy as jnp

from qwen_moe_jax.rounding import ceil_div, next_power_of_two

#: Sides of a tile of the result, powers of two: two such tiles' operands, three deep, stay under 100 KB of fast memory.
TILE = 128

#: Bytes of the summed dimension that a program reads at once: a cache line.
STEP_BYTES = 128

#: Tensor cores multiply blocks of this side; other dimensions are padded to a multiple.
ALIGNMENT = 16


def ragged(
    rows_RK: jax.Array, weights: jax.Array, sizes_E: jax.Array, *, transposed: bool, interpret: bool = False
) -> jax.Array:
    """Each row times the matrix of its expert.

    Args:
        rows_RK: rows sorted by expert, bfloat16, float16 or float32 (multiplied as JAX's default precision says).
        weights: [E, N, K] if `transposed`, else [E, K, N]; the dtype of the rows.
        sizes_E: rows of each expert, int32; rows past their sum are padding.
        transposed: whether the matrices have their outputs first, as the Hub's have.
        interpret: run the kernel as ordinary operations, to test it where there is no GPU.

    Returns:
        [R, N] in the dtype of the rows, summed in float32; padding's rows are whatever was in memory.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    N_axis = 1 if transposed else 2
    N = weights.shape[N_axis]
    rows_RK, weights = _aligned(rows_RK, 1), _aligned(_aligned(weights, 1), 2)
    (R, K), width = rows_RK.shape, weights.shape[N_axis]
    row_tile = _row_tile(R, sizes_E.size)
    out_tile, step = math.gcd(width, TILE), math.gcd(K, STEP_BYTES // rows_RK.dtype.itemsize)

    def kernel(rows_ref, weights_ref, experts_ref, starts_ref, ends_ref, out_ref):
        tile = pl.program_id(1)
        expert, start, end = experts_ref[tile], starts_ref[tile], ends_ref[tile]
        rows, columns = pl.ds(start, row_tile), pl.ds(pl.program_id(0) * out_tile, out_tile)

        @pl.when(start < end)
        def _():
            mine = (start + jnp.arange(row_tile, dtype=jnp.int32) < end)[:, None]

            def add(index, sums):
                summed = pl.ds(index * step, step)
                x = triton.load(rows_ref.at[rows, summed], mask=mine, other=0)
                matrix = weights_ref.at[(expert, columns, summed) if transposed else (expert, summed, columns)]
                return sums + _dot(x, triton.load(matrix), (1, 1) if transposed else (1, 0))

            sums = jax.lax.fori_loop(0, K // step, add, jnp.zeros((row_tile, out_tile), jnp.float32))
            triton.store(out_ref.at[rows, columns], sums.astype(out_ref.dtype), mask=mine)

    experts_I, starts_I, ends_I = _row_tiles(sizes_E, R, row_tile)
    out_RN = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((R, width), rows_RK.dtype),
        # Neighbouring programs share rows and an expert: both are then read from the second-level cache.
        grid=(width // out_tile, experts_I.size),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_matmul",
    )(rows_RK, weights, experts_I, starts_I, ends_I)
    return out_RN[:, :N]


def outer(left_RO: jax.Array, right_RI: jax.Array, sizes_E: jax.Array, *, interpret: bool = False) -> jax.Array:
    """For each expert the sum of its rows' outer products: the gradient of its matrix.

    Args:
        left_RO: rows sorted by expert, bfloat16, float16 or float32.
        right_RI: the same rows' other factor, same dtype.
        sizes_E: rows of each expert, int32; rows past their sum are padding and take no part, whatever they hold.
        interpret: run the kernel as ordinary operations, to test it where there is no GPU.

    Returns:
        [E, O, I] in the dtype of the rows, summed in float32; zeros for an expert without rows.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    widths = left_RO.shape[1], right_RI.shape[1]
    left_RO, right_RI = _aligned(left_RO, 1), _aligned(right_RI, 1)
    left_width, right_width = left_RO.shape[1], right_RI.shape[1]
    left_tile, right_tile = math.gcd(left_width, TILE), math.gcd(right_width, TILE)
    step = STEP_BYTES // left_RO.dtype.itemsize

    def kernel(left_ref, right_ref, starts_ref, ends_ref, out_ref):
        expert = pl.program_id(2)
        start, end = starts_ref[expert], ends_ref[expert]
        left_columns = pl.ds(pl.program_id(0) * left_tile, left_tile)
        right_columns = pl.ds(pl.program_id(1) * right_tile, right_tile)

        def add(index, sums):
            first = start + index * step
            rows, mine = pl.ds(first, step), (first + jnp.arange(step, dtype=jnp.int32) < end)[:, None]
            left = triton.load(left_ref.at[rows, left_columns], mask=mine, other=0)
            right = triton.load(right_ref.at[rows, right_columns], mask=mine, other=0)
            return sums + _dot(left, right, (0, 0))

        sums = jax.lax.fori_loop(0, pl.cdiv(end - start, step), add, jnp.zeros((left_tile, right_tile), jnp.float32))
        triton.store(out_ref.at[expert, left_columns, right_columns], sums.astype(out_ref.dtype))

    ends_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    out_EOI = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((sizes_E.size, left_width, right_width), left_RO.dtype),
        grid=(left_width // left_tile, right_width // right_tile, sizes_E.size),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_outer",
    )(left_RO, right_RI, ends_E - sizes_E, ends_E)
    return out_EOI[:, : widths[0], : widths[1]]


def select_layer(weights: jax.Array, sizes_E: jax.Array, layer: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """A layer of stacked weights [L, E, O, I], as weights and sizes for `ragged`."""
    return jax.lax.dynamic_index_in_dim(weights, layer, keepdims=False), sizes_E


def _row_tile(rows: int, experts: int) -> int:
    """Rows of a tile: about an expert's share, so that in decoding a tile is not mostly empty."""
    share = next_power_of_two(rows // experts)
    return min(max(share, ALIGNMENT), TILE)


def _row_tiles(sizes_E: jax.Array, rows: int, row_tile: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each tile's expert, its first row, and the row after the expert's last; tiles too many start at or past that."""
    count = rows // row_tile + min(sizes_E.size, rows)  # each expert has at most one tile that is not full
    row_ends_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    tiles_E = ceil_div(sizes_E, row_tile)
    tile_ends_E = jnp.cumsum(tiles_E, dtype=jnp.int32)
    tile_I = jnp.arange(count, dtype=sizes_E.dtype)
    experts_I = jnp.sum(tile_I[:, None] >= tile_ends_E, axis=1, dtype=sizes_E.dtype).clip(max=sizes_E.size - 1)
    starts_I = (row_ends_E - sizes_E)[experts_I] + (tile_I - (tile_ends_E - tiles_E)[experts_I]) * row_tile
    return experts_I, starts_I, row_ends_E[experts_I]


def _dot(left: jax.Array, right: jax.Array, summed: tuple[int, int]) -> jax.Array:
    """Product of two matrices over the given axis of each, in float32."""
    axes = (((summed[0],), (summed[1],)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


def _aligned(array: jax.Array, axis: int) -> jax.Array:
    """The array with zeros up to a multiple of `ALIGNMENT` along `axis`: itself, for every published model."""
    widths = [(0, -size % ALIGNMENT if index == axis else 0) for index, size in enumerate(array.shape)]
    return jnp.pad(array, widths)
