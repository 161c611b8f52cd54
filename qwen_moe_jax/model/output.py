"""What a forward pass returns."""

import dataclasses

import jax

from qwen_moe_jax.moe.losses import RouterLosses
from qwen_moe_jax.moe.stats import RouterStats, RouterTrace


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterOutput:
    """What the routers of all sparse layers did.

    Attributes:
        stats: counts, stacked [L_sparse, …] in layer order.
        losses: unscaled auxiliary losses.
        trace: logits, chosen experts, weights and drops of every token, stacked likewise, where
            `output_router_logits` asked for it.
    """

    stats: RouterStats
    losses: RouterLosses
    trace: RouterTrace | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """What a model returns.

    Attributes:
        logits: float32; [B, T, V] of a CausalLM, [B, labels] of a SequenceClassifier, [B, T, labels] of a
            TokenClassifier.
        router: None where no layer is sparse.
        hidden_states: [L + 1, B, T, D], where `output_hidden_states` asked for them: what entered each layer, and
            the last layer's result after the final norm, as in transformers.
    """

    logits: jax.Array
    router: RouterOutput | None = None
    hidden_states: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """What `CausalLM.token_losses` returns.

    Attributes:
        losses: float32 [B, T]; -log p(target), in nats. Those of padding mean nothing.
        logsumexp: float32 [B, T]; of the logits of each token.
        router: None where no layer is sparse; its `trace` is None.
    """

    losses: jax.Array
    logsumexp: jax.Array
    router: RouterOutput | None = None
