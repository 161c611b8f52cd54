"""Suggestions for misspelt names, as error messages give them. Imports neither JAX nor numpy."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question to insert before the list of known names; empty where none of them is similar.

        raise ConfigError(f"run.stepz: unknown key; {did_you_mean('stepz', known)}known: {', '.join(known)}.")
        # run.stepz: unknown key; did you mean 'steps'? known: steps, seed.

    Args:
        word: what was found.
        known: what would have been accepted.

    Returns:
        "did you mean 'steps'? ", with the space at its end, or "".
    """
    near = similar(word, known, count=1)
    return f"did you mean {near[0]!r}? " if near else ""


def similar(word: str, known: Iterable[str], *, count: int = 3, cutoff: float = 0.6) -> list[str]:
    """The known names that are spelt most like a word, the most similar first.

    Args:
        word: what was found.
        known: what would have been accepted.
        count: how many names at most.
        cutoff: the least similarity, 0 to 1, as `difflib.get_close_matches` measures it.
    """
    return difflib.get_close_matches(word, list(known), n=count, cutoff=cutoff)
