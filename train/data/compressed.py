"""Files of records as bytes: plain ones, and the content of .gz and .zst files as it is read.

A file that ends before its compressed content does is refused: what it holds is not all.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from train.data.messages import refuse

#: Endings of compressed files.
COMPRESSED = (".gz", ".zst")
#: Compressed bytes that are read at a time.
_AT_ONCE = 1 << 17


@contextmanager
def open_data(file: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading; the content of a .gz or .zst file, whose frames follow one another.

    Raises:
        ConfigError: the file is damaged or incomplete, or zstandard is not installed.
    """
    if file.suffix not in COMPRESSED:
        with file.open("rb") as opened:
            yield opened
        return
    try:
        with file.open("rb") as compressed:
            yield _content(compressed, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        refuse(
            f"{file}: this is no whole {file.suffix} file ({error}). Copy or download it again, or leave it out by "
            "data.path or data.pattern."
        )


def _content(compressed: BinaryIO, file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=compressed))
    try:
        import zstandard  # an optional dependency
    except ImportError:
        refuse(f"{file}: a .zst file needs zstandard, which is not installed: pip install zstandard.")
    return io.BufferedReader(_ZstdContent(compressed, zstandard))


class _ZstdContent(io.RawIOBase):
    """The content of all frames of a .zst file. zstandard's own reader ends after the first, and in the middle of one.

    Args:
        compressed: the file.
        zstandard: the library.
    """

    def __init__(self, compressed: BinaryIO, zstandard: Any) -> None:
        self._compressed, self._zstandard = compressed, zstandard
        self._frame: Any = None  # the decompressor of a frame that has begun and not ended
        self._rest = self._held = b""  # compressed bytes that follow, and content that was not asked for yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            found = self._rest or self._compressed.read(_AT_ONCE)
            if not found:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._held = self._frame.decompress(found)
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            self._rest = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        size = min(len(buffer), len(self._held))
        buffer[:size], self._held = self._held[:size], self._held[size:]
        return size
