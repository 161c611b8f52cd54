"""Config classes → TOML, and what two configs differ in."""

import dataclasses
from typing import Any

from train.config.renamed import API_ONLY
from train.config.run_config import OBJECTIVE_TABLES, SECTIONS, TrainConfig


def to_toml(config: TrainConfig) -> str:
    """The whole config, defaults included, as TOML that `load_config` reads back to an equal config.

    Fields that are set in Python alone (`API_ONLY`) are left out.
    """
    parts = []
    for section in ["model", *SECTIONS]:
        table = as_table(config, section)
        if table or section in (*OBJECTIVE_TABLES, "lora") and getattr(config, section) is not None:
            parts.append("\n".join([f"[{section}]", *(f"{key} = {toml_value(value)}" for key, value in table.items())]))
    return "\n\n".join(parts) + "\n"


def differences(old: TrainConfig, new: TrainConfig, sections: tuple[str, ...]) -> list[str]:
    """The keys of these sections that two configs disagree about, each as `section.key: old → new`."""
    lines = []
    for section in sections:
        before, after = as_table(old, section), as_table(new, section)
        for key in [*before, *(key for key in after if key not in before)]:
            if before.get(key) != after.get(key):
                lines.append(f"{section}.{key}: {before.get(key)!r} → {after.get(key)!r}")
    return lines


def as_table(config: TrainConfig, section: str) -> dict[str, Any]:
    """A section as the keys of a TOML file, those that are None left out."""
    if section == "model":
        return config.model
    value: Any = config.execution.sharding if section == "sharding" else getattr(config, section)
    if value is None:
        return {}
    table = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {key: item for key, item in table.items() if item is not None and f"{section}.{key}" not in API_ONLY}


def toml_value(value: Any) -> str:
    """A value as TOML writes it; of a table, the keys that are not None."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A TOML basic string knows these escapes and wants every control character escaped.
        short = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
        return '"' + "".join(short.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in value) + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        given = {key: item for key, item in value.items() if item is not None}
        return "{" + ", ".join(f"{toml_value(key)} = {toml_value(item)}" for key, item in given.items()) + "}"
    return repr(value)
