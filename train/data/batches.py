"""Documents → rows of T tokens → batches. Which rows a step sees is a pure function of (seed, step).

So a checkpoint needs no iterator state: a resumed run, on any number of hosts, reads at each step the rows that the
uninterrupted run would have read.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import jax
import numpy as np

from qwen_moe_jax.rounding import ceil_div


@dataclass(frozen=True)
class Documents(Sequence):
    """Documents of token ids, each a slice of one long array, which may be a memory-mapped file.

    Attributes:
        tokens: the ids of all documents, integer [total].
        learned: whether a token is a target of the loss, bool [total].
        starts, lengths: the slice of each document, int64 [documents].
        fully_learned: whether every token is known to be a target; False where `learned` says it.
        labels: of every token, int32 [total], where the objective labels tokens.
    """

    tokens: np.ndarray
    learned: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    fully_learned: bool = False
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> np.ndarray:  # type: ignore[override]  # there are no slices of documents
        return self.tokens[self._span(number)]

    def learned_in(self, number: int) -> np.ndarray:
        """Whether each token of a document is a target of the loss, bool."""
        return self.learned[self._span(number)]

    def labels_in(self, number: int) -> np.ndarray:
        """The label of each token of a document, int32."""
        return self.labels[self._span(number)]

    def select(self, chosen: np.ndarray) -> "Documents":
        """The documents that a mask or an array of numbers selects."""
        return dataclasses.replace(self, starts=self.starts[chosen], lengths=self.lengths[chosen])

    def _span(self, number: int) -> slice:
        return slice(self.starts[number], self.starts[number] + self.lengths[number])


def as_documents(arrays: Sequence[np.ndarray]) -> Documents:
    """Documents of arrays of ids, all of which are targets of the loss."""
    lengths = np.array([len(array) for array in arrays], np.int64)
    tokens = np.concatenate([np.asarray(array) for array in arrays])
    learned = np.ones(len(tokens), bool)
    return Documents(tokens, learned, starts=np.cumsum(lengths) - lengths, lengths=lengths, fully_learned=True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Row:
    """T tokens: int32 arrays [T] and the bool array `learned_T`, as described in `Rows`."""

    tokens_T: np.ndarray
    segment_ids_T: np.ndarray
    positions_T: np.ndarray
    learned_T: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """The batch of one step: int32 arrays [B,T], and a bool mask.

    Attributes:
        tokens_BT: the input ids.
        segment_ids_BT: the document of each token within its row, from 1; 0 is padding.
        positions_BT: positions within the segment, from 0.
        targets_BT: the token after each one.
        target_mask_BT: whether the target exists, belongs to the same document and is learned: False at the last token
            of a segment, on padding, and before tokens that the assistant did not write.
    """

    tokens_BT: np.ndarray | jax.Array
    segment_ids_BT: np.ndarray | jax.Array
    positions_BT: np.ndarray | jax.Array
    targets_BT: np.ndarray | jax.Array
    target_mask_BT: np.ndarray | jax.Array


@dataclass(frozen=True)
class Reference:
    """A row, `rows[number]`, in an epoch (from 0)."""

    rows: "Source"
    number: int
    epoch: int


class Source(Protocol):
    """What a batch is put together from: numbered rows, each a dataclass of arrays of the same shapes."""

    @property
    def name(self) -> str: ...
    @property
    def num_tokens(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Any: ...


class Rows:
    """Packed rows: the documents are concatenated and split every T tokens.

    A row may hold the end of one document and the beginning of the next: `segment_ids_T` numbers its documents 1, 2, …
    and is 0 on padding, which only the last row can have; `positions_T` counts from 0 within each segment. A document
    that is longer than a row goes on in the next one as a new segment. `learned_T` is that of `Documents`.

    A row is built on access, so that the documents may be larger than host memory.
    """

    def __init__(self, documents: Documents, seq_len: int, name: str, numbers: np.ndarray | None = None) -> None:
        """`numbers` selects some of the rows; None is all of them."""
        self.name = name
        self._numbers = numbers
        self._documents, self._seq_len = documents, seq_len
        self._ends = np.cumsum(documents.lengths)  # offsets in the concatenation of all documents
        self._total = int(self._ends[-1])

    @property
    def num_tokens(self) -> int:
        """The tokens of all rows, without padding."""
        if self._numbers is None:
            return self._total
        padding = len(self._all) * self._seq_len - self._total if len(self._all) - 1 in self._numbers else 0
        return len(self._numbers) * self._seq_len - padding

    @property
    def _all(self) -> range:
        return range(ceil_div(self._total, self._seq_len))

    def __len__(self) -> int:
        return len(self._all) if self._numbers is None else len(self._numbers)

    def __getitem__(self, number: int) -> Row:
        if self._numbers is not None:
            number = int(self._numbers[number])
        start, stop = number * self._seq_len, min((number + 1) * self._seq_len, self._total)
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        tokens, learned, lengths = [], [], []
        for document in range(first, last + 1):
            begins = self._ends[document] - self._documents.lengths[document]
            piece = slice(max(start - begins, 0), stop - begins)
            tokens.append(self._documents[document][piece])
            learned.append(self._documents.learned_in(document)[piece])
            lengths.append(len(tokens[-1]))

        def to_row(pieces: list[np.ndarray], dtype: type) -> np.ndarray:
            return np.pad(np.concatenate(pieces).astype(dtype), (0, self._seq_len - (stop - start)))

        return Row(
            tokens_T=to_row(tokens, np.int32),
            segment_ids_T=to_row([np.full(length, segment) for segment, length in enumerate(lengths, 1)], np.int32),
            positions_T=to_row([np.arange(length) for length in lengths], np.int32),
            learned_T=to_row(learned, bool),
        )

    def with_targets(self) -> "Rows":
        """The rows that have a target: a learned token that is not the first of its segment.

        Returns:
            These rows themselves, where all have one.
        """
        has_target = np.cumsum(self._changes())[:-1] > 0
        if has_target.all():
            return self
        return Rows(self._documents, self._seq_len, self.name, np.flatnonzero(has_target))

    def _changes(self) -> np.ndarray:
        """Differences, from row to row, of the number of runs of targets; int64 [rows + 1]."""
        documents, changes = self._documents, np.zeros(len(self._all) + 1, np.int64)
        starts = self._ends - documents.lengths
        if documents.fully_learned:
            self._add_runs(changes, starts, self._ends, starts)
            return changes
        for number, start in enumerate(starts):
            edges = np.flatnonzero(np.diff(np.concatenate([[False], documents.learned_in(number), [False]])))
            self._add_runs(changes, start + edges[::2], start + edges[1::2], start)
        return changes

    def _add_runs(self, changes: np.ndarray, starts: np.ndarray, ends: np.ndarray, document_starts: np.ndarray) -> None:
        """Adds runs of learned tokens [start, end), counted from the first token of all documents.

        The first token of a document is no target, and neither is the first of a row.
        """
        first = np.maximum(starts, document_starts + 1)
        first += first % self._seq_len == 0
        rows, last_rows = first // self._seq_len, (ends - 2) // self._seq_len  # a row needs its second token, too
        holds = (first < ends) & (rows <= last_rows)
        np.add.at(changes, rows[holds], 1)
        np.add.at(changes, last_rows[holds] + 1, -1)


def references(rows: Source, seed: int | str) -> grain.MapDataset:
    """An endless sequence of `Reference`s: every row once an epoch, each epoch in another order."""
    # Grain shuffles epoch e by seed + e: without the hash, runs with neighbouring seeds would share epochs.
    hashed = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
    numbers = grain.MapDataset.range(len(rows)).shuffle(seed=hashed)
    return numbers.map_with_index(lambda index, number: Reference(rows, number, epoch=index // len(rows)))


@dataclass(frozen=True)
class Mixture:
    """Rows of several sources, in proportion to their weights.

    Each source has its own epochs: none of its rows is repeated before all were read once.
    """

    sources: Sequence[Source]
    weights: Sequence[float]

    @property
    def num_rows(self) -> int:
        """The rows of all sources."""
        return sum(map(len, self.sources))

    @property
    def num_tokens(self) -> int:
        """The tokens of all sources."""
        return sum(rows.num_tokens for rows in self.sources)

    def references(self, seed: int) -> grain.MapDataset:
        """An endless sequence of `Reference`s to rows of the sources; the shares are exact to a hundredth."""
        # Sources of equal length need different orders, or their n-th rows would always be neighbours.
        several = [references(rows, f"{seed}, source {number}") for number, rows in enumerate(self.sources)]
        return grain.MapDataset.mix(several, weights=list(self.weights))


def pack(documents: Sequence[np.ndarray], seq_len: int, name: str = "documents") -> Rows:
    """Packs documents of integer ids into rows of `seq_len`; every token is in exactly one row.

    Args:
        documents: `Documents`, or arrays of ids, all of which are targets of the loss.
        name: of the source, for messages.
    """
    return Rows(documents if isinstance(documents, Documents) else as_documents(documents), seq_len, name)


def batch_of(rows: Sequence[Row]) -> Batch:
    """The batch of these packed rows."""
    tokens_BT, segment_ids_BT, positions_BT, learned_BT = (
        np.stack(fields) for fields in zip(*(vars(row).values() for row in rows), strict=True)
    )
    targets_BT = np.zeros_like(tokens_BT)
    targets_BT[:, :-1] = tokens_BT[:, 1:]
    target_mask_BT = np.zeros(tokens_BT.shape, bool)
    same_segment = (segment_ids_BT[:, :-1] == segment_ids_BT[:, 1:]) & (segment_ids_BT[:, :-1] > 0)
    target_mask_BT[:, :-1] = same_segment & learned_BT[:, 1:]
    return Batch(tokens_BT, segment_ids_BT, positions_BT, targets_BT, target_mask_BT)


def blank_batch(batch_size: int, seq_len: int) -> Batch:
    """A batch of padding."""
    zeros = np.zeros(seq_len, np.int32)
    return batch_of([Row(zeros, zeros, zeros, np.zeros(seq_len, bool))] * batch_size)


def batch_at(
    rows: Source | Mixture,
    step: int,
    batch_size: int,
    seed: int,
    part: Sequence[int] | None = None,
    collate: Callable[[Sequence[Any]], Any] = batch_of,
) -> Any:
    """The batch of training step `step` (from 0), or the rows of it whose numbers are in `part`.

    Every epoch reads all rows once, in an order of its own; a batch may span the end of an epoch. `collate` makes a
    batch of rows.
    """
    chosen = _references(rows, step, batch_size, seed)
    numbers = range(batch_size) if part is None else part
    return collate([chosen[number].rows[chosen[number].number] for number in numbers])


def describe_batch(rows: Source | Mixture, step: int, batch_size: int, seed: int) -> str:
    """The rows of `batch_at`, for messages: `epoch 0 of books: rows 17, 4; epoch 2 of chats.jsonl: rows 5, 0`."""
    numbers: dict[str, list[str]] = {}
    for reference in _references(rows, step, batch_size, seed):
        numbers.setdefault(f"epoch {reference.epoch} of {reference.rows.name}", []).append(str(reference.number))
    return "; ".join(f"{source}: rows {', '.join(its_rows)}" for source, its_rows in numbers.items())


def rows_of_devices(devices: Collection[jax.Device], sharding: jax.sharding.Sharding, batch_size: int) -> list[int]:
    """The rows of a batch that these devices hold, in order: those that their process has to read."""
    held: set[int] = set()
    for device, (rows, *_) in sharding.devices_indices_map((batch_size, 1)).items():
        if device in devices:
            held.update(range(batch_size)[rows])
    return sorted(held)


def heldout_batches(
    rows: Source | Mixture,
    num_rows: int,
    batch_size: int,
    part: Sequence[int] | None = None,
    collate: Callable[[Sequence[Any]], Any] = batch_of,
) -> list[Any]:
    """`num_rows` held-out rows, evenly spread over each source and, in a mixture, by weight.

    `part` are the rows of each batch that are returned.

    The last batch is filled with rows of padding, which have no targets.
    """
    sources, weights = (rows.sources, rows.weights) if isinstance(rows, Mixture) else ([rows], [1.0])
    chosen = []
    for source, weight in zip(sources, weights, strict=True):
        share = max(1, round(num_rows * weight / sum(weights)))
        chosen += [source[int(number)] for number in np.linspace(0, len(source) - 1, min(share, len(source)))]
    empty = jax.tree.map(np.zeros_like, chosen[0])
    chosen += [empty] * (-len(chosen) % batch_size)
    numbers = range(batch_size) if part is None else part
    return [collate([chosen[start + number] for number in numbers]) for start in range(0, len(chosen), batch_size)]


def _references(rows: Source | Mixture, step: int, batch_size: int, seed: int) -> list[Reference]:
    order = rows.references(seed) if isinstance(rows, Mixture) else references(rows, seed)
    return [order[index] for index in range(step * batch_size, (step + 1) * batch_size)]
