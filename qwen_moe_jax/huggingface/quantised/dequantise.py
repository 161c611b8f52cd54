"""A matrix of codes with scales, read as the floating-point numbers that it represents."""

import abc
import dataclasses

import ml_dtypes
import numpy as np

from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.rounding import ceil_div
from qwen_moe_jax.storage.tensor import Index, StoredTensor, TensorView, blocks, full_index, index_shape

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
#: Values that are dequantised at once: 4 MB in float32, of which a few copies are held.
_CHUNK = 1 << 20


class Dequantised(StoredTensor):
    """A tensor that is stored in fewer bits than it is read in.

    Attributes:
        stored_dtype: what the file has, for people: "int4 (gptq)".
        stored_bits: of a value, scales aside.
    """

    stored_dtype: str
    stored_bits: int

    @abc.abstractmethod
    def values(self, index: Index) -> np.ndarray:
        """The numbers of a slice of at most `_CHUNK` values (or one row), in the tensor's dtype."""

    @abc.abstractmethod
    def rounding(self) -> tuple[float, float]:
        """How far values are from what was quantised, if each was rounded to the nearest: a share of it, and more."""

    def read_into(self, index: Index, out: np.ndarray) -> None:
        for part in blocks(index_shape(index), 1, _CHUNK):
            inner = tuple(
                slice(own.start + piece.start, own.start + piece.stop) for own, piece in zip(index, part, strict=True)
            )
            out[part] = self.values(inner)


@dataclasses.dataclass(frozen=True)
class ScaledCodes(Dequantised):
    """(code − zero) · scale: calculated in float32 and rounded to the tensor's dtype.

    In 16 bits this is what libraries calculate in that dtype: a code has at most eight bits, so that differences and
    products are exact in float32.

    Attributes:
        codes: [..., out, in], integers or small floats.
        scale: one value, [out], or [..., rows of blocks, columns of blocks].
        block: rows and columns that share a scale.
        dtype: of the result.
        stored_dtype, stored_bits: see `Dequantised`.
        step: distance of neighbouring codes, the largest one.
        zero: zero points, as `scale`; None are zeros.
        groups: integers [in], the column of scales of each column; None: they are consecutive.
    """

    codes: StoredTensor
    scale: StoredTensor
    block: tuple[int, int]
    dtype: str
    stored_dtype: str
    stored_bits: int
    step: float = 1.0
    zero: StoredTensor | None = None
    groups: StoredTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def source(self) -> str:
        return self.codes.source

    def values(self, index: Index) -> np.ndarray:
        found = as_float32(self.codes.read(index))
        if self.zero is not None:
            found = found - self._spread(self.zero, index)
        found = found * self._spread(self.scale, index)
        return found.astype(self.dtype, copy=False)

    def rounding(self) -> tuple[float, float]:
        largest = float(np.abs(as_float32(self.scale.read())).max(initial=0.0))
        if self.codes.dtype not in FLOAT8:
            return 0.0, self.step / 2 * largest
        info = ml_dtypes.finfo(self.codes.dtype)
        return float(info.eps) / 2, float(info.smallest_subnormal) / 2 * largest

    def _spread(self, tensor: StoredTensor, index: Index) -> np.ndarray:
        """Scales or zero points of a slice of the matrix, float32 and broadcastable to it."""
        if tensor.shape in ((), (1,)):
            return as_float32(tensor.read()).reshape(())
        if len(tensor.shape) == 1:
            return as_float32(tensor.read((index[-2],)))[:, None]
        if self.groups is None:
            first = [part.start // size for part, size in zip(index[-2:], self.block, strict=True)]
            last = [ceil_div(part.stop, size) for part, size in zip(index[-2:], self.block, strict=True)]
            found = as_float32(tensor.read((*index[:-2], *map(slice, first, last))))
        else:
            first = [index[-2].start, 0]
            found = as_float32(tensor.read((*index[:-2], index[-2], slice(0, tensor.shape[-1]))))
        for axis, (part, size) in enumerate(zip(index[-2:], self.block, strict=True)):
            if axis == 1 and self.groups is not None:
                columns = self._columns(part, tensor.shape[-1])
            else:
                columns = np.arange(part.start, part.stop) // size - first[axis]
            if found.shape[axis - 2] > 1 and not (axis == 0 and size == 1):
                found = found.take(columns, axis=axis - 2)
        return found

    def _columns(self, part: slice, count: int) -> np.ndarray:
        assert self.groups is not None
        columns = self.groups.read((part,))
        if columns.size and not 0 <= columns.min() <= columns.max() < count:
            raise CheckpointError(
                f"{self.source}: groups of columns (g_idx) from {columns.min()} to {columns.max()}, expected numbers "
                f"below {count}, which is how many groups have a scale. The file is damaged."
            )
        return columns


@dataclasses.dataclass(frozen=True)
class Transposed(TensorView):
    """A matrix with its two axes exchanged."""

    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.tensor.shape[1], self.tensor.shape[0])

    def read_into(self, index: Index, out: np.ndarray) -> None:
        out[...] = self.tensor.read((index[1], index[0])).T


@dataclasses.dataclass(frozen=True)
class ScaledScales(TensorView):
    """Scales in float32 times one number, or divided by it.

    Attributes:
        tensor: the scales.
        factor: one value.
        divide: divide by it.
    """

    tensor: StoredTensor
    factor: StoredTensor
    divide: bool

    dtype = "float32"

    def read_into(self, index: Index, out: np.ndarray) -> None:
        factor = as_float32(self.factor.read()).reshape(())
        scales = as_float32(self.tensor.read(index))
        out[...] = scales / factor if self.divide else scales * factor


def as_float32(array: np.ndarray) -> np.ndarray:
    """The array in float32; of eight-bit floats by a table of their 256 values.

    The table is three times as fast as the cast (35 ms and 117 ms for 16 MB).
    """
    if array.dtype.name in FLOAT8:
        return np.arange(256, dtype=np.uint8).view(array.dtype).astype(np.float32)[array.view(np.uint8)]
    return array.astype(np.float32, copy=False)


def read_all(tensor: StoredTensor) -> np.ndarray:
    """A small tensor as a whole."""
    return tensor.read(full_index(tensor.shape))
