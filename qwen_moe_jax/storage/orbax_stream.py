"""Tensors of any size → an Orbax checkpoint folder, block by block.

Orbax writes arrays that are in memory. Here it writes the checkpoint as always, and leaves the values to a handler of
ours, which opens the same TensorStore arrays as Orbax's would and fills them from tensors that are read in parts.
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

# The older interface too: only there, handlers of leaves are public. `get_json_tspec_write` is called deprecated there
# and has no successor yet; it knows in which subfolder a process writes, and how the database in it is set up.
import orbax.checkpoint as orbax_v0
import tensorstore as ts
from orbax.checkpoint import type_handlers
from orbax.checkpoint.experimental import v1 as ocp

from qwen_moe_jax.errors import ShardingError
from qwen_moe_jax.rounding import ceil_div, round_up
from qwen_moe_jax.storage.orbax import BLOCK, ITEM, PIECE, axes_of_rows, refuse_unstorable
from qwen_moe_jax.storage.tensor import Index, StoredTensor, index_shape

#: How many blocks are in memory, read or being written. TensorStore holds a copy of each; without waiting for writes it
#: would hold the whole model.
_BLOCKS_AT_ONCE = 3
#: Into how many pieces the last axis is cut at most: narrower columns are slow to copy, wider meshes are rare.
_COLUMNS = 8


def stream_tensors(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes the folder that `save_arrays` would write, from tensors that are read block by block.

    In memory are a few blocks, however large a tensor is: some 200 MB. To Orbax the leaves are NumPy arrays: restored
    without a description they come as such.

    Args:
        folder: to write; does not exist yet.
        tensors: by name. Each is read once, in blocks of consecutive rows, from several threads.
        advance: is told of bytes written, from another thread.

    Raises:
        ShardingError: there are several processes; each would write everything.
        CheckpointError: Orbax cannot keep such a table; or as reading the tensors raises it.
    """
    if jax.process_count() > 1:
        raise ShardingError(
            f"{folder}: tensors are streamed by one process, found {jax.process_count()}. Do it in a program without "
            "jax.distributed, or place them on the devices and write with save_arrays."
        )
    refuse_unstorable(folder, {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
    table = _StreamedTable({name: _Leaf(tensor) for name, tensor in tensors.items()}, advance)
    # In a thread of its own, so that an interrupt reaches this one wherever Orbax is, and ends the writing before the
    # caller removes what is there.
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
    """A tensor in the tree that is given to Orbax: a type of its own, which our handler is found by.

    Attributes:
        tensor: to be read.
    """

    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.tensor.dtype)


class _StreamedTable:
    """The tree of leaves, in the form of an object that Orbax asks to write itself into a folder.

    Attributes:
        stop: is set to end the writing.
        failure: what ended it. Kept, because Orbax's threads wrap what is raised in them.
    """

    def __init__(self, leaves: Mapping[str, _Leaf], advance: Callable[[int], None]) -> None:
        self._leaves = dict(leaves)
        self._advance = advance
        self.stop = threading.Event()
        self.failure: Exception | None = None

    async def save(self, directory: ocp.path.PathAwaitingCreation) -> Awaitable[None]:
        return self._write(directory)

    async def load(self, directory: ocp.path.Path) -> Awaitable[None]:
        raise NotImplementedError("written so, and restored as any tree of arrays")

    async def _write(self, directory: ocp.path.PathAwaitingCreation) -> None:
        path = await directory.await_creation()
        try:
            await asyncio.to_thread(self._write_tree, path)
        except Exception as error:
            self.failure = error
            raise

    def _write_tree(self, path: ocp.path.Path) -> None:
        # Orbax warns where nothing handles jax.Array.
        registry = type_handlers.create_type_handler_registry(
            (_Leaf, _StreamingHandler(self._advance, self.stop)), (jax.Array, type_handlers.ArrayHandler())
        )
        tree = orbax_v0.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, type_handler_registry=registry)
        tree.save(path, args=orbax_v0.args.PyTreeSave(self._leaves))
        tree.finalize(path)


class _StreamingHandler(type_handlers.NumpyHandler):
    """Writes leaves block by block; in the checkpoint's metadata they are what they are to the class above, arrays."""

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
        """Returns when everything is on disk, so there is nothing to wait for."""
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
            # What was begun ends first: TensorStore would go on with it after an error too.
            await asyncio.gather(*writing, return_exceptions=True)
        return []

    async def _write_block(self, store: ts.TensorStore, leaf: _Leaf, index: Index) -> None:
        values = np.empty(index_shape(index), leaf.dtype)
        await asyncio.to_thread(leaf.tensor.read_into, index, values)
        # Returns when the block is on disk, and TensorStore has let go of it.
        await store[index].write(values, can_reference_source_data_indefinitely=True)
        self._advance(values.nbytes)


def _layout(shape: Sequence[int], itemsize: int) -> tuple[list[int], list[int]]:
    """Shapes of the blocks that an array is written in, and of the pieces that they can be read in.

    Blocks are runs of rows, as they lie in memory; rows are what the leading axes number, the experts [F, D] of
    [L, E, F, D]. A piece is one row, or a part of one: where rows are large, their first and last axes are cut in turn.
    """
    leading = axes_of_rows(shape, itemsize, PIECE)
    row = list(shape[leading:])
    if not row:
        return [], []
    cuts = [1] * len(row)
    piece = list(row)
    while math.prod(piece) * itemsize > PIECE:
        cuts[-1 if cuts[-1] < min(cuts[0], _COLUMNS) else 0] *= 2
        piece = [ceil_div(size, cut) for size, cut in zip(row, cuts, strict=True)]
    # The last piece of an axis may reach beyond it.
    covering = [round_up(size, part) for size, part in zip(row, piece, strict=True)]
    covering_bytes = math.prod(covering) * itemsize
    if leading and covering_bytes <= BLOCK:
        rows = _even_run(shape[leading - 1], BLOCK // covering_bytes)
        return [1] * (leading - 1) + [rows, *covering], [1] * leading + piece
    strips = covering[0] // piece[0]
    run = _even_run(strips, max(BLOCK // (covering_bytes // strips), 1))
    return [1] * leading + [run * piece[0], *covering[1:]], [1] * leading + piece


def _even_run(count: int, limit: int) -> int:
    """Length of the runs that divide `count` things most evenly into as few runs as `limit` allows."""
    return ceil_div(count, ceil_div(count, limit))


def _zarr_metadata(shape: Sequence[int], block: Sequence[int], piece: Sequence[int]) -> dict[str, Any]:
    """As Orbax has it, but that its pieces are whole blocks. Uncompressed, see `save_arrays`."""
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
