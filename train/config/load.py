"""A TOML file and the words of a command line → `TrainConfig`."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, Literal, get_origin

from qwen_moe_jax.config import SHARDING_RULES
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.suggest import did_you_mean
from qwen_moe_jax.text_files import encoding_problem, read_text
from train.config.kinds import described, hints, type_name
from train.config.problems import KeyProblem, dotted
from train.config.renamed import API_ONLY
from train.config.run_config import SECTIONS, TRAINER_DEFAULTS, TrainConfig


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """Reads a TOML file and lays `--section.key value` words over it.

    Args:
        path: the TOML file.
        overrides: `["--run.max_steps=20", "--mesh.expert=4"]`, as `split_overrides` gives them.

    Raises:
        ConfigError: the file is missing or no TOML; a section or key is unknown; a value has the wrong type or is out
          of range. The message has a line for each problem, with the file (or the option) and the key, what was found
          and what was expected.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(read_text(path))
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(_absent(path)) from None
    except OSError as error:
        raise ConfigError(f"{path}: it cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: {encoding_problem(error)}.") from None
    except tomllib.TOMLDecodeError as error:
        model = " A model's config.json is the [model] table of one." if path.suffix == ".json" else ""
        raise ConfigError(f"{path}: this is no TOML: {error}.{model}") from None
    return build_config(tables, overrides or [], source=str(path))


def _absent(path: Path) -> str:
    """The message for a path that is no file."""
    folder = path if path.is_dir() else path.parent
    near = sorted(str(other) for other in folder.glob("*.toml"))
    found = f" In that folder: {', '.join(near)}." if near else ""
    if not path.is_dir():
        return f"{path}: there is no such file.{found}"
    if (path / "config.json").is_file():
        found += f" To fine-tune the checkpoint in it: run.model_name_or_path = {str(path)!r} in a TOML file."
    return f"{path} is a folder, expected a TOML file.{found}"


def build_config(tables: dict[str, Any], overrides: list[str], source: str) -> TrainConfig:
    """`load_config` on tables that were read already; `source` is named in messages. Raises ConfigError as it does."""
    from train.config.validate import validate  # imports pydantic, which --help and a wrong path do not wait for

    problems = [
        KeyProblem((section,), f"found {described(table)}, expected a section, [{section}]")
        for section, table in tables.items()
        if not isinstance(table, dict)
    ]
    tables = {section: dict(table) for section, table in tables.items() if isinstance(table, dict)}
    options, refused = _override(tables, overrides)
    model = tables.pop("model", {})
    problems += refused + _choose_rules(tables)
    for section, defaults in TRAINER_DEFAULTS.items():
        tables[section] = {**defaults, **tables.get(section, {})}
    sections, found = validate(tables)
    problems += found

    if "sharding" in sections:
        execution = sections.get("execution", TrainConfig.execution)
        sections["execution"] = dataclasses.replace(execution, sharding=sections.pop("sharding"))
    try:
        config = TrainConfig(model=model, **sections)
    except ConfigError as error:
        wrong = [dotted(problem.path[:2]) for problem in problems]
        across = [KeyProblem.of(problem) for problem in error.problems]
        problems += [problem for problem in across if not problem.follows_from(wrong)]
    if problems:
        keys = [options.get(dotted(one.path[:2]), f"{source}: {one.key}") for one in problems]
        texts = [one.text if one.text.endswith("?") else f"{one.text}." for one in problems]
        lines = [f"{key}: {text}" for key, text in zip(keys, texts, strict=True)]
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    return config


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Takes the `--section.key value` words out of a command line.

    Returns:
        the overrides, each as one word `--section.key=value`, and all other words, both in their order.

    Raises:
        ConfigError: a value is missing.
    """
    overrides, others = [], []
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if not (option.startswith("--") and "." in option):
            others.append(word)
            continue
        given = value if equals else next(rest, None)
        if given is None:
            raise ConfigError(f"{option}: found no value, expected one after it.")
        overrides.append(f"{option}={given}")
    return overrides, others


def _override(tables: dict[str, Any], overrides: list[str]) -> tuple[dict[str, str], list[KeyProblem]]:
    """Lays the overrides over the tables, in place.

    Returns:
        the option that set a key, by dotted key, and overrides of [model] that are refused.
    """
    options, problems = {}, []
    for override in overrides:
        option, _, word = override.partition("=")
        key = option.removeprefix("--")
        section, _, field = key.partition(".")
        options[key] = option
        if not word.isascii() and word != word.encode("utf-8", "replace").decode("utf-8"):
            problems.append(KeyProblem((section, field), f"found {word!r}, expected text in UTF-8"))
            continue
        if section not in tables:
            options[section] = option  # an unknown section is refused by this option
        table = tables.setdefault(section, {})
        if section == "model":
            problems += _override_model(table, field, word)
        else:
            types = hints(SECTIONS[section]) if section in SECTIONS else {}
            outer, _, inner = field.partition(".")
            if inner and dataclasses.is_dataclass(types.get(outer)):
                options[f"{section}.{outer}"] = option
                known = table.get(outer)
                table[outer] = {**(known if isinstance(known, dict) else {}), inner: word}
            else:
                table[field] = _from_word(word, types.get(field, str))
    _replace_length(tables.get("run", {}), options)
    _replace_rows(tables.get("sharding", {}), options)
    return options, problems


def _replace_length(run: dict[str, Any], options: dict[str, str]) -> None:
    """Leaves out the file's length of the run where an override gives it by the other key."""
    for key, other in (("max_steps", "num_train_epochs"), ("num_train_epochs", "max_steps")):
        if f"run.{key}" in options and f"run.{other}" not in options:
            run.pop(other, None)


