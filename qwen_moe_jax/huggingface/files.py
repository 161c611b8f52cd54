"""The files of a Hub folder that hold its tensors; only their headers are read."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.storage.safetensors_file import open_safetensors
from qwen_moe_jax.storage.tensor import StoredTensor
from qwen_moe_jax.storage.torch_file import open_torch_file
from qwen_moe_jax.text_files import read_text

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: (file, whether it is an index, opener) of weights, in the order of preference of transformers.
LAYOUTS = (
    (SINGLE, False, open_safetensors),
    (INDEX, True, open_safetensors),
    ("pytorch_model.bin", False, open_torch_file),
    ("pytorch_model.bin.index.json", True, open_torch_file),
)
#: Names of the files that an index names.
_PARTS = {"model-*-of-*.safetensors": INDEX, "pytorch_model-*-of-*.bin": "pytorch_model.bin.index.json"}
#: Prefixes that wrappers of a model put before the names of all its tensors.
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")
#: The vision tower of a multimodal folder, which the text model does not use.
VISION = re.compile(r"^(model\.)?visual\.")
#: The next-token head.
NEXT_TOKEN_HEAD = re.compile(r"^(model\.)?mtp\.")
#: Tensors of checkpoints that a model runs without: an index may name them without their being there.
HARMLESS = re.compile(rf"\.rotary_emb\.inv_freq$|{NEXT_TOKEN_HEAD.pattern}|{VISION.pattern}")
#: Most files of a folder that a message names.
_LISTED = 10


@dataclasses.dataclass(frozen=True)
class Files:
    """The tensors of a folder, under the names in its files.

    Attributes:
        tensors: by name; no values are read.
        problems: found in the files, a line each.
        unreadable: names of tensors that an index puts into files that could not be opened.
        is_remote: whether values are fetched over a network when they are read.
    """

    tensors: dict[str, StoredTensor]
    problems: list[str]
    unreadable: frozenset[str] = frozenset()
    is_remote: bool = False

    def without_wrappers(self) -> tuple["Files", str]:
        """The same without the prefixes that wrappers of a model put before every name; and the prefixes.

        `module.` is DataParallel's, `_orig_mod.` torch.compile's, `base_model.model.` PEFT's.
        """
        names, removed = list(self.tensors), ""
        while names and (prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in names)), None)):
            names, removed = [name.removeprefix(prefix) for name in names], removed + prefix
        tensors = dict(zip(names, self.tensors.values(), strict=True))
        return dataclasses.replace(self, tensors=tensors), removed


def is_weights(name: str) -> bool:
    """Whether a file of this name in a Hub folder holds weights or is an index of them."""
    return name.startswith(("model", "pytorch_model")) and name.endswith((".safetensors", ".bin", ".index.json"))


def open_files(folder: Path) -> Files:
    """Opens a folder's safetensors files, or its PyTorch files if it has no safetensors.

    Raises:
        CheckpointError: the folder has neither, or has PyTorch files and torch is not installed.
    """
    for name, is_index, opener in LAYOUTS:
        if (folder / name).is_file():
            return open_indexed(folder / name, opener) if is_index else Files(*opener(folder / name))
    for pattern, index in _PARTS.items():
        if parts := sorted(path.name for path in folder.glob(pattern)):
            raise CheckpointError(
                f"{folder}: found {parts[0]}, one of several files of weights, without {index}, which says which "
                "tensor is in which file. Download or copy it, too."
            )
    names = ", ".join(name for name, _, _ in LAYOUTS)
    raise CheckpointError(
        f"{folder}: found none of {names}, but {_content(folder)}. A checkpoint folder needs one of them; other "
        "formats have to be saved as safetensors first (save_pretrained of transformers does)."
    )


def _content(folder: Path) -> str:
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return ", ".join(names[:_LISTED] + ["…"] * (len(names) > _LISTED))


def needed_files(index: Path, *, drop_mtp: bool) -> list[str]:
    """Names of the files that an index gives a tensor which a model reads; none, if the index cannot be read.

    Args:
        index: model.safetensors.index.json.
        drop_mtp: the next-token head is not read.
    """
    try:
        weight_map = _weight_map(index)
    except (OSError, ValueError, RecursionError):
        return []
    return sorted({file for name, file in weight_map.items() if not _is_unread(name, drop_mtp=drop_mtp)})


def _is_unread(name: str, *, drop_mtp: bool) -> bool:
    return HARMLESS.search(name) is not None and (drop_mtp or NEXT_TOKEN_HEAD.search(name) is None)


def open_indexed(
    path: Path,
    opener: Callable[[Path], tuple[dict[str, StoredTensor], list[str]]],
    is_there: Callable[[str], bool] | None = None,
) -> Files:
    """Opens the files that an index names.

    Args:
        path: of the index.
        opener: of one file, by its path in the folder of the index.
        is_there: whether a file of this name can be opened; None looks into the folder.
    """
    is_remote = is_there is not None
    is_there = is_there or (lambda name: (path.parent / name).is_file())
    try:
        weight_map = _weight_map(path)
        # A file of nothing but tensors that no forward pass reads need not be there.
        present = {name: is_there(name) for name in weight_map.values()}
        weight_map = {name: file for name, file in weight_map.items() if present[file] or not HARMLESS.search(name)}
    except (OSError, ValueError, RecursionError) as error:
        return Files({}, [f"damaged: {path.name} is not an index of tensors ({error})"])
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    unread: set[str] = set()
    for name in sorted(set(weight_map.values())):
        if not present[name]:
            problems.append(f"absent: {path.name} names {name}, which is not in the folder")
            unread.add(name)
            continue
        found, wrong = opener(path.parent / name)
        problems += wrong
        if not found:
            unread.add(name)
        for tensor in sorted(tensors.keys() & found.keys()):
            problems.append(f"duplicated: {tensor} is in {tensors[tensor].source} and in {name}")
        tensors |= found
    for tensor, name in weight_map.items():
        if tensor not in tensors and name not in unread and not HARMLESS.search(tensor):
            problems.append(f"index: {path.name} says that {tensor} is in {name}, which does not have it")
    unreadable = frozenset(tensor for tensor, name in weight_map.items() if name in unread)
    return Files(tensors, problems, unreadable, is_remote)


def _weight_map(path: Path) -> Mapping[str, str]:
    content = json.loads(read_text(path))
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found:
        raise ValueError("expected an object with a weight_map of tensor names to file names")
    for name in found.values():
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
            raise ValueError(f"expected names of files in the folder itself, found {name!r}")
    for name in found:
        if not name.isprintable():
            raise ValueError(f"expected printable tensor names, found {name!r}")
    return found
