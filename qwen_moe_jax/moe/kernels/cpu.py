"""Grouped matmuls in XLA's own operations, for any device and made for CPUs: a loop over blocks of sorted rows.

The loop runs over the blocks that have rows, so its cost follows the rows, not the buffer. A block starts where its
expert's rows start and may reach into the next expert's; what it writes there is overwritten, since the next expert's
blocks come later. Products accumulate in float32.
"""

import jax
import jax.numpy as jnp

from qwen_moe_jax.nn.bits import rows_at
from qwen_moe_jax.rounding import next_power_of_two

#: Rows of the longest and the shortest block.
LONGEST, SHORTEST = 128, 4
#: Rows that are worth a matmul: XLA's on CPUs transposes the matrix first, which takes as long as multiplying it with
#: some 4 vectors.
MATMUL = 8
#: Rows per expert up to which a layer's experts are read from the stack of all layers. With more, the products outweigh
#: the copy of the layer's experts, and blocks sized for one layer's experts are better filled. Measured in float32: at
#: 8 the copy takes half as long again, at 16 the two are nearly even (benchmarks/results/decode-cpu.md).
FEW_ROWS = 16


def tile_rows(rows: int) -> int:
    """The longest block for this many rows. A buffer has one more than the rows fill, where the last ends."""
    return min(max(SHORTEST, next_power_of_two(rows)), LONGEST)


def ragged(rows_RK: jax.Array, weights: jax.Array, sizes_E: jax.Array, *, transposed: bool) -> jax.Array:
    """Each row times its expert's matrix.

    Args:
        rows_RK: rows sorted by expert, at least `tile_rows` of them past the last real one.
        weights: [E, N, K] if `transposed` (a row is multiplied with the transpose), else [E, K, N].
        sizes_E: rows of each expert.

    Returns:
        [R, N] in the dtype of the rows. Rows past the last real one mean nothing.
    """
    block = _block_rows(len(rows_RK), len(weights))
    block = block if block >= MATMUL else 1
    ends_E = jnp.cumsum(sizes_E)
    contracted = ((1,), (1 if transposed else 0,))

    def run_expert(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first, out_RN = state
        # The next one that has rows. Its matrix is copied, since XLA on CPUs multiplies with no slice: once is enough.
        expert = jnp.searchsorted(ends_E, first, side="right", method="compare_all")
        matrix = rows_at(weights, expert, 1)[0]

        def multiply(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            start, out_RN = state
            rows_bK = rows_at(rows_RK, start, block)
            product_bN = jax.lax.dot_general(
                rows_bK, matrix, (contracted, ((), ())), preferred_element_type=jnp.float32
            )
            return start + block, jax.lax.dynamic_update_slice(out_RN, product_bN, (start, 0))

        end = ends_E[expert]
        return end, jax.lax.while_loop(lambda state: state[0] < end, multiply, (first, out_RN))[1]

    # Cast once at the end: a cast on the way into the buffer takes XLA on CPUs longer than the product itself.
    width = weights.shape[1 if transposed else 2]
    start = jnp.int32(0), jnp.zeros((len(rows_RK), width), jnp.float32)
    out_RN = jax.lax.while_loop(lambda state: state[0] < ends_E[-1], run_expert, start)[1]
    return out_RN.astype(rows_RK.dtype)


def outer(left_RO: jax.Array, right_RI: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Each expert's sum of outer products of its rows, the gradient of its weights.

    Args:
        left_RO, right_RI: rows sorted by expert, in a buffer as for `ragged`.
        sizes_E: rows of each expert.

    Returns:
        [E, O, I] in the dtype of the rows; zeros for an expert without rows.
    """
    block = _block_rows(len(left_RO), len(sizes_E))
    ends_E = jnp.cumsum(sizes_E)
    starts_E = ends_E - sizes_E
    shape = left_RO.shape[1], right_RI.shape[1]

    def one_expert(expert: jax.Array, out_EOI: jax.Array) -> jax.Array:
        def add(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            start, sum_OI = state
            own_b1 = (start + jnp.arange(block) < ends_E[expert])[:, None]
            left_bO = jnp.where(own_b1, rows_at(left_RO, start, block), 0)
            right_bI = jnp.where(own_b1, rows_at(right_RI, start, block), 0)  # 0 * NaN of a neighbour is NaN
            product_OI = jax.lax.dot_general(
                left_bO, right_bI, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
            return start + block, sum_OI + product_OI

        start = starts_E[expert], jnp.zeros(shape, jnp.float32)
        sum_OI = jax.lax.while_loop(lambda state: state[0] < ends_E[expert], add, start)[1]
        return jax.lax.dynamic_update_slice(out_EOI, sum_OI.astype(out_EOI.dtype)[None], (expert, 0, 0))

    return jax.lax.fori_loop(0, len(sizes_E), one_expert, jnp.zeros((len(sizes_E), *shape), left_RO.dtype))


def select_layer(weights: jax.Array, sizes_E: jax.Array, layer: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """A layer of stacked weights [L, E, O, I], as weights and sizes for `ragged`.

    Few rows are multiplied with the experts of all layers in one row, of which those of other layers have no rows: a
    copy of the layer's experts would read all of them, and a few rows need few.

    Args:
        weights: of all layers.
        sizes_E: rows of each of the layer's experts.
        layer: int32 [].
        rows: of the buffer.
    """
    layers, experts = weights.shape[:2]
    if rows > FEW_ROWS * experts:
        return rows_at(weights, layer, 1)[0], sizes_E
    sizes_N = jnp.zeros(layers * experts, sizes_E.dtype)
    sizes_N = jax.lax.dynamic_update_slice_in_dim(sizes_N, sizes_E, layer * experts, axis=0)
    return weights.reshape(layers * experts, *weights.shape[2:]), sizes_N


def matrix_at(weights: jax.Array, index: jax.Array) -> jax.Array:
    """One expert's matrix [O, I] of [..., O, I], in a loop read without a copy of all."""
    return rows_at(weights.reshape(-1, *weights.shape[-2:]), index, 1)[0]


def _block_rows(buffer: int, experts: int) -> int:
    """A power of two near the mean rows of an expert: longer blocks are half empty, shorter ones waste the matmul."""
    longest = min(LONGEST, buffer // 2)  # what `tile_rows` said when the buffer was made
    mean = max(1, (buffer - longest) // experts)
    return min(max(next_power_of_two(mean), SHORTEST), longest)
