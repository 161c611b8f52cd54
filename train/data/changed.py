"""Whether the files of a run's sources are those that its documents were made of."""

from pathlib import Path
from typing import Any

from train.config import SourceConfig
from train.data.fingerprints import files_fingerprint, named_files
from train.data.sources import describe_source

#: Most changed files that a message names.
_LISTED = 3


def changed_files(source: SourceConfig, files: str, named: list[list[Any]]) -> list[str]:
    """What the start of a resumed run says about a source whose files are not those that were read.

    The run goes on with the documents of its first start: a corpus that grows must not stop what restarts by itself.
    Sources that are gone, which a run does not need any more, and Python's standard library, which changes with its
    version, are not compared; nor are data sets of the Hub.

    Args:
        source: as the config has it now.
        files: the `files_fingerprint` of what was read.
        named: [name, bytes, modification time] of the first files that were read.

    Returns:
        A line that names the first of the files that came, went, have another size or were written again; or none.
    """
    if not source.path or source.format == "datasets" or not Path(source.path).exists():
        return []
    if files_fingerprint(source) == files:
        return []
    before = {name: (size, time) for name, size, time in named}
    now = {name: (size, time) for name, size, time in named_files(source)}
    changes = [f"{name} is new" for name in now.keys() - before.keys()]
    changes += [f"{name} is gone" for name in before.keys() - now.keys()]
    for name in now.keys() & before.keys():
        (old, _), (new, _) = before[name], now[name]
        if old != new:
            changes.append(f"{name} had {old:,} bytes and has {new:,}")
        elif before[name] != now[name]:
            changes.append(f"{name} was written again, with the same size")
    return [
        f"data.path: {describe_source(source)} changed since this run began: "
        f"{_listed(sorted(changes) or ['one of many files'])}. The run goes on with the documents that it read then; "
        "--fresh, or another run.output_dir, reads them anew"
    ]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}"