def _replace_rows(sharding: dict[str, Any], options: dict[str, str]) -> None:
    """Leaves out the file's rows of sharding rules where an override names a whole table of them."""
    if "sharding.rules" in options:
        for row in [row for row in sharding if f"sharding.{row}" not in options]:
            del sharding[row]


def _override_model(table: dict[str, Any], key: str, word: str) -> list[KeyProblem]:
    # A Hub config may hold many keys that no list here knows. Only those that the file sets can be changed from the
    # command line, so that a misspelt key cannot pass as a new one.
    path = ("model", key)
    if key not in table:
        return [
            KeyProblem(path, f"not set by the file's [model] table; {did_you_mean(key, table)}set: {', '.join(table)}")
        ]
    old = table[key]
    new = _from_word(word, type(old))
    if type(new) is not type(old) and not (type(old) is float and type(new) is int):
        expected = f"{type_name(type(old))} as in the file ({old!r})"
        return [KeyProblem(path, f"found {described(new)}, expected {expected}")]
    table[key] = type(old)(new)
    return []


def _from_word(word: str, hint: Any) -> Any:
    """A word of the command line as the type of its key; left as text, for the validator to refuse, if it is none."""
    if hint in (str, Any) or get_origin(hint) is Literal:
        return word
    try:
        return tomllib.loads(f"value = {word}")["value"]
    except tomllib.TOMLDecodeError:
        return word


def _choose_rules(tables: dict[str, Any]) -> list[KeyProblem]:
    """Replaces `sharding.rules`, the name of a table of rules, by that table's rows, under those that are given."""
    table = tables.get("sharding", {})
    if "rules" not in table:
        return []
    name = table.pop("rules")
    if not isinstance(name, str) or name not in SHARDING_RULES:
        question = did_you_mean(str(name), SHARDING_RULES).strip()
        text = f"found {name!r}, expected one of {', '.join(SHARDING_RULES)}"
        return [KeyProblem(("sharding", "rules"), f"{text}; {question}" if question else text)]
    rows = dataclasses.asdict(SHARDING_RULES[name])
    tables["sharding"] = {**{row: axes for row, axes in rows.items() if f"sharding.{row}" not in API_ONLY}, **table}
    return []
