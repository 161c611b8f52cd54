"""PyTorch's pickled files (.bin), read by torch with `weights_only=True`: no code in the file is run."""

import dataclasses
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.storage.git_lfs import lfs_problem
from qwen_moe_jax.storage.tensor import Index, StoredTensor

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class TorchTensor(StoredTensor):
    """A torch tensor of a file; memory-mapped, and not read yet, where the file is a zip archive."""

    tensor: "torch.Tensor"
    path: Path

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def source(self) -> str:
        return self.path.name

    def read_into(self, index: Index, out: np.ndarray) -> None:
        import torch

        part = self.tensor[index].contiguous().view(-1)
        # As bytes: torch does not convert bfloat16 and float8 to NumPy.
        out[...] = part.view(torch.uint8).numpy().view(self.dtype).reshape(out.shape)


def open_torch_file(path: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of a file by name, and the problems found in it, as `open_safetensors`.

    Raises:
        CheckpointError: torch is not installed, or there is no permission to read the file.
    """
    if (problem := lfs_problem(path)) is not None:
        return {}, [f"not downloaded: {problem}"]
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path} is a PyTorch file, which only torch can read, and torch is not installed. Install it (pip install "
            "torch), or open the folder with transformers on a machine that has torch and call save_pretrained, which "
            "writes safetensors."
        ) from None
    try:
        # Files older than PyTorch 1.6 are not zip archives; torch cannot map them and reads them whole.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except Exception as error:  # a damaged file may raise pickle's errors, RuntimeError, KeyError, …
        reason = str(error).strip().splitlines()
        return {}, [f"damaged: {path.name} is not a PyTorch file of tensors only ({reason[0] if reason else error!r})"]
    if (name := _nested(loaded)) is not None:
        return {}, [
            f"nested: {path.name} holds its tensors under the key {name!r}, as checkpoints of training do, expected a "
            f"dictionary of tensors by name. Write them alone, in Python: loaded = torch.load({path.name!r}, "
            f"map_location='cpu'); torch.save(loaded[{name!r}], {path.name!r})"
        ]
    tensors = loaded.items() if isinstance(loaded, dict) else ()
    if not tensors or not all(isinstance(name, str) and _plain(value) for name, value in tensors):
        return {}, [f"damaged: {path.name} does not hold a dictionary of tensors by name"]
    return {name: TorchTensor(value.detach(), path) for name, value in tensors}, []


def _nested(loaded: object) -> str | None:
    """The key under which a dictionary has another one of tensors; None where it has none, or tensors itself."""
    import torch

    if not isinstance(loaded, dict) or any(isinstance(value, torch.Tensor) for value in loaded.values()):
        return None
    for name, value in loaded.items():
        if isinstance(value, dict) and value and all(isinstance(one, torch.Tensor) for one in value.values()):
            return str(name)
    return None


def _plain(value: object) -> bool:
    import torch

    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":  # a tensor on "meta" has no values
        return False
    return value.layout is torch.strided and not value.is_quantized
