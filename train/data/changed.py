"""Whether the files of a run's sources are those that its documents were made of."""

from pathlib import Path
from typing import Any

from qwen_moe_jax.errors import ConfigError
from train.config import SourceConfig
from train.data.fingerprints import files_fingerprint, named_files
from train.data.sources import describe_source

#: Most changed files that a message names.
_LISTED = 3


def changed_files(source: SourceConfig, files: str, named: list[list[Any]]) -> list[str]:
    """What the start of a resumed run says about a source whose files were written anew.

    Sources that are gone, which a run does not need any more, and Python's standard library, which changes with its
    version, are not compared; nor are data sets of the Hub.

    Args:
        source: as the config has it now.
        files: the `files_fingerprint` of what was read.
        named: [name, bytes, modification time] of the first files that were read.

    Returns:
        Lines, where times alone differ: files that were copied again have other times and the same text.

    Raises:
        ConfigError: files came, went or have another size; the message names the first of them.
    """
    if not source.path or source.format == "datasets" or not Path(source.path).exists():
        return []
    if files_fingerprint(source) == files:
        return []
    before = {name: (size, time) for name, size, time in named}
    now = {name: (size, time) for name, size, time in named_files(source)}
    if before.keys() == now.keys() and all(before[name][0] == now[name][0] for name in now):
        touched = _listed([name for name in now if before[name] != now[name]] or ["one of many"])
        return [
            f"files of {describe_source(source)} were written since this run began, with the same size: {touched}. The "
            "run goes on with the documents that it read then; --fresh reads them anew"
        ]
    changes = [f"{name} is new" for name in now.keys() - before.keys()]
    changes += [f"{name} is gone" for name in before.keys() - now.keys()]
    changes += [
        f"{name} had {before[name][0]:,} bytes and has {now[name][0]:,}"
        for name in now.keys() & before.keys()
        if before[name][0] != now[name][0]
    ]
    raise ConfigError(
        f"data.path: {describe_source(source)} changed since this run began: {_listed(sorted(changes))}. A run "
        "learns the documents that it read at its first start. Add --fresh to start anew with what is there now, or "
        "choose another run.output_dir. To go on with the old documents, bring the old files back, or move the new "
        "ones away."
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}"
