"""Large safetensors files, read in slices and written block by block.

Small files (adapters, traces, states) go through the safetensors library: `storage/arrays.py`. This reader and writer
exist in addition to it, for three reasons:

1. Slices are read by `pread`, not from a mapped file. Under several processes, mapped pages count as each process's
   memory, and a mapped file that shrinks is a bus error; here it is a `CheckpointError`.
2. A file is written from slices. The library's writer takes every tensor of the file in memory at once.
3. Headers are checked against the file's size, and all problems of a file are reported together; the library stops at
   the first.

The format is eight bytes of length, a JSON object and the data: https://huggingface.co/docs/safetensors.
"""

import dataclasses
import json
import math
import mmap
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np

from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.storage.git_lfs import lfs_problem
from qwen_moe_jax.storage.prefetch import prefetch
from qwen_moe_jax.storage.tensor import Index, StoredTensor, blocks, index_shape

#: safetensors' names of element types, and NumPy's.
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
_NAMES = {numpy: name for name, numpy in DTYPES.items()}
#: The library's limit. A longer header means a damaged file.
_LONGEST_HEADER = 100_000_000
#: NumPy's limits, which hold for empty arrays, too.
_MOST_AXES, _MOST_ELEMENTS = 64, 2**59
#: Bytes per block of a tensor that is written.
_BLOCK = 64 << 20


class ReadableFile(Protocol):
    """A file of which stretches of bytes are read, wherever it is.

    Attributes:
        path: its path; of a file elsewhere, its name.
        size: bytes.
    """

    if TYPE_CHECKING:  # in words only: a class has them as attributes

        @property
        def path(self) -> PurePath: ...
        @property
        def size(self) -> int: ...

    def fill(self, data: np.ndarray, position: int) -> None:
        """Fills a uint8 array with the file's bytes from `position` on."""

    def view(self, position: int, size: int) -> np.ndarray:
        """So many bytes from `position` on, uint8, of which few are going to be used."""


class OpenFile:
    """A file open for reading; closed when the last reference to it is dropped."""

    def __init__(self, path: Path):
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self.descriptor)
        self.size = os.fstat(self.descriptor).st_size

    def fill(self, data: np.ndarray, position: int) -> None:
        """Fills a uint8 array with the file's bytes from `position` on."""
        wanted = memoryview(data.data)
        while len(wanted):
            try:
                found = os.preadv(self.descriptor, [wanted], position)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read ({error}).") from None
            if not found:
                end = position + len(wanted)
                raise CheckpointError(f"{self.path}: ends before byte {end}, up to which its header says it has data.")
            position, wanted = position + found, wanted[found:]

    def view(self, position: int, size: int) -> np.ndarray:
        """So many bytes from `position` on, memory-mapped; unmapped when released."""
        first = position - position % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self.descriptor, position + size - first, access=mmap.ACCESS_READ, offset=first)
        return np.frombuffer(mapped, np.uint8, size, position - first)


