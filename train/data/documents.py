"""Documents of token ids: in memory, or in the shards of a cache, of which slices are read by `pread`.

Mapped pages would count as memory of the process, and a mapped file that shrinks ends it with a bus error.
"""

import dataclasses
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from qwen_moe_jax.errors import CheckpointError

#: Shards whose index is held in memory.
_SHARDS_IN_MEMORY = 32


class FileArray:
    """A one-dimensional array in a .npy file; a slice of it is read when it is asked for.

    Raises:
        CheckpointError: the file is shorter than its header says.
    """

    def __init__(self, file: Path) -> None:
        with file.open("rb") as opened:
            np.lib.format.read_magic(opened)
            (self._length,), _, self.dtype = np.lib.format.read_array_header_1_0(opened)
            self._offset = opened.tell()
        self._file, self._opened = file, os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._opened)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, _ = span.indices(self._length)
        size, at = max(stop - start, 0) * self.dtype.itemsize, self._offset + start * self.dtype.itemsize
        found = os.pread(self._opened, size, at)
        while len(found) < size:
            more = os.pread(self._opened, size - len(found), at + len(found))
            if not more:
                raise CheckpointError(f"{self._file}: found fewer than its {self._length:,} items: it was shortened.")
            found += more
        return np.frombuffer(found, self.dtype)


@dataclass(frozen=True)
class LearnedRuns:
    """A mask as runs of True, each within one document: int64 arrays [runs] in ascending order."""

    starts: np.ndarray
    stops: np.ndarray

    def __getitem__(self, span: slice) -> np.ndarray:
        mask = np.zeros(max(span.stop - span.start, 0), bool)
        first = np.searchsorted(self.stops, span.start, side="right")
        last = np.searchsorted(self.starts, span.stop, side="left")
        for start, stop in zip(self.starts[first:last], self.stops[first:last], strict=True):
            mask[max(start - span.start, 0) : stop - span.start] = True
        return mask


