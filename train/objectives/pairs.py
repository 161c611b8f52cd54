"""What the objectives that compare two texts share: their data, their rows and the counts of a batch.

Letters of this file: `P` pairs, `R` rows of T tokens, two to a pair.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from train.config import TrainConfig
from train.data.corpus import Corpus, load_corpus
from train.data.examples import PairBatch, blank_row, example_feed, pair_batch
from train.data.feed import BatchFeed
from train.data.pairs import PAIRS
from train.objectives.contract import WholeBatch, abstract


def load_pairs(folder: Path, config: TrainConfig) -> Corpus:
    """The pairs of the run in `folder`, made there at its first start."""
    return load_corpus(folder, config.data, PAIRS)


def pair_feed(config: TrainConfig, corpus: Corpus, mesh: Mesh, sharding: NamedSharding, pad_id: int = 0) -> BatchFeed:
    """The batches of padded pairs."""
    return example_feed(config, corpus, mesh, sharding, partial(pair_batch, pad_id=pad_id))


def abstract_pairs(config: TrainConfig) -> PairBatch:
    """The shapes of a batch."""
    return abstract(pair_batch([blank_row(2, config.data.seq_len)] * config.data.batch_size))


def rows_of(x_P2T: jax.Array) -> jax.Array:
    """[P, 2, …] to [R, …]: the rows of a pair stay neighbours, and on their device."""
    return jnp.reshape(x_P2T, (-1, *x_P2T.shape[2:]))


def real_pairs(batch: PairBatch) -> jax.Array:
    """Whether there is a pair, bool [P]; False in batches that are filled up."""
    return jnp.any(batch.segment_ids_P2T > 0, axis=(1, 2))


def whole_pairs(batch: PairBatch, micro_batches: int) -> WholeBatch:
    """The counts of a batch of pairs."""
    real_P2T = batch.segment_ids_P2T > 0
    return WholeBatch(
        targets=jnp.sum(batch.target_mask_P2T, dtype=jnp.int32),
        tokens=jnp.sum(real_P2T, dtype=jnp.int32),
        sequences=jnp.sum(jnp.any(real_P2T, axis=2), dtype=jnp.int32),
        micro_batches=jnp.int32(micro_batches),
        examples=jnp.sum(real_pairs(batch), dtype=jnp.int32),
    )


def sums_over_pairs(terms_P: dict[str, jax.Array], batch: PairBatch) -> dict[str, jax.Array]:
    """The sum of each term over the real pairs, float32 scalars, and the number of these pairs."""
    sums = {name: mean_over_pairs(x_P, batch, 1) for name, x_P in terms_P.items()}
    return {**sums, "pairs": jnp.sum(real_pairs(batch), dtype=jnp.int32)}


def means_over_pairs(sums: dict[str, jax.Array], loss: str) -> dict[str, float]:
    """The means from `sums_over_pairs`, the term that is minimised under the name "loss"."""
    means = {name: float(value / sums["pairs"]) for name, value in sums.items() if name != "pairs"}
    return {"loss": means.pop(loss), **means}


def mean_over_pairs(x_P: jax.Array, batch: PairBatch, count: jax.Array | int) -> jax.Array:
    """The sum over the real pairs divided by a count of them, that of the whole batch: float32 scalar."""
    return jnp.sum(x_P.astype(jnp.float32), where=real_pairs(batch)) / jnp.maximum(count, 1)
