"""Reward models: a number for each text, larger for the chosen one of a pair (Bradley-Terry, as in TRL)."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.huggingface.labels import with_labels
from qwen_moe_jax.model.causal_lm import SequenceClassifier
from qwen_moe_jax.model.output import ModelOutput
from train.config import LossConfig, RewardModelConfig, TrainConfig
from train.data.corpus import Corpus
from train.data.examples import PairBatch
from train.data.feed import Feed
from train.objectives.contract import Description, Loss, WholeBatch
from train.objectives.pairs import (
    abstract_pairs,
    load_pairs,
    mean_over_pairs,
    means_over_pairs,
    pair_feed,
    rows_of,
    sums_over_pairs,
    whole_pairs,
)
from train.objectives.router import resolve_router_losses, router_losses


@dataclass(frozen=True)
class Reward:
    """The objective of `[reward]`; see `train.objectives`."""

    settings: RewardModelConfig

    @property
    def description(self) -> Description:
        """See `Objective`."""
        return Description(
            name="reward model",
            table="reward",
            model_class=SequenceClassifier,
            loss="reward_loss",
            shown=("accuracy", "margin"),
            captions={
                "reward_loss": "-log σ(reward of the chosen text - of the rejected one - margin), mean over pairs",
                "accuracy": "share of pairs whose chosen text has the larger reward",
                "margin": "reward of the chosen text less that of the rejected one",
                "mean_reward": "over both texts of all pairs",
            },
            sequences=2,
        )

    def load_corpus(self, folder: Path, config: TrainConfig) -> Corpus:
        """The pairs."""
        return load_pairs(folder, config)

    def feed(self, config: TrainConfig, corpus: Corpus, mesh: Mesh, sharding: NamedSharding) -> Feed:
        """The batches of pairs."""
        return pair_feed(config, corpus, mesh, sharding, corpus.pad_id)

    def abstract_batch(self, config: TrainConfig, model: ModelConfig) -> PairBatch:
        """The shapes of a batch."""
        return abstract_pairs(config)

    def model_config(self, model: ModelConfig, corpus: Corpus) -> ModelConfig:
        """With one label, and the token of padding by which transformers finds the last token of a text."""
        return dataclasses.replace(with_labels(model, 1), pad_token_id=corpus.pad_id)

    def resolve_loss(self, config: LossConfig, model: ModelConfig) -> LossConfig:
        """The settings of the routers' losses."""
        return resolve_router_losses(config, model)

    def whole_batch(self, batch: PairBatch, micro_batches: int) -> WholeBatch:
        """The counts of a batch."""
        return whole_pairs(batch, micro_batches)

    def forward(self, model: SequenceClassifier, batch: PairBatch, noise_key: jax.Array | None = None) -> ModelOutput:
        """The rewards of all texts, float32 [R, 1]."""
        tokens_RT, segment_ids_RT, positions_RT = map(
            rows_of, (batch.tokens_P2T, batch.segment_ids_P2T, batch.positions_P2T)
        )
        return model(tokens_RT, segment_ids_RT, positions_RT, noise_key=noise_key)

    def training_loss(self, out: ModelOutput, batch: PairBatch, whole: WholeBatch, config: LossConfig) -> Loss:
        """The mean loss over pairs plus the routers' losses."""
        terms = {name: mean_over_pairs(x_P, batch, whole.examples) for name, x_P in self._terms(out, batch).items()}
        router = router_losses(out.router, whole, config)
        return Loss(terms["reward_loss"] + router.total, {**terms, **router.terms})

    def heldout_sum(self, out: ModelOutput, batch: PairBatch) -> dict[str, jax.Array]:
        """The sums of all terms over the pairs of a batch, and their number."""
        return sums_over_pairs(self._terms(out, batch), batch)

    def heldout_metrics(self, sums: Any) -> dict[str, float]:
        """The means over all pairs."""
        return means_over_pairs(sums, "reward_loss")

    def _terms(self, out: ModelOutput, batch: PairBatch) -> dict[str, jax.Array]:
        """Of each pair, float32 [P]."""
        rewards_P2 = jnp.reshape(out.logits, (-1, 2))
        seen_P2 = jax.lax.stop_gradient(rewards_P2)
        chosen_P, rejected_P = seen_P2[:, 0], seen_P2[:, 1]
        return {
            "reward_loss": reward_losses(rewards_P2, batch.margin_P, self.settings.center_rewards_coefficient),
            "accuracy": (chosen_P > rejected_P).astype(jnp.float32),
            "margin": chosen_P - rejected_P,
            "mean_reward": (chosen_P + rejected_P) / 2,
        }


def reward_losses(rewards_P2: jax.Array, margin_P: jax.Array, center: float) -> jax.Array:
    """The loss of each pair, as TRL computes it: -log σ(chosen - rejected - margin) + center (chosen + rejected)²."""
    chosen_P, rejected_P = rewards_P2[:, 0], rewards_P2[:, 1]
    losses_P = -jax.nn.log_sigmoid(chosen_P - rejected_P - margin_P)
    return losses_P + center * (chosen_P + rejected_P) ** 2