@dataclass(frozen=True)
class Documents(Sequence):
    """Documents of token ids, each a slice of one long array, which may be in a file.

    Attributes:
        tokens: the ids of all documents, integer [total].
        learned: whether a token is a target of the loss, bool [total].
        starts, lengths: the slice of each document, int64 [documents].
        fully_learned: whether every token is known to be a target; False where `learned` says it.
        labels: of every token, int32 [total], where the objective labels tokens.
    """

    tokens: np.ndarray | FileArray
    learned: np.ndarray | LearnedRuns
    starts: np.ndarray
    lengths: np.ndarray
    fully_learned: bool = False
    labels: np.ndarray | FileArray | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> np.ndarray:  # type: ignore[override]  # there are no slices of documents
        return self.tokens[self._span(number)]

    @property
    def num_tokens(self) -> int:
        """Of all documents."""
        return int(self.ends[-1]) if len(self) else 0

    @property
    def labelled(self) -> bool:
        """Whether tokens have labels."""
        return self.labels is not None

    @cached_property
    def ends(self) -> np.ndarray:
        """Where each document ends in the concatenation of all, int64 [documents]."""
        return np.cumsum(self.lengths)

    def learned_in(self, number: int) -> np.ndarray:
        """Whether each token of a document is a target of the loss, bool."""
        return self._learned(self._span(number))

    def labels_in(self, number: int) -> np.ndarray:
        """The label of each token of a document, int32."""
        assert self.labels is not None
        return self.labels[self._span(number)]

    def select(self, chosen: np.ndarray) -> "Documents":
        """The documents that a mask or an array of numbers selects."""
        return dataclasses.replace(self, starts=self.starts[chosen], lengths=self.lengths[chosen])

    def pieces(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The ids and learned masks of what each document has between two offsets in the concatenation of all."""
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        for number in range(first, last + 1):
            begins = self.ends[number] - self.lengths[number] - self.starts[number]
            span = slice(
                max(start - begins, self.starts[number]), min(stop, self.ends[number]) - begins
            )  # of the array
            yield self.tokens[span], self._learned(span)

    def blocks(self) -> "Iterator[Documents]":
        """The documents in order, in parts whose index fits into memory."""
        yield self

    def learned_runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Runs of learned tokens, by their offsets in the concatenation of all documents, in order.

        Returns:
            The start and the end of each, and the start of its document; int64 [runs].
        """
        begins = self.ends - self.lengths
        if self.fully_learned:
            return begins, self.ends, begins
        if isinstance(self.learned, LearnedRuns):
            document = np.searchsorted(self.starts, self.learned.starts, side="right") - 1
            inside = document >= 0
            inside[inside] = self.learned.starts[inside] < (self.starts + self.lengths)[document[inside]]
            document = document[inside]
            shift = (begins - self.starts)[document]
            return self.learned.starts[inside] + shift, self.learned.stops[inside] + shift, begins[document]
        found: list[tuple[int, int, int]] = []
        for number, begin in enumerate(begins):
            edges = begin + np.flatnonzero(np.diff(np.concatenate([[False], self.learned_in(number), [False]])))
            found += [(start, stop, begin) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
        starts, stops, document_starts = np.array(found, np.int64).reshape(-1, 3).T
        return starts, stops, document_starts

    def _learned(self, span: slice) -> np.ndarray:
        return np.ones(span.stop - span.start, bool) if self.fully_learned else self.learned[span]

    def _span(self, number: int) -> slice:
        return slice(self.starts[number], self.starts[number] + self.lengths[number])


class ShardedDocuments(Sequence):
    """The documents of several shards, one shard after the other; see `Documents` for the methods.

    Memory holds the index of a few shards, and one number of documents and tokens of each.
    """

    def __init__(
        self, opened: Callable[[int], Documents], documents: Sequence[int], tokens: Sequence[int], *, labelled: bool
    ) -> None:
        """`opened` opens a shard by its number; the sequences have the counts of each shard."""
        self.labelled = labelled
        self._open = lru_cache(_SHARDS_IN_MEMORY)(opened)
        self._numbers = np.cumsum([0, *documents], dtype=np.int64)
        self._offsets = np.cumsum([0, *tokens], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._numbers[-1])

    def __getitem__(self, number: int) -> np.ndarray:  # type: ignore[override]  # there are no slices of documents
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard, within = self._find(number)
        return shard[within]

    @property
    def num_tokens(self) -> int:
        """Of all documents."""
        return int(self._offsets[-1])

    def learned_in(self, number: int) -> np.ndarray:
        """See `Documents`."""
        shard, within = self._find(number)
        return shard.learned_in(within)

    def labels_in(self, number: int) -> np.ndarray:
        """See `Documents`."""
        shard, within = self._find(number)
        return shard.labels_in(within)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """See `Documents`."""
        first, last = np.searchsorted(self._offsets, [start, stop - 1], side="right") - 1
        for shard in range(first, last + 1):
            offset, end = self._offsets[shard : shard + 2]
            if offset < end:
                yield from self._open(shard).pieces(max(start - offset, 0), min(stop, end) - offset)

    def blocks(self) -> Iterator[Documents]:
        """See `Documents`."""
        for shard in range(len(self._numbers) - 1):
            if self._numbers[shard] < self._numbers[shard + 1]:
                yield self._open(shard)

    def _find(self, number: int) -> tuple[Documents, int]:
        shard = int(np.searchsorted(self._numbers, number, side="right")) - 1
        return self._open(shard), int(number - self._numbers[shard])


AnyDocuments = Documents | ShardedDocuments


def as_documents(arrays: Sequence[np.ndarray]) -> Documents:
    """Documents of arrays of ids, all of which are targets of the loss."""
    lengths = np.array([len(array) for array in arrays], np.int64)
    tokens = np.concatenate([np.asarray(array) for array in arrays])
    learned = np.ones(len(tokens), bool)
    return Documents(tokens, learned, starts=np.cumsum(lengths) - lengths, lengths=lengths, fully_learned=True)
