"""The batches of a run, sharded over its mesh: each process reads the rows that its own devices hold."""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding

from train.config import DataConfig
from train.data.batches import Batch, Mixture, batch_at, describe_batch, heldout_batches, pack, rows_of_devices
from train.data.corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class BatchFeed:
    """The training batch of each step, and the held-out batches.

    Attributes:
        rows: the training rows of all sources.
        heldout: the batches of the held-out loss, on their devices.
        batch_size: rows of a batch on all devices together, B.
        seed: of the order of the rows.
        sharding: of the arrays [B,T] of a batch.
        own_rows: the rows of a batch that this process reads.
    """

    rows: Mixture
    heldout: list[Batch]
    batch_size: int
    seed: int
    sharding: NamedSharding
    own_rows: list[int]

    def training(self, step: int) -> Batch:
        """The batch of a step (from 0), on its devices."""
        return _to_devices(batch_at(self.rows, step, self.batch_size, self.seed, self.own_rows), self.sharding)

    def describe(self, step: int) -> str:
        """The rows of the batch of a step (from 0), in words for messages."""
        return describe_batch(self.rows, step, self.batch_size, self.seed)


def make_feed(config: DataConfig, corpus: Corpus, mesh: Mesh, sharding: NamedSharding, seed: int) -> BatchFeed:
    """Packs the corpus into rows and reads the held-out ones."""
    weights = [source.weight for source in config.mixture]
    rows = Mixture([pack(part.training, config.seq_len, part.name) for part in corpus.parts], weights)
    heldout_rows = Mixture([pack(part.heldout, config.seq_len, part.name) for part in corpus.parts], weights)
    own_rows = rows_of_devices(mesh.local_devices, sharding, config.batch_size)
    heldout = heldout_batches(heldout_rows, config.heldout_rows, config.batch_size, own_rows)
    return BatchFeed(
        rows=rows,
        heldout=[_to_devices(batch, sharding) for batch in heldout],
        batch_size=config.batch_size,
        seed=seed,
        sharding=sharding,
        own_rows=own_rows,
    )


def _to_devices(batch: Batch, sharding: NamedSharding) -> Batch:
    """The global arrays of a batch of which each process has its own rows."""
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
