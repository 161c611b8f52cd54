"""Rows of one example each, padded to T tokens, and the feed of their batches.

Letters of this file: `K` documents of an example, `P` examples of a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qwen_moe_jax.errors import ConfigError
from train.config import TrainConfig
from train.data.batches import Mixture, rows_of_devices
from train.data.corpus import Corpus
from train.data.documents import AnyDocuments
from train.data.feed import BatchFeed, feed_of
from train.data.parts import Part

Array = Any
"""NumPy's on the host, JAX's on devices."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExampleRow:
    """One example: arrays [K, T], with zeros as padding, and its numbers.

    Attributes:
        tokens_KT: int32.
        real_KT: whether there is a token, bool.
        learned_KT: whether it is learned, bool.
        labels_KT: int32; -100 (ignored) where the objective labels no tokens, and on padding.
        numbers: of the example, by name.
    """

    tokens_KT: np.ndarray
    real_KT: np.ndarray
    learned_KT: np.ndarray
    labels_KT: np.ndarray
    numbers: dict[str, np.ndarray] = field(default_factory=dict)


class Examples:
    """The examples of one source; see `train.data.batches.Source`."""

    def __init__(
        self, documents: AnyDocuments, per_example: int, numbers: dict[str, np.ndarray], seq_len: int, name: str
    ) -> None:
        """`numbers` are arrays [examples, …]; `per_example` is K."""
        self.name, self.numbers = name, numbers
        self._documents, self._per_example, self._seq_len = documents, per_example, seq_len

    @property
    def num_tokens(self) -> int:
        """The tokens of all examples, without padding."""
        return sum(int(np.minimum(block.lengths, self._seq_len).sum()) for block in self._documents.blocks())

    def __len__(self) -> int:
        return len(self._documents) // self._per_example

    def __getitem__(self, number: int) -> ExampleRow:
        wanted = range(number * self._per_example, (number + 1) * self._per_example)
        row = blank_row(self._per_example, self._seq_len)
        for k, document in enumerate(wanted):
            tokens = self._documents[document][: self._seq_len]
            row.tokens_KT[k, : len(tokens)] = tokens
            row.real_KT[k, : len(tokens)] = True
            row.learned_KT[k, : len(tokens)] = self._documents.learned_in(document)[: self._seq_len]
            if self._documents.labelled:
                row.labels_KT[k, : len(tokens)] = self._documents.labels_in(document)[: self._seq_len]
        row.numbers.update({name: values[number] for name, values in self.numbers.items()})
        return row


def blank_row(per_example: int, seq_len: int) -> ExampleRow:
    """An example of padding, without numbers."""
    shape = (per_example, seq_len)
    return ExampleRow(
        np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, bool), np.full(shape, -100, np.int32)
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairBatch:
    """The batch of one step of an objective that compares two documents, the better one first: arrays [P, 2, T].

    Attributes:
        tokens_P2T: int32, the input ids.
        segment_ids_P2T: int32, 1 and on padding 0.
        positions_P2T: int32, from 0.
        targets_P2T: int32, the token after each one.
        target_mask_P2T: bool, whether the target belongs to the completion.
        margin_P: float32, how much better the chosen one is.
        reference_P2: float32, the sum of log-probabilities of each completion under the reference, in nats.
    """

    tokens_P2T: Array
    segment_ids_P2T: Array
    positions_P2T: Array
    targets_P2T: Array
    target_mask_P2T: Array
    margin_P: Array
    reference_P2: Array


def pair_batch(rows: Sequence[ExampleRow], pad_id: int = 0) -> PairBatch:
    """The batch of these pairs; `pad_id` is the token of padding."""
    tokens, real, learned = (
        np.stack([getattr(row, name) for row in rows]) for name in ("tokens_KT", "real_KT", "learned_KT")
    )
    following = np.zeros_like(tokens)
    following[..., :-1] = tokens[..., 1:]
    target_mask = np.zeros_like(real)
    target_mask[..., :-1] = learned[..., 1:] & real[..., :-1]
    no_reference = np.zeros(2, np.float32)
    return PairBatch(
        tokens_P2T=np.where(real, tokens, pad_id).astype(np.int32),
        segment_ids_P2T=real.astype(np.int32),
        positions_P2T=positions_of(real),
        targets_P2T=following,
        target_mask_P2T=target_mask,
        margin_P=np.array([row.numbers.get("margin", 0.0) for row in rows], np.float32),
        reference_P2=np.stack([row.numbers.get("reference", no_reference) for row in rows]).astype(np.float32),
    )


def positions_of(real: np.ndarray) -> np.ndarray:
    """Positions [..., T] of the tokens of rows that are padded on the right, 0 on padding."""
    return np.where(real, np.arange(real.shape[-1]), 0).astype(np.int32)


def example_rows(part: Part, seq_len: int, *, heldout: bool) -> Examples:
    """The training or the held-out examples of a part."""
    documents = part.heldout if heldout else part.training
    numbers = part.heldout_numbers if heldout else part.training_numbers
    return Examples(documents, part.documents, numbers, seq_len, part.name)


def example_feed(
    config: TrainConfig,
    corpus: Corpus,
    mesh: Mesh,
    sharding: NamedSharding,
    collate: Callable[[Sequence[Any]], Any],
) -> BatchFeed:
    """The feed of the examples of all sources.

    Raises:
        ConfigError: a source, or what is held out, has no example.
    """
    data = config.data
    training = [example_rows(part, data.seq_len, heldout=False) for part in corpus.parts]
    heldout = [example_rows(part, data.seq_len, heldout=True) for part in corpus.heldout_parts]
    for rows, kind in [*((rows, "training") for rows in training), *((rows, "held-out") for rows in heldout)]:
        if not len(rows):
            raise ConfigError(f"data: found no {kind} example of {rows.name}, expected at least 1.")
    weights = corpus.heldout_weights([source.weight for source in data.mixture])
    seed = config.run.seed
    return feed_of(training, Mixture(heldout, weights), data, mesh, sharding, seed, notes=[], collate=collate)


def batches_in_order(
    rows: Examples, batch_size: int, mesh: Mesh, sharding: NamedSharding, collate: Callable[[Sequence[Any]], Any]
) -> list[Callable[[], Any]]:
    """Functions that make one batch each, of this process's rows: all examples in order, the last batch filled up."""
    own_rows = rows_of_devices(mesh.local_devices, sharding, batch_size)
    blank = jax.tree.map(np.zeros_like, rows[0])

    def batch(first: int) -> Any:
        numbers = [first + number for number in own_rows]
        return collate([rows[number] if number < len(rows) else blank for number in numbers])

    return [lambda first=first: batch(first) for first in range(0, len(rows), batch_size)]  # type: ignore[misc]
