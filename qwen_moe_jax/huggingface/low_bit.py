"""Quantising tensors while they are read: the arrays of a low-bit matrix as views of its float tensors.

The float matrix never exists whole: a block of rows is read, quantised and forgotten.
"""

import dataclasses
import threading
from collections.abc import Callable

import numpy as np

from qwen_moe_jax.huggingface.tensors import HubParameter
from qwen_moe_jax.nn.quantised import integers_of, scales_of
from qwen_moe_jax.rounding import ceil_div
from qwen_moe_jax.storage.tensor import Index, StoredTensor, blocks, index_shape

#: Bytes of floats that are quantised at a time: with their copies they stay in a core's caches.
_BLOCK = 1 << 20

#: The parts of a quantised matrix, by the last word of their paths.
INTEGERS, SCALES = "integers", "scales"


def float_parameters(parameters: list[HubParameter]) -> list[HubParameter]:
    """The parameters as files have them: of a quantised matrix, one of floats in place of integers and scales."""
    return [_as_floats(one) for one in parameters if _part(one) != SCALES]


def stored_tensors(
    parameters: list[HubParameter], stacked: Callable[[HubParameter], StoredTensor]
) -> list[StoredTensor]:
    """A tensor for each parameter, of any checkpoint of floats.

    Args:
        parameters: of a model, quantised or not.
        stacked: the tensor of a parameter of floats.
    """
    scales = {_matrix(one): one for one in parameters if _part(one) == SCALES}
    integers = {_matrix(one): one for one in parameters if _part(one) == INTEGERS}
    floats = {matrix: stacked(_as_floats(one)) for matrix, one in integers.items()}
    last = LastScales()
    tensors: list[StoredTensor] = []
    for one in parameters:
        matrix = _matrix(one)
        if matrix in floats:
            bits, groups = (4 if integers[matrix].leaf.dtype == np.uint8 else 8), scales[matrix].shape[-2]
            tensors.append(QuantisedTensor(floats[matrix], bits, groups, _part(one), last))
        else:
            tensors.append(stacked(one))
    return tensors


def _part(parameter: HubParameter) -> str:
    """The last word of its path: `INTEGERS` or `SCALES` of a quantised matrix."""
    return parameter.path.rpartition(".")[2]


def _matrix(parameter: HubParameter) -> str:
    """The path of the quantised matrix that it would be part of."""
    return parameter.path.rpartition(".")[0]


def _as_floats(parameter: HubParameter) -> HubParameter:
    if _part(parameter) != INTEGERS:
        return parameter
    packed = 2 if parameter.leaf.dtype == np.uint8 else 1
    shape = (*parameter.shape[:-1], parameter.shape[-1] * packed)
    return dataclasses.replace(parameter, path=_matrix(parameter), leaf=_Floats(shape), shape=shape)


@dataclasses.dataclass(frozen=True)
class _Floats:
    """Shape and dtype that the floats of a matrix are read with."""

    shape: tuple[int, ...]
    dtype: np.dtype = np.dtype(np.float32)


class LastScales:
    """The scales of the matrix whose integers were read last, so that its floats are read once for both."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: StoredTensor | None = None
        self._scales = self._known = np.empty(0)

    def put(self, of: "QuantisedTensor", index: Index, scales: np.ndarray) -> None:
        """Keeps scales; those of another tensor are forgotten."""
        with self._lock:
            if self._of is not of.tensor:
                *lead, outputs, _ = of.tensor.shape
                shape = (*lead, of.groups, outputs)
                # Only what is written to takes memory.
                self._of, self._scales, self._known = of.tensor, np.empty(shape, scales.dtype), np.zeros(shape, bool)
            self._scales[index], self._known[index] = scales, True

    def get(self, tensor: StoredTensor, index: Index) -> np.ndarray | None:
        """The scales, where all of them are known."""
        with self._lock:
            known = self._of is tensor and self._known[index].all()
            return self._scales[index] if known else None


@dataclasses.dataclass(frozen=True)
class QuantisedTensor(StoredTensor):
    """The integers or the scales of stacked float matrices [..., O, I].

    Attributes:
        tensor: the floats.
        bits: 8 or 4.
        groups: scales of each output.
        part: `INTEGERS` or `SCALES`.
        last: shared by all tensors of a model.
    """

    tensor: StoredTensor
    bits: int
    groups: int
    part: str
    last: LastScales

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, outputs, inputs = self.tensor.shape
        if self.part == SCALES:
            return (*lead, self.groups, outputs)
        return (*lead, outputs, inputs * self.bits // 8)

    @property
    def dtype(self) -> str:
        if self.part == SCALES:
            return "float32" if self.bits == 8 else "bfloat16"
        return "int8" if self.bits == 8 else "uint8"

    @property
    def source(self) -> str:
        return self.tensor.source

    def read_into(self, index: Index, out: np.ndarray) -> None:
        lead, inputs = index[:-2], self.tensor.shape[-1]
        group = inputs // self.groups
        if self.part == SCALES:
            groups, rows = index[-2:]
            used = slice(groups.start * group, groups.stop * group)
        else:
            rows, columns = index[-2:]
            used = slice(columns.start * 8 // self.bits, columns.stop * 8 // self.bits)
            groups = slice(used.start // group, ceil_div(used.stop, group))
        outer = (*lead, rows)
        whole = slice(groups.start * group, groups.stop * group)
        for window in blocks(index_shape(outer), 4 * index_shape((whole,))[0], _BLOCK):
            at = tuple(
                slice(own.start + part.start, own.start + part.stop) for own, part in zip(outer, window, strict=True)
            )
            of_scales = (*at[:-1], groups, at[-1])
            scales = self.last.get(self.tensor, of_scales)
            if self.part == SCALES:
                if scales is None:
                    scales = scales_of(self._floats((*at, whole)), self.bits, groups.stop - groups.start, np)
                out[(*window[:-1], slice(None), window[-1])] = scales
                continue
            floats = self._floats((*at, whole if scales is None else used))
            if scales is None:
                scales = scales_of(floats, self.bits, groups.stop - groups.start, np)
                self.last.put(self, of_scales, scales)
                floats = floats[..., used.start - whole.start : used.stop - whole.start]
            out[window] = integers_of(floats, scales, self.bits, np)

    def _floats(self, index: Index) -> np.ndarray:
        floats = np.empty(index_shape(index), np.float32)
        self.tensor.read_into(index, floats)
        return floats
