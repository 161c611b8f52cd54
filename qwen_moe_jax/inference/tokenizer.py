"""Text ↔ token ids, through the checkpoint's own tokenizer."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from qwen_moe_jax.errors import CheckpointError, RequestError
from qwen_moe_jax.storage.git_lfs import lfs_problem
from qwen_moe_jax.text_files import read_text


class Tokenizer(Protocol):
    """The interface of a tokenizer: that of `tokenizers.Tokenizer` and of the tokenizers in transformers."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Any: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


def load_tokenizer(folder: str | PathLike[str]) -> tokenizers.Tokenizer:
    """Reads a checkpoint folder's tokenizer.json, with its padding and truncation settings switched off.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file. The checkpoint folder has to hold its tokenizer.")
    if (problem := lfs_problem(path)) is not None:
        raise CheckpointError(f"{path}: {problem}.")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(read_text(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path}: cannot be read as a tokenizer ({error}).") from None
    # Settings of the data that the tokenizer was trained on; transformers ignores them as well.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text, with the special tokens the tokenizer adds by itself unless the text has its own.

    Special tokens that the text spells out are tokens either way.
    """
    encoded = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return list(getattr(encoded, "ids", encoded))


def require_unicode(name: str, text: str) -> None:
    """Checks that a text can be encoded.

    Raises:
        RequestError: it has half of a surrogate pair; the message begins with `name`.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(f"{name} is not valid UTF-8, expected a text.") from None


def encode_prompt(tokenizer: Tokenizer, prompt: str, vocab_size: int, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a prompt: at least one, and all of them in the model's vocabulary.

    Raises:
        RequestError: an empty prompt, one that is not valid Unicode, or a tokenizer of another model.
    """
    require_unicode("the prompt", prompt)
    ids = encode(tokenizer, prompt, add_special_tokens=add_special_tokens) if prompt else []
    if not ids:
        raise RequestError("the prompt is empty, expected at least one token.")
    if max(ids) >= vocab_size:
        raise RequestError(
            f"the tokenizer gives token id {max(ids)}, expected ids below the model's vocab_size={vocab_size}: "
            "does tokenizer.json belong to this model?"
        )
    return ids


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of token ids, without special tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=True)
