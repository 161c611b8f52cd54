"""Text ↔ token ids, through the checkpoint's own tokenizer."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from qwen_moe_jax.errors import CheckpointError


class Tokenizer(Protocol):
    """What is needed of a tokenizer: `tokenizers.Tokenizer` has it, and so have those of transformers."""

    def encode(self, text: str) -> Any: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


def load_tokenizer(folder: str | PathLike[str]) -> tokenizers.Tokenizer:
    """Reads a checkpoint folder's tokenizer.json.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. The checkpoint folder has to hold its tokenizer.")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path}: cannot be read as a tokenizer ({error}).") from None


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text, with the special tokens the tokenizer adds by itself."""
    encoded = tokenizer.encode(text)
    return list(getattr(encoded, "ids", encoded))


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of token ids, without special tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=True)
