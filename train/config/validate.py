"""Tables of TOML → the config classes. pydantic checks names and types; the classes check their own values.

This is the one module of `train` that imports pydantic.
"""

import json
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from pydantic import ConfigDict, ValidationError, create_model

from qwen_moe_jax.suggest import did_you_mean
from train.config.kinds import described, hint_at, hints, type_name
from train.config.problems import KeyProblem, dotted
from train.config.renamed import API_ONLY, RENAMED
from train.config.run_config import SECTIONS

#: By section and key, as `tomllib` reads them.
Tables = dict[str, dict[str, Any]]

_SECTION_FIELDS: dict[str, Any] = {section: (cls | None, None) for section, cls in SECTIONS.items()}
_Schema = create_model("TrainFile", __config__=ConfigDict(extra="forbid", strict=True), **_SECTION_FIELDS)


def validate(tables: Tables) -> tuple[dict[str, Any], list[KeyProblem]]:
    """The sections of a file as instances of their classes, and all that is wrong with them.

    Wrong keys are left out and the rest is checked again, until nothing is wrong: so what the classes say about one
    key is known although another one is of the wrong type. What only follows from a wrong key is not said.
    """
    problems: list[KeyProblem] = []
    for key in API_ONLY:
        if _is_set(tables, key):
            path = tuple(key.split("."))
            problems.append(KeyProblem(path, f"set in Python only: write {API_ONLY[key]} instead"))
    tables = _without(tables, problems)
    while True:
        try:
            parsed = _Schema.model_validate_json(json.dumps(tables, default=str))
        except ValidationError as error:
            found = [problem for detail in error.errors(include_url=False) for problem in _problems(detail)]
            wrong = [dotted(problem.path[:2]) for problem in problems]
            problems += [problem for problem in found if not problem.follows_from(wrong)]
            tables = _without(tables, found)
        else:
            return {section: value for section, value in parsed if value is not None}, problems


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The refusal of a name that is none of those that are known."""
    known = list(known)
    return f"unknown {kind}; {did_you_mean(name, known)}known: {', '.join(known)}"


def _problems(detail: Any) -> list[KeyProblem]:
    """One of pydantic's errors in our words."""
    path, kind = detail["loc"], detail["type"]
    if kind == "value_error":  # raised by the class itself
        error = detail["ctx"]["error"]
        return [KeyProblem.of(problem, path) for problem in getattr(error, "problems", ())] or [
            KeyProblem(path, str(error).removesuffix("."))
        ]
    if kind == "extra_forbidden":
        return [KeyProblem(path, unknown("section", path[0], ["model", *SECTIONS]))]
    if kind == "unexpected_keyword_argument":
        return [KeyProblem(path, _unknown_key(path))]
    hint = hint_at(SECTIONS[path[0]], path[1:])
    text = f"found {described(detail['input'])}, expected {type_name(hint)}"
    if type_name(hint) == "a list of tables":
        text += f", each headed [[{dotted(path)}]]"
    if get_origin(hint) is Literal and isinstance(detail["input"], str):
        question = did_you_mean(detail["input"], get_args(hint)).strip()
        text += f"; {question}" if question else ""
    return [KeyProblem(path, text)]


def _unknown_key(path: tuple[str | int, ...]) -> str:
    new = RENAMED.get(".".join(step for step in path if isinstance(step, str)))
    if new is not None:
        return f"this key is named {new} now"
    owner = hint_at(SECTIONS[str(path[0])], path[1:-1])
    known = [field for field in hints(owner) if f"{path[0]}.{field}" not in API_ONLY]
    return unknown("key", str(path[-1]), [*(["rules"] if path[0] == "sharding" else []), *known])


def _without(tables: Tables, problems: list[KeyProblem]) -> Tables:
    """The tables without the keys of these problems; where the file does not set one, without what it follows from."""
    left_out: set[str] = set()
    for problem in problems:
        section = str(problem.path[0])
        keys = [dotted(problem.path[:2])] if len(problem.path) > 1 else []
        for some in (keys, problem.given):
            if found := [key for key in some if _is_set(tables, key)]:
                left_out.update(found)
                break
        else:
            left_out.add(section)
    return {
        section: {key: value for key, value in table.items() if f"{section}.{key}" not in left_out}
        for section, table in tables.items()
        if section not in left_out
    }


def _is_set(tables: Tables, key: str) -> bool:
    section, _, field = key.partition(".")
    return field in tables.get(section, {})
