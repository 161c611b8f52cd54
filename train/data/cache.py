"""The cache of tokenized sources: a folder for each source and tokenizer, with shards and a manifest.

`manifest.json` is written last and makes the folder complete. A build that was interrupted goes on after its last
shard: it reads the records before that once more, without tokenizing them. Two processes that want the same folder
take turns by a file lock; the second finds it complete.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.whole_file import write_whole
from train.config import DataConfig, SourceConfig
from train.data.encode import Encoder, Kind
from train.data.fingerprints import Fingerprint, files_fingerprint, fingerprint
from train.data.lengths import LengthRule
from train.data.recognised import Recognised
from train.data.shards import Shard, ShardWriter, whole_shards
from train.data.sources import describe_source, read_records
from train.data.tokenizing_progress import TokenizingProgress
from train.data.workers import encoded, in_groups, num_workers

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The tokenized documents of a source.

    Attributes:
        folder: of the shards.
        shards: in order.
        lengths: the counts of a `LengthRule`.
        turn_ends: how often each token ended an assistant's turn.
        forms: lines on what the records were recognised as.
        read: how much was read, where that is not all.
        memory: the state of the kind's `memory` after this source.
    """

    folder: Path
    shards: list[Shard]
    lengths: dict[str, int]
    turn_ends: Counter[int]
    forms: list[str]
    read: list[str]
    memory: dict[str, Any] | None


def tokenized(
    cache: Path, source: SourceConfig, config: DataConfig, kind: Kind, encoder: Encoder, tokenizer: Path
) -> Entry:
    """The tokenized documents of a source, made where the cache does not have them.

    Args:
        cache: its folder.
        source, config: what is read.
        kind: how records become examples.
        encoder: of the tokenizer in the folder `tokenizer`.

    Raises:
        ConfigError: there is no text, a record is refused, or the files changed in the meantime.
    """
    longest = LengthRule(config.too_long, config.seq_len, whole=kind.whole).longest_kept
    wanted = fingerprint(source, config, kind, tokenizer, end_id=encoder.end_id, longest=longest)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", Path(source.path).name or "python").strip("-")
    folder = cache / f"{slug}-{wanted.key}"
    if not (folder / MANIFEST).exists():
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not (folder / MANIFEST).exists():
                _say_what_changed(cache, source, wanted)
                _Build(folder, source, config, kind, encoder).run(tokenizer, wanted)
                if files_fingerprint(source) != wanted.files:
                    (folder / MANIFEST).unlink()
                    raise ConfigError(f"data.path: files of {describe_source(source)} changed while they were read.")
    entry = open_entry(folder)
    if kind.memory is not None and entry.memory is not None:
        kind.memory.restore(entry.memory)
    return entry


def open_entry(folder: Path) -> Entry:
    """A complete folder of the cache.

    Raises:
        FileNotFoundError, KeyError, json.JSONDecodeError: it is not complete, or a file was changed.
    """
    found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return Entry(
        folder=folder,
        shards=[Shard(**shard) for shard in found["shards"]],
        lengths=found["lengths"],
        turn_ends=Counter({int(token): count for token, count in found["turn_ends"]}),
        forms=found["forms"],
        read=found["read"],
        memory=found["memory"],
    )


class _Build:
    """The making of one folder of the cache."""

    def __init__(self, folder: Path, source: SourceConfig, config: DataConfig, kind: Kind, encoder: Encoder) -> None:
        self._folder, self._source, self._config, self._kind, self._encoder = folder, source, config, kind, encoder
        self._lengths = LengthRule(config.too_long, config.seq_len, whole=kind.whole)
        self._turn_ends: Counter[int] = Counter()
        self._records = 0  # that are tokenized

    def run(self, tokenizer: Path, wanted: Fingerprint) -> None:
        """Makes what is missing of the folder."""
        source, config, kind, encoder = self._source, self._config, self._kind, self._encoder
        shards = self._go_on()
        name, read = describe_source(source), list[str]()
        recognised = Recognised(source.columns, kind.read)
        records = read_records(source, config.megabytes, encoder.end_id, read.append, recognised)
        progress = TokenizingProgress(name, wanted.size)
        for record in islice(records, self._records):
            progress.skip(record.size)
        workers = num_workers(config, source, kind, wanted.size)
        writer = ShardWriter(self._folder, len(shards))
        for group in encoded(in_groups(records), kind, encoder, tokenizer, workers):
            self._records += group.records
            self._turn_ends.update(group.turn_ends)
            tokens = 0
            for record, example in self._lengths.apply(group.examples):
                writer.add(record, example)
                tokens += sum(len(turns.ids) for turns in example.documents)
            progress.add(group.size, len(group.examples), tokens)
            if writer.full:
                shards.append(writer.write(self._state()))
        last = writer.write(self._state())
        shards += [] if last is None else [last]
        progress.end(workers)
        manifest = {
            "source": {"path": source.path, "files": wanted.named},
            "fingerprints": {"files": wanted.files, "tokenizer": wanted.tokenizer, "settings": wanted.settings},
            "documents": sum(shard.documents for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
            "shards": [asdict(shard) for shard in shards],
            "forms": recognised.notes(name),
            "read": read,
            **self._state(),
        }
        self._folder.mkdir(exist_ok=True)
        write_whole(self._folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")

    def _go_on(self) -> list[Shard]:
        """The shards of an interrupted build, after which this one goes on."""
        found = list(whole_shards(self._folder))
        if found:
            _, state = found[-1]
            self._records = state["records"]
            self._lengths.restore(state["lengths"])
            self._turn_ends = Counter({int(token): count for token, count in state["turn_ends"]})
            if self._kind.memory is not None:
                self._kind.memory.restore(state["memory"])
        return [shard for shard, _ in found]

    def _state(self) -> dict[str, Any]:
        memory = self._kind.memory
        return {
            "records": self._records,
            "lengths": self._lengths.state(),
            "turn_ends": [list(pair) for pair in self._turn_ends.items()],
            "memory": None if memory is None else memory.state(),
        }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process, which makes {folder}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _say_what_changed(cache: Path, source: SourceConfig, wanted: Fingerprint) -> None:
    """Says why a source is tokenized that the cache has in another form."""
    for file in cache.glob(f"*/{MANIFEST}"):
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["source"]["path"] != source.path:
            continue
        old, new = found["fingerprints"], wanted.settings
        changed = ["its files"] * (old["files"] != wanted.files)
        changed += ["the tokenizer"] * (old["tokenizer"] != wanted.tokenizer)
        changed += [key for key in new if old["settings"].get(key) != new[key]]
        print(f"tokenizing {describe_source(source)} anew: changed since {file.parent.name}: {', '.join(changed)}")
