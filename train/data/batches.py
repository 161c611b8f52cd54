"""Documents → rows of T tokens → batches. Which rows a step sees is a pure function of (seed, step).

So there is no iterator whose state a checkpoint would have to keep: a resumed run, on however many hosts, asks for its
next step and gets the rows that the uninterrupted run would have seen there.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import grain
import jax
import numpy as np

from qwen_moe_jax.rounding import ceil_div


@dataclass(frozen=True)
class Documents(Sequence):
    """Documents of token ids, each a piece of one long array, which may be a file that is mapped into memory.

    `learned` says of each token whether the model is to learn to write it; `starts` and `lengths` say where the
    documents are.
    """

    tokens: np.ndarray
    learned: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> np.ndarray:  # type: ignore[override]  # there are no slices of documents
        return self.tokens[self._span(number)]

    def learned_in(self, number: int) -> np.ndarray:
        """Which tokens of a document the model is to learn to write, bool."""
        return self.learned[self._span(number)]

    def select(self, chosen: np.ndarray) -> "Documents":
        """Those that are chosen by a mask or by their numbers."""
        return Documents(self.tokens, self.learned, self.starts[chosen], self.lengths[chosen])

    def _span(self, number: int) -> slice:
        return slice(self.starts[number], self.starts[number] + self.lengths[number])


def as_documents(arrays: Sequence[np.ndarray]) -> Documents:
    """Arrays of ids that are all to be learned."""
    lengths = np.array([len(array) for array in arrays], np.int64)
    tokens = np.concatenate([np.asarray(array) for array in arrays])
    return Documents(tokens, np.ones(len(tokens), bool), starts=np.cumsum(lengths) - lengths, lengths=lengths)


@dataclass(frozen=True)
class Row:
    """T tokens: int32 and, for `learned_T`, bool; see `Rows` for what they mean."""

    tokens_T: np.ndarray
    segment_ids_T: np.ndarray
    positions_T: np.ndarray
    learned_T: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What one step reads; int32 [B,T], and bool for the mask.

    `targets_BT` is the token after each one, `target_mask_BT` says where that token exists, belongs to the same
    document and is to be learned: not at the last token of a segment, not on padding, not before a word of the user's.
    """

    tokens_BT: np.ndarray | jax.Array
    segment_ids_BT: np.ndarray | jax.Array
    positions_BT: np.ndarray | jax.Array
    targets_BT: np.ndarray | jax.Array
    target_mask_BT: np.ndarray | jax.Array


@dataclass(frozen=True)
class Reference:
    """Where a row comes from: `rows[number]`, met for the `epoch`-th time (from 0)."""

    rows: "Rows"
    number: int
    epoch: int


