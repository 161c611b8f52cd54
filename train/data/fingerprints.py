"""What the tokens of a source depend on, as hashes: its files, the tokenizer with its chat template, and settings."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import DataConfig, SourceConfig
from train.data.encode import Kind
from train.data.sources import describe_source, files_of, open_dataset

#: The version of what a cache has on disk, and of how records become tokens: raised with a change of either.
_VERSION = 2
#: Files of a source that a manifest names one by one.
_MOST_NAMED = 1000

#: The formats whose readers say how many bytes of the files a record is.
_SIZED = ("text", "jsonl", "tokens")


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What the tokens of a source depend on.

    Attributes:
        files: of the names, sizes and times of its files, or of a dataset.
        tokenizer: of the tokenizer's files; "" where only the files matter.
        settings: by their names, as JSON.
        named: [name, bytes, modification time in ns] of the first files, for the manifest.
        size: of the text that is read, in bytes; 0 where it is not known.
    """

    files: str
    tokenizer: str
    settings: dict[str, Any]
    named: list[list[Any]]
    size: float

    @property
    def key(self) -> str:
        """Another for other tokens."""
        return _hash([_VERSION, self.files, self.tokenizer, self.settings])[:16]


def fingerprint(
    source: SourceConfig, config: DataConfig, kind: Kind, tokenizer: Path, *, end_id: int, longest: int | None
) -> Fingerprint:
    """That of one source; `longest` is the length to which documents are cut, `tokenizer` a folder."""
    named, size = _files(source)
    settings = {
        "objective": kind.name,
        "earlier": None if kind.memory is None else kind.memory.state(),
        "format": source.format,
        "split": source.split,
        "columns": dict(source.columns.given),
        "megabytes": str(config.megabytes),
        "too_long": config.too_long if longest is not None else "split",
        "longest": longest,
        "end_id": end_id,
    }
    return Fingerprint(
        files=_hash(named),
        tokenizer=tokenizer_fingerprint(tokenizer),
        settings=settings,
        named=named[:_MOST_NAMED],
        size=min(size, config.megabytes * 1e6) if source.format in _SIZED else 0,
    )


def text_fingerprint(config: DataConfig, kind: Kind) -> str:
    """Of the text on which a tokenizer is trained, and of its size."""
    sources = [
        [source.format, source.split, dict(source.columns.given), _files(source)[0]] for source in config.mixture
    ]
    return _hash([_VERSION, kind.name, config.vocab_size, str(config.megabytes), sources])[:16]


def tokenizer_fingerprint(folder: Path) -> str:
    """Of the files of a tokenizer, its chat templates included."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\n{file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def named_files(source: SourceConfig) -> list[list[Any]]:
    """The [name, bytes, modification time in ns] of a source's first files, as a manifest has them."""
    return _files(source)[0][:_MOST_NAMED]


def files_fingerprint(source: SourceConfig) -> str:
    """Of a source's files alone."""
    return _hash(_files(source)[0])


def _files(source: SourceConfig) -> tuple[list[list[Any]], int]:
    """The [name, size, modification time] of each file, and the bytes of all."""
    path = Path(source.path)
    if source.format == "datasets" and (not path.exists() or any(path.glob("*.json"))):
        return [[describe_source(source), open_dataset(source)._fingerprint, 0]], 0
    found = [(name, file.stat()) for file, name in files_of(source)]
    compressed = any(name.endswith((".gz", ".zst")) for name, _ in found)
    size = sum(stat.st_size for _, stat in found)
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found], 0 if compressed else size


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
