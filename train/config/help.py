"""The second half of `python -m train --help`, made from the docstrings of the config classes."""

import dataclasses
import textwrap
from typing import Any

from qwen_moe_jax.config.docs import field_docs
from train.config.kinds import hints, type_name
from train.config.renamed import API_ONLY
from train.config.run_config import OBJECTIVE_TABLES, SECTIONS, TRAINER_DEFAULTS
from train.config.toml import toml_value

#: How a named table of sharding rules is chosen, which is no field of `ShardingRules`.
RULES_HELP = (
    "the table that the other keys of [sharding] change: expert+fsdp (dense weights are sharded over both, and "
    "gathered for each layer), fsdp or expert (over one of them, replicated over the other), expert+tensor (nothing is "
    "gathered)."
)


def key_options() -> list[str]:
    """The option of every key but those of [model], which are a Hub config's: `--run.max_steps` and so on."""
    return [
        "--sharding.rules",
        *(
            f"--{section}.{field.name}"
            for section, cls in SECTIONS.items()
            for field in dataclasses.fields(cls)
            if f"{section}.{field.name}" not in API_ONLY
        ),
    ]


def describe_keys() -> str:
    """Every key of a TOML file with its type, default and meaning."""
    lines = ["[model] takes the keys of a Hub config.json; --model.KEY VALUE changes one that the file sets."]
    for section, cls in SECTIONS.items():
        docs, types = field_docs(cls), hints(cls)
        lines += ["", f"[{section}]"]
        if section == "lora":
            lines.append("  A [lora] table, or one of these, trains low-rank adapters instead of the weights.")
        if section in OBJECTIVE_TABLES:
            lines.append("  This table, or one of these, makes it the objective of the run.")
        if section == "sharding":
            lines += _entry("--sharding.rules", "text", "expert+fsdp", RULES_HELP)
        for field in dataclasses.fields(cls):
            if f"{section}.{field.name}" in API_ONLY:
                continue
            default = TRAINER_DEFAULTS.get(section, {}).get(field.name, field.default)
            kind = type_name(types[field.name])
            lines += _entry(f"--{section}.{field.name}", kind, default, docs.get(field.name, ""))
    return "\n".join(lines)


def _entry(option: str, kind: str, default: Any, text: str) -> list[str]:
    kind = kind.removeprefix("a ").removeprefix("an ")
    shown = "optional" if default is None else f"default {toml_value(default)}"
    body = textwrap.wrap(text, width=100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return [f"  {option} {kind.upper() if not kind.startswith('one of') else kind}  ({shown})", *body]