class Rows:
    """Packed rows: documents laid end to end and cut every T tokens.

    A row may hold the end of one document and the beginning of the next: `segment_ids_T` numbers its documents 1, 2, …
    and is 0 on padding, which only the last row can have; `positions_T` counts from 0 within each segment. A document
    that is longer than a row goes on in the next one as a new segment. `learned_T` is that of `Documents`.

    A row is put together when it is asked for, so that the documents may be larger than this machine's memory.
    """

    def __init__(self, documents: Documents, seq_len: int, name: str) -> None:
        self.name = name
        self._documents, self._seq_len = documents, seq_len
        self._ends = np.cumsum(documents.lengths)  # in the text that all documents make, laid end to end
        self.num_tokens = int(self._ends[-1])

    def __len__(self) -> int:
        return ceil_div(self.num_tokens, self._seq_len)

    def __getitem__(self, number: int) -> Row:
        start, stop = number * self._seq_len, min((number + 1) * self._seq_len, self.num_tokens)
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

    def references(self, seed: int | str) -> grain.MapDataset:
        """Without end, a `Reference` to every row once an epoch, each epoch in an order of its own."""
        # Grain shuffles epoch e by seed + e: with seeds that are near each other, runs would share their epochs.
        scattered = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
        numbers = grain.MapDataset.range(len(self)).shuffle(seed=scattered)
        return numbers.map_with_index(lambda index, number: Reference(self, number, epoch=index // len(self)))


@dataclass(frozen=True)
class Mixture:
    """Rows of several sources, in proportion to their weights.

    Each source goes through epochs of its own: none of its rows comes twice before all have come once.
    """

    sources: Sequence[Rows]
    weights: Sequence[float]

    @property
    def num_tokens(self) -> int:
        """Of all sources together."""
        return sum(rows.num_tokens for rows in self.sources)

    def references(self, seed: int) -> grain.MapDataset:
        """Without end, a `Reference` to a row of one source or another; the shares are exact to a hundredth."""
        # Sources of one length need orders of their own, or their n-th rows would always come side by side.
        several = [rows.references(f"{seed}, source {number}") for number, rows in enumerate(self.sources)]
        return grain.MapDataset.mix(several, weights=list(self.weights))


def pack(documents: Sequence[np.ndarray], seq_len: int, name: str = "documents") -> Rows:
    """Lays documents of integer ids end to end in rows of `seq_len`; no token is lost, none appears twice.

    Args:
        documents: `Documents`, or arrays of ids that are all to be learned.
        name: what messages call them.
    """
    return Rows(documents if isinstance(documents, Documents) else as_documents(documents), seq_len, name)


def batch_at(rows: Rows | Mixture, step: int, batch_size: int, seed: int, part: Sequence[int] | None = None) -> Batch:
    """The batch of training step `step` (from 0), or those of its rows that `part` names.

    Every epoch goes through all rows once, in an order of its own; a batch may reach from one epoch into the next.
    """
    chosen = _references(rows, step, batch_size, seed)
    places = range(batch_size) if part is None else part
    return _batch([chosen[place].rows[chosen[place].number] for place in places])


def describe_batch(rows: Rows | Mixture, step: int, batch_size: int, seed: int) -> str:
    """What `batch_at` gives, for messages: `epoch 0 of books: rows 17, 4; epoch 2 of chats.jsonl: rows 5, 0`."""
    numbers: dict[str, list[str]] = {}
    for reference in _references(rows, step, batch_size, seed):
        numbers.setdefault(f"epoch {reference.epoch} of {reference.rows.name}", []).append(str(reference.number))
    return "; ".join(f"{source}: rows {', '.join(its_rows)}" for source, its_rows in numbers.items())


def rows_of_devices(devices: Collection[jax.Device], sharding: jax.sharding.Sharding, batch_size: int) -> list[int]:
    """Which rows of a batch of this size these devices hold, in their order: all that their process has to read."""
    held: set[int] = set()
    for device, (rows, *_) in sharding.devices_indices_map((batch_size, 1)).items():
        if device in devices:
            held.update(range(batch_size)[rows])
    return sorted(held)


def heldout_batches(
    rows: Rows | Mixture, num_rows: int, batch_size: int, part: Sequence[int] | None = None
) -> list[Batch]:
    """`num_rows` rows, in a mixture by weight, spread evenly over each source; of each batch those that `part` names.

    The last batch is filled with rows of padding, which count in nothing.
    """
    sources, weights = (rows.sources, rows.weights) if isinstance(rows, Mixture) else ([rows], [1.0])
    chosen = []
    for source, weight in zip(sources, weights, strict=True):
        share = max(1, round(num_rows * weight / sum(weights)))
        chosen += [source[int(number)] for number in np.linspace(0, len(source) - 1, min(share, len(source)))]
    empty = Row(*(np.zeros_like(field) for field in vars(chosen[0]).values()))
    chosen += [empty] * (-len(chosen) % batch_size)
    places = range(batch_size) if part is None else part
    return [_batch([chosen[start + place] for place in places]) for start in range(0, len(chosen), batch_size)]


def _references(rows: Rows | Mixture, step: int, batch_size: int, seed: int) -> list[Reference]:
    order = rows.references(seed)
    return [order[place] for place in range(step * batch_size, (step + 1) * batch_size)]


def _batch(rows: Sequence[Row]) -> Batch:
    tokens_BT, segment_ids_BT, positions_BT, learned_BT = (
        np.stack(fields) for fields in zip(*(vars(row).values() for row in rows), strict=True)
    )
    targets_BT = np.zeros_like(tokens_BT)
    targets_BT[:, :-1] = tokens_BT[:, 1:]
    target_mask_BT = np.zeros(tokens_BT.shape, bool)
    same_segment = (segment_ids_BT[:, :-1] == segment_ids_BT[:, 1:]) & (segment_ids_BT[:, :-1] > 0)
    target_mask_BT[:, :-1] = same_segment & learned_BT[:, 1:]
    return Batch(tokens_BT, segment_ids_BT, positions_BT, targets_BT, target_mask_BT)
