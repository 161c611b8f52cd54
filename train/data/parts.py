"""The examples of one source, divided into those to train on and those that are held out by hashes of their names."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen_moe_jax.errors import ConfigError
from train.config import DataConfig
from train.data.cache import Entry, open_entry
from train.data.documents import AnyDocuments, Documents, ShardedDocuments
from train.data.shards import Shard, open_digests, open_numbers, open_shard

#: Hashes that are sorted at once.
_HASHES_IN_MEMORY = 1 << 22


@dataclass(frozen=True)
class Part:
    """The examples of one source, or of the file that is held out (`data.eval_path`).

    Attributes:
        name: of the source.
        training, heldout: their documents, those of one example one after the other.
        documents: in one example.
        training_numbers, heldout_numbers: arrays [examples, …] by name.
    """

    name: str
    training: AnyDocuments
    heldout: AnyDocuments
    documents: int = 1
    training_numbers: dict[str, np.ndarray] = field(default_factory=dict)
    heldout_numbers: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Division:
    """Which examples are held out: those whose hash is at most `until`; and how many there are of each kind, by shard.

    Attributes:
        until: the largest hash that is held out; None: nothing is.
        training_documents, training_tokens, heldout_documents, heldout_tokens: one number for each shard.
    """

    until: int | None
    training_documents: list[int]
    training_tokens: list[int]
    heldout_documents: list[int]
    heldout_tokens: list[int]


def hold_out(entry: Entry, name: str, config: DataConfig, *, whole: bool) -> Division:
    """Chooses the held-out examples, which have the smallest hashes; those of one record are on the same side.

    Args:
        entry: the tokenized documents.
        name: of the source, for messages.
        config: what share is held out.
        whole: whether a row has one example; else documents are packed into rows.

    Raises:
        ConfigError: too little is left to train on.
    """
    counts = _counts_of_hashes(entry)
    names = sum(count for _, count in counts)
    count = 0 if config.eval_path else max(1, round(names * config.heldout_fraction))
    division = divide(entry, _smallest_hash(entry, counts, count) if 0 < count <= names else None)
    training_tokens = sum(division.training_tokens)
    if not names or training_tokens < (1 if whole else config.seq_len):
        remedy = "Read more text." if whole else "Read more text, or lower data.seq_len."
        if config.too_long == "drop":
            remedy = 'Read more text, raise data.seq_len, or set data.too_long to "truncate" or "split".'
        raise ConfigError(
            f"data.megabytes: found {config.megabytes}, which gives {names} documents of "
            f"{name}; with {count} of them held out, {training_tokens} tokens are left to train on, "
            f"fewer than one row of {config.seq_len}. {remedy}"
        )
    return division


def hold_out_all(entry: Entry, config: DataConfig) -> Division:
    """Holds all examples of `data.eval_path` out.

    Raises:
        ConfigError: there are none.
    """
    if not entry.shards:
        raise ConfigError(f"data.eval_path: found no document in {config.eval_path}, expected some to evaluate on.")
    return divide(entry, 2**64 - 1)


def divide(entry: Entry, until: int | None) -> Division:
    """Counts what is on both sides of a hash, shard by shard."""
    counts: list[list[int]] = []
    for shard in entry.shards:
        lengths = np.load(entry.folder / shard.name / "lengths.npy")
        heldout = _is_heldout(entry.folder, shard, until)
        tokens, documents = int(lengths[heldout].sum()), int(heldout.sum())
        counts.append([shard.documents - documents, shard.tokens - tokens, documents, tokens])
    columns = [list(column) for column in zip(*counts, strict=True)] or [[]] * 4
    return Division(
        until=until,
        training_documents=columns[0],
        training_tokens=columns[1],
        heldout_documents=columns[2],
        heldout_tokens=columns[3],
    )


def describe_part(entry: Entry, folder: Path, division: Division) -> dict[str, Any]:
    """What `open_part` needs of a part, as JSON; a cache within the `folder` of the corpus is named from there."""
    inside = entry.folder.is_relative_to(folder)
    return {"cache": str(entry.folder.relative_to(folder) if inside else entry.folder.absolute()), **asdict(division)}


def open_part(folder: Path, described: dict[str, Any], name: str) -> Part:
    """The part that `describe_part` described in the corpus in `folder`.

    Raises:
        FileNotFoundError, KeyError: something is missing.
    """
    fields = {key: value for key, value in described.items() if key != "name"}
    entry = open_entry(folder / fields.pop("cache"))
    division = Division(**fields)
    for shard in entry.shards:
        if not (entry.folder / shard.name / "tokens.npy").exists():
            raise FileNotFoundError(2, "missing", str(entry.folder / shard.name / "tokens.npy"))
    return Part(
        name,
        training=_documents(entry, division, heldout=False),
        heldout=_documents(entry, division, heldout=True),
        documents=entry.shards[0].per_example if entry.shards else 1,
        training_numbers=_numbers(entry, division, heldout=False),
        heldout_numbers=_numbers(entry, division, heldout=True),
    )


def _documents(entry: Entry, division: Division, *, heldout: bool) -> ShardedDocuments:
    def opened(number: int) -> Documents:
        shard = entry.shards[number]
        return open_shard(entry.folder / shard.name).select(_is_heldout(entry.folder, shard, division.until) == heldout)

    documents = division.heldout_documents if heldout else division.training_documents
    tokens = division.heldout_tokens if heldout else division.training_tokens
    return ShardedDocuments(opened, documents, tokens, labelled=any(shard.labelled for shard in entry.shards))


def _numbers(entry: Entry, division: Division, *, heldout: bool) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {}
    for shard in entry.shards:
        numbers = open_numbers(entry.folder / shard.name)
        if numbers:
            chosen = _is_heldout(entry.folder, shard, division.until)[:: shard.per_example] == heldout
            for key, values in numbers.items():
                found.setdefault(key, []).append(values[chosen])
    return {key: np.concatenate(values) for key, values in found.items()}


def _is_heldout(folder: Path, shard: Shard, until: int | None) -> np.ndarray:
    """Whether each document of a shard is held out, bool [documents]."""
    if until is None:
        return np.zeros(shard.documents, bool)
    return np.repeat(open_digests(folder / shard.name) <= np.uint64(until), shard.per_example)


def _counts_of_hashes(entry: Entry) -> list[tuple[int, int]]:
    """Ranges of hashes, of which few enough are there to be sorted, as (end of the range, different hashes in it)."""
    examples = sum(shard.examples for shard in entry.shards)
    ranges = max(1, -(-examples // _HASHES_IN_MEMORY))
    ends = [2**64 * (number + 1) // ranges for number in range(ranges)]
    return [(end, len(hashes)) for end, hashes in zip(ends, _sorted_hashes(entry, ends), strict=True)]


def _smallest_hash(entry: Entry, counts: Sequence[tuple[int, int]], count: int) -> int:
    """The hash that is the `count`-th of all in ascending order, from 1."""
    before = 0
    for hashes, (_, number) in zip(_sorted_hashes(entry, [end for end, _ in counts]), counts, strict=True):
        if before + number >= count:
            return int(hashes[count - before - 1])
        before += number
    raise AssertionError("there are as many hashes as were counted")


def _sorted_hashes(entry: Entry, ends: Sequence[int]) -> Iterator[np.ndarray]:
    """The different hashes of each range in ascending order; each range reads all shards."""
    start = 0
    for end in ends:
        found = [np.zeros(0, np.uint64)]
        for shard in entry.shards:
            hashes = open_digests(entry.folder / shard.name)
            found.append(np.unique(hashes[(hashes >= np.uint64(start)) & (hashes <= np.uint64(end - 1))]))
        yield np.unique(np.concatenate(found))
        start = end
