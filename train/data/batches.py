"""Documents → rows of T tokens → batches. Which rows a step sees is a pure function of (seed, step).

So a checkpoint needs no iterator state: a resumed run, on any number of hosts, reads at each step the rows that the
uninterrupted run would have read.
"""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import jax
import numpy as np

from qwen_moe_jax.rounding import ceil_div
from train.data.documents import AnyDocuments, Documents, ShardedDocuments, as_documents


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

    A row is built on access: memory holds no row, and of documents in shards the index of a few.
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
        tokens, learned = zip(*self._documents.pieces(start, stop), strict=True)
        lengths = [len(piece) for piece in tokens]

        def to_row(pieces: Sequence[np.ndarray], dtype: type) -> np.ndarray:
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
    if not isinstance(documents, Documents | ShardedDocuments):
        documents = as_documents(documents)
    return Rows(documents, seq_len, name)


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
