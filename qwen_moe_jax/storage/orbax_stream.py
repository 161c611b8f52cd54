"""Tensors of any size → an Orbax checkpoint folder, block by block.

Orbax 0.12.8 can save leaf by leaf: `v1.partial.save` adds leaves to an unfinished checkpoint, and the largest leaf
determines peak memory. Neither of its interfaces saves a leaf slice by slice, and a leaf here is one matrix of all
experts of all layers: 151 GB of Qwen3-235B-A22B in bfloat16. So Orbax writes the tree and its metadata, and this file's
leaf handler opens the same TensorStore arrays as Orbax's own and fills them in blocks.
"""

import asyncio
import dataclasses
import itertools
import math
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np

# The older interface, too: only there leaf handlers are public. `get_json_tspec_write` is deprecated without a
# successor; it knows the subfolder that a process writes to, and the options of the OCDBT database in it.
import orbax.checkpoint as orbax_v0
import tensorstore as ts
from orbax.checkpoint import type_handlers
from orbax.checkpoint.experimental import v1 as ocp

from qwen_moe_jax.errors import ShardingError
from qwen_moe_jax.rounding import ceil_div, round_up
from qwen_moe_jax.storage.orbax import BLOCK, ITEM, PIECE, axes_of_rows, check_storable
from qwen_moe_jax.storage.tensor import Index, StoredTensor, index_shape

#: Blocks in memory, read or being written. TensorStore copies each; without this limit it would hold the whole model.
_BLOCKS_AT_ONCE = 3
#: Most pieces along the last axis: narrower columns are slow to copy, and wider `tensor` axes rare.
_COLUMNS = 8


def stream_tensors(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes the folder that `save_arrays` would write, from tensors that are read block by block.

    Memory holds a few blocks, some 200 MB, however large a tensor is. Orbax records the leaves as NumPy arrays, and
    restores them as such when it is given no abstract tree.

    Args:
        folder: to create.
        tensors: by name. Each is read once, in blocks of consecutive rows, from several threads.
        advance: called with the number of bytes after each block, from another thread.

    Raises:
        ShardingError: called under several processes, each of which would write everything.
        CheckpointError: Orbax cannot store such arrays; or as reading the tensors raises it.
    """
    if jax.process_count() > 1:
        raise ShardingError(
            f"{folder}: tensors are streamed by a single process, found {jax.process_count()}. Run this without "
            "jax.distributed, or load the tensors onto devices and write them with save_arrays."
        )
    check_storable(folder, {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
    table = _StreamedTable({name: _Leaf(tensor) for name, tensor in tensors.items()}, advance)
    # In a thread, so that an interrupt reaches this one whatever Orbax is doing, and writing has stopped when the
    # caller removes the folder.
    with ThreadPoolExecutor(1, thread_name_prefix="stream") as pool:
        written = pool.submit(_save_table, folder, table)
        try:
            while not wait([written], timeout=0.5).done:
                pass
        finally:
            table.stop.set()
    if table.failure is not None:
        raise table.failure
    written.result()


def _save_table(folder: Path, table: "_StreamedTable") -> None:
    with ocp.Context():
        ocp.save_checkpointables(folder.absolute(), {ITEM: table})


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A tensor in the tree that Orbax is given. Orbax finds this file's leaf handler by this type."""

    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.tensor.dtype)


class _StreamedTable:
    """The tree of leaves as a checkpointable of Orbax: an object that writes itself into a folder.

    Attributes:
        stop: set to stop writing.
        failure: the exception that stopped it. Kept here because Orbax wraps exceptions of its threads.
    """

    def __init__(self, leaves: Mapping[str, _Leaf], advance: Callable[[int], None]) -> None:
        self._leaves = dict(leaves)
        self._advance = advance
        self.stop = threading.Event()
        self.failure: Exception | None = None

    async def save(self, directory: ocp.path.PathAwaitingCreation) -> Awaitable[None]:
        return self._write(directory)

    async def load(self, directory: ocp.path.Path) -> Awaitable[None]:
        raise NotImplementedError("restored as any tree of arrays, not through this class")

    async def _write(self, directory: ocp.path.PathAwaitingCreation) -> None:
        path = await directory.await_creation()
        try:
            await asyncio.to_thread(self._write_tree, path)
        except Exception as error:
            self.failure = error
            raise

    def _write_tree(self, path: ocp.path.Path) -> None:
        # Orbax warns about a registry without a handler of jax.Array.
        registry = type_handlers.create_type_handler_registry(
            (_Leaf, _StreamingHandler(self._advance, self.stop)), (jax.Array, type_handlers.ArrayHandler())
        )
        tree = orbax_v0.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, type_handler_registry=registry)
        tree.save(path, args=orbax_v0.args.PyTreeSave(self._leaves))
        tree.finalize(path)


