"""Triangular systems with ones on their diagonal: held to NumPy's solution in float64."""

import jax
import numpy as np
import pytest

from qwen_moe_jax.attention_kernels.triangular import solve_unit_lower
from tests.distance import assert_near


@pytest.mark.parametrize("size", [8, 64, 128])
def test_solution_and_gradients_are_exact(size):
    """Entries near one, whose inverse a power series in float32 would lose to cancellation."""
    numbers = np.random.default_rng(0)
    lower = np.tril(numbers.uniform(0.7, 1, (3, size, size)), -1)
    right, of_solution = numbers.normal(size=(2, 3, size, 5))
    inverse = np.linalg.inv(np.eye(size) + lower)
    solution, of_right = inverse @ right, inverse.transpose(0, 2, 1) @ of_solution
    of_lower = np.tril(-of_right @ solution.transpose(0, 2, 1), -1)
    lower, right, of_solution = (x.astype(np.float32) for x in (lower, right, of_solution))
    found, pull = jax.vjp(solve_unit_lower, lower, right)
    for name, ours, theirs in zip(
        ("solution", "of lower", "of right"), (found, *pull(of_solution)), (solution, of_lower, of_right), strict=True
    ):
        assert_near(ours, theirs, 1e-6, name)
