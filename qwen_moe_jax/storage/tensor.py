"""Tensors that are read in slices: from a file, from several files stacked, by rows, from arrays on devices.

Each of these is a `StoredTensor`. Code that writes a file or fills devices reads it in blocks, whatever its source, and
holds a few blocks of it in memory.
"""

import abc
import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import ml_dtypes  # noqa: F401  registers bfloat16 and the float8 types with NumPy
import numpy as np

from qwen_moe_jax.rounding import ceil_div

#: A slice of an array: start and stop, and no step, for every axis.
Index = tuple[slice, ...]


class StoredTensor(abc.ABC):
    """An array in a file or on devices, of which slices are read.

    Attributes:
        shape: of the array.
        dtype: NumPy's name of its element type ("bfloat16", "float32", "float8_e4m3fn", …).
        source: name of the file (or device array) that holds it, for messages.
    """

    if TYPE_CHECKING:  # in words only: a subclass has them as fields or as properties

        @property
        def shape(self) -> tuple[int, ...]: ...
        @property
        def dtype(self) -> str: ...
        @property
        def source(self) -> str: ...

    @abc.abstractmethod
    def read_into(self, index: Index, out: np.ndarray) -> None:
        """Reads a slice into an array of its shape, cast to that array's dtype. Thread-safe.

        Args:
            index: the slice.
            out: array of shape `index_shape(index)`, which is overwritten.

        Raises:
            CheckpointError: the file cannot be read, or is shorter than its header says.
        """

    def read(self, index: Index | None = None) -> np.ndarray:
        """Reads a slice, or the whole tensor, into a new array."""
        index = full_index(self.shape) if index is None else index
        out = np.empty(index_shape(index), self.dtype)
        self.read_into(index, out)
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return nbytes(self.shape, self.dtype)


class TensorView(StoredTensor):
    """A tensor that is computed from another: with its shape, dtype and source, unless a subclass has its own.

    Attributes:
        tensor: the other one.
    """

    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def source(self) -> str:
        return self.tensor.source


@dataclasses.dataclass(frozen=True)
class TensorSlice(TensorView):
    """A slice of another tensor; axes that are indexed by a number are dropped, as in NumPy.

    Attributes:
        tensor: the tensor that is sliced.
        window: a number or a slice for each leading axis; the remaining axes are taken whole.
    """

    tensor: StoredTensor
    window: tuple[int | slice, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        kept = [part.stop - part.start for part in self.window if isinstance(part, slice)]
        return (*kept, *self.tensor.shape[len(self.window) :])

    def read_into(self, index: Index, out: np.ndarray) -> None:
        asked = iter(index)
        inner: list[slice] = []
        for part in self.window:
            if isinstance(part, slice):
                own = next(asked)
                inner.append(slice(part.start + own.start, part.start + own.stop))
            else:
                inner.append(slice(part, part + 1))
        inner += asked
        self.tensor.read_into(tuple(inner), out.reshape(index_shape(tuple(inner))))


@dataclasses.dataclass(frozen=True)
class StackedTensor(StoredTensor):
    """Tensors of one shape, stacked along new leading axes.

    Attributes:
        tensors: object array of `StoredTensor`; its axes become the leading axes.
        dtype: that their values are cast to.
    """

    tensors: np.ndarray
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.tensors.shape, *self.tensors.flat[0].shape)

    @property
    def source(self) -> str:
        return self.tensors.flat[0].source

    def read_into(self, index: Index, out: np.ndarray) -> None:
        axes = self.tensors.ndim
        for position, tensor in np.ndenumerate(self.tensors[index[:axes]]):
            tensor.read_into(index[axes:], out[(*position, ...)])


