"""Tokens to text while they come: only what no later token changes, and no further than a stop string."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.tokenizer import Tokenizer, decode

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_FALLBACK_BYTE = re.compile("<0x[0-9A-F]{2}>")
#: A character has at most four bytes, and so many tokens. Text that stays broken for longer is looked at again only
#: when it has doubled, so that a stream of nonsense costs no square of its length.
_LONGEST_CHARACTER = 4


class Detokenizer:
    """The text of a stream of tokens.

    All that `push` returned and what `finish` returns is together `decode` of all tokens, special tokens left out. A
    token costs a decoding of a few tokens before it, however long the text is: what is new is the difference between
    two decodings of a window, whose first tokens are there because decoders treat the start of a text differently.

    Held back is what later tokens may change: bytes that may be the start of a character, and the byte tokens of
    SentencePiece vocabularies up to the first other token, because a stray byte after them would break them all.

    Args:
        tokenizer: whose decoder adds to the text of earlier tokens, as those of byte-level BPE, SentencePiece and
            WordPiece do, and does not rewrite it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._context = 0  # so many tokens of the window are there for the sake of the others
        self._settled = 0  # so many belong to no run of byte tokens that is still open
        self._shown = 0  # so many characters of the window's text have been returned
        self._retry = 0  # not worth decoding before so many tokens of the window are settled
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
        """The rest of the text, broken characters as U+FFFD. The next token starts a new text."""
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
        """Makes a context of the settled tokens, if they have a text: what decoders do to a start is done then."""
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
    """Looks for strings in a text that comes in pieces.

    What counts is the string that is complete first, and of two that end together the longer. How the text was cut
    does not matter. The text returned ends before it: transformers' text goes on to the end of the token that completed
    the string, vLLM's ends where this one does.

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
            tail: what follows for now and may still change (`Detokenizer.held`). It ends the text if it completes a
                stop string, and is forgotten otherwise.
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
        places = [(start, start + len(string), string) for string in self._strings if (start := text.find(string)) >= 0]
        if not places:
            return None
        start, end, string = min(places, key=lambda place: (place[1], place[0]))
        return StopMatch(string, self._before + start, self._before + end)

    def _safe(self, text: str) -> int:
        """Up to where no stop string can have begun."""
        longest = max(map(len, self._strings), default=0)
        for start in range(max(0, len(text) - longest + 1), len(text)):
            if any(string.startswith(text[start:]) for string in self._strings):
                return start
        return len(text)


class TextStream:
    """Tokens in, text out, up to a stop string: `Detokenizer` and `StopStrings` together.

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
        """The rest of the text, once no more tokens come."""
        return "" if self.stopped is not None else self._stop.push(self._detokenizer.finish()) + self._stop.finish()


def _piece(tokenizer: Tokenizer, token: int) -> str:
    """How the vocabulary writes a token; "" where a tokenizer does not tell."""
    name = getattr(tokenizer, "id_to_token", None) or getattr(tokenizer, "convert_ids_to_tokens", None)
    return (name(token) or "") if name else ""
