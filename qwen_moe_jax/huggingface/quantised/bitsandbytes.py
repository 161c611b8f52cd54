"""bitsandbytes: 4 bits (nf4, fp4) in blocks of consecutive values, and int8 with a scale for each row.

4 bits: table[code] · absmax of the block, in float32, rounded to the dtype of the quantised weights; where the absmax
are quantised themselves, table[code] · absmax + offset. int8: code · SCB · (1 / 127), in float32.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen_moe_jax.huggingface.quantised.dequantise import Dequantised, ScaledCodes, as_float32, read_all
from qwen_moe_jax.huggingface.quantised.modules import (
    Opener,
    ProblemError,
    open_modules,
    require,
    require_shape,
    unsupported,
)
from qwen_moe_jax.rounding import ceil_div
from qwen_moe_jax.storage.tensor import Index, StoredTensor

METHOD = "bitsandbytes"
_STATE = "weight.quant_state.bitsandbytes__"
_PARTS = (
    "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", f"{_STATE}nf4",
    f"{_STATE}fp4", "SCB", "weight_format",
)  # fmt: skip
#: bitsandbytes' reciprocal of 127.
_RECIPROCAL = np.float32(7.874015718698502e-3)
_DTYPES = ("float16", "bfloat16", "float32")


def opener(config: Mapping[str, Any], where: str) -> Opener:
    """Of `quant_method="bitsandbytes"`.

    Raises:
        ConfigError: neither 4 nor 8 bits.
    """
    if not config.get("load_in_4bit") and not config.get("load_in_8bit"):
        raise unsupported(where, METHOD, "load_in_4bit", "False", "load_in_4bit or load_in_8bit to be true")
    return _open


def _open(tensors: dict[str, StoredTensor]) -> tuple[dict[str, StoredTensor], list[str]]:
    def module(name: str, tensor: StoredTensor) -> str | None:
        own = name.removesuffix(".weight")
        is_quantised = own != name and any(f"{own}.{part}" in tensors for part in ("weight.absmax", "SCB"))
        return own if is_quantised else None

    return open_modules(tensors, module, _PARTS, _weight)


def _weight(module: str, own: Mapping[str, StoredTensor]) -> StoredTensor:
    if "SCB" in own:
        weight, scale = own["weight"], own["SCB"]
        if weight.dtype != "int8" or len(weight.shape) != 2:
            raise ProblemError(
                f"{METHOD}: {module}.weight in {weight.source} is {weight.dtype}, expected an int8 matrix"
            )
        if "weight_format" in own and int(read_all(own["weight_format"]).reshape(())) != 0:
            raise ProblemError(f"{METHOD}: {module}.weight_format in {weight.source} is not 0, expected rows (0)")
        require_shape(METHOD, f"{module}.SCB", scale, (weight.shape[0],))
        return RowsOfInt8(weight, scale, (1, weight.shape[1]), "float32", f"int8 ({METHOD})", 8)
    return _four_bits(module, own)


@dataclasses.dataclass(frozen=True)
class RowsOfInt8(ScaledCodes):
    """int8 codes; 127 represents a row's scale."""

    def values(self, index: Index) -> np.ndarray:
        return super().values(index) * _RECIPROCAL

    def rounding(self) -> tuple[float, float]:
        return 0.0, super().rounding()[1] / 127


