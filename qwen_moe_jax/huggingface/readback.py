"""What was written, read back and compared bit for bit with what was to be written."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import jax

from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.huggingface.files import open_files
from qwen_moe_jax.huggingface.layouts import equal
from qwen_moe_jax.storage.placement import DeviceTensor
from qwen_moe_jax.storage.tensor import StoredTensor, TensorSlice

_LISTED = 10


def require_same_files(folder: Path, shown: Path, written: Mapping[str, StoredTensor]) -> None:
    """Checks that the safetensors of a folder hold these tensors and no others.

    Args:
        folder: that was written.
        shown: the folder for messages.
        written: by the files' names.

    Raises:
        CheckpointError: a tensor has other values, another shape or dtype, is missing or is one too many.
    """
    files = open_files(folder)
    found = files.tensors
    wrong = list(files.problems)
    wrong += [f"{name}: missing" for name in written.keys() - found.keys()]
    wrong += [f"{name}: unexpected" for name in found.keys() - written.keys()]
    wrong += [
        f"{name}: other values" for name, tensor in written.items() if name in found and not equal(tensor, found[name])
    ]
    _require_none(shown, wrong)


def require_same_arrays(shown: Path, written: Mapping[str, jax.Array], stored: Mapping[str, StoredTensor]) -> None:
    """Checks that an Orbax folder holds these arrays; each process reads the shards of its own devices.

    Args:
        shown: the folder for messages.
        written: by name, as they were saved.
        stored: the folder's.

    Raises:
        CheckpointError: an array has other values, another shape or dtype, or is missing.
    """
    wrong = [f"{name}: missing" for name in written.keys() - stored.keys()]
    for name, array in written.items():
        if name in stored and not all(_equal_shards(array, stored[name])):
            wrong.append(f"{name}: other values")
    _require_none(shown, wrong)


def _equal_shards(array: jax.Array, stored: StoredTensor) -> Iterable[bool]:
    if stored.shape != array.shape:
        yield False
        return
    windows = {
        tuple(part.indices(size)[:2] for part, size in zip(shard.index, array.shape, strict=True))
        for shard in array.addressable_shards
    }
    for bounds in sorted(windows):
        window = tuple(slice(start, stop) for start, stop in bounds)
        yield equal(TensorSlice(DeviceTensor(array), window), TensorSlice(stored, window))


def _require_none(shown: Path, wrong: list[str]) -> None:
    if not wrong:
        return
    more = [f"… and {len(wrong) - _LISTED} more"] if len(wrong) > _LISTED else []
    listed = "\n  ".join(sorted(wrong)[:_LISTED] + more)
    raise CheckpointError(
        f"{shown}: what was written differs from the model ({len(wrong)} tensors); what was there is unchanged:\n"
        f"  {listed}\nThe disk or the file system lost data: check it, and write again."
    )
