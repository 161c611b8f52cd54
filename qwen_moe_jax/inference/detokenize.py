"""Streaming detokenization: only text that no later token changes, and only up to a stop string."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.tokenizer import Tokenizer, decode

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_FALLBACK_BYTE = re.compile("<0x[0-9A-F]{2}>")
#: A character has at most four bytes, and so as many tokens. Text that stays incomplete for longer is decoded again
#: only when its length has doubled, so that a stream of invalid bytes does not cost quadratic time.
_LONGEST_CHARACTER = 4


class Detokenizer:
    """The text of a stream of tokens.

    The results of all `push` calls and of `finish`, concatenated, are `decode` of all tokens, without special tokens. A
    token costs a decoding of a few tokens before it, however long the text is: what is new is the difference between
    two decodings of a window, whose first tokens are there because decoders treat the start of a text differently.

    Text that later tokens may change is held back: bytes that may be the start of a character, and byte tokens of
    SentencePiece vocabularies up to the first other token, because an invalid byte after them would change the
    text of all.

    Args:
        tokenizer: whose decoder adds to the text of earlier tokens, as those of byte-level BPE, SentencePiece and
            WordPiece do, and does not rewrite it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._context = 0  # tokens at the start of the window that are only context of the others
        self._settled = 0  # tokens that belong to no unfinished run of byte tokens
        self._shown = 0  # characters of the window's text that have been returned
        self._retry = 0  # settled tokens of the window before decoding is tried again
        self._settles: dict[int, bool] = {}

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens; returns the text that is final now, often that of these tokens."""
        for token in token_ids:
            self._window.append(token)
            if self._ends_run(token):
                self._settled = len(self._window)
        if self._settled <= self._context or self._settled < self._retry:
            return ""
        text = self._decode(self._settled)
        whole = text.rstrip(_REPLACEMENT)
        new = whole[self._shown :]
        self._shown = max(self._shown, len(whole))
        pending = self._settled - self._context
        if whole == text:
            self._move()
        else:
            self._retry = self._settled + (1 if pending < _LONGEST_CHARACTER else pending)
        return new

    def finish(self) -> str:
        """The rest of the text, incomplete characters as U+FFFD. The next token starts a new text."""
        text = self.held()
        self._window.clear()
        self._context = self._settled = self._shown = self._retry = 0
        return text

    def held(self) -> str:
        """What `finish` would return: the text held back, as it is without any further token."""
        return self._decode(len(self._window))[self._shown :] if len(self._window) > self._context else ""

    def _decode(self, end: int) -> str:
        return decode(self._tokenizer, self._window[:end])

    def _move(self) -> None:
        """Makes the settled tokens the context, if they have a text: decoders treat the start of a text differently."""
        context = self._window[self._context : self._settled]
        if text := decode(self._tokenizer, context):
            del self._window[: self._context]
            self._context = self._settled = len(context)
            self._shown = len(text)
        self._retry = 0

    def _ends_run(self, token: int) -> bool:
        """Whether a token ends a run of byte tokens: it is none, and decoding does not leave it out."""
        if token not in self._settles:
            # Some decoders drop the space at the start of a text, none that of a second token.
            seen = decode(self._tokenizer, [token, token]) != ""
            self._settles[token] = seen and _FALLBACK_BYTE.fullmatch(_piece(self._tokenizer, token)) is None
        return self._settles[token]


@dataclass(frozen=True)
class StopMatch:
    """A stop string in a text.

    Attributes:
        string: which one.
        start, end: where, in characters from the start of the text.
    """

    string: str
    start: int
    end: int


class StopStrings:
    """Search for stop strings in a streamed text.

    The match is the string that is complete first, and of two with the same end the longer. It does not depend on how
    the text is divided into pieces. The text returned ends before it, as in vLLM; transformers' text goes on to the end
    of the token that completed the string.

    Args:
        strings: none of them empty; no strings at all are never found.

    Attributes:
        found: the first match, once it is complete.

    Raises:
        RequestError: an empty string.
    """

    def __init__(self, strings: Sequence[str]):
        if isinstance(strings, str) or not all(isinstance(string, str) and string for string in strings):
            raise RequestError(f"stop strings are {strings!r}, expected a list of strings, none of them empty.")
        self.found: StopMatch | None = None
        self._strings = tuple(strings)
        self._before = 0  # characters returned
        self._held = ""

    def push(self, text: str, tail: str = "") -> str:
        """Takes the next piece; returns what may be shown: not what may be the beginning of a stop string.

        Args:
            text: it follows the last piece. Ignored once a stop string was found.
            tail: provisional text after it (`Detokenizer.held`). It ends the text if it completes a stop string, and
                is discarded otherwise.
        """
        if self.found is not None:
            return ""
        seen = self._held + text
        # Not in one: a string that the text completes wins over all that the tail would.
        self.found = self._first(seen) or (self._first(seen + tail) if tail else None)
        shown = (seen + tail)[: self.found.start - self._before] if self.found else seen[: self._safe(seen)]
        self._held = "" if self.found else seen[len(shown) :]
        self._before += len(shown)
        return shown

    def finish(self) -> str:
        """What was held back, for a text that ended otherwise."""
        held, self._held = self._held, ""
        self._before += len(held)
        return held

    def _first(self, text: str) -> StopMatch | None:
        matches = [
            (start, start + len(string), string) for string in self._strings if (start := text.find(string)) >= 0
        ]
        if not matches:
            return None
        start, end, string = min(matches, key=lambda match: (match[1], match[0]))
        return StopMatch(string, self._before + start, self._before + end)

    def _safe(self, text: str) -> int:
        """The number of characters before any that may begin a stop string."""
        longest = max(map(len, self._strings), default=0)
        for start in range(max(0, len(text) - longest + 1), len(text)):
            if any(string.startswith(text[start:]) for string in self._strings):
                return start
        return len(text)


class TextStream:
    """Tokens in, text out, up to a stop string: a `Detokenizer` followed by `StopStrings`.

    Args:
        tokenizer: as for `Detokenizer`.
        stop_strings: as for `StopStrings`.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopStrings(stop_strings)
        self._stoppable = bool(stop_strings)
        self._taken = 0

    @property
    def stopped(self) -> StopMatch | None:
        """The stop string that ended the text."""
        return self._stop.found

    @property
    def num_tokens(self) -> int:
        """How many tokens were taken: up to and with the one that completed the stop string, else all."""
        return self._taken

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens; returns the text that may be shown now. Nothing after a stop string counts."""
        shown = []
        # One by one where it matters which of them completed a string.
        for tokens in [[token] for token in token_ids] if self._stoppable else [token_ids]:
            if self.stopped is not None:
                break
            self._taken += len(tokens)
            text = self._detokenizer.push(tokens)
            shown.append(self._stop.push(text, self._detokenizer.held() if self._stoppable else ""))
        return "".join(shown)

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        return "" if self.stopped is not None else self._stop.push(self._detokenizer.finish()) + self._stop.finish()


def _piece(tokenizer: Tokenizer, token: int) -> str:
    """The vocabulary's string of a token; "" where the tokenizer has no method for it."""
    name = getattr(tokenizer, "id_to_token", None) or getattr(tokenizer, "convert_ids_to_tokens", None)
    return (name(token) or "") if name else ""
