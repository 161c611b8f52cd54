"""Typed reading of a JSON object, with errors that name the file, the field, what was found and what was expected."""

import json
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.storage.git_lfs import lfs_problem
from qwen_moe_jax.text_files import read_text

REQUIRED = object()
_TOO_DEEP = "its values are nested too deeply"
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 100, 100


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        ConfigError: the file is absent, is not JSON, or does not hold an object.
    """
    try:
        found = json.loads(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. {_needs(path)}") from None
    except (ValueError, OSError) as error:
        if (problem := lfs_problem(path)) is not None:
            raise ConfigError(f"{path}: {problem}.") from None
        toml = " A run's TOML file is read by `python -m train`." if path.suffix == ".toml" else ""
        raise ConfigError(f"{path}: cannot be read as JSON ({error}).{toml}") from None
    except RecursionError:
        raise ConfigError(f"{path}: cannot be read as JSON ({_TOO_DEEP}).") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(found).__name__}.")
    return found


def shown(value: Any) -> str:
    """A value for a message, shortened where it is long or nested."""
    return _SHORT.repr(value)


def _needs(path: Path) -> str:
    """What a file that is not there is needed for, and where it may be instead."""
    folder, is_adapter = path.parent, path.name == "adapter_config.json"
    needs = f"{'A folder of adapters' if is_adapter else 'A checkpoint folder'} needs one."
    exported = folder / ("adapter" if is_adapter else "hub")
    if (exported / path.name).is_file():
        found = "The adapters of this training run are" if is_adapter else "The model of this training run is"
        return f"{needs} {found} in {exported}."
    if path.name == "config.json" and (folder / "adapter_config.json").is_file():
        return f"{needs} It holds low-rank adapters: give the checkpoint of their base, and this folder as its adapter."
    return needs


class Fields:
    """A JSON object whose fields are read by type. A null field counts as absent, as it does in transformers.

    Args:
        values: the object.
        where: its name in messages, for example a path.
        defaults: values of absent fields.
        renames: the object's key of every field that has another name there.

    Attributes:
        asked: the object's keys that have been asked for, whether they are there or not.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        defaults: Mapping[str, Any] | None = None,
        renames: Mapping[str, str] | None = None,
    ):
        self.values = values
        self.where = where
        self.defaults = defaults or {}
        self.renames = renames or {}
        self.asked: set[str] = set()

    def key(self, name: str) -> str:
        """The object's key of a field."""
        key = self.renames.get(name, name)
        self.asked.add(key)
        return key

    def given(self, name: str) -> Any:
        """The field's value as it is, None where it is absent or null."""
        return self.values.get(self.key(name))

    def __contains__(self, name: str) -> bool:
        return self.given(name) is not None

    def is_null(self, name: str) -> bool:
        """Whether the field is given, as null."""
        return self.given(name) is None and self.key(name) in self.values

    def error(self, name: str, expected: str) -> ConfigError:
        """The refusal of a field, ready to be raised."""
        return ConfigError(
            f"{self.where}: {self.key(name)}={shown(self.given(name))} is not supported: expected {expected}."
        )

    def _get(self, name: str, default: Any) -> Any:
        found = self.given(name)
        if found is None:
            found = self.defaults.get(name, REQUIRED) if default is REQUIRED else default
        if found is REQUIRED:
            raise ConfigError(f"{self.where}: the field {self.key(name)} is missing.")
        return found

    def integer(self, name: str, default: Any = REQUIRED) -> Any:
        """An int, or the default."""
        found = self._get(name, default)
        if isinstance(found, float) and found.is_integer():
            found = int(found)
        if found is not None and (not isinstance(found, int) or isinstance(found, bool)):
            raise self.error(name, "an integer")
        if found is not None and not -(2**64) < found < 2**64:
            raise self.error(name, "an integer of at most 64 bits")
        return found

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A float, or the default."""
        found = self._get(name, default)
        if found is not None and (not isinstance(found, int | float) or isinstance(found, bool)):
            raise self.error(name, "a number")
        if found is not None and not abs(found) <= sys.float_info.max:  # of JSON, Python reads NaN and Infinity
            raise self.error(name, "a finite number")
        return None if found is None else float(found)

    def boolean(self, name: str, default: Any = REQUIRED) -> bool:
        """A bool, or the default."""
        found = self._get(name, default)
        if not isinstance(found, bool):
            raise self.error(name, "true or false")
        return found

    def string(self, name: str, default: Any = REQUIRED) -> Any:
        """A str, or the default."""
        found = self._get(name, default)
        if found is not None and not isinstance(found, str):
            raise self.error(name, "a string")
        return found

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of ints, or one int, or nothing; always as a tuple."""
        found = self._get(name, self.defaults.get(name, ()))
        found = tuple(found) if isinstance(found, list | tuple) else (found,)
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in found):
            raise self.error(name, "an integer or a list of integers")
        return found

    def mapping(self, name: str) -> Mapping[str, Any]:
        """An object, or an empty one."""
        found = self._get(name, {})
        if not isinstance(found, Mapping):
            raise self.error(name, "an object")
        return found


def freeze(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """A JSON object as hashable (name, JSON) pairs: configs are static arguments of compiled functions."""
    try:
        return tuple((name, json.dumps(value, sort_keys=True)) for name, value in values.items())
    except RecursionError:
        raise ConfigError(f"{_TOO_DEEP}.") from None


def thaw(pairs: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """The JSON object that `freeze` was given."""
    return {name: json.loads(text) for name, text in pairs}


def one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    """Token ids in the Hub's form: a single one as a number, several as a list, none as null."""
    return list(ids) if len(ids) > 1 else (ids[0] if ids else None)
