"""The batches of a run, sharded over its mesh: each process reads the rows that its own devices hold."""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding

from qwen_moe_jax.errors import ConfigError
from train.config import DataConfig
from train.data.batches import Batch, Mixture, Rows, batch_at, describe_batch, heldout_batches, pack, rows_of_devices
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
        notes: lines for the start of the run, one on every source of which rows are left out.
    """

    rows: Mixture
    heldout: list[Batch]
    batch_size: int
    seed: int
    sharding: NamedSharding
    own_rows: list[int]
    notes: list[str]

    def training(self, step: int) -> Batch:
        """The batch of a step (from 0), on its devices."""
        return _to_devices(batch_at(self.rows, step, self.batch_size, self.seed, self.own_rows), self.sharding)

    def describe(self, step: int) -> str:
        """The rows of the batch of a step (from 0), in words for messages."""
        return describe_batch(self.rows, step, self.batch_size, self.seed)


def make_feed(config: DataConfig, corpus: Corpus, mesh: Mesh, sharding: NamedSharding, seed: int) -> BatchFeed:
    """Packs the corpus into rows, leaves out those without a target, and reads the held-out ones.

    Raises:
        ConfigError: a source has no row with a target.
    """
    weights = [source.weight for source in config.mixture]
    packed = [pack(part.training, config.seq_len, part.name) for part in corpus.parts]
    training = [_with_targets(rows) for rows in packed]
    heldout_rows = [_with_targets(pack(part.heldout, config.seq_len, part.name)) for part in corpus.parts]
    rows = Mixture(training, weights)
    own_rows = rows_of_devices(mesh.local_devices, sharding, config.batch_size)
    heldout = heldout_batches(Mixture(heldout_rows, weights), config.heldout_rows, config.batch_size, own_rows)
    return BatchFeed(
        rows=rows,
        heldout=[_to_devices(batch, sharding) for batch in heldout],
        batch_size=config.batch_size,
        seed=seed,
        sharding=sharding,
        own_rows=own_rows,
        notes=[
            f"left out {1 - len(kept) / len(found):.1%} of the rows of {found.name} ({len(found) - len(kept):,} of "
            f"{len(found):,}), which have no token to learn"
            for found, kept in zip(packed, training, strict=True)
            if len(kept) < len(found)
        ],
    )


def _with_targets(rows: Rows) -> Rows:
    kept = rows.with_targets()
    if not len(kept):
        raise ConfigError(
            f"data: none of the {len(rows)} rows of {rows.name} has a token to learn: expected an answer of the "
            "assistant within data.seq_len tokens. Raise data.seq_len, or data.heldout_fraction if there are few rows."
        )
    return kept


def _to_devices(batch: Batch, sharding: NamedSharding) -> Batch:
    """The global arrays of a batch of which each process has its own rows."""
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
