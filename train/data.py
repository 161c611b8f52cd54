"""Documents → rows of T tokens → batches. Plain NumPy; which rows a step sees is a pure function of (seed, step)."""

from dataclasses import dataclass

import jax
import numpy as np


@dataclass(frozen=True)
class Rows:
    """Packed rows: documents laid end to end and cut every T tokens.

    A row may hold the end of one document and the beginning of the next: `segment_ids_NT` numbers its documents 1, 2, …
    and is 0 on padding, which only the last row can have; `positions_NT` counts from 0 within each segment. A document
    that is longer than a row goes on in the next one as a new segment. All int32.
    """

    tokens_NT: np.ndarray
    segment_ids_NT: np.ndarray
    positions_NT: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens_NT)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What one step reads; int32 [B,T], and bool for the mask.

    `targets_BT` is the token after each one, `target_mask_BT` says where that token exists and belongs to the same
    document: not at the last token of a segment, not on padding.
    """

    tokens_BT: np.ndarray | jax.Array
    segment_ids_BT: np.ndarray | jax.Array
    positions_BT: np.ndarray | jax.Array
    targets_BT: np.ndarray | jax.Array
    target_mask_BT: np.ndarray | jax.Array


def pack(documents: list[np.ndarray], seq_len: int) -> Rows:
    """Lays documents of integer ids end to end in rows of `seq_len`; no token is lost, none appears twice."""
    lengths = [len(document) for document in documents]
    total = sum(lengths)
    num_rows = -(-total // seq_len)
    padding = num_rows * seq_len - total

    def to_rows(flat: np.ndarray) -> np.ndarray:
        return np.pad(flat, (0, padding)).reshape(num_rows, seq_len).astype(np.int32)

    tokens_NT = to_rows(np.concatenate([np.asarray(document) for document in documents]))
    document_NT = to_rows(np.repeat(np.arange(1, len(documents) + 1), lengths))  # 0 is padding

    columns = np.arange(seq_len)
    starts_NT = np.ones((num_rows, seq_len), bool)
    starts_NT[:, 1:] = document_NT[:, 1:] != document_NT[:, :-1]
    start_of_segment_NT = np.maximum.accumulate(np.where(starts_NT, columns, 0), axis=1)
    real_NT = document_NT > 0
    return Rows(
        tokens_NT=tokens_NT,
        segment_ids_NT=(np.cumsum(starts_NT, axis=1) * real_NT).astype(np.int32),
        positions_NT=((columns - start_of_segment_NT) * real_NT).astype(np.int32),
    )


def batch_at(rows: Rows, step: int, batch_size: int, seed: int) -> Batch:
    """The batch of training step `step` (from 0): no iterator, so a resumed run needs to remember nothing.

    Every epoch goes through all rows once, in an order of its own; a batch may reach from one epoch into the next.
    """
    return _batch(rows, np.concatenate([*rows_at(len(rows), step, batch_size, seed).values()]))


def rows_at(num_rows: int, step: int, batch_size: int, seed: int) -> dict[int, np.ndarray]:
    """The numbers of the rows that `batch_at` takes, by epoch (from 0), in their order."""
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), num_rows)
    chosen = {}
    for epoch in np.unique(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(num_rows)
        chosen[int(epoch)] = order[places[epochs == epoch]]
    return chosen


def heldout_batches(rows: Rows, num_rows: int, batch_size: int) -> list[Batch]:
    """`num_rows` rows spread evenly over all; the last batch is filled with rows of padding, which count in nothing."""
    chosen = np.linspace(0, len(rows) - 1, min(num_rows, len(rows))).astype(int)
    padding = -len(chosen) % batch_size
    padded = Rows(*(np.pad(field[chosen], ((0, padding), (0, 0))) for field in vars(rows).values()))
    return [_batch(padded, np.arange(start, start + batch_size)) for start in range(0, len(padded), batch_size)]


def _batch(rows: Rows, chosen: np.ndarray) -> Batch:
    tokens_BT, segment_ids_BT = rows.tokens_NT[chosen], rows.segment_ids_NT[chosen]
    targets_BT = np.zeros_like(tokens_BT)
    targets_BT[:, :-1] = tokens_BT[:, 1:]
    target_mask_BT = np.zeros(tokens_BT.shape, bool)
    target_mask_BT[:, :-1] = (segment_ids_BT[:, :-1] == segment_ids_BT[:, 1:]) & (segment_ids_BT[:, :-1] > 0)
    return Batch(tokens_BT, segment_ids_BT, rows.positions_NT[chosen], targets_BT, target_mask_BT)
