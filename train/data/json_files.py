"""JSON lines, and the array of a .json file → values, each with its place in the file.

Files are UTF-8 or UTF-16, and may be compressed.
"""

import codecs
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from qwen_moe_jax.text_files import decode_text, encoding_problem
from train.data.compressed import open_data
from train.data.messages import refuse
from train.data.records import WANTED

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BLANKS = " \t\r\n"
_BEFORE_ARRAY = b"".join([codecs.BOM_UTF8, *_UTF16, _BLANKS.encode()])


@dataclass(frozen=True)
class Value:
    """One JSON value of a file.

    Attributes:
        found: the value.
        place: the file and line, and for an item of an array its number.
        number: of the line, or of the item, from 1.
        size: in bytes, about.
    """

    found: Any
    place: str
    number: int
    size: int


def read_json_file(file: Path) -> Iterator[Value]:
    """The values of a file: one a line, or the items of the array that a .json file is. Blank lines are skipped.

    Raises:
        ConfigError: a compressed file that is damaged, bytes that are no text, or text that is no JSON, by file and
            line.
    """
    with open_data(file) as opened:
        start = opened.read(64)
    with open_data(file) as opened:  # again: a compressed file cannot be read from its start a second time
        if file.suffix == ".json" and start.replace(b"\0", b"").lstrip(_BEFORE_ARRAY).startswith(b"["):
            yield from _items(decode(opened.read(), str(file)), file)
        elif start.startswith(_UTF16) or b"\0" in start[:2]:
            yield from _lines(io.BytesIO(decode(opened.read(), str(file)).encode("utf-8")), file)
        else:
            yield from _lines(opened, file)


def decode(raw: bytes, place: str) -> str:
    """A text in UTF-8, without the mark that it may begin with, or in UTF-16.

    Raises:
        ConfigError: it is none; the message begins with `place`.
    """
    try:
        return decode_text(raw)
    except UnicodeDecodeError as error:
        if raw.startswith(_UTF16):
            refuse(f"{place}: begins as UTF-16 and is none ({error.reason} at offset {error.start}).")
        refuse(f"{place}: {encoding_problem(error)}.")


def _lines(lines: Iterable[bytes], file: Path) -> Iterator[Value]:
    for number, raw in enumerate(lines, start=1):
        place = f"{file}, line {number}"
        line = decode(raw, place)
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            refuse(f"{place}: this is no JSON ({error}): {line.strip()!r:.80}; expected {WANTED}.")
        yield Value(found, place, number, len(raw))


def _items(text: str, file: Path) -> Iterator[Value]:
    """The items of the array that the text is, one by one, so that memory holds the text and one item."""
    decoder, at, line = json.JSONDecoder(), text.index("[") + 1, 1
    counted = 0
    for number in count(1):
        at = _skip_blanks(text, at)
        if text[at : at + 1] == "]" and number == 1:
            return
        line, counted = line + text.count("\n", counted, at), at
        place = f"{file}, line {line} (item {number})"
        try:
            found, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            refuse(f"{place}: this is no JSON ({error}): {text[at : at + 60]!r}; expected an item of the array.")
        yield Value(found, place, number, len(text[at:end].encode("utf-8", "surrogatepass")))
        at = _skip_blanks(text, end)
        if text[at : at + 1] == "]":
            return
        if text[at : at + 1] != ",":
            refuse(f"{place}: found {text[at : at + 20]!r} after it, expected a comma or the end of the array.")
        at += 1


def _skip_blanks(text: str, at: int) -> int:
    while text[at : at + 1] in _BLANKS and at < len(text):
        at += 1
    return at
