"""The folder that a checkpoint is written into: which one is refused, and what of an old one is named.

One rule for everything that writes a checkpoint folder (`save_*`, `convert`, the commands of surgery): the folder is
new, or empty, or has a checkpoint, whose weights and configs are replaced. Its other files are kept and named.
"""

import contextlib
import fnmatch
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path

from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.huggingface.checkpoint import ORBAX
from qwen_moe_jax.huggingface.files import is_weights
from qwen_moe_jax.huggingface.unused_fields import say_once
from qwen_moe_jax.sharding.distributed import is_process_zero
from qwen_moe_jax.storage.folder import replaced_folder

#: Files of a tokenizer, and of a chat template.
_TOKENIZER = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "*.tiktoken",
)
_LICENCES = ("LICENSE*", "NOTICE*")
#: A model card.
CARDS = ("README*",)
_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json", "adapter_model.*")
#: Most files of a folder that a message names.
_LISTED = 10


def is_stale(name: str) -> bool:
    """Whether a file of this name belongs to the weights of a folder, and is removed when they are replaced."""
    return is_weights(name) or name == ORBAX


def is_companion(name: str) -> bool:
    """Whether a file of this name comes with weights that it says nothing about: tokenizer, chat template, licence."""
    return _matches(name, _TOKENIZER + _LICENCES)


def is_card(name: str) -> bool:
    """Whether a file of this name is a model card, which is true of certain weights only."""
    return _matches(name, CARDS)


def require_target(folder: str | PathLike[str]) -> None:
    """Checks that a checkpoint may be written into a folder.

    Raises:
        CheckpointError: it holds other files, and no checkpoint.
    """
    folder = Path(folder)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if any(is_stale(name) or _matches(name, _CONFIGS + _TOKENIZER) for name in names):
        return
    others = [name for name in names if not (name.startswith(".") or _matches(name, CARDS + _LICENCES))]
    if others:
        raise CheckpointError(
            f"{folder} holds other files and no checkpoint ({_listed(others)}): expected a folder that is empty, does "
            f"not exist yet, or has a checkpoint to replace. Give another one, for example {folder / 'model'}."
        )


@contextlib.contextmanager
def checkpoint_folder(
    folder: Path, *, stale: Callable[[str], bool] = is_stale, expected: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """A temporary folder to write a checkpoint into, which replaces `folder` at the end; see `replaced_folder`.

    Args:
        folder: that is written.
        stale: (file name) → whether the file is removed with the old checkpoint. Other files that the new one does not
            have are kept, and named on stderr.
        expected: (file name) → whether the file is kept without being named.

    Raises:
        CheckpointError: as `require_target` and `replaced_folder`.
    """
    require_target(folder)
    with replaced_folder(folder, stale) as new:
        yield new
        if is_process_zero() and folder.is_dir():
            before = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
            kept = [name for name in before if not (stale(name) or expected(name) or (new / name).exists())]
            if kept:
                say_once(f"{folder}: kept what was there and is not of the new checkpoint: {_listed(kept)}.")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_LISTED] + ["…"] * (len(names) > _LISTED))
