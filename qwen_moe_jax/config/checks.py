"""Checks of config fields. A refusal names each wrong field, what was found and what was expected."""

import dataclasses
import operator
from numbers import Integral, Real
from types import NoneType, TracebackType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from qwen_moe_jax.config.dtypes import DTYPES, as_dtype_name
from qwen_moe_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Problem:
    """One wrong field of a config.

    Attributes:
        field: its name; of a config of configs, a dotted path ("data.batch_size").
        found: its value, in words.
        expected: what would have been right, in words.
        given: other fields, named as `field` is, that the expectation was derived from.
    """

    field: str
    found: str
    expected: str
    given: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.field}={self.found} is not supported: expected {self.expected}."


class Checks:
    """Checks the fields of one config and raises one `ConfigError` for all that are wrong, when the block ends.

    with Checks(config) as check:
        check(config.r > 0, "r", "a positive integer")
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._problems: list[Problem] = []

    def __enter__(self) -> "Checks":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None and self._problems:
            raise invalid(self._problems)

    def __call__(
        self, holds: bool, field: str, expected: str, *, found: str | None = None, given: tuple[str, ...] = ()
    ) -> bool:
        """Notes a problem with a field unless the condition holds.

        Args:
            holds: the condition.
            field, expected, given: as `Problem` has them.
            found: in words, where that is not the field's value.

        Returns:
            Whether it holds.
        """
        if not holds:
            found = repr(self._value(field)) if found is None else found
            self._problems.append(Problem(field, found, expected, given))
        return holds

    def _value(self, field: str) -> Any:
        return operator.attrgetter(field)(self._config)

    def literals(self) -> None:
        """Each field that is annotated with a `Literal` is one of its names, or None where it may be."""
        for field in dataclasses.fields(self._config):
            kinds = get_args(field.type) if get_origin(field.type) in (Union, UnionType) else (field.type,)
            names = [name for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]
            found = getattr(self._config, field.name)
            holds = not names or found in names or (found is None and NoneType in kinds)
            self(holds, field.name, "one of " + ", ".join(map(repr, names)))

    def types(self) -> bool:
        """Each field that is annotated as a bool, int or float is one, or None where it may be.

        NumPy's numbers, and floats that are integers, are kept as Python's.

        Returns:
            Whether all of them are.
        """
        for field in dataclasses.fields(self._config):
            kinds = get_args(field.type) if get_origin(field.type) in (Union, UnionType) else (field.type,)
            kind = next((kind for kind in kinds if kind in _NUMBERS), None)
            found = getattr(self._config, field.name)
            if kind is None or (found is None and NoneType in kinds):
                continue
            value = _as_number(kind, found)
            if self(value is not None, field.name, _NUMBERS[kind]):
                object.__setattr__(self._config, field.name, value)
        return not self._problems

    def at_least(self, least: int, *fields: str) -> None:
        """Each field is an integer or a number not below `least`, or None."""
        words = {0: "zero or a positive number", 1: "a positive integer"}
        for field in fields:
            found = self._value(field)
            self(found is None or found >= least, field, words.get(least, f"at least {least}"))

    def dtypes(self, *fields: str) -> None:
        """Each field is a supported dtype, or None; it is kept as its name."""
        for field in fields:
            found = self._value(field)
            if found is None:
                continue
            try:
                object.__setattr__(self._config, field, dtype_name(field, found))
            except ConfigError as error:
                self._problems.extend(error.problems)


#: The types that `Checks.types` checks, in words.
_NUMBERS: dict[Any, str] = {bool: "True or False", int: "an integer", float: "a number"}


def _as_number(kind: type, found: Any) -> bool | int | float | None:
    """The value as a bool, int or float; None where it is none."""
    if isinstance(found, bool) or getattr(getattr(found, "dtype", None), "kind", None) == "b":  # NumPy's, not imported
        return bool(found) if kind is bool else None
    if not isinstance(found, Real) or kind is bool:
        return None
    if kind is int and isinstance(found, Integral):
        return int(found)
    number = float(found)
    return number if kind is float else int(number) if number.is_integer() else None


def invalid(problems: list[Problem]) -> ConfigError:
    """The error that names these problems and carries them, for callers that know which file the fields are from."""
    error = ConfigError("\n".join(map(str, problems)))
    error.problems = tuple(problems)
    return error


def dtype_name(field: str, found: Any) -> str:
    """The name of a supported dtype: "float32", "bfloat16" or "float16".

    Args:
        field: names the argument in the error.
        found: anything that `jnp.dtype` takes: jnp.bfloat16, np.float32, np.dtype("float16"), "bfloat16".

    Raises:
        ConfigError: it is no dtype, or another one (int8, float64).
    """
    name = as_dtype_name(found)
    if name not in DTYPES:
        names = "one of " + ", ".join(map(repr, DTYPES))
        raise invalid(
            [Problem(field, repr(found if name is None else name), f"{names}, or the same as a jax.numpy dtype")]
        )
    return name


def require(holds: bool, field: str, found: Any, expected: str) -> None:
    """Raises `ConfigError` for one field unless the condition holds."""
    if not holds:
        raise invalid([Problem(field, repr(found), expected)])


def require_size(field: str, found: int) -> None:
    """Requires the length of an axis."""
    require(0 < found < 2**31, field, found, "a positive integer below 2**31")


def require_choice(field: str, found: Any, choices: Any) -> None:
    """Requires one of the names of a `Literal`."""
    names = get_args(choices)
    require(found in names, field, found, "one of " + ", ".join(map(repr, names)))


def token_ids(field: str, found: Any) -> tuple[int, ...]:
    """A sequence of token ids, as a tuple."""
    try:
        ids = tuple(operator.index(token) for token in found)
    except TypeError:
        ids = (-1,)
    require(all(0 <= token < 2**31 for token in ids), field, found, "a sequence of token ids")
    return ids


def stop_ids(field: str, found: Any) -> tuple[int, ...]:
    """One token id or a sequence of them, as transformers has tokens that end a text; as a tuple."""
    one = isinstance(found, Integral) and not isinstance(found, bool)
    require(one or not isinstance(found, Real), field, found, "a token id or a sequence of token ids")
    return token_ids(field, (found,) if one else found)


def strings(field: str, found: Any) -> tuple[str, ...]:
    """A list or tuple of strings that are not empty, as a tuple."""
    # A string is an iterable of strings as well, and hardly meant as one.
    good = isinstance(found, list | tuple) and all(isinstance(text, str) and text for text in found)
    require(good, field, found, "a tuple of strings, none of them empty")
    return tuple(found)
