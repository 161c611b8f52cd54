"""A flat dictionary of name → array as an Orbax checkpoint folder: written from devices, read in slices.

Orbax writes it. Orbax restores whole arrays, and all of a process's at once, so reading goes through TensorStore, which
Orbax is built on, and `placement.place`, as for any other file.
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

#: Bytes of a chunk on disk.
BLOCK = 16 << 20
#: Bytes of the smallest readable piece of a chunk, in folders that `stream_tensors` wrote.
PIECE = 1 << 20
#: Seconds. Orbax's default of 20 minutes is not enough for a large model on a slow disk.
_TIMEOUT = 7 * 24 * 60 * 60
#: The name of the tree in a folder; `ocp.save`'s default. Explicit, so that both writers agree whatever the default.
ITEM = "state"
#: Orbax's list of the leaves of a tree. Read directly: `ocp.metadata` also opens every array, and for a damaged one
#: logs its internals and reports that there is no tree.
_LIST = "_METADATA"


def save_arrays(folder: Path, arrays: Mapping[str, jax.Array]) -> None:
    """Writes arrays, each process its own shards, and returns when all of them are on disk.

    Args:
        folder: to create; the same for all processes, on a file system that all of them see.
        arrays: by name.

    Raises:
        CheckpointError: the folder exists, or Orbax cannot store such arrays.
    """
    check_storable(folder, {name: (array.shape, str(array.dtype)) for name, array in arrays.items()})
    context = ocp.Context()
    # zstd (level 1) saves a fifth of bfloat16 weights drawn from a normal distribution. On two cores it makes writing
    # 1.2 times as slow, and reading from memory 4 times.
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = _chunks_for_orbax
    context.asynchronous.timeout_secs = _TIMEOUT
    with context:
        ocp.save(folder.absolute(), dict(arrays), checkpointable_name=ITEM)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The arrays of a folder by name, from its metadata alone; values are read on demand.

    A slice is read in whole chunks: 1 MB in folders of `stream_tensors`, up to 16 MB in those of `save_arrays`, a
    device's shard in those that plain Orbax wrote.

    Raises:
        CheckpointError: the folder is not a complete Orbax checkpoint, or is not a flat dictionary of arrays.
    """
    names = _names(folder)
    # A cache for OCDBT's index nodes and none for chunks; each of the parallel reads holds one chunk in memory.
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
        folder: of the checkpoint.
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
    # "auto" detects the version of Zarr.
    database = {"driver": "file", "path": f"{folder.absolute() / ITEM}/"}
    store = {"driver": "ocdbt", "base": database, "path": f"{name}/", "cache_pool": "cache_pool#nodes"}
    return {"driver": "auto", "kvstore": store}


def _names(folder: Path) -> list[str]:
    """Names of the arrays of a folder, from Orbax's list of them."""
    path = folder / ITEM / _LIST
    if not path.is_file():
        found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        raise CheckpointError(
            f"{folder} is not an Orbax checkpoint: expected {ITEM}/{_LIST} in it, found "
            f"{', '.join(found[:8]) or 'nothing'}{', …' if len(found) > 8 else ''}. Give the folder of one checkpoint, "
            "not their parent; if writing it was interrupted, repeat that."
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
            f"{folder}: {', '.join(odd[:8])}{', …' if len(odd) > 8 else ''} are not arrays, or are in a nested tree; "
            "expected a flat dictionary of name → array. Write one with save_arrays or stream_tensors."
        )
    return [key for [key] in keys]


def _is_flat_array(key: Sequence[Any], kind: str) -> bool:
    return len(key) == 1 and isinstance(key[0], str) and kind in ("jax.Array", "np.ndarray")


def _damaged(folder: Path, error: BaseException, name: str | None = None) -> CheckpointError:
    while error.__cause__ is not None:
        error = error.__cause__
    # TensorStore appends its whole specification to the message.
    reason = f"{type(error).__name__}: {error}".split(" [tensorstore_spec")[0].split(" [source")[0]
    what = f"{folder}" if name is None else f"{folder}: {name}"
    return CheckpointError(
        f"{what} cannot be read ({reason}). Expected a complete Orbax checkpoint: if copying or writing it was "
        "interrupted, repeat that; if the checkpoint is in another folder, give that one."
    )


def check_storable(folder: Path, arrays: Mapping[str, tuple[Sequence[int], str]]) -> None:
    """Refuses what Orbax would refuse later, from one of its threads.

    Args:
        folder: to create.
        arrays: (shape, dtype) by name.

    Raises:
        CheckpointError: the folder exists; an array is empty or has a dtype that TensorStore does not have.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already: expected a new folder. Remove it or give another one.")
    problems = [f"{name}: has no elements" for name, (shape, _) in arrays.items() if math.prod(shape) == 0]
    problems += [
        f"{name}: TensorStore has no element type {dtype}"
        for name, (_, dtype) in arrays.items()
        if not hasattr(ts, dtype)
    ]
    if not arrays:
        problems = ["there are none"]
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise CheckpointError(f"{folder}: an Orbax checkpoint cannot store these arrays, leave them out:{lines}")


def axes_of_rows(shape: Sequence[int], itemsize: int, limit: int) -> int:
    """How many leading axes are split into single rows, so that a row has at most `limit` bytes.

    Rows have at least `PIECE` bytes: the shorter ones of an embedding are not split.
    """
    axes, rest = 0, math.prod(shape) * itemsize
    while rest > limit and rest // shape[axes] >= PIECE:
        rest //= shape[axes]
        axes += 1
    return axes


def _chunks_for_orbax(_: Any, array: jax.Array) -> ocp.options.ArrayOptions.Saving.StorageOptions:
    """Chunks of a few rows of a shard, where Orbax's default is the whole shard. `shard_axes` are split to size 1."""
    axes = axes_of_rows(array.sharding.shard_shape(array.shape), array.dtype.itemsize, BLOCK)
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=BLOCK, shard_axes=tuple(range(axes)))
