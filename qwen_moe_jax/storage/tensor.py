"""What a stored tensor is to whoever reads it, whatever holds it; and how a large one is cut into blocks."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import ml_dtypes  # noqa: F401  registers bfloat16 and the float8 types with NumPy
import numpy as np

#: A part of an array: a slice with start and stop, and no step, for every axis.
Index = tuple[slice, ...]


class Tensor(Protocol):
    """An array that stands somewhere else and is read in parts.

    Attributes:
        shape: of the array.
        dtype: NumPy's name of its element type ("bfloat16", "float32", "float8_e4m3fn", …).
        where: the file that holds it, for messages.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def where(self) -> str: ...

    def read(self, index: Index) -> np.ndarray:
        """Reads that part, and as little besides as the format allows; may be called from several threads.

        Raises:
            CheckpointError: the file cannot be read, or is shorter than its header says.
        """
        ...


def whole(shape: Sequence[int]) -> Index:
    """The index of all of an array."""
    return tuple(slice(0, size) for size in shape)


def size_of(index: Index) -> tuple[int, ...]:
    """The shape of a part."""
    return tuple(part.stop - part.start for part in index)


def nbytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of an array."""
    return math.prod(shape) * np.dtype(dtype).itemsize


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
        yield whole(shape)
        return
    cut = shape[axis - 1]
    count = -(-cut // max(limit // max(inner, 1), 1))
    runs = [slice(cut * part // count, cut * (part + 1) // count) for part in range(count)]
    for leading in itertools.product(*(range(size) for size in shape[: axis - 1])):
        for run in runs:
            yield (*(slice(at, at + 1) for at in leading), run, *whole(shape[axis:]))
