"""What a forward pass returns."""

import dataclasses
from typing import Any

import jax

from qwen_moe_jax.model.cache import Cache
from qwen_moe_jax.moe.losses import RouterLosses
from qwen_moe_jax.moe.stats import RouterStats, RouterTrace
from qwen_moe_jax.sharding.positions import RowOrder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterOutput:
    """Statistics, losses and traces of all routers.

    Attributes:
        stats: counts, stacked [L_sparse, …] in layer order.
        losses: unscaled auxiliary losses.
        trace: logits, chosen experts, weights and drops of every token, stacked likewise, where
            `output_router_logits` asked for it; `model(…, replay=trace)` takes it back.
    """

    stats: RouterStats
    losses: RouterLosses
    trace: RouterTrace | None = None

    def first_rows(self, batch: int) -> "RouterOutput":
        """The same without the rows of padding that filled the mesh."""
        return dataclasses.replace(self, trace=jax.tree.map(lambda x: x[:, :batch], self.trace))

    def restored(self, order: RowOrder) -> "RouterOutput":
        """The same with tokens in the order of their rows."""
        return dataclasses.replace(self, trace=jax.tree.map(lambda x: order.restore(x, axis=2), self.trace))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """What a model returns.

    Attributes:
        logits: float32; [B, T, V] of a CausalLM, [B, labels] of a SequenceClassifier, [B, T, labels] of a
            TokenClassifier.
        router: None where no layer is sparse; with a cache, only where `output_router_logits` asked for it.
        hidden_states: [L + 1, B, T, D], where `output_hidden_states` asked for them: what entered each layer, and
            the last layer's result after the final norm, as in transformers.
        cache: with the new tokens in it, where the model was called with one.
    """

    logits: jax.Array
    router: RouterOutput | None = None
    hidden_states: jax.Array | None = None
    cache: Cache | None = None

    def first_rows(self, batch: int) -> "ModelOutput":
        """The same without the rows of padding that filled the mesh."""
        return dataclasses.replace(
            self,
            logits=self.logits[:batch],
            router=_first_rows(self.router, batch),
            hidden_states=None if self.hidden_states is None else self.hidden_states[:, :batch],
        )

    def restored(self, order: RowOrder) -> "ModelOutput":
        """The same with tokens in the order of their rows; logits of all tokens are those of this many."""
        of_all = self.logits is not None and self.logits.ndim == 3 and self.logits.shape[1] == order.padded
        return dataclasses.replace(
            self,
            logits=order.restore(self.logits) if of_all else self.logits,
            router=None if self.router is None else self.router.restored(order),
            hidden_states=None if self.hidden_states is None else order.restore(self.hidden_states, axis=2),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """What `CausalLM.token_losses` returns.

    Attributes:
        losses: float32 [B, T]; -log p(target), in nats. Those of padding have no meaning.
        logsumexp: float32 [B, T]; of the logits of each token.
        router: None where no layer is sparse; its `trace` is there where `output_router_logits` asked for it. It has no
            part of the next-token head.
        mtp_losses: float32 [B, T], where the next-token head's were asked for; -log p of the target of the token after
            each one. Those of a token without another after it in its segment have no meaning.
        mtp_router: what the next-token head's router did, likewise, stacked [1, …] as the stats of one sparse layer;
            None where the head is dense.
        entropy: float32 [B, T], where it was asked for; of the distribution of each token, in nats, without a gradient.
    """

    losses: jax.Array
    logsumexp: jax.Array
    router: RouterOutput | None = None
    mtp_losses: jax.Array | None = None
    mtp_router: RouterStats | None = None
    entropy: jax.Array | None = None

    def first_rows(self, batch: int) -> "TokenLosses":
        """The same without the rows of padding that filled the mesh."""
        return dataclasses.replace(
            self,
            losses=self.losses[:batch],
            logsumexp=self.logsumexp[:batch],
            router=_first_rows(self.router, batch),
            mtp_losses=None if self.mtp_losses is None else self.mtp_losses[:batch],
            entropy=None if self.entropy is None else self.entropy[:batch],
        )

    def restored(self, order: RowOrder) -> "TokenLosses":
        """The same with tokens in the order of their rows."""
        tokens = dataclasses.replace(self, router=None, mtp_router=None)
        router = None if self.router is None else self.router.restored(order)
        return dataclasses.replace(jax.tree.map(order.restore, tokens), router=router, mtp_router=self.mtp_router)


def _first_rows(router: RouterOutput | None, batch: int) -> Any:
    return None if router is None else router.first_rows(batch)
