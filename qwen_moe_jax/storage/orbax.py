"""A flat table of name → array as an Orbax checkpoint folder: written from devices or from disk, restored on any mesh.

Orbax writes and restores arrays that lie on devices. Two things it does not do are done here, in folders of its own
format: writing tensors that are larger than memory, and reading a part of an array. For the first, Orbax writes the
checkpoint as always, and leaves the values to a handler of ours, which opens the same TensorStore arrays as Orbax's
would and fills them block by block. For the second, TensorStore opens the array without Orbax.
"""

import asyncio
import dataclasses
import itertools
import json
import math
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The older interface too: only there, handlers of leaves are public. `get_json_tspec_write` is called deprecated there
# and has no successor yet; it knows in which subfolder a process writes, and how the database in it is set up.
import orbax.checkpoint as orbax_v0
import tensorstore as ts
from orbax.checkpoint import type_handlers
from orbax.checkpoint.experimental import v1 as ocp

from qwen_moe_jax.errors import CheckpointError, ShardingError
from qwen_moe_jax.storage.tensor import Index, Tensor, size_of

#: Bytes written at a time, which lie in one piece on disk; and how many such blocks are in memory, read or being
#: written. TensorStore holds a copy of each. Without waiting for writes it would hold the whole model.
_BLOCK = 16 << 20
_BLOCKS_AT_ONCE = 3
#: Bytes read at a time: blocks are divided into pieces that are read alone, so that a device reads little more than it
#: holds, whichever axes its mesh splits.
_PIECE = 1 << 20
#: Into how many pieces the last axis is cut at most: narrower columns are slow to copy, wider meshes are rare.
_COLUMNS = 8
#: Seconds after which Orbax gives up writing. Its own 20 minutes are not enough for a large model on a slow disk.
_PATIENCE = 7 * 24 * 60 * 60
#: The name under which `ocp.save` and `ocp.load` keep a tree in a folder. Given and not left open, so that a new
#: default does not part the two ways of writing.
_ITEM = "state"
#: Orbax's list of the leaves of a tree. Read here because Orbax, asked for it, opens every array too, and where one is
#: damaged logs its internals and answers that there is no tree.
_LIST = "_METADATA"


def save_arrays(folder: Path, arrays: Mapping[str, jax.Array]) -> None:
    """Writes arrays from where they are, each process its own parts, and returns when all is whole on disk.

    Args:
        folder: to write; does not exist yet. The same, and seen by all processes.
        arrays: by name.

    Raises:
        CheckpointError: Orbax cannot keep such a table.
    """
    _refuse_unstorable(folder, {name: (array.shape, str(array.dtype)) for name, array in arrays.items()})
    context = ocp.Context()
    # zstd takes a fifth off bfloat16 weights (normal deviates, level 1). On two cores, writing them takes 1.2 times as
    # long with it, and reading them, where the disk does not limit it, 4 times.
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = _chunks_for_orbax
    context.asynchronous.timeout_secs = _PATIENCE
    with context:
        ocp.save(folder.absolute(), dict(arrays), checkpointable_name=_ITEM)


def stream_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: str | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes the folder that `save_arrays` would write, from tensors that are read block by block.

    In memory are a few blocks, however large a tensor is: some 200 MB. To Orbax the leaves are NumPy arrays: restored
    without a description they come as such.

    Args:
        folder: to write; does not exist yet.
        tensors: by name. Each is read once, in blocks of consecutive rows, from several threads.
        dtype: of floating-point tensors, which are cast to it; others keep theirs. None: all keep theirs.
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
    leaves = {name: _Leaf(tensor, _stored_dtype(tensor, dtype)) for name, tensor in tensors.items()}
    _refuse_unstorable(folder, {name: (leaf.shape, leaf.dtype.name) for name, leaf in leaves.items()})
    table = _StreamedTable(leaves, advance)
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


