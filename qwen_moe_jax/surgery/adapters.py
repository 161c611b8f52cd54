"""How far an adapter has been merged into the matrices of a checkpoint: B = A + c · (scaling · b a), for some c."""

import math

import numpy as np

from qwen_moe_jax.storage.tensor import StoredTensor
from qwen_moe_jax.surgery.measure import row_blocks
from qwen_moe_jax.surgery.result import Finding
from qwen_moe_jax.surgery.sides import read32
from qwen_moe_jax.surgery.tensors import finding
from qwen_moe_jax.surgery.tolerance import bounds


def diagnose_merge(name: str, base: StoredTensor, merged: StoredTensor, second: StoredTensor) -> Finding | None:
    """What share of the adapter is in B's matrix; None if it is the expected one, or B is no sum of the two.

    The expected share is that of a right merge, rounded to B's dtype: little is left of an adapter that is small
    compared with the weights' rounding.

    Args:
        name: of the matrix.
        base: A's.
        merged: A's with the adapter added once.
        second: B's.
    """
    if second.shape != base.shape:
        return None
    sums = np.zeros(5)
    rounded_product = 0.0
    for block in row_blocks(base.shape):
        a, b = read32(base, block).astype(np.float64), read32(second, block).astype(np.float64)
        delta = read32(merged, block) - a
        change = b - a
        rounded = read32(merged, block).astype(second.dtype).astype(np.float64) - a
        rounded_product += (rounded * delta).sum()
        sums += [(change * delta).sum(), (delta**2).sum(), (change**2).sum(), (a**2).sum(), change.size]
    product, deltas, changes, weights, size = sums
    if not deltas:
        return None
    factor, expected = product / deltas, rounded_product / deltas
    left = max(changes - factor * product, 0.0)
    unit = max((bound.relative for bound in bounds(base, second, computed=True)), default=0.0)
    if math.sqrt(left) > unit * (math.sqrt(weights) + abs(factor) * math.sqrt(deltas)) + 1e-3 * math.sqrt(deltas):
        return None
    # How well the factor is known: rounding of the weights hides a small adapter.
    known = 0.02 + 2 * math.sqrt(left / deltas / max(size, 1))
    if abs(factor - expected) <= known:
        return None
    if abs(factor) <= known:
        return finding("adapter missing", "the adapter has not been added", name, 0.0)
    if abs(factor - 2) <= 2 * known:
        return finding("adapter twice", "the adapter has been added twice", name, 2.0)
    return finding(
        "adapter scaled", f"the adapter has been added with {factor:.3g} times its scale", name, float(factor)
    )
