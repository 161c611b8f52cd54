"""What the configs ask of their fields, and the refusal that names the field, what was found and what was expected."""

import operator
from typing import Any, get_args

from qwen_moe_jax.errors import ConfigError


def require(holds: bool, field: str, found: Any, expected: str) -> None:
    """Refuses a value that does not hold."""
    if not holds:
        raise ConfigError(f"{field}={found!r} is not supported: expected {expected}.")


def require_size(field: str, found: int) -> None:
    """A length of an axis."""
    require(0 < found < 2**31, field, found, "a positive integer below 2**31")


def require_choice(field: str, found: Any, choices: Any) -> None:
    """One of the names of a `Literal`."""
    names = get_args(choices)
    require(found in names, field, found, "one of " + ", ".join(map(repr, names)))


def token_ids(field: str, found: Any) -> tuple[int, ...]:
    """Any sequence of token ids, kept as a tuple."""
    try:
        ids = tuple(operator.index(token) for token in found)
    except TypeError:
        ids = (-1,)
    require(all(0 <= token < 2**31 for token in ids), field, found, "a sequence of token ids")
    return ids


def strings(field: str, found: Any) -> tuple[str, ...]:
    """Strings that say something, kept as a tuple."""
    # Not any iterable: a string is one too, of strings, but hardly meant so.
    good = isinstance(found, list | tuple) and all(isinstance(text, str) and text for text in found)
    require(good, field, found, "a tuple of strings, none of them empty")
    return tuple(found)
