"""A flat table of name → array as an Orbax checkpoint folder: written from devices, and read in parts.

Orbax writes. It restores arrays as a whole, all of a process at once; so they are read here with TensorStore, on which
Orbax stands, and placed like those of any other file.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from orbax.checkpoint.experimental import v1 as ocp

from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.storage.tensor import Index, StoredTensor

#: Bytes that lie in one piece on disk.
BLOCK = 16 << 20
#: Bytes that can be read alone, where they were streamed.
PIECE = 1 << 20
#: Seconds after which Orbax gives up writing. Its own 20 minutes are not enough for a large model on a slow disk.
_PATIENCE = 7 * 24 * 60 * 60
#: The name under which `ocp.save` and `ocp.load` keep a tree in a folder. Given and not left open, so that a new
#: default does not part the two ways of writing.
ITEM = "state"
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
    refuse_unstorable(folder, {name: (array.shape, str(array.dtype)) for name, array in arrays.items()})
    context = ocp.Context()
    # zstd takes a fifth off bfloat16 weights (normal deviates, level 1). On two cores, writing them takes 1.2 times as
    # long with it, and reading them, where the disk does not limit it, 4 times.
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = _chunks_for_orbax
    context.asynchronous.timeout_secs = _PATIENCE
    with context:
        ocp.save(folder.absolute(), dict(arrays), checkpointable_name=ITEM)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
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
        return {name: OrbaxTensor(folder, name, store.result()) for name, store in opening.items()}
    except (ValueError, OSError) as error:
        raise _damaged(folder, error) from error


@dataclasses.dataclass(frozen=True)
class OrbaxTensor(StoredTensor):
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
    def source(self) -> str:
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
    database = {"driver": "file", "path": f"{folder.absolute() / ITEM}/"}
    store = {"driver": "ocdbt", "base": database, "path": f"{name}/", "cache_pool": "cache_pool#nodes"}
    return {"driver": "auto", "kvstore": store}


def _names(folder: Path) -> list[str]:
    """Names of the arrays of a folder, from Orbax's list of them."""
    path = folder / ITEM / _LIST
    if not path.is_file():
        found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        raise CheckpointError(
            f"{folder} is no Orbax checkpoint: expected {ITEM}/{_LIST} in it, found "
            f"{', '.join(found[:8]) or 'nothing'}{', …' if len(found) > 8 else ''}. Give the folder of one checkpoint, "
            "not of several; if writing it was cut short, do that again."
        )
    try:
        leaves = list(json.loads(path.read_text(encoding="utf-8"))["tree_metadata"].values())
        keys = [[key["key"] for key in leaf["key_metadata"]] for leaf in leaves]
        kinds = [leaf["value_metadata"]["value_type"] for leaf in leaves]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(folder, error, f"{ITEM}/{_LIST}") from error
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


def refuse_unstorable(folder: Path, described: Mapping[str, tuple[Sequence[int], str]]) -> None:
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


def axes_of_rows(shape: Sequence[int], itemsize: int, limit: int) -> int:
    """How many leading axes only number rows: of those, as many as bring a row under `limit` bytes.

    Rows are at least a piece long; what is shorter, a vocabulary's, is not cut to single ones.
    """
    axes, rest = 0, math.prod(shape) * itemsize
    while rest > limit and rest // shape[axes] >= PIECE:
        rest //= shape[axes]
        axes += 1
    return axes


def _chunks_for_orbax(_: Any, array: jax.Array) -> ocp.options.ArrayOptions.Saving.StorageOptions:
    """Chunks of a few rows of each device's part; Orbax would take the whole part. The axes named are cut to ones."""
    axes = axes_of_rows(array.sharding.shard_shape(array.shape), array.dtype.itemsize, BLOCK)
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=BLOCK, shard_axes=tuple(range(axes)))