class _StreamingHandler(type_handlers.NumpyHandler):
    """Writes leaves block by block. Checkpoint metadata, as the base class writes it, calls them NumPy arrays."""

    def __init__(self, advance: Callable[[int], None], stop: threading.Event) -> None:
        super().__init__()
        self._advance = advance
        self._stop = stop

    async def serialize(
        self,
        values: Sequence[_Leaf],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[type_handlers.SaveArgs] | None = None,
    ) -> list[orbax_v0.Future]:
        """Returns when everything is on disk, hence no futures."""
        writing: deque[asyncio.Task[None]] = deque()
        try:
            for leaf, info in zip(values, infos, strict=True):
                block, piece = _layout(leaf.shape, leaf.dtype.itemsize)
                spec = type_handlers.get_json_tspec_write(
                    info, True, leaf.shape, leaf.shape, leaf.dtype, process_index=jax.process_index()
                )
                spec["metadata"] = _zarr_metadata(leaf.shape, block, piece)
                store = await ts.open(spec, create=True, open=True, context=info.ts_context)
                for index in _grid(leaf.shape, block):
                    if len(writing) == _BLOCKS_AT_ONCE:
                        await writing.popleft()
                    if self._stop.is_set():
                        raise InterruptedError
                    writing.append(asyncio.create_task(self._write_block(store, leaf, index)))
            while writing:
                await writing.popleft()
        finally:
            # Started writes are awaited after an error, too: TensorStore would continue them.
            await asyncio.gather(*writing, return_exceptions=True)
        return []

    async def _write_block(self, store: ts.TensorStore, leaf: _Leaf, index: Index) -> None:
        values = np.empty(index_shape(index), leaf.dtype)
        await asyncio.to_thread(leaf.tensor.read_into, index, values)
        # Returns when the block is on disk and TensorStore has released it.
        await store[index].write(values, can_reference_source_data_indefinitely=True)
        self._advance(values.nbytes)


def _layout(shape: Sequence[int], itemsize: int) -> tuple[list[int], list[int]]:
    """Shapes of an array's chunks (blocks that are written) and of their readable pieces.

    A block is a run of rows that are contiguous in memory; the leading axes index rows, the experts [F, D] of
    [L, E, F, D]. A piece is a row, or part of a large one, whose first and last axis are then split alternately.
    """
    leading = axes_of_rows(shape, itemsize, PIECE)
    row = list(shape[leading:])
    if not row:
        return [], []
    splits = [1] * len(row)
    piece = list(row)
    while math.prod(piece) * itemsize > PIECE:
        splits[-1 if splits[-1] < min(splits[0], _COLUMNS) else 0] *= 2
        piece = [ceil_div(size, count) for size, count in zip(row, splits, strict=True)]
    # The last piece along an axis may extend beyond it.
    covering = [round_up(size, part) for size, part in zip(row, piece, strict=True)]
    covering_bytes = math.prod(covering) * itemsize
    if leading and covering_bytes <= BLOCK:
        rows = _even_run(shape[leading - 1], BLOCK // covering_bytes)
        return [1] * (leading - 1) + [rows, *covering], [1] * leading + piece
    strips = covering[0] // piece[0]
    run = _even_run(strips, max(BLOCK // (covering_bytes // strips), 1))
    return [1] * leading + [run * piece[0], *covering[1:]], [1] * leading + piece


def _even_run(count: int, limit: int) -> int:
    """Length of the most even runs that divide `count` items into as few runs of at most `limit` as possible."""
    return ceil_div(count, ceil_div(count, limit))


def _zarr_metadata(shape: Sequence[int], block: Sequence[int], piece: Sequence[int]) -> dict[str, Any]:
    """As Orbax writes it, except that its inner chunks are whole blocks. Uncompressed, see `save_arrays`."""
    plain = {"name": "bytes", "configuration": {"endian": "little"}}
    pieces = {
        "chunk_shape": list(piece),
        "codecs": [plain],
        "index_codecs": [plain, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "shape": list(shape),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(block)}},
        "codecs": [{"name": "sharding_indexed", "configuration": pieces}],
    }


def _grid(shape: Sequence[int], block: Sequence[int]) -> Iterator[Index]:
    """The blocks of an array, in memory order."""
    starts = [range(0, size, step) for size, step in zip(shape, block, strict=True)]
    for begin in itertools.product(*starts):
        yield tuple(slice(at, min(at + step, size)) for at, step, size in zip(begin, block, shape, strict=True))
