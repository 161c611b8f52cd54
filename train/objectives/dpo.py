"""Direct preference optimization (arXiv 2305.18290): a chosen completion becomes more probable than a rejected one.

The reference's log-probabilities are computed once, with the initial weights, before the first step, and stored with
the corpus. Under LoRA that is the base under the adapters, which are without effect then.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.model.output import TokenLosses
from train.config import DpoConfig, LossConfig, TrainConfig
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
from train.objectives.reference import ReferenceFeed
from train.objectives.router import resolve_router_losses, router_losses

_CAPTIONS = {
    "dpo_loss": "of the kind that dpo.loss_type names, mean over pairs",
    "rewards/chosen": "beta times the log-ratio of the chosen completion to the reference, in nats",
    "rewards/rejected": "the same of the rejected one",
    "rewards/accuracies": "share of pairs whose chosen completion has the larger reward",
    "rewards/margins": "reward of the chosen completion less that of the rejected one",
    "logps/chosen": "log-probability of the chosen completion, summed over its tokens",
    "logps/rejected": "the same of the rejected one",
}


@dataclass(frozen=True)
class Dpo:
    """The objective of `[dpo]`; see `train.objectives`."""

    settings: DpoConfig

    @property
    def description(self) -> Description:
        """See `Objective`."""
        return Description(
            name=f"direct preference optimization ({self.settings.loss_type})",
            table="dpo",
            model_class=CausalLM,
            loss="dpo_loss",
            shown=("rewards/accuracies", "rewards/margins"),
            captions=_CAPTIONS,
            sequences=2,
        )

    def load_corpus(self, folder: Path, config: TrainConfig) -> Corpus:
        """The pairs."""
        return load_pairs(folder, config)

    def feed(self, config: TrainConfig, corpus: Corpus, mesh: Mesh, sharding: NamedSharding) -> Feed:
        """The batches of pairs, with the reference's log-probabilities."""
        pairs = pair_feed(config, corpus, mesh, sharding)
        return pairs if self.settings.reference_free else ReferenceFeed.of(pairs, sum_log_probs)

    def abstract_batch(self, config: TrainConfig, model: ModelConfig) -> PairBatch:
        """The shapes of a batch."""
        return abstract_pairs(config)

    def model_config(self, model: ModelConfig, corpus: Corpus) -> ModelConfig:
        """The model's config as it is."""
        return model

    def resolve_loss(self, config: LossConfig, model: ModelConfig) -> LossConfig:
        """The settings of the routers' losses."""
        return resolve_router_losses(config, model)

    def whole_batch(self, batch: PairBatch, micro_batches: int) -> WholeBatch:
        """The counts of a batch."""
        return whole_pairs(batch, micro_batches)

    def forward(self, model: CausalLM, batch: PairBatch, noise_key: jax.Array | None = None) -> TokenLosses:
        """The losses of all tokens, float32 [R, T]."""
        return model.token_losses(
            rows_of(batch.tokens_P2T),
            rows_of(batch.targets_P2T),
            segment_ids=rows_of(batch.segment_ids_P2T),
            positions=rows_of(batch.positions_P2T),
            noise_key=noise_key,
        )

    def training_loss(self, out: TokenLosses, batch: PairBatch, whole: WholeBatch, config: LossConfig) -> Loss:
        """The mean loss over pairs plus the routers' losses."""
        terms_P = self._terms(out, batch)
        terms = {name: mean_over_pairs(x_P, batch, whole.examples) for name, x_P in terms_P.items()}
        router = router_losses(out.router, whole, config)
        return Loss(terms["dpo_loss"] + router.total, {**terms, **router.terms})

    def heldout_sum(self, out: TokenLosses, batch: PairBatch) -> dict[str, jax.Array]:
        """The sums of all terms over the pairs of a batch, and their number."""
        return sums_over_pairs(self._terms(out, batch), batch)

    def heldout_metrics(self, sums: Any) -> dict[str, float]:
        """The means over all pairs."""
        return means_over_pairs(sums, "dpo_loss")

    def _terms(self, out: TokenLosses, batch: PairBatch) -> dict[str, jax.Array]:
        """Loss, rewards and log-probabilities of each pair, float32 [P]."""
        log_probs_P2 = sum_log_probs(out, batch)
        lengths_P2 = jnp.sum(batch.target_mask_P2T, axis=2)
        ratios_P2 = log_probs_P2 - jax.lax.stop_gradient(batch.reference_P2)
        rewards_P2 = jax.lax.stop_gradient(self.settings.beta * ratios_P2)
        chosen_P, rejected_P = rewards_P2[:, 0], rewards_P2[:, 1]
        logps_P2 = jax.lax.stop_gradient(log_probs_P2)
        return {
            "dpo_loss": dpo_losses(ratios_P2, lengths_P2, self.settings),
            "rewards/chosen": chosen_P,
            "rewards/rejected": rejected_P,
            "rewards/accuracies": (chosen_P > rejected_P).astype(jnp.float32),
            "rewards/margins": chosen_P - rejected_P,
            "logps/chosen": logps_P2[:, 0],
            "logps/rejected": logps_P2[:, 1],
        }


def sum_log_probs(out: TokenLosses, batch: PairBatch) -> jax.Array:
    """The log-probability of each completion, the sum over its tokens, float32 [P, 2]."""
    losses_P2T = jnp.reshape(out.losses, batch.targets_P2T.shape)
    return -jnp.sum(losses_P2T, axis=2, where=batch.target_mask_P2T)


def dpo_losses(ratios_P2: jax.Array, lengths_P2: jax.Array, settings: DpoConfig) -> jax.Array:
    """The loss of each pair, as TRL computes it, float32 [P].

    Args:
        ratios_P2: log p(completion) less the reference's, of the chosen and the rejected one.
        lengths_P2: tokens of each completion.
        settings: with δ the difference of the two ratios: sigmoid is -log σ(βδ), with label smoothing ε
            -(1 - ε) log σ(βδ) - ε log σ(-βδ) (conservative DPO); robust (arXiv 2403.00409) is
            (-(1 - ε) log σ(βδ) + ε log σ(-βδ)) / (1 - 2ε); hinge is max(0, 1 - βδ); ipo (arXiv 2310.12036) is
            (δ' - 1 / 2β)², where δ' is the difference of the ratios' means over tokens.
    """
    beta, smoothing = settings.beta, settings.label_smoothing
    delta_P = ratios_P2[:, 0] - ratios_P2[:, 1]
    if settings.loss_type == "ipo":
        means_P2 = ratios_P2 / jnp.maximum(lengths_P2, 1)
        return (means_P2[:, 0] - means_P2[:, 1] - 1 / (2 * beta)) ** 2
    if settings.loss_type == "hinge":
        return jax.nn.relu(1 - beta * delta_P)
    right_P, wrong_P = -jax.nn.log_sigmoid(beta * delta_P), -jax.nn.log_sigmoid(-beta * delta_P)
    if settings.loss_type == "robust":
        return ((1 - smoothing) * right_P - smoothing * wrong_P) / (1 - 2 * smoothing)
    return (1 - smoothing) * right_P + smoothing * wrong_P
