"""GRPO: completions that the model samples are made likelier or less likely by their rewards (arXiv 2402.03300)."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.model.output import TokenLosses
from qwen_moe_jax.moe.replay import packed_dtype
from train.config import GRPOConfig, LossConfig, TrainConfig
from train.data.corpus import Corpus
from train.data.feed import Feed
from train.objectives.contract import Description, HeldoutSum, Loss, WholeBatch
from train.objectives.policy_gradient import PolicyLoss, policy_loss
from train.objectives.router import resolve_router_losses, router_losses
from train.rollout.batch import RolloutBatch
from train.rollout.corpus import PromptCorpus, load_prompts

_DESCRIPTION = Description(
    name="GRPO",
    table="grpo",
    model_class=CausalLM,
    loss="policy_loss",
    shown=("reward", "entropy"),
    captions={
        "policy_loss": "of clipped ratios times advantages; its gradient counts, not its height",
        "reward": "the mean of a rollout's completions",
        "reward_std": "of the completions of a prompt, the mean over prompts: 0 teaches nothing",
        "prompts_without_spread": "share of the prompts all of whose completions have the same reward",
        "completion_length": "tokens, the mean of a rollout's completions",
        "completions_truncated": "share of the completions that reached their largest length without an end",
        "rewards_failed": "calls of reward functions that raised, hung or died, and count as 0",
        "entropy": "of the distributions that completions are sampled from, nats per token",
        "sampling_kl": "KL(sampled ‖ trained), nats per token: 0 in the first step on a rollout but for rounding",
        "kl": "KL(trained ‖ reference), nats per token",
        "clipped_low": "share of the ratios below the lower bound, with a negative advantage",
        "clipped_high": "share of the ratios above the upper bound, with a positive advantage",
        "routing_difference": "share of the experts of the rollout that the routers would not choose in the step",
        "rollout_tokens_per_second": "sampled tokens, all devices",
    },
)


@dataclass(frozen=True)
class GRPO:
    """The objective of a run with a [grpo] table; see `train.objectives`."""

    config: GRPOConfig

    @property
    def description(self) -> Description:
        """See `Objective`."""
        return _DESCRIPTION

    def load_corpus(self, folder: Path, config: TrainConfig) -> PromptCorpus:
        """The prompts of the run in `folder`, made there at its first start."""
        return load_prompts(folder, config)

    def feed(self, config: TrainConfig, corpus: Corpus, mesh: Mesh, sharding: NamedSharding) -> Feed:
        """The rollouts."""
        from train.rollout.feed import RolloutFeed  # which reads how a run starts, and that imports this module

        assert isinstance(corpus, PromptCorpus)
        return RolloutFeed(config, corpus, mesh, sharding)

    def abstract_batch(self, config: TrainConfig, model: ModelConfig) -> RolloutBatch:
        """The shapes of a batch."""

        def rows(dtype: type | np.dtype, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((config.data.batch_size, *shape), dtype)

        integers, floats = rows(jnp.int32, config.data.seq_len), rows(jnp.float32, config.data.seq_len)
        experts = None
        if model.num_sparse_layers:
            moe, shape = model.moe, (config.data.seq_len, model.num_sparse_layers)
            experts = rows(packed_dtype(moe.num_experts), *shape, moe.num_experts_per_tok)
        return RolloutBatch(
            tokens_BT=integers,
            positions_BT=integers,
            segment_ids_BT=integers,
            targets_BT=integers,
            target_mask_BT=rows(jnp.bool_, config.data.seq_len),
            log_probs_BT=floats,
            advantages_B=rows(jnp.float32),
            experts_BTLA=experts,
            reference_log_probs_BT=floats if self.config.beta else None,
        )

    def model_config(self, model: ModelConfig, corpus: Corpus) -> ModelConfig:
        """The model's config, which the objective does not change."""
        return model

    def resolve_loss(self, config: LossConfig, model: ModelConfig) -> LossConfig:
        """The settings of the routers' losses with the model's coefficient filled in."""
        return resolve_router_losses(config, model)

    def whole_batch(self, batch: RolloutBatch, micro_batches: int) -> WholeBatch:
        """The counts of a batch, which need no forward pass."""
        token_mask_BT = batch.segment_ids_BT > 0
        return WholeBatch(
            targets=jnp.sum(batch.target_mask_BT, dtype=jnp.int32),
            tokens=jnp.sum(token_mask_BT, dtype=jnp.int32),
            sequences=jnp.sum(jnp.any(token_mask_BT, axis=1), dtype=jnp.int32),
            micro_batches=jnp.int32(micro_batches),
        )

    def forward(self, model: CausalLM, batch: RolloutBatch, noise_key: jax.Array | None = None) -> TokenLosses:
        """The losses of all targets at the temperature of sampling; with replay, under the experts of the rollout."""
        return model.token_losses(
            batch.tokens_BT,
            batch.targets_BT,
            segment_ids=batch.segment_ids_BT,
            positions=batch.positions_BT,
            noise_key=noise_key,
            replay=batch.experts_LBTA if self.config.routing_replay else None,
            temperature=self.config.temperature,
            entropy=True,
            output_router_logits=True,
        )

    def training_loss(self, out: TokenLosses, batch: RolloutBatch, whole: WholeBatch, config: LossConfig) -> Loss:
        """The policy loss, plus the losses of the routers; see `policy_loss`."""
        policy = policy_loss(
            -out.losses,
            batch.log_probs_BT,
            batch.reference_log_probs_BT,
            batch.advantages_B,
            batch.target_mask_BT,
            self._policy_loss,
            tokens=whole.targets,
            sequences=whole.sequences,
        )
        router = router_losses(out.router, whole, config)
        targets, mask_BT = jnp.maximum(whole.targets, 1), batch.target_mask_BT
        # k3 of http://joschu.net/blog/kl-approx.html, which is never negative.
        log_ratio_BT = jnp.where(mask_BT, jax.lax.stop_gradient(-out.losses) - batch.log_probs_BT, 0)
        terms = {
            "policy_loss": policy.loss,
            "entropy": jnp.sum(out.entropy, where=mask_BT) / targets,
            "sampling_kl": jnp.sum(jnp.expm1(log_ratio_BT) - log_ratio_BT) / targets,
            "clipped_low": policy.clipped_low,
            "clipped_high": policy.clipped_high,
            **({"kl": policy.kl} if self.config.beta else {}),
            **router.terms,
        }
        if batch.experts_BTLA is not None:
            terms["routing_difference"] = routing_difference(out, batch) / jnp.maximum(whole.tokens, 1)
        return Loss(total=policy.loss + router.total, terms=terms)

    def heldout_sum(self, out: TokenLosses, batch: RolloutBatch) -> HeldoutSum:
        """The summed -log p of the completions, in nats, and their tokens."""
        mask_BT = batch.target_mask_BT
        return HeldoutSum(loss=jnp.sum(out.losses, where=mask_BT), targets=jnp.sum(mask_BT, dtype=jnp.int32))

    def heldout_metrics(self, sums: HeldoutSum) -> dict[str, float]:
        """The mean -log p per token, in nats."""
        return {"loss": float(sums.loss / sums.targets)}

    @property
    def _policy_loss(self) -> PolicyLoss:
        config = self.config
        return PolicyLoss(
            loss_type=config.loss_type,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
            beta=config.beta,
            importance_sampling_level=config.importance_sampling_level,
            use_bias_correction_kl=config.use_bias_correction_kl,
            max_completion_length=config.max_completion_length,
        )


