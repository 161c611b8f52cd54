"""What a tensor that stands somewhere else is to whoever reads it; and how tensors are cut and put together unread.

A file, a stack of the files' tensors, an array on devices: all are a `StoredTensor`, read in parts. So whoever writes or
places one never asks where it comes from, and never holds more of it than a block.
"""

import abc
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import ml_dtypes  # noqa: F401  registers bfloat16 and the float8 types with NumPy
import numpy as np

from qwen_moe_jax.rounding import ceil_div

#: A part of an array: a slice with start and stop, and no step, for every axis.
Index = tuple[slice, ...]


class StoredTensor(abc.ABC):
    """An array that stands somewhere else and is read in parts.

    Attributes:
        shape: of the array.
        dtype: NumPy's name of its element type ("bfloat16", "float32", "float8_e4m3fn", …).
        source: name of the file (or device array) that holds it, for messages.
    """

    shape: tuple[int, ...]
    dtype: str
    source: str

    @abc.abstractmethod
    def read_into(self, index: Index, out: np.ndarray) -> None:
        """Reads a part into an array of its size, cast to that array's dtype; may be called from several threads.

        Raises:
            CheckpointError: the file cannot be read, or is shorter than its header says.
        """

    def read(self, index: Index | None = None) -> np.ndarray:
        """Reads a part, or everything, into a new array."""
        index = full_index(self.shape) if index is None else index
        out = np.empty(index_shape(index), self.dtype)
        self.read_into(index, out)
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return nbytes(self.shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class TensorSlice(StoredTensor):
    """A window into another tensor, without the axes of which one row is taken.

    Attributes:
        tensor: that tensor.
        window: a row number or a slice for each leading axis; the axes after them are taken whole.
    """

    tensor: StoredTensor
    window: tuple[int | slice, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        kept = [part.stop - part.start for part in self.window if isinstance(part, slice)]
        return (*kept, *self.tensor.shape[len(self.window) :])

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def source(self) -> str:
        return self.tensor.source

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
    """Tensors of one shape, side by side on new leading axes.

    Attributes:
        tensors: an object array of them; its axes become the leading ones.
        dtype: which they are cast to.
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
        for place, tensor in np.ndenumerate(self.tensors[index[:axes]]):
            tensor.read_into(index[axes:], out[(*place, ...)])


@dataclasses.dataclass(frozen=True)
class CastTensor(StoredTensor):
    """A tensor in another dtype.

    Attributes:
        tensor: that tensor.
        dtype: which its values are rounded to.
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
class ZeroPaddedTensor(StoredTensor):
    """A tensor followed by zeros along its axes.

    Attributes:
        tensor: that tensor.
        shape: with the zeros; at least as large along every axis.
    """

    tensor: StoredTensor
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def where(self) -> str:
        return self.tensor.where

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
            # Read apart: tensors are read into contiguous memory.
            out[tuple(slice(0, size) for size in index_shape(known))] = self.tensor.read(known)


def full_index(shape: Sequence[int]) -> Index:
    """The index of all of an array."""
    return tuple(slice(0, size) for size in shape)


def nbytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of an array."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def index_shape(index: Index) -> tuple[int, ...]:
    """The shape of a part."""
    return tuple(part.stop - part.start for part in index)


def blocks(shape: Sequence[int], itemsize: int, limit: int) -> Iterator[Index]:
    """Cuts an array into parts of at most `limit` bytes, each contiguous in memory, in memory order.

    The leading axes are cut to single rows until what is left fits, and one axis into nearly equal runs: an expert
    stack [L, E, F, D] falls into some experts of one layer at a time.

    Args:
        shape: of the array.
        itemsize: bytes of an element.
        limit: bytes of a part. A single element is never cut.
    """
    shape = tuple(shape)
    axis, inner = 0, math.prod(shape) * itemsize
    while axis < len(shape) and inner > limit:
        inner //= max(shape[axis], 1)
        axis += 1
    if axis == 0:
        yield full_index(shape)
        return
    cut = shape[axis - 1]
    count = ceil_div(cut, max(limit // max(inner, 1), 1))
    runs = [slice(cut * part // count, cut * (part + 1) // count) for part in range(count)]
    for leading in itertools.product(*(range(size) for size in shape[: axis - 1])):
        for run in runs:
            yield (*(slice(at, at + 1) for at in leading), run, *full_index(shape[axis:]))
