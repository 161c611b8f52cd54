"""The types of config fields, and of values, in words."""

import dataclasses
import typing
from types import NoneType
from typing import Any, Literal, get_args, get_origin

_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list", dict: "a table"}


def hints(cls: type) -> dict[str, Any]:
    """The type of each field of a dataclass, None left out: TOML has no None, a field that is None is left out."""
    types = typing.get_type_hints(cls)
    return {field.name: _given(types[field.name]) for field in dataclasses.fields(cls)}


def hint_at(cls: type, path: tuple[str | int, ...]) -> Any:
    """The type of what a path of field names and indices leads to, from a dataclass on."""
    hint: Any = cls
    for step in path:
        hint = get_args(hint)[0] if isinstance(step, int) else hints(hint)[step]
    return hint


def type_name(hint: Any) -> str:
    """The type of a field in words: "an integer", "one of 'stop', 'skip'", "a list of text"."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        return "a list of " + ("tables" if dataclasses.is_dataclass(item) else "text")
    if hint is Any:
        return "a dtype"
    return "a table" if dataclasses.is_dataclass(hint) else _NAMES.get(hint, hint.__name__)


def described(value: Any) -> str:
    """A value with its type, as a message says what was found."""
    name = _NAMES.get(type(value), type(value).__name__)
    return f"{value!r} ({name.removeprefix('a ').removeprefix('an ')})"


def _given(hint: Any) -> Any:
    given = [kind for kind in get_args(hint) if kind is not NoneType]
    return given[0] if NoneType in get_args(hint) else hint