@dataclasses.dataclass(frozen=True)
class SafetensorsTensor(StoredTensor):
    """One tensor of an open safetensors file.

    Attributes:
        shape, dtype: of the tensor.
        file: the open file.
        offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    dtype: str
    file: ReadableFile
    offset: int

    @property
    def source(self) -> str:
        return self.file.path.name

    def read_into(self, index: Index, out: np.ndarray) -> None:
        if math.prod(index_shape(index)) == 0:
            return
        run = _run(self.shape, index)
        if run is None:
            # Of columns, which are not contiguous, pages are read.
            out[...] = self.file.view(self.offset, self.nbytes).view(self.dtype).reshape(self.shape)[index]
            return
        start, count = run
        direct = out.flags.c_contiguous and out.dtype == self.dtype
        values = out if direct else np.empty(index_shape(index), self.dtype)
        self.file.fill(values.reshape(count).view(np.uint8), self.offset + start * values.itemsize)
        if not direct:
            out[...] = values.reshape(out.shape)


def _run(shape: tuple[int, ...], index: Index) -> tuple[int, int] | None:
    """First element and length of a slice that is contiguous in the file; None if it is not."""
    sizes = index_shape(index)
    first = next((axis for axis, size in enumerate(sizes) if size != 1), len(shape))
    if any(size != full for size, full in zip(sizes[first + 1 :], shape[first + 1 :], strict=True)):
        return None
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return sum(part.start * stride for part, stride in zip(index, strides, strict=True)), math.prod(sizes)


def open_safetensors(path: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Reads a file's header: its tensors by name, and every problem found, a line each.

    Tensors with an invalid header entry are left out of the first result and reported in the second.

    Raises:
        CheckpointError: the file cannot be read at all: no permission, a disk that fails.
    """
    if (problem := lfs_problem(path)) is not None:
        return {}, [f"not downloaded: {problem}"]
    try:
        file = OpenFile(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    return read_header(file)


def read_header(file: ReadableFile) -> tuple[dict[str, StoredTensor], list[str]]:
    """`open_safetensors` of a file that is open, or elsewhere."""
    path = file.path
    try:
        begin, entries = _header(file)
    except (ValueError, RecursionError) as error:
        return {}, [f"damaged: {path.name} is not a safetensors file ({error})"]
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    ends: list[tuple[int, int, str]] = []
    for name, entry in entries:
        if name == "__metadata__":
            continue
        if not name.isprintable():
            problems.append(f"damaged: {name!r} in {path.name} is not a tensor name: expected printable characters")
            continue
        try:
            shape, dtype, start, end = _entry(entry)
        except ValueError as error:
            problems.append(f"damaged: {name} in {path.name}: {error}")
            continue
        if name in tensors:
            problems.append(f"duplicated: {name} is twice in the header of {path.name}")
        ends.append((start, end, name))
        tensors[name] = SafetensorsTensor(shape, dtype, file, begin + start)
    if not tensors and not problems:
        return {}, [f"damaged: {path.name} holds no tensors"]
    if not problems:
        problems = _layout_problems(path, ends, file.size - begin)
    return tensors, problems


def _header(file: ReadableFile) -> tuple[int, list[tuple[str, Any]]]:
    """The offset of the data, and the header's (name, entry) pairs, in which a name may be repeated."""
    head = np.zeros(min(8, file.size), np.uint8)
    file.fill(head, 0)
    length = int.from_bytes(head.tobytes(), "little")
    if file.size < 8 or length > min(file.size - 8, _LONGEST_HEADER):
        raise ValueError(f"it has {file.size} bytes, and its first eight say that the header alone has {length}")
    text = np.zeros(length, np.uint8)
    file.fill(text, 8)
    pairs = json.loads(text.tobytes(), object_pairs_hook=_Pairs)
    if not isinstance(pairs, _Pairs):
        raise ValueError("its header is not a JSON object")
    return 8 + length, pairs


class _Pairs(list):
    """A JSON object as (name, value) pairs, repeated names included."""


def _entry(entry: Any) -> tuple[tuple[int, ...], str, int, int]:
    fields = dict(entry) if isinstance(entry, _Pairs) else {}
    shape, offsets, dtype = fields.get("shape"), fields.get("data_offsets"), fields.get("dtype")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or not isinstance(dtype, str):
        raise ValueError("expected an object with dtype, shape and data_offsets")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r:.80} is not known, expected one of {', '.join(DTYPES)}")
    if len(shape) > _MOST_AXES or math.prod(filter(None, shape)) >= _MOST_ELEMENTS:
        raise ValueError(
            f"shape {shape!s:.200} is not supported, expected at most {_MOST_AXES} axes and 2**59 elements"
        )
    expected = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != expected:
        raise ValueError(
            f"{dtype} {shape} has {expected} bytes, and its data_offsets {offsets} say {offsets[1] - offsets[0]}"
        )
    return tuple(shape), DTYPES[dtype], *offsets


def _counts(values: Any) -> bool:
    return type(values) is list and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _layout_problems(path: PurePath, ends: list[tuple[int, int, str]], size: int) -> list[str]:
    """The format requires that tensors cover the data without holes or overlaps."""
    reached = 0
    for start, end, name in sorted(ends):
        if start != reached:
            found = "overlaps the one before it" if start < reached else "leaves a hole before it"
            return [f"damaged: {name} in {path.name} {found}: its data begins at {start}, expected {reached}"]
        reached = end
    if reached > size:
        return [f"truncated: {path.name} has {size} bytes of data, and its header says {reached}"]
    if reached < size:
        return [f"damaged: {path.name} has {size - reached} bytes more than its header says"]
    return []


def write_safetensors(path: Path, tensors: Mapping[str, StoredTensor], advance: Callable[[int], None]) -> None:
    """Writes a file from tensors that are read block by block; a few blocks are in memory at a time.

    Args:
        path: of the new file.
        tensors: by name; each is written in its own dtype.
        advance: called with the number of bytes after each block.
    """
    # Widest elements first, as the library writes them, so that every tensor is aligned to its element size.
    names = sorted(tensors, key=lambda name: -np.dtype(tensors[name].dtype).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end = start + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    parts = (
        (tensors[name], block)
        for name in names
        for block in blocks(tensors[name].shape, np.dtype(tensors[name].dtype).itemsize, _BLOCK)
    )
    with open(path, "wb", buffering=0) as file:
        _write(file, len(text).to_bytes(8, "little") + text)
        for values in prefetch(lambda part: part[0].read(part[1]), parts):
            _write(file, values.reshape(-1).view(np.uint8))
            advance(values.nbytes)


def _write(file: BinaryIO, data: bytes | np.ndarray) -> None:
    remaining = memoryview(data.data if isinstance(data, np.ndarray) else data)
    while len(remaining):
        remaining = remaining[file.write(remaining) :]