@dataclasses.dataclass(frozen=True)
class CastTensor(StoredTensor):
    """A tensor cast to another dtype.

    Attributes:
        tensor: the tensor that is cast.
        dtype: that its values are rounded to.
    """

    tensor: StoredTensor
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def source(self) -> str:
        return self.tensor.source

    def read_into(self, index: Index, out: np.ndarray) -> None:
        if out.dtype == self.dtype:
            self.tensor.read_into(index, out)
        else:
            out[...] = self.read(index)


@dataclasses.dataclass(frozen=True)
class PickedRows(StoredTensor):
    """Rows of one or several tensors of the same width, in another order: one run of rows after the other.

    Attributes:
        runs: (tensor, first row, row after the last) of each run; every run has at least one row.
    """

    runs: tuple[tuple[StoredTensor, int, int], ...]

    @functools.cached_property
    def _starts(self) -> list[int]:
        """The first row of each run here, and the number of rows."""
        return [0, *itertools.accumulate(stop - start for _, start, stop in self.runs)]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._starts[-1], *self.runs[0][0].shape[1:])

    @property
    def dtype(self) -> str:
        return self.runs[0][0].dtype

    @property
    def source(self) -> str:
        return self.runs[0][0].source

    def read_into(self, index: Index, out: np.ndarray) -> None:
        rows = index[0]
        first = bisect.bisect_right(self._starts, rows.start) - 1
        for (tensor, start, _), begin, end in zip(
            self.runs[first:], self._starts[first:], self._starts[first + 1 :], strict=False
        ):
            low, high = max(rows.start, begin), min(rows.stop, end)
            if low >= high:
                break
            inner = slice(start + low - begin, start + high - begin)
            tensor.read_into((inner, *index[1:]), out[low - rows.start : high - rows.start])


@dataclasses.dataclass(frozen=True)
class ZeroPaddedTensor(StoredTensor):
    """A tensor padded with zeros at the end of its axes.

    Attributes:
        tensor: the tensor that is padded.
        shape: with padding; at least the tensor's along every axis.
    """

    tensor: StoredTensor
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def source(self) -> str:
        return self.tensor.source

    def read_into(self, index: Index, out: np.ndarray) -> None:
        known = tuple(
            slice(part.start, max(part.start, min(part.stop, size)))
            for part, size in zip(index, self.tensor.shape, strict=True)
        )
        if index_shape(known) == index_shape(index):
            self.tensor.read_into(index, out)
            return
        out[...] = 0
        if 0 not in index_shape(known):
            # Read separately: tensors are read into contiguous memory.
            out[tuple(slice(0, size) for size in index_shape(known))] = self.tensor.read(known)


def full_index(shape: Sequence[int]) -> Index:
    """The index of a whole array."""
    return tuple(slice(0, size) for size in shape)


def nbytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of an array of this shape and dtype."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def index_shape(index: Index) -> tuple[int, ...]:
    """The shape of the slice that an index selects."""
    return tuple(part.stop - part.start for part in index)


def blocks(shape: Sequence[int], itemsize: int, limit: int) -> Iterator[Index]:
    """Divides an array into blocks of at most `limit` bytes, each contiguous in memory, in memory order.

    Leading axes are split into single rows until one row fits, and one more axis into nearly equal runs: the blocks of
    an expert stack [L, E, F, D] are a few experts of one layer each.

    Args:
        shape: of the array.
        itemsize: bytes of an element.
        limit: bytes of a block. A block holds at least one element.
    """
    shape = tuple(shape)
    axis, inner = 0, math.prod(shape) * itemsize
    while axis < len(shape) and inner > limit:
        inner //= max(shape[axis], 1)
        axis += 1
    if axis == 0:
        yield full_index(shape)
        return
    size = shape[axis - 1]
    count = ceil_div(size, max(limit // max(inner, 1), 1))
    runs = [slice(size * run // count, size * (run + 1) // count) for run in range(count)]
    for leading in itertools.product(*map(range, shape[: axis - 1])):
        for run in runs:
            yield (*(slice(at, at + 1) for at in leading), run, *full_index(shape[axis:]))
