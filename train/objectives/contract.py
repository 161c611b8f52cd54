"""The types of an objective; `train/objectives/__init__.py` says what each function has to do."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.moe.stats import RouterStats
from train.config import LossConfig
from train.data.batches import Batch


class LossTerms(Protocol):
    """The losses of a micro-batch, float32 scalars: a registered dataclass with at least these fields.

    `total` is what is differentiated; the other terms are without their coefficients.
    """

    @property
    def total(self) -> jax.Array: ...
    @property
    def cross_entropy(self) -> jax.Array: ...
    @property
    def z(self) -> jax.Array: ...
    @property
    def balance(self) -> jax.Array: ...
    @property
    def router_z(self) -> jax.Array: ...
    @property
    def mtp(self) -> jax.Array: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class WholeBatch:
    """Counts of the whole batch of a step, by which the sums over a micro-batch are divided; int32 scalars.

    Attributes:
        targets: real targets.
        mtp_targets: those of the next-token head: of tokens whose successor has a real target.
        tokens: real tokens.
        sequences: rows that hold a real token.
        micro_batches: the number of micro-batches.
        router: router counts of all micro-batches, where their load is balanced as one; None where each micro-batch is
            balanced on its own.
    """

    targets: jax.Array
    mtp_targets: jax.Array
    tokens: jax.Array
    sequences: jax.Array
    micro_batches: jax.Array
    router: RouterStats | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeldoutSum:
    """The summed loss (float32 scalar) over a number of targets (int32 scalar); sums of batches add up."""

    loss: jax.Array
    targets: jax.Array


class Objective(Protocol):
    """The functions that a module of `train.objectives` offers."""

    def resolve_loss(self, config: LossConfig, model: ModelConfig) -> LossConfig: ...
    def whole_batch(self, batch: Batch, micro_batches: int) -> WholeBatch: ...
    def forward(self, model: CausalLM, batch: Batch, noise_key: jax.Array | None = None) -> Any: ...
    def training_loss(self, out: Any, batch: Batch, whole: WholeBatch, config: LossConfig) -> LossTerms: ...
    def heldout_sum(self, out: Any, batch: Batch) -> HeldoutSum: ...
