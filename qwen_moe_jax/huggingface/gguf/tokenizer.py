"""A folder's tokenizer as llama.cpp stores it: byte-level BPE of tokenizer.json, or SentencePiece's tokenizer.model."""

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.fields import read_json

#: Kinds of tokens in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
#: llama.cpp's name of the rule that splits a text, by the regular expression in tokenizer.json.
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "qwen2"
    ),
}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What GGUF says of a tokenizer.

    Attributes:
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece).
        pre: name of the rule that splits a text; of "llama", none.
        tokens, types: of each id.
        scores: of each id; None for "gpt2".
        merges: pairs, separated by a space; None for "llama".
    """

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None


def read_vocabulary(folder: Path, size: int) -> Vocabulary | str:
    """The tokenizer of a folder, or why llama.cpp has no form for it.

    Args:
        folder: of the checkpoint.
        size: of the model's vocabulary; ids without a token are unused ones.
    """
    if (folder / "tokenizer.model").is_file():
        try:
            return _sentencepiece((folder / "tokenizer.model").read_bytes(), size)
        except (ValueError, IndexError, struct.error, UnicodeDecodeError) as error:
            return f"tokenizer.model cannot be read ({error})"
    if not (folder / "tokenizer.json").is_file():
        return "there is no tokenizer.json and no tokenizer.model"
    try:
        return _byte_level(read_json(folder / "tokenizer.json"), size)
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        return f"tokenizer.json cannot be read ({error!r})"


def _byte_level(content: dict[str, Any], size: int) -> Vocabulary | str:
    model = content["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return f"tokenizer.json is of {model.get('type')}, expected byte-level BPE"
    pre = _split_rule(content.get("pre_tokenizer"))
    if pre is None:
        return "tokenizer.json splits texts by a rule that llama.cpp has no name for here"
    tokens, types = [f"[PAD{token}]" for token in range(size)], [UNUSED] * size
    for token, at in model["vocab"].items():
        tokens[at], types[at] = token, NORMAL
    for added in content.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added.get("special") else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary("gpt2", pre, tokens, types, None, merges)


def _split_rule(pre: Any) -> str | None:
    parts = pre.get("pretokenizers", [pre]) if isinstance(pre, dict) else []
    patterns = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    if len(patterns) == 1:
        return _SPLITS.get(patterns[0])
    byte_level = [part for part in parts if part.get("type") == "ByteLevel"]
    return "gpt-2" if len(parts) == 1 and byte_level and byte_level[0].get("use_regex", True) else None


def _sentencepiece(data: bytes, size: int) -> Vocabulary:
    """The pieces of SentencePiece's protocol buffer: field 1 of the model; in each 1 text, 2 score, 3 kind."""
    tokens, types = [f"[PAD{token}]" for token in range(size)], [UNUSED] * size
    scores = [0.0] * size
    at = 0
    for number, value in _fields(data):
        if number != 1 or not isinstance(value, bytes):
            continue
        piece = dict(_fields(value))
        tokens[at] = piece[1].decode() if isinstance(piece.get(1), bytes) else ""
        scores[at] = struct.unpack("<f", piece[2])[0] if isinstance(piece.get(2), bytes) else 0.0
        types[at] = piece.get(3, NORMAL) if isinstance(piece.get(3, NORMAL), int) else NORMAL
        at += 1
    return Vocabulary("llama", None, tokens, types, scores, None)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message's fields: numbers as int, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        value: Any
        if kind == 0:
            value, at = _varint(data, at)
        else:
            if kind == 2:
                length, at = _varint(data, at)
            else:
                length = {1: 8, 5: 4}.get(kind, -1)
            if length < 0 or at + length > len(data):
                raise ValueError("not a protocol buffer")
            value, at = data[at : at + length], at + length
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