def restore_arrays(folder: Path, described: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads arrays of a folder, cast and placed as described; others of the folder are not read.

    Args:
        folder: as `save_arrays` or `stream_tensors` wrote it, on whatever mesh.
        described: shape, dtype and sharding of each array that is wanted, by name; without a sharding, JAX's default
            device.

    Raises:
        CheckpointError: the folder is no whole Orbax checkpoint, lacks a name, or has it in another shape.
    """
    shapes = {name: tensor.shape for name, tensor in stored_tensors(folder).items()}
    # Orbax too refuses another shape, but only after reading, and one at a time.
    problems = [f"absent: {name}" for name in described if name not in shapes]
    problems += [
        f"mismatched: {name} has shape {list(shapes[name])}, expected {list(array.shape)}"
        for name, array in described.items()
        if name in shapes and shapes[name] != tuple(array.shape)
    ]
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise CheckpointError(
            f"{folder} holds {len(shapes)} arrays, and not those expected:{lines}\n"
            "It was written for another model or by another version: give the folder of this one."
        )
    if not described:
        return {}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            return ocp.load(folder.absolute(), _with_shardings(described), checkpointable_name=_ITEM)
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # of the devices, not of the folder
    except Exception as error:  # Orbax raises bare ones
        raise _damaged(folder, error) from error


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All arrays of a folder by name, from its metadata alone; values are read when asked for.

    Reading a part reads the chunks that it touches: pieces of a MB of what `stream_tensors` wrote, up to 16 MB of what
    `save_arrays` wrote, as large as a device's part of what others wrote.

    Raises:
        CheckpointError: the folder is no whole Orbax checkpoint, or holds something else than a flat table of arrays.
    """
    names = _names(folder)
    # One cache for the nodes that say where in which file a chunk is; no cache for chunks. Each of the parallel reads
    # holds a chunk in memory.
    context = ts.Context({"cache_pool#nodes": {"total_bytes_limit": 32 << 20}, "file_io_concurrency": {"limit": 4}})
    try:
        opening = {name: ts.open(_read_spec(folder, name), open=True, read=True, context=context) for name in names}
        return {name: _StoredTensor(folder, name, store.result()) for name, store in opening.items()}
    except (ValueError, OSError) as error:
        raise _damaged(folder, error) from error


@dataclasses.dataclass(frozen=True)
class _StoredTensor(Tensor):
    """One array of a folder.

    Attributes:
        folder: that holds it.
        name: of the array.
        store: opened for reading.
    """

    folder: Path
    name: str
    store: ts.TensorStore = dataclasses.field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.store.shape)

    @property
    def dtype(self) -> str:
        return self.store.dtype.numpy_dtype.name

    @property
    def where(self) -> str:
        return str(self.folder)

    def read_into(self, index: Index, out: np.ndarray) -> None:
        try:
            part = self.store[index]
            if out.dtype == self.dtype:
                ts.array(out).write(part[ts.d[:].translate_to[0]]).result()
            else:
                out[...] = part.read().result()
        except (ValueError, OSError) as error:
            raise _damaged(self.folder, error, self.name) from error


def _read_spec(folder: Path, name: str) -> dict[str, Any]:
    # "auto": whichever version of Zarr it was written in.
    database = {"driver": "file", "path": f"{folder.absolute() / _ITEM}/"}
    store = {"driver": "ocdbt", "base": database, "path": f"{name}/", "cache_pool": "cache_pool#nodes"}
    return {"driver": "auto", "kvstore": store}


def _names(folder: Path) -> list[str]:
    """Names of the arrays of a folder, from Orbax's list of them."""
    path = folder / _ITEM / _LIST
    if not path.is_file():
        found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        raise CheckpointError(
            f"{folder} is no Orbax checkpoint: expected {_ITEM}/{_LIST} in it, found "
            f"{', '.join(found[:8]) or 'nothing'}{', …' if len(found) > 8 else ''}. Give the folder of one checkpoint, "
            "not of several; if writing it was cut short, do that again."
        )
    try:
        leaves = list(json.loads(path.read_text(encoding="utf-8"))["tree_metadata"].values())
        keys = [[key["key"] for key in leaf["key_metadata"]] for leaf in leaves]
        kinds = [leaf["value_metadata"]["value_type"] for leaf in leaves]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(folder, error, f"{_ITEM}/{_LIST}") from error
    odd = [".".join(map(str, key)) for key, kind in zip(keys, kinds, strict=True) if not _is_flat_array(key, kind)]
    if odd:
        raise CheckpointError(
            f"{folder}: {', '.join(odd[:8])}{', …' if len(odd) > 8 else ''} are no arrays, or lie in a nested tree; "
            "expected a flat table of name → array. Write one with save_arrays or stream_tensors."
        )
    return [key for [key] in keys]


def _is_flat_array(key: Sequence[Any], kind: str) -> bool:
    return len(key) == 1 and isinstance(key[0], str) and kind in ("jax.Array", "np.ndarray")


def _damaged(folder: Path, error: BaseException, name: str | None = None) -> CheckpointError:
    while error.__cause__ is not None:
        error = error.__cause__
    # TensorStore tells after its message how it was opened, at length.
    reason = f"{type(error).__name__}: {error}".split(" [tensorstore_spec")[0].split(" [source")[0]
    what = f"{folder}" if name is None else f"{folder}: {name}"
    return CheckpointError(
        f"{what} cannot be read ({reason}). Expected a whole Orbax checkpoint: if copying or writing it was cut short, "
        "do that again; if the checkpoint is another folder, give that one."
    )