def routing_difference(out: TokenLosses, batch: RolloutBatch) -> jax.Array:
    """The share of the rollout's experts that the present routers would not choose, summed over the tokens."""
    used_LBTA = jnp.asarray(batch.experts_LBTA, jnp.int32)
    assert out.router is not None and out.router.trace is not None
    # As `moe.router.route` does: float32 probabilities, of equal ones the lower expert. Comparisons instead of top_k,
    # which would gather the tokens of all devices.
    probs_LBTE = jax.nn.softmax(out.router.trace.logits.astype(jnp.float32), axis=-1)
    used_LBTAE = used_LBTA[..., None] == jnp.arange(probs_LBTE.shape[-1], dtype=jnp.int32)
    own_LBTA1 = jnp.sum(jnp.where(used_LBTAE, probs_LBTE[..., None, :], 0), axis=-1, keepdims=True)
    before_LBTAE = jnp.arange(probs_LBTE.shape[-1], dtype=jnp.int32) < used_LBTA[..., None]
    others_LBT1E = probs_LBTE[..., None, :]
    stronger_LBTAE = (others_LBT1E > own_LBTA1) | ((others_LBT1E == own_LBTA1) & before_LBTAE)
    rank_LBTA = jnp.sum(stronger_LBTAE, axis=-1)
    share_BT = jnp.mean(rank_LBTA >= used_LBTA.shape[-1], axis=(0, 3), dtype=jnp.float32)
    return jnp.sum(share_BT, where=batch.segment_ids_BT > 0)
