"""Rows of T tokens → batches. Which rows a step sees is a pure function of (seed, step).

So a checkpoint needs no iterator state: a resumed run, on any number of hosts, reads at each step the rows that the
uninterrupted run would have read.
"""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np

from train.data.rows import Row, Source


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
