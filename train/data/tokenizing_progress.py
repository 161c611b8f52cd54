"""Lines on how far the tokenizing of a source is: documents, tokens, speed, and the time that is left."""

import time

from qwen_moe_jax.units import format_seconds

#: Seconds between two lines; what is done sooner prints none.
_SECONDS = 5.0


class TokenizingProgress:
    """Counts what was read and tokenized, and prints a line now and then."""

    def __init__(self, name: str, size: float) -> None:
        """`size` is that of the text of the source `name`, in bytes; 0 where it is not known."""
        self._name, self._size = name, size
        self._began = self._said = time.monotonic()
        self._skipped = self._read = self._documents = self._tokens = 0

    def skip(self, size: int) -> None:
        """A record of so many bytes that an earlier start has tokenized."""
        self._skipped += size
        self._began = time.monotonic()

    def add(self, size: int, documents: int, tokens: int) -> None:
        """Records of so many bytes, which became so many documents and tokens."""
        self._read, self._documents, self._tokens = (
            self._read + size,
            self._documents + documents,
            self._tokens + tokens,
        )
        if time.monotonic() >= self._said + _SECONDS:
            self._said = time.monotonic()
            left = self._size - self._skipped - self._read
            seconds = left / self._read * (self._said - self._began) if left > 0 and self._read else 0.0
            self._say(f", {format_seconds(seconds)} left" if seconds else "")

    def end(self, workers: int) -> None:
        """The last line, where there was one before it."""
        if self._said > self._began:
            self._say(f" by {workers} processes" if workers > 1 else "")

    def _say(self, rest: str) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        print(
            f"tokenizing {self._name}: {self._documents:,} documents, {self._tokens:,} tokens, "
            f"{self._tokens / seconds:,.0f} tokens/s{rest}",
            flush=True,
        )
