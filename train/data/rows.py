"""Documents → rows of T tokens: cut every T tokens (`Rows`), or whole documents by best-fit decreasing (`BestFitRows`).

Rows are numbered and built on access: memory holds no row.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import numpy as np

from qwen_moe_jax.rounding import ceil_div
from train.data.best_fit import best_fit_decreasing
from train.data.documents import AnyDocuments, Documents, ShardedDocuments, as_documents

PackingStrategy = Literal["wrapped", "bfd"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Row:
    """T tokens: int32 arrays [T] and the bool array `learned_T`, as described in `Rows`."""

    tokens_T: np.ndarray
    segment_ids_T: np.ndarray
    positions_T: np.ndarray
    learned_T: np.ndarray


class Source(Protocol):
    """What a batch is put together from: numbered rows, each a dataclass of arrays of the same shapes."""

    @property
    def name(self) -> str: ...
    @property
    def num_tokens(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Any: ...


class PackedRows(Source, Protocol):
    """Rows of documents."""

    @property
    def padding(self) -> float:
        """The share of the tokens of all rows that is padding."""

    def with_targets(self) -> "PackedRows":
        """The rows that have a target: a learned token that is not the first of its segment; they themselves if all."""


def pack(
    documents: Sequence[np.ndarray], seq_len: int, name: str = "documents", strategy: PackingStrategy = "wrapped"
) -> PackedRows:
    """Packs documents of integer ids into rows of `seq_len`; every token is in exactly one row.

    Args:
        documents: `Documents`, or arrays of ids, all of which are targets of the loss.
        name: of the source, for messages.
        strategy: "wrapped" is `Rows`, "bfd" `BestFitRows`.
    """
    if not isinstance(documents, Documents | ShardedDocuments):
        documents = as_documents(documents)
    return BestFitRows.of(documents, seq_len, name) if strategy == "bfd" else Rows(documents, seq_len, name)


class Rows:
    """Packed rows: the documents are concatenated and split every T tokens.

    A row may hold the end of one document and the beginning of the next: `segment_ids_T` numbers its documents 1, 2, …
    and is 0 on padding, which only the last row can have; `positions_T` counts from 0 within each segment. A document
    that is longer than a row goes on in the next one as a new segment. `learned_T` is that of `Documents`.

    Of documents in shards, memory holds the index of a few.
    """

    def __init__(
        self, documents: AnyDocuments, seq_len: int, name: str, left_out: np.ndarray = np.zeros(0, np.int64)
    ) -> None:
        """`left_out` are numbers of rows, in ascending order, that are none of these rows."""
        self.name = name
        self._documents, self._seq_len, self._left_out = documents, seq_len, left_out
        self._skips = left_out - np.arange(len(left_out))  # row n comes after those whose number here is at most n

    @property
    def num_tokens(self) -> int:
        """The tokens of all rows, without padding."""
        total = self._documents.num_tokens
        padding = -total % self._seq_len if self._num_all - 1 in self._left_out else 0
        return total - len(self._left_out) * self._seq_len + padding

    @property
    def _num_all(self) -> int:
        return ceil_div(self._documents.num_tokens, self._seq_len)

    def __len__(self) -> int:
        return self._num_all - len(self._left_out)

    def __getitem__(self, number: int) -> Row:
        number += int(np.searchsorted(self._skips, number, side="right"))
        start, stop = number * self._seq_len, min((number + 1) * self._seq_len, self._documents.num_tokens)
        return _row(self._documents.pieces(start, stop), self._seq_len)

    @property
    def padding(self) -> float:
        """See `PackedRows`: that of the last row."""
        return 1 - self.num_tokens / (len(self) * self._seq_len) if len(self) else 0.0

    def with_targets(self) -> "Rows":
        """The rows that have a target: a learned token that is not the first of its segment.

        Returns:
            These rows themselves, where all have one.
        """
        left_out, offset = [np.zeros(0, np.int64)], 0
        last, last_has = -1, True  # the last row so far, and whether it has a target: the next block may go on in it
        for block in self._documents.blocks():
            has = self._have_target(block, offset)
            numbers = offset // self._seq_len + np.arange(len(has))
            if numbers[0] == last:
                has[0] |= last_has
            elif not last_has:
                left_out.append(np.array([last]))
            left_out.append(numbers[:-1][~has[:-1]])
            last, last_has = int(numbers[-1]), bool(has[-1])
            offset += block.num_tokens
        if not last_has:
            left_out.append(np.array([last]))
        numbers = np.concatenate(left_out).astype(np.int64)
        return Rows(self._documents, self._seq_len, self.name, numbers) if len(numbers) else self

    def _have_target(self, block: Documents, offset: int) -> np.ndarray:
        """Whether the rows of a block that begins at an offset have a target in it, bool [rows].

        The first token of a document is no target, and neither is the first of a row.
        """
        first_row = offset // self._seq_len
        changes = np.zeros((offset + block.num_tokens - 1) // self._seq_len - first_row + 2, np.int64)
        starts, ends, document_starts = (offset + found for found in block.learned_runs())
        first = np.maximum(starts, document_starts + 1)
        first += first % self._seq_len == 0
        rows, last_rows = first // self._seq_len, (ends - 2) // self._seq_len  # a row needs its second token, too
        holds = (first < ends) & (rows <= last_rows)
        np.add.at(changes, rows[holds] - first_row, 1)
        np.add.at(changes, last_rows[holds] + 1 - first_row, -1)
        return np.cumsum(changes)[:-1] > 0


@dataclass(frozen=True, eq=False)
class BestFitRows:
    """Packed rows of whole documents: best-fit decreasing of their lengths, so that few tokens are padding.

    Only a document that is longer than a row is split, every T tokens; its rest is packed like a document. Rows are as
    in `Rows`, but each may end in padding. Memory holds 16 bytes a document.

    Source: Ding et al., arXiv 2404.10830; TRL's `packing_strategy="bfd"`.

    Attributes:
        name: of the source, for messages.
        documents: of the rows.
        seq_len: T.
        starts, stops: of the pieces of documents in the concatenation of all, row by row; int64 [pieces].
        ends: of the pieces of each row among all, int64 [rows].
    """

    name: str
    documents: AnyDocuments
    seq_len: int
    starts: np.ndarray
    stops: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, documents: AnyDocuments, seq_len: int, name: str) -> "BestFitRows":
        """Packs the documents; those of one shard together."""
        starts, stops, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        offset = 0
        for block in documents.blocks():
            first, last = _pieces(offset + block.ends - block.lengths, block.lengths, seq_len)
            order, per_row = best_fit_decreasing(last - first, seq_len)
            starts.append(first[order])
            stops.append(last[order])
            counts.append(per_row)
            offset += block.num_tokens
        ends = np.cumsum(np.concatenate(counts))
        return cls(name, documents, seq_len, np.concatenate(starts), np.concatenate(stops), ends)

    @property
    def num_tokens(self) -> int:
        """The tokens of all rows, without padding."""
        return int(np.sum(self.stops - self.starts))

    @property
    def padding(self) -> float:
        """See `PackedRows`."""
        return 1 - self.num_tokens / (len(self) * self.seq_len) if len(self) else 0.0

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> Row:
        if not 0 <= number < len(self):
            raise IndexError(number)
        pieces = slice(self.ends[number - 1] if number else 0, self.ends[number])
        spans = zip(self.starts[pieces], self.stops[pieces], strict=True)
        return _row((piece for start, stop in spans for piece in self.documents.pieces(start, stop)), self.seq_len)

    def with_targets(self) -> "BestFitRows":
        """See `PackedRows`."""
        by_start = np.argsort(self.starts)
        sorted_starts, has = self.starts[by_start], np.zeros(len(by_start), bool)
        offset = done = 0
        for block in self.documents.blocks():
            starts, ends, _ = (offset + found for found in block.learned_runs())
            offset += block.num_tokens
            until = int(np.searchsorted(sorted_starts, offset))
            own, done = by_start[done:until], until
            second = self.starts[own] + 1  # a piece's first token is no target
            run = np.searchsorted(ends, second, side="right")  # the first that ends behind the piece's second token
            holds = run < len(ends)
            has[own[holds]] = np.maximum(starts[run[holds]], second[holds]) < self.stops[own[holds]]
        counts = np.diff(self.ends, prepend=0)
        kept = np.bincount(np.repeat(np.arange(len(self)), counts), weights=has, minlength=len(self)) > 0
        if kept.all():
            return self
        pieces = np.repeat(kept, counts)
        return dataclasses.replace(
            self, starts=self.starts[pieces], stops=self.stops[pieces], ends=np.cumsum(counts[kept])
        )


def _pieces(starts: np.ndarray, lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the pieces of documents begin and end, none of which is longer than `longest`; int64 [pieces] each."""
    counts = -(-lengths // longest)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = starts[document] + number * longest
    return first, np.minimum(first + longest, (starts + lengths)[document])


def _row(pieces: Iterable[tuple[np.ndarray, np.ndarray]], seq_len: int) -> Row:
    """The row of these ids and learned masks, each a segment, with padding behind them."""
    tokens, learned = zip(*pieces, strict=True)
    lengths = [len(piece) for piece in tokens]

    def to_row(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
        return np.pad(np.concatenate(arrays).astype(dtype), (0, seq_len - sum(lengths)))

    return Row(
        tokens_T=to_row(tokens, np.int32),
        segment_ids_T=to_row([np.full(length, segment) for segment, length in enumerate(lengths, 1)], np.int32),
        positions_T=to_row([np.arange(length) for length in lengths], np.int32),
        learned_T=to_row(learned, bool),
    )
