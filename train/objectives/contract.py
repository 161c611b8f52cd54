"""The types of an objective; `train/objectives/__init__.py` says what each function has to do."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh, NamedSharding

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.moe.stats import RouterStats
from train.config import LossConfig, TrainConfig
from train.data.corpus import Corpus
from train.data.feed import Feed


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the rest of the trainer has to know about an objective; it is constant.

    Attributes:
        name: in words, for the start of a run and its page.
        table: the TOML table that chooses it; "" is language modelling's.
        model_class: the model with its head.
        loss: the term of `LossTerms.terms` that progress lines and curves show as the loss.
        shown: further terms in progress lines.
        captions: of terms, for the page; those without one are drawn without.
        sequences: rows of T tokens in one example, of which a batch has `data.batch_size`.
    """

    name: str
    table: str
    model_class: type[Model]
    loss: str
    shown: tuple[str, ...] = ()
    captions: Mapping[str, str] = field(default_factory=dict)
    sequences: int = 1


class LossTerms(Protocol):
    """The losses of a micro-batch, a pytree: what is differentiated, and float32 scalars by their names in the metrics.

    The terms are without coefficients. Those of all micro-batches add up to those of the step.
    """

    @property
    def total(self) -> jax.Array: ...
    @property
    def terms(self) -> dict[str, jax.Array]: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Loss:
    """See `LossTerms`."""

    total: jax.Array
    terms: dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class WholeBatch:
    """Counts of the whole batch of a step, by which the sums over a micro-batch are divided; int32 scalars.

    Attributes:
        targets: real targets; a step without any changes nothing but the step number.
        tokens: real tokens.
        sequences: rows that hold a real token.
        micro_batches: the number of micro-batches.
        examples: real examples: pairs, labelled texts; 0 where the loss is a mean over targets.
        mtp_targets: those of the next-token head: of tokens whose successor has a real target.
        router: router counts of all micro-batches, where their load is balanced as one; None where each micro-batch is
            balanced on its own.
    """

    targets: jax.Array
    tokens: jax.Array
    sequences: jax.Array
    micro_batches: jax.Array
    examples: jax.Array | int = 0
    mtp_targets: jax.Array | int = 0
    router: RouterStats | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeldoutSum:
    """The summed loss (float32 scalar) over a number of targets (int32 scalar); sums of batches add up."""

    loss: jax.Array
    targets: jax.Array


class Objective(Protocol):
    """What a module of `train.objectives` offers, or an object that it makes from its table of the config.

    `Batch` is any pytree of arrays whose first axis is that of the examples.
    """

    @property
    def description(self) -> Description: ...

    # The data, on the host.
    def load_corpus(self, folder: Path, config: TrainConfig) -> Corpus: ...
    def feed(self, config: TrainConfig, corpus: Corpus, mesh: Mesh, sharding: NamedSharding) -> Feed: ...
    def abstract_batch(self, config: TrainConfig, model: ModelConfig) -> Any: ...

    # The model and its settings, before anything is compiled.
    def model_config(self, model: ModelConfig, corpus: Corpus) -> ModelConfig: ...
    def resolve_loss(self, config: LossConfig, model: ModelConfig) -> LossConfig: ...

    # In the compiled steps.
    def whole_batch(self, batch: Any, micro_batches: int) -> WholeBatch: ...
    def forward(self, model: Any, batch: Any, noise_key: jax.Array | None = None) -> Any: ...
    def training_loss(self, out: Any, batch: Any, whole: WholeBatch, config: LossConfig) -> LossTerms: ...
    def heldout_sum(self, out: Any, batch: Any) -> Any: ...

    # On the host again.
    def heldout_metrics(self, sums: Any) -> dict[str, float]: ...


def abstract(batch: Any) -> Any:
    """The shapes and dtypes of a batch of NumPy arrays, for `Objective.abstract_batch`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
