"""Text files of other programs: UTF-8 with or without a byte order mark, and UTF-16, which Windows' tools write."""

import codecs
from pathlib import Path

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_text(raw: bytes) -> str:
    """The text of a file's bytes, by its byte order mark, which is left out; UTF-8 where there is none.

    UTF-16 without a mark is recognised by its first character, if that is ASCII.

    Raises:
        UnicodeDecodeError: the bytes are no such text.
    """
    for mark, encoding in _MARKS:
        if raw.startswith(mark):
            return raw.decode(encoding)
    first = raw[:2]
    if len(first) == 2 and first.count(0) == 1:
        return raw.decode("utf-16-le" if first[1] == 0 else "utf-16-be")
    return raw.decode("utf-8")


def read_text(path: Path) -> str:
    """The text of a file, by `decode_text`.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is no such text.
    """
    return decode_text(path.read_bytes())


def encoding_problem(error: UnicodeDecodeError) -> str:
    """What was found and what was expected, for messages."""
    return f"found byte 0x{error.object[error.start]:02x} at offset {error.start}, expected text in UTF-8"