def _four_bits(module: str, own: Mapping[str, StoredTensor]) -> StoredTensor:
    kind = next((kind for kind in ("nf4", "fp4") if f"{_STATE}{kind}" in own), None)
    if kind is None:
        raise ProblemError(f"{METHOD}: {module} has no {_STATE}nf4 or fp4, which has its shape")
    require(METHOD, module, own, "weight.quant_map")
    packed, absmax = own["weight"], own["weight.absmax"]
    try:
        state = json.loads(read_all(own[f"{_STATE}{kind}"]).tobytes())
        rows, columns = (int(size) for size in state["shape"])
        size, dtype = int(state["blocksize"]), str(state["dtype"])
        offset = float(state.get("nested_offset", 0.0))
        nested_size = int(state.get("nested_blocksize", 1))
    except (ValueError, KeyError, TypeError) as error:
        raise ProblemError(f"{METHOD}: {module}.{_STATE}{kind} in {packed.source} cannot be read ({error!r})") from None
    nested = "weight.nested_absmax" in own
    if nested:
        require(METHOD, module, own, "weight.nested_quant_map")
    if packed.nbytes != ceil_div(rows * columns, 2) or dtype not in _DTYPES:
        raise ProblemError(
            f"{METHOD}: {module}.weight in {packed.source} has {packed.nbytes} bytes, expected 4 bits for each of "
            f"{rows} × {columns} values of {' or '.join(_DTYPES)} (found {dtype})"
        )
    require_shape(METHOD, f"{module}.weight.absmax", absmax, (ceil_div(rows * columns, size),))
    return FourBits(
        packed=packed,
        absmax=absmax,
        table=own["weight.quant_map"],
        nested=(own["weight.nested_absmax"], own["weight.nested_quant_map"]) if nested else None,
        nested_size=nested_size,
        offset=offset,
        size=size,
        shape=(rows, columns),
        dtype=dtype,
        stored_dtype=f"{kind} ({METHOD})",
    )


@dataclasses.dataclass(frozen=True)
class FourBits(Dequantised):
    """A matrix in 4 bits, row after row, the higher four bits of a byte first.

    Attributes:
        packed: the bytes, in whatever dtype they were stored.
        absmax: [blocks], float32, or codes of the nested table.
        table: [16] float32.
        nested: absmax and table [256] of the absmax, where those are quantised.
        nested_size: number of absmax that share one.
        offset: added to quantised absmax.
        size: consecutive values that share an absmax.
        shape, dtype: of the matrix.
    """

    packed: StoredTensor
    absmax: StoredTensor
    table: StoredTensor
    nested: tuple[StoredTensor, StoredTensor] | None
    nested_size: int
    offset: float
    size: int
    shape: tuple[int, int]
    dtype: str
    stored_dtype: str
    stored_bits: int = 4

    @property
    def source(self) -> str:
        return self.packed.source

    def values(self, index: Index) -> np.ndarray:
        rows, columns = index
        width = self.shape[1]
        first, last = rows.start * width, rows.stop * width
        found = self._bytes(first // 2, ceil_div(last, 2))
        codes = np.stack([found >> 4, found & 0xF], axis=-1).reshape(-1)[first % 2 :][: last - first]
        absmax = self._scales(first // self.size, ceil_div(last, self.size))
        each = np.arange(first, last) // self.size - first // self.size
        numbers = read_all(self.table)[codes] * absmax[each]
        return numbers.reshape(-1, width)[:, columns].astype(self.dtype, copy=False)

    def rounding(self) -> tuple[float, float]:
        table = np.sort(read_all(self.table))
        largest = float(self._scales(0, self.absmax.shape[0]).max(initial=0.0))
        return 0.0, float(np.diff(table).max()) / 2 * largest

    def _bytes(self, first: int, last: int) -> np.ndarray:
        """Bytes of the stored tensor, which is a column of numbers of any size."""
        each = np.dtype(self.packed.dtype).itemsize
        start, stop = first // each, ceil_div(last, each)
        if math.prod(self.packed.shape) == self.packed.shape[0]:
            index = (slice(start, stop), *(slice(0, 1) for _ in self.packed.shape[1:]))
        else:  # stored as a row, by old versions
            index = (slice(0, 1), slice(start, stop))
        found = np.ascontiguousarray(self.packed.read(index)).reshape(-1).view(np.uint8)
        return found[first - start * each : last - start * each]

    def _scales(self, first: int, last: int) -> np.ndarray:
        found = self.absmax.read((slice(first, last),))
        if self.nested is None:
            return as_float32(found)
        absmax, table = (as_float32(read_all(tensor)) for tensor in self.nested)
        blocks = np.arange(first, last) // self.nested_size
        return table[found] * absmax[blocks] + np.float32(self.offset)
