"""A shard: a folder of .npy files with the token ids of some documents, what is learned of them, and their borders.

| file | |
|---|---|
| `tokens.npy` | uint32 [tokens], the documents one after the other |
| `lengths.npy` | int64 [documents] |
| `learned.npy` | int64 [2, runs]: starts and ends of the runs of learned tokens; missing where all are learned |
| `labels.npy` | int32 [tokens], where the objective labels tokens |
| `digests.npy` | uint64 [examples], hashes of the names of their records |
| `number.NAME.npy` | [examples, …], numbers of the examples |
| `shard.json` | counts, the checksum of the other files, and how far the build had come |

It is written to a temporary name and renamed: a folder of a shard's name is complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.data.chat import Example
from train.data.documents import Documents, FileArray, LearnedRuns

#: A shard ends with the group of records that brings it to one of these sizes.
TOKENS_OF_A_SHARD, DOCUMENTS_OF_A_SHARD = 1 << 24, 1 << 16

_NUMBER = "number."


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What is known of a shard without opening it.

    Attributes:
        name: of its folder.
        documents, examples, tokens: how many it has.
        labelled: whether its tokens have labels.
        per_example: documents of an example.
        sha256: of its files, in the order of their names.
    """

    name: str
    documents: int
    examples: int
    tokens: int
    labelled: bool
    per_example: int
    sha256: str


class ShardWriter:
    """Collects examples and writes them as shards of a folder."""

    def __init__(self, folder: Path, number: int = 0) -> None:
        """`number` is that of the next shard."""
        self._folder, self._number = folder, number
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._runs: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._digests: list[int] = []
        self._numbers: dict[str, list[Any]] = {}
        self._fully_learned: bool = True
        self._total, self._per_example = 0, 1

    @property
    def full(self) -> bool:
        """Whether it is time to write a shard."""
        return self._total >= TOKENS_OF_A_SHARD or len(self._lengths) >= DOCUMENTS_OF_A_SHARD

    def add(self, name: str, example: Example) -> None:
        """Adds the example of a record of this name.

        All have the same number of documents and the same numbers; all documents have labels, or none.
        """
        self._per_example = len(example.documents)
        for turns in example.documents:
            self._tokens.append(turns.ids.astype(np.uint32))
            edges = np.flatnonzero(np.diff(np.concatenate([[False], turns.learned, [False]])))
            self._runs.append(self._total + edges.reshape(-1, 2))
            self._fully_learned = self._fully_learned and bool(turns.learned.all())
            if turns.labels is not None:
                self._labels.append(turns.labels.astype(np.int32))
            self._lengths.append(len(turns.ids))
            self._total += len(turns.ids)
        for key, value in example.numbers.items():
            self._numbers.setdefault(key, []).append(value)
        self._digests.append(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))

    def write(self, state: dict[str, Any]) -> Shard | None:
        """Writes a shard of what was added since the last; `state` is how far the build has come.

        Returns:
            The shard; None where nothing was added.
        """
        if not self._digests:
            return None
        folder = self._folder / f"{self._number:06}"
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_array(partial / "tokens.npy", np.dtype(np.uint32), self._tokens)
        _write_array(partial / "lengths.npy", np.dtype(np.int64), [np.array(self._lengths, np.int64)])
        _write_array(partial / "digests.npy", np.dtype(np.uint64), [np.array(self._digests, np.uint64)])
        if not self._fully_learned:
            np.save(partial / "learned.npy", np.concatenate(self._runs).astype(np.int64).T)
        if self._labels:
            _write_array(partial / "labels.npy", np.dtype(np.int32), self._labels)
        for key, values in self._numbers.items():
            np.save(partial / f"{_NUMBER}{key}.npy", np.array(values))
        shard = Shard(
            name=folder.name,
            documents=len(self._lengths),
            examples=len(self._digests),
            tokens=self._total,
            labelled=bool(self._labels),
            per_example=self._per_example,
            sha256=checksum(partial),
        )
        (partial / "shard.json").write_text(json.dumps({**asdict(shard), "state": state}) + "\n", encoding="utf-8")
        for file in partial.iterdir():
            _to_disk(file)
        shutil.rmtree(folder, ignore_errors=True)  # what a changed file has left
        os.replace(partial, folder)
        self._number += 1
        self._clear()
        return shard


def whole_shards(folder: Path) -> Iterator[tuple[Shard, dict[str, Any]]]:
    """The shards of an interrupted build in order, each with how far it had come; up to the first that is damaged."""
    number = 0
    while (described := folder / f"{number:06}" / "shard.json").exists():
        found = json.loads(described.read_text(encoding="utf-8"))
        state = found.pop("state")
        shard = Shard(**found)
        if checksum(described.parent) != shard.sha256:
            return
        yield shard, state
        number += 1


def open_shard(folder: Path) -> Documents:
    """The documents of a shard; its token ids are read where they are asked for.

    Raises:
        FileNotFoundError: something is missing.
    """
    lengths = np.load(folder / "lengths.npy")
    labels, learned = folder / "labels.npy", folder / "learned.npy"
    runs = np.load(learned) if learned.exists() else np.zeros((2, 0), np.int64)
    return Documents(
        tokens=FileArray(folder / "tokens.npy"),
        learned=LearnedRuns(*runs),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        fully_learned=not learned.exists(),
        labels=FileArray(labels) if labels.exists() else None,
    )


def open_digests(folder: Path) -> np.ndarray:
    """The hashes of the names of a shard's examples, uint64 [examples]."""
    return np.load(folder / "digests.npy")


def open_numbers(folder: Path) -> dict[str, np.ndarray]:
    """The numbers of a shard's examples, [examples, …] by name."""
    return {file.stem.removeprefix(_NUMBER): np.load(file) for file in sorted(folder.glob(f"{_NUMBER}*.npy"))}


def checksum(folder: Path) -> str:
    """The SHA-256 of a shard's arrays, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.npy")):
        digest.update(f"{file.name}\n".encode())
        with file.open("rb") as opened:
            while part := opened.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def _write_array(file: Path, dtype: np.dtype, parts: Sequence[np.ndarray]) -> None:
    """Writes arrays one after the other as one array, without putting them together in memory."""
    with file.open("wb") as opened:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (sum(map(len, parts)),)}
        np.lib.format.write_array_header_1_0(opened, header)
        for part in parts:
            opened.write(part.data)


def _to_disk(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
