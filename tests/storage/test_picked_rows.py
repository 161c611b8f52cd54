"""Rows picked by runs are read in slices, whatever slice is asked for, and never outside it."""

import itertools

import numpy as np
import pytest

from qwen_moe_jax.storage.arrays import ArrayTensor
from qwen_moe_jax.storage.tensor import Index, PickedRows, StoredTensor, TensorSlice, index_shape

ONE = ArrayTensor(np.arange(60, dtype=np.float32).reshape(12, 5), "one")
OTHER = ArrayTensor(np.arange(100, 130, dtype=np.float32).reshape(6, 5), "other")
RUNS = ((ONE, 8, 12), (OTHER, 0, 1), (ONE, 0, 2), (OTHER, 3, 6), (ONE, 5, 6))
PICKED = PickedRows(RUNS)
EXPECTED = np.concatenate([tensor.array[start:stop] for tensor, start, stop in RUNS])


def test_the_rows_are_the_runs_one_after_the_other():
    assert (PICKED.shape, PICKED.dtype, PICKED.source) == ((11, 5), "float32", "one")
    np.testing.assert_array_equal(PICKED.read(), EXPECTED)


def test_every_slice_is_the_slice_of_the_whole():
    for start, stop in itertools.combinations_with_replacement(range(12), 2):
        found = PICKED.read((slice(start, stop), slice(1, 4)))
        np.testing.assert_array_equal(found, EXPECTED[start:stop, 1:4])


def test_values_are_cast_to_the_dtype_that_is_asked_for():
    out = np.empty((11, 5), np.float64)
    PICKED.read_into((slice(0, 11), slice(0, 5)), out)
    np.testing.assert_array_equal(out, EXPECTED)


def test_trailing_axes_and_slices_of_slices():
    cube = ArrayTensor(np.arange(24.0).reshape(4, 3, 2), "cube")
    picked = PickedRows(((cube, 2, 4), (cube, 0, 1)))
    np.testing.assert_array_equal(TensorSlice(picked, (slice(1, 3), 2)).read(), cube.array[[3, 0], 2])


class Recorded(StoredTensor):
    """A tensor that notes the number of values in each slice it reads."""

    shape, dtype, source = (1000, 4), "float32", "recorded"

    def __init__(self):
        self.read_values: list[int] = []

    def read_into(self, index: Index, out: np.ndarray) -> None:
        self.read_values.append(int(np.prod(index_shape(index))))
        out[...] = 0


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_no_more_is_read_than_is_asked_for(rows):
    recorded = Recorded()
    picked = PickedRows(tuple((recorded, start, start + 10) for start in range(990, -1, -10)))
    picked.read((slice(333, 333 + rows), slice(0, 4)))
    assert sum(recorded.read_values) == 4 * rows
