"""Triangular systems with ones on their diagonal, many small ones at once, solved exactly and by matmuls.

XLA's own triangular solve took about twice as long on a CPU of two cores, for 32 systems of 64 rows. A power series,
which is fewer matmuls, loses its digits to cancellation where the entries are near one.

Letters of this file: X any leading axes, C rows of a system, P right-hand sides, m blocks of its diagonal, J rows of a
block.
"""

import jax
import jax.numpy as jnp
import numpy as np

#: Rows of the blocks that are inverted first.
SMALLEST_BLOCK = 8


@jax.custom_vjp
def solve_unit_lower(lower_XCC: jax.Array, right_XCP: jax.Array) -> jax.Array:
    """The solution x of (I + lower) x = right.

    Args:
        lower_XCC: float32, zero on and above its diagonal; C is a power of two, at least `SMALLEST_BLOCK`.
        right_XCP: float32.
    """
    return _inverse(lower_XCC) @ right_XCP


def _forward(lower_XCC, right_XCP):
    inverse_XCC = _inverse(lower_XCC)
    solution_XCP = inverse_XCC @ right_XCP
    return solution_XCP, (inverse_XCC, solution_XCP)


def _backward(saved, of_solution_XCP):
    inverse_XCC, solution_XCP = saved
    of_right_XCP = inverse_XCC.mT @ of_solution_XCP
    return -jnp.tril(of_right_XCP @ solution_XCP.mT, -1), of_right_XCP


solve_unit_lower.defvjp(_forward, _backward)


def _inverse(lower_XCC: jax.Array) -> jax.Array:
    """The inverse of I + lower, exact to rounding, by matmuls alone.

    Two inverted blocks of the diagonal and what lies below them give one of twice the size:
    [[A, 0], [L, B]]^-1 = [[A^-1, 0], [-B^-1 L A^-1, B^-1]]. Up to `SMALLEST_BLOCK` all blocks of a size are merged in
    one product with zeros between them, which is less work than to move them.
    """
    *_, length, _ = lower_XCC.shape
    block, blocks_XmJJ = 1, _diagonal_blocks(lower_XCC, SMALLEST_BLOCK)
    row, column = np.indices((SMALLEST_BLOCK, SMALLEST_BLOCK))
    inverse_XmJJ = jnp.eye(SMALLEST_BLOCK, dtype=jnp.float32)
    while block < SMALLEST_BLOCK:
        below = (row // block % 2 == 1) & (row // block == column // block + 1)
        part_XmJJ = jnp.where(below, blocks_XmJJ, 0)
        inverse_XmJJ -= part_XmJJ if block == 1 else inverse_XmJJ @ part_XmJJ @ inverse_XmJJ
        block *= 2
    while block < length:
        below_XmJJ = _diagonal_blocks(lower_XCC, 2 * block)[..., block:, :block]
        first_XmJJ, second_XmJJ = inverse_XmJJ[..., 0::2, :, :], inverse_XmJJ[..., 1::2, :, :]
        corner_XmJJ = -second_XmJJ @ (below_XmJJ @ first_XmJJ)
        top = jnp.concatenate([first_XmJJ, jnp.zeros_like(first_XmJJ)], axis=-1)
        inverse_XmJJ = jnp.concatenate([top, jnp.concatenate([corner_XmJJ, second_XmJJ], axis=-1)], axis=-2)
        block *= 2
    return inverse_XmJJ[..., 0, :, :]


def _diagonal_blocks(x_XCC: jax.Array, size: int) -> jax.Array:
    """The square blocks of that size on the diagonal, [..., m, size, size]."""
    starts = range(0, x_XCC.shape[-1], size)
    return jnp.stack([x_XCC[..., start : start + size, start : start + size] for start in starts], axis=-3)