def _refuse_unstorable(folder: Path, described: Mapping[str, tuple[Sequence[int], str]]) -> None:
    """What Orbax would refuse halfway, from one of its threads."""
    if folder.exists():
        raise CheckpointError(f"{folder} exists already, expected a folder to create. Remove it or give another one.")
    problems = [f"{name}: has no elements" for name, (shape, _) in described.items() if math.prod(shape) == 0]
    problems += [
        f"{name}: TensorStore has no element type {dtype}"
        for name, (_, dtype) in described.items()
        if not hasattr(ts, dtype)
    ]
    if not described:
        problems = ["there are none"]
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise CheckpointError(f"{folder}: these arrays cannot be kept in an Orbax checkpoint, leave them out:{lines}")


def _save_table(folder: Path, table: "_StreamedTable") -> None:
    with ocp.Context():
        ocp.save_checkpointables(folder.absolute(), {_ITEM: table})


def _with_shardings(described: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    default = jnp.zeros(()).sharding
    return {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding or default)
        for name, array in described.items()
    }


def _stored_dtype(tensor: Tensor, dtype: str | None) -> np.dtype:
    own = np.dtype(tensor.dtype)
    return np.dtype(dtype) if dtype is not None and jnp.issubdtype(own, jnp.floating) else own


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A tensor in the tree that is given to Orbax.

    Attributes:
        tensor: to be read.
        dtype: to be stored in.
    """

    tensor: Tensor
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


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
        values = np.empty(size_of(index), leaf.dtype)
        await asyncio.to_thread(leaf.tensor.read_into, index, values)
        # Returns when the block is on disk, and TensorStore has let go of it.
        await store[index].write(values, can_reference_source_data_indefinitely=True)
        self._advance(values.nbytes)


def _layout(shape: Sequence[int], itemsize: int) -> tuple[list[int], list[int]]:
    """Shapes of the blocks that an array is written in, and of the pieces that they can be read in.

    Blocks are runs of rows, as they lie in memory; rows are what the leading axes number, the experts [F, D] of
    [L, E, F, D]. A piece is one row, or a part of one: where rows are large, their first and last axes are cut in turn.
    """
    leading = _axes_of_rows(shape, itemsize, _PIECE)
    row = list(shape[leading:])
    if not row:
        return [], []
    cuts = [1] * len(row)
    piece = list(row)
    while math.prod(piece) * itemsize > _PIECE:
        cuts[-1 if cuts[-1] < min(cuts[0], _COLUMNS) else 0] *= 2
        piece = [-(-size // cut) for size, cut in zip(row, cuts, strict=True)]
    # The last piece of an axis may reach beyond it.
    covering = [-(-size // part) * part for size, part in zip(row, piece, strict=True)]
    covering_bytes = math.prod(covering) * itemsize
    if leading and covering_bytes <= _BLOCK:
        rows = _even_run(shape[leading - 1], _BLOCK // covering_bytes)
        return [1] * (leading - 1) + [rows, *covering], [1] * leading + piece
    strips = covering[0] // piece[0]
    run = _even_run(strips, max(_BLOCK // (covering_bytes // strips), 1))
    return [1] * leading + [run * piece[0], *covering[1:]], [1] * leading + piece


def _even_run(count: int, limit: int) -> int:
    """Length of the runs that divide `count` things most evenly into as few runs as `limit` allows."""
    return -(-count // -(-count // limit))


def _axes_of_rows(shape: Sequence[int], itemsize: int, limit: int) -> int:
    """How many leading axes only number rows: of those, as many as bring a row under `limit` bytes.

    Rows are at least a piece long; what is shorter, a vocabulary's, is not cut to single ones.
    """
    axes, rest = 0, math.prod(shape) * itemsize
    while rest > limit and rest // shape[axes] >= _PIECE:
        rest //= shape[axes]
        axes += 1
    return axes


def _chunks_for_orbax(_: Any, array: jax.Array) -> ocp.options.ArrayOptions.Saving.StorageOptions:
    """Chunks of a few rows of each device's part; Orbax would take the whole part. The axes named are cut to ones."""
    axes = _axes_of_rows(array.sharding.shard_shape(array.shape), array.dtype.itemsize, _BLOCK)
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=_BLOCK, shard_axes=tuple(range(axes)))


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
