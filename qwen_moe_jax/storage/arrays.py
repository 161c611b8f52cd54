"""Small safetensors files as whole NumPy arrays, read and written by the safetensors library: adapters, traces, states.

Files of any size are `storage/safetensors_file.py`'s, which says why it does not use the library.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.storage.git_lfs import lfs_problem
from qwen_moe_jax.storage.tensor import Index, StoredTensor


@dataclasses.dataclass(frozen=True)
class ArrayTensor(StoredTensor):
    """An array in memory as a `StoredTensor`.

    Attributes:
        array: the values.
        source: name of the file that they were read from, for messages.
    """

    array: np.ndarray
    source: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> str:
        return self.array.dtype.name

    def read_into(self, index: Index, out: np.ndarray) -> None:
        out[...] = self.array[index]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a safetensors file by name.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    if (problem := lfs_problem(path)) is not None:
        raise CheckpointError(f"{path}: {problem}.")
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except (SafetensorError, OSError, AttributeError) as error:  # AttributeError: a dtype that NumPy does not have
        raise CheckpointError(f"{path}: damaged, it cannot be read as safetensors ({error}).") from None


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name into a new safetensors file, which torch and NumPy both read."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(contiguous, path, metadata={"format": "pt"})
