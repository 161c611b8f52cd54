"""Codes of a few bits packed into words or bytes, read as an integer or a float each."""

import dataclasses

import numpy as np

from qwen_moe_jax.rounding import ceil_div
from qwen_moe_jax.storage.tensor import Index, StoredTensor, TensorView

#: The sixteen numbers of FP4 (E2M1) by their code.
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclasses.dataclass(frozen=True)
class WordCodes(StoredTensor):
    """Codes of 2, 4 or 8 bits in 32-bit words along one axis, the lowest bits first, as int16.

    Attributes:
        words: int32 or uint32, two axes.
        bits: of a code.
        axis: along which a word holds several codes.
        shape: of the codes; a last word may have more than are needed.
        order: position in its word of each of the codes of a word; () is 0, 1, 2, …
        plus: added to each word before it is unpacked, with the carry from code to code.
        minus: subtracted from each code.
    """

    words: StoredTensor
    bits: int
    axis: int
    shape: tuple[int, int]
    order: tuple[int, ...] = ()
    plus: int = 0
    minus: int = 0

    dtype = "int16"

    @property
    def source(self) -> str:
        return self.words.source

    def read_into(self, index: Index, out: np.ndarray) -> None:
        each = 32 // self.bits
        asked = index[self.axis]
        first = asked.start // each
        wanted = list(index)
        wanted[self.axis] = slice(first, ceil_div(asked.stop, each))
        words = np.ascontiguousarray(self.words.read(tuple(wanted))).view(np.uint32) + np.uint32(self.plus)
        shifts = np.array(self.order or range(each), np.uint32) * np.uint32(self.bits)
        mask = np.uint32((1 << self.bits) - 1)
        codes = ((np.expand_dims(words, self.axis + 1) >> _along(shifts, self.axis)) & mask).astype(np.int16)
        shape = list(words.shape)
        shape[self.axis] *= each
        kept = [slice(None), slice(None)]
        kept[self.axis] = slice(asked.start - first * each, asked.stop - first * each)
        out[...] = codes.reshape(shape)[tuple(kept)] - np.int16(self.minus)


def _along(shifts: np.ndarray, axis: int) -> np.ndarray:
    return shifts[None, :, None] if axis == 0 else shifts[None, None, :]


@dataclasses.dataclass(frozen=True)
class Fp4Codes(StoredTensor):
    """FP4 numbers, two in a byte along the last axis, the lower four bits first, as float32.

    Attributes:
        bytes: uint8; the axes behind `shape`'s last but one are one axis.
        shape: of the numbers.
    """

    bytes: StoredTensor
    shape: tuple[int, ...]

    dtype = "float32"

    @property
    def source(self) -> str:
        return self.bytes.source

    def read_into(self, index: Index, out: np.ndarray) -> None:
        rows, columns = index[:-1], index[-1]
        first, last = columns.start // 2, ceil_div(columns.stop, 2)
        if len(self.bytes.shape) == len(self.shape):
            found = self.bytes.read((*rows, slice(first, last)))
        else:  # blocks of columns are an axis of their own
            size = self.bytes.shape[-1]
            blocks = slice(first // size, ceil_div(last, size))
            found = self.bytes.read((*rows, blocks, slice(0, size)))
            found = found.reshape(*found.shape[:-2], -1)[..., first - blocks.start * size : last - blocks.start * size]
        numbers = FP4[np.stack([found & 0xF, found >> 4], axis=-1)].reshape(*found.shape[:-1], -1)
        skipped = columns.start - 2 * first
        out[...] = numbers[..., skipped : skipped + columns.stop - columns.start]


@dataclasses.dataclass(frozen=True)
class Exponents(TensorView):
    """Powers of two, from bytes that are an exponent plus 127 (E8M0), as float32."""

    tensor: StoredTensor

    dtype = "float32"

    def read_into(self, index: Index, out: np.ndarray) -> None:
        exponents = np.ascontiguousarray(self.tensor.read(index)).view(np.uint8).astype(np.int32) - 127
        out[...] = np.ldexp(np.float32(1), exponents)
