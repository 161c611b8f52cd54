"""Grouped matmuls for CPUs: by C functions where they are available, else in XLA's own operations, for any device.

The C functions are those of `nn.kernels.matmul`. XLA's operations are a loop over blocks of sorted rows. It runs over
the blocks that have rows, so its cost follows the rows, not the buffer. A block starts where its expert's rows start
and may reach into the next expert's; what it writes there is overwritten, since the next expert's blocks come later.
Products accumulate in float32.

XLA's products on CPUs pack an expert's matrix anew for every block, which takes as long as some 20 rows: an expert with
many rows has few long blocks, and its last one is hardly longer than the rows that are left.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from qwen_moe_jax.nn.bits import as_bits, from_bits, rows_at
from qwen_moe_jax.nn.kernels import matmul
from qwen_moe_jax.nn.kernels.cpu import arrays_of, format_of, picked_matmul
from qwen_moe_jax.nn.quantised import Quantised, Weight, as_matrix
from qwen_moe_jax.rounding import next_power_of_two

#: Rows of the longest and the shortest block where there is one length only, and of a buffer's end that may be read.
LONGEST, SHORTEST = 128, 4
#: Rows that are worth a matmul: XLA's on CPUs transposes the matrix first, which takes as long as multiplying it with
#: some 4 vectors.
MATMUL = 8
#: Numbers of a matrix from which on it is worth having blocks of several lengths, each of which is compiled.
SEVERAL_LENGTHS = 2**16


def tile_rows(rows: int) -> int:
    """The longest block for this many rows. A buffer has one more than the rows fill, where the last ends."""
    return min(max(SHORTEST, next_power_of_two(rows)), LONGEST)


def ragged(
    rows_RK: jax.Array, weights: Weight, sizes_E: jax.Array, *, transposed: bool, first: jax.Array | int = 0
) -> jax.Array:
    """Each row times its expert's matrix.

    Args:
        rows_RK: rows sorted by expert, at least `tile_rows` of them past the last real one.
        weights: [M, N, K] if `transposed` (a row is multiplied with the transpose), else [M, K, N]; quantised ones are
            dequantised a matrix at a time.
        sizes_E: rows of each expert.
        first: int32 []; of the M matrices, that of the first expert. The others' follow it.

    Returns:
        [R, N] in the dtype of the rows. Rows past the last real one mean nothing.
    """
    floats = None if isinstance(weights, Quantised) or weights.dtype != rows_RK.dtype else weights
    if floats is not None and matmul.is_worth_it(rows_RK.dtype, *floats.shape[1:]):
        return matmul.ragged_matmul(rows_RK, floats, sizes_E, transposed=transposed, first=first)
    lengths = block_lengths(len(rows_RK), len(sizes_E), weights.shape[1] * weights.shape[2])
    lengths = lengths if lengths[-1] >= MATMUL else (1,)
    ends_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    contracted = ((1,), (1 if transposed else 0,))

    def run_expert(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, out_RN = state
        # The next one that has rows. Its matrix is copied, since XLA on CPUs multiplies with no slice: once is enough.
        expert = jnp.searchsorted(ends_E, start, side="right", method="compare_all")
        matrix = as_matrix(jax.tree.map(lambda array: rows_at(array, first + expert, 1)[0], weights), rows_RK.dtype)

        def multiply(block: int, start: jax.Array, out_RN: jax.Array) -> jax.Array:
            rows_bK = rows_at(rows_RK, start, block)
            product_bN = jax.lax.dot_general(
                rows_bK, matrix, (contracted, ((), ())), preferred_element_type=jnp.float32
            )
            return jax.lax.dynamic_update_slice_in_dim(out_RN, product_bN, start, axis=0)

        end = ends_E[expert]
        return end, _in_blocks(lengths, multiply, start, end, out_RN)

    # Cast once at the end: a cast on the way into the buffer takes XLA on CPUs longer than the product itself.
    width = weights.shape[1 if transposed else 2]
    begin = jnp.int32(0), jnp.zeros((len(rows_RK), width), jnp.float32)
    out_RN = jax.lax.while_loop(lambda state: state[0] < ends_E[-1], run_expert, begin)[1]
    return out_RN.astype(rows_RK.dtype)


def ragged_in_place(
    rows_RI: jax.Array, weights: Sequence[Weight], matrices_G: jax.Array, sizes_G: jax.Array
) -> list[jax.Array]:
    """Few rows times the transpose of their group's matrix in each of several stacks [..., O, I], read in place.

    Args:
        rows_RI: rows sorted by group.
        weights: stacks for which `nn.kernels.cpu.reads_in_place`.
        matrices_G: int32; the matrix of each group, counted over all leading axes of a stack.
        sizes_G: rows of each group.

    Returns:
        [R, O] for each stack, in the dtype of the rows, and zeros past the last real one.
    """
    stacks = [arrays_of(weight) for weight in weights]
    products = picked_matmul(rows_RI.astype(jnp.float32), stacks, matrices_G, sizes_G, format_of(weights[0]))
    return [product_RO.astype(rows_RI.dtype) for product_RO in products]


def outer(left_RO: jax.Array, right_RI: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Each expert's sum of outer products of its rows, the gradient of its weights.

    Args:
        left_RO, right_RI: rows sorted by expert, in a buffer as for `ragged`.
        sizes_E: rows of each expert.

    Returns:
        [E, O, I] in the dtype of the rows; zeros for an expert without rows.
    """
    shape = left_RO.shape[1], right_RI.shape[1]
    if left_RO.dtype == right_RI.dtype and matmul.is_worth_it(left_RO.dtype, *shape):
        return matmul.ragged_outer(left_RO, right_RI, sizes_E)
    lengths = block_lengths(len(left_RO), len(sizes_E), shape[0] * shape[1])
    ends_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    starts_E = ends_E - sizes_E

    def one_expert(expert: jax.Array, out_EOI: jax.Array) -> jax.Array:
        end = ends_E[expert]

        def add(block: int, start: jax.Array, sum_OI: jax.Array) -> jax.Array:
            own_b1 = (start + jnp.arange(block, dtype=jnp.int32) < end)[:, None]
            left_bO = jnp.where(own_b1, rows_at(left_RO, start, block), 0)
            right_bI = jnp.where(own_b1, rows_at(right_RI, start, block), 0)  # 0 * NaN of a neighbour is NaN
            return sum_OI + jax.lax.dot_general(
                left_bO, right_bI, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )

        sum_OI = _in_blocks(lengths, add, starts_E[expert], end, jnp.zeros(shape, jnp.float32))
        of_expert_1OI = as_bits(sum_OI.astype(left_RO.dtype))[None]
        return jax.lax.dynamic_update_slice_in_dim(out_EOI, of_expert_1OI, expert, axis=0)

    out_EOI = as_bits(jnp.zeros((len(sizes_E), *shape), left_RO.dtype))
    return from_bits(jax.lax.fori_loop(0, len(sizes_E), one_expert, out_EOI))


