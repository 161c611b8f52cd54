"""Tokens as texts, each by itself; in readable form, invisible characters are replaced."""

import re
from collections.abc import Sequence

import tokenizers

_SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥"}
_STRAY_BYTES = re.compile("[\udc80-\udcff]+")  # how Python's surrogateescape keeps bytes that are no UTF-8
_FALLBACK_BYTE = re.compile("<0x([0-9A-F]{2})>")  # how SentencePiece vocabularies name a byte


def readable_tokens(tokenizer: tokenizers.Tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    """Each token by itself, printable: `␣the`, `↵⇥`, `<|im_start|>`, `‹\\xe4\\xbd›` for a part of a character."""
    texts = {token: readable(token_text(tokenizer, token)) for token in set(ids)}
    return tuple(texts[token] for token in ids)


def readable(text: str) -> str:
    """The text with visible signs for spaces, line ends and tabs, and codes for other invisible characters.

    No character of the result controls a terminal or the direction of text.
    """
    text = _STRAY_BYTES.sub(lambda match: "‹" + "".join(rf"\x{ord(c) - 0xDC00:02x}" for c in match[0]) + "›", text)
    return "".join(_SIGNS.get(c) or (c if c.isprintable() else f"‹U+{ord(c):04X}›") for c in text)


def token_text(tokenizer: tokenizers.Tokenizer, token: int) -> str:
    """The text that a token adds; bytes of incomplete characters as lone surrogates."""
    # Some decoders drop the space at the start of a text: what the token adds shows behind another one, itself.
    alone, twice = (tokenizer.decode([token] * times, skip_special_tokens=False) for times in (1, 2))
    text = twice.removeprefix(alone) if twice.startswith(alone) else alone
    piece = tokenizer.id_to_token(token) or ""
    if "\N{REPLACEMENT CHARACTER}" in text:
        found = _bytes(piece)
        return text if found is None else found.decode("utf-8", "surrogateescape")
    return text or piece


def _bytes(piece: str) -> bytes | None:
    """The bytes that a vocabulary's entry encodes; None where it is text."""
    if match := _FALLBACK_BYTE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    if all(c in _BYTE_OF for c in piece):
        return bytes(_BYTE_OF[c] for c in piece)
    return None


def _byte_alphabet() -> dict[str, int]:
    """The byte alphabet of byte-level BPE since GPT-2: printable Latin-1 as it is, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
