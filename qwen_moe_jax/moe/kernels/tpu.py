"""Grouped matmuls on TPUs by JAX's own Pallas kernels, megablox.

`jax.lax.ragged_dot` compiles to grouped kernels there too, but its weight gradient multiplies every row with every
expert in jax 0.10 (no longer in 0.12), and it keeps five times the temporaries. Here all three products are grouped.
"""

import jax
import jax.numpy as jnp

from qwen_moe_jax.rounding import ceil_div, round_up

#: Bytes of a core's vector memory that the tiles may take; XLA gives a kernel 16 MiB of it on v5e and v5p.
TILE_BYTES = 10 * 2**20

#: Rows, columns and sums of a tile are multiples of this, the width of a vector register.
LANES = 128


def ragged(
    rows_RK: jax.Array, weights: jax.Array, sizes_E: jax.Array, *, transposed: bool, interpret: bool = False
) -> jax.Array:
    """Each row times the matrix of its expert.

    Args:
        rows_RK: rows sorted by expert, bfloat16 or float32.
        weights: [E, N, K] if `transposed`, else [E, K, N]; the dtype of the rows.
        sizes_E: rows of each expert, int32; rows past their sum are padding.
        transposed: whether the matrices have their outputs first, as the Hub's have.
        interpret: run the kernel as ordinary operations, to test it where there is no TPU.

    Returns:
        [R, N] in the dtype of the rows, summed in float32; padding's rows are whatever was in memory.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    R, K = rows_RK.shape
    N = weights.shape[1 if transposed else 2]
    row_tile = _row_tile(R, sizes_E.size)
    out_RN = gmm(
        _padded(rows_RK, row_tile),
        weights,
        sizes_E,
        preferred_element_type=rows_RK.dtype,
        tiling=(row_tile, *_ragged_tile(row_tile, R, sizes_E.size, K, N, rows_RK.dtype.itemsize)),
        transpose_rhs=transposed,
        interpret=interpret,
    )
    return out_RN[:R]


def outer(left_RO: jax.Array, right_RI: jax.Array, sizes_E: jax.Array, *, interpret: bool = False) -> jax.Array:
    """For each expert the sum of its rows' outer products: the gradient of its matrix.

    Args:
        left_RO: rows sorted by expert, bfloat16 or float32.
        right_RI: the same rows' other factor, same dtype.
        sizes_E: rows of each expert, int32; rows past their sum are padding and take no part, whatever they hold.
        interpret: run the kernel as ordinary operations, to test it where there is no TPU.

    Returns:
        [E, O, I] in the dtype of the rows, summed in float32; zeros for an expert without rows.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    row_tile = _row_tile(len(left_RO), sizes_E.size)
    widths = left_RO.shape[1], right_RI.shape[1]
    return tgmm(
        _padded(left_RO, row_tile).T,  # the kernel transposes it back, so that nothing is moved
        _padded(right_RI, row_tile),
        sizes_E,
        preferred_element_type=left_RO.dtype,
        tiling=(row_tile, *_outer_tile(row_tile, *widths, left_RO.dtype.itemsize)),
        interpret=interpret,
    )


def select_layer(weights: jax.Array, sizes_E: jax.Array, layer: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """A layer of stacked weights [L, E, O, I], as weights and sizes for `ragged`.

    Few rows, as in decoding, are multiplied with the experts of all layers in one row, of which those of other layers
    have no rows: a copy of the layer's experts would write and read all of them again. Tiles of many rows are sized by
    the number of experts, which must then be the layer's.
    """
    layers, experts = weights.shape[:2]
    if _row_tile(rows, experts) > LANES:
        return jax.lax.dynamic_index_in_dim(weights, layer, keepdims=False), sizes_E
    sizes_N = jnp.zeros(layers * experts, sizes_E.dtype)
    sizes_N = jax.lax.dynamic_update_slice_in_dim(sizes_N, sizes_E, layer * experts, axis=0)
    return weights.reshape(layers * experts, *weights.shape[2:]), sizes_N


def _row_tile(rows: int, experts: int) -> int:
    """Rows of a tile: every expert starts and ends within one, so about one tile an expert is computed twice."""
    if rows < LANES:
        return round_up(rows, 16)  # a register's rows in bfloat16
    large = (tile for tile in (512, 256) if rows >= 4 * tile * experts and rows % tile == 0)
    return next(large, LANES)


def _padded(rows_RK: jax.Array, row_tile: int) -> jax.Array:
    """Rows up to a whole number of tiles, which the kernels ask for: themselves, if the caller saw to it."""
    return jnp.pad(rows_RK, ((0, -rows_RK.shape[0] % row_tile), (0, 0)))


def _ragged_tile(row_tile: int, rows: int, experts: int, K: int, N: int, itemsize: int) -> tuple[int, int]:
    """Tile of K and N that fits and reads the least: with all of K, an expert's tiles read its matrix only once."""

    def fits(k: int, n: int) -> bool:
        operands = row_tile * k + k * n + row_tile * n
        return 2 * itemsize * operands + 4 * row_tile * n <= TILE_BYTES  # each twice, one being fetched; and the sums

    def reads(k: int, n: int) -> int:
        return rows * K * ceil_div(N, n) + (experts if k == K else rows // row_tile + experts) * K * N

    return min(((k, n) for k in _tiles(K) for n in _tiles(N) if fits(k, n)), key=lambda tile: reads(*tile))


def _outer_tile(row_tile: int, left: int, right: int, itemsize: int) -> tuple[int, int]:
    """Tile of the two widths that fits and reads the rows the fewest times."""

    def fits(m: int, n: int) -> bool:
        operands = row_tile * m + row_tile * n + m * n
        masked = row_tile * (m + n)  # in float32, as the sums
        return 2 * itemsize * operands + 4 * (m * n + masked) <= TILE_BYTES

    def reads(m: int, n: int) -> int:
        return left * ceil_div(right, n) + right * ceil_div(left, m)

    return min(((m, n) for m in _tiles(left) for n in _tiles(right) if fits(m, n)), key=lambda tile: reads(*tile))


def _tiles(size: int) -> list[int]:
    """Tiles to choose from, largest first: the whole dimension, and multiples of `LANES` that divide it evenly."""
    parts = [part for part in range(size - size % LANES, 0, -LANES) if size % part == 0]
    return parts or [size, *range(4 * LANES, 0, -LANES)]