def select_layer(weights: Weight, layer: jax.Array) -> tuple[Weight, jax.Array]:
    """A layer of stacked weights [L, E, O, I], as weights and the number of its first one for `ragged`: no copy."""
    flat = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), weights)
    return flat, layer * weights.shape[1]


def matrix_at(weights: jax.Array, index: jax.Array) -> jax.Array:
    """One expert's matrix [O, I] of [..., O, I], in a loop read without a copy of all."""
    return rows_at(weights.reshape(-1, *weights.shape[-2:]), index, 1)[0]


def block_lengths(buffer: int, experts: int, size: int) -> tuple[int, ...]:
    """Rows of the blocks of an expert's rows, in ascending order.

    Args:
        buffer: rows of the buffer.
        experts: that may have rows in it.
        size: of a matrix, in numbers.
    """
    end = min(LONGEST, buffer // 2)  # what `tile_rows` said when the buffer was made
    mean = max(1, (buffer - end) // experts)
    power = min(max(next_power_of_two(mean), SHORTEST), end)
    if power < 2 * MATMUL or size < SEVERAL_LENGTHS:
        return (power,)  # longer blocks would be half empty, shorter ones waste the matmul
    step = power // 4
    return tuple(step * count for count in (1, 2, 3, 4, 5, 6, 8) if step * count <= buffer - end)


def _in_blocks(
    lengths: tuple[int, ...],
    run: Callable[[int, jax.Array, jax.Array], jax.Array],
    start: jax.Array,
    end: jax.Array,
    result: jax.Array,
) -> jax.Array:
    """Runs `run(rows of a block, its first row, result)` on block after block: the shortest that holds what is left."""

    # A loop for each length, the longest first, and not a switch: XLA on CPUs copies what a switch passes through.
    state = start, result
    for shorter, length in reversed(list(zip((0, *lengths), lengths, strict=False))):

        def fits(state: tuple[jax.Array, jax.Array], shorter: int = shorter) -> jax.Array:
            return end - state[0] > shorter

        def one_block(state: tuple[jax.Array, jax.Array], length: int = length) -> tuple[jax.Array, jax.Array]:
            return state[0] + length, run(length, *state)

        state = jax.lax.while_loop(fits, one_block, state)
    return state[1]
