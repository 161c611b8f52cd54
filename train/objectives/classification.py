"""Classification: a label for each text, several, a number, or a label for each word. Losses are transformers'.

Letters of this file: `L` labels.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.labels import label_names, problem_type, with_labels
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.model.causal_lm import SequenceClassifier, TokenClassifier
from qwen_moe_jax.model.output import ModelOutput
from train.config import ClassificationConfig, LossConfig, TrainConfig
from train.data.corpus import Corpus, load_corpus
from train.data.examples import Array, ExampleRow, blank_row, example_feed, positions_of
from train.data.feed import Feed
from train.data.labels import (
    IGNORED,
    MOST_LABELS,
    MULTI,
    REGRESSION,
    SINGLE,
    Labels,
    ProblemType,
    labelled_kind,
    sorted_names,
)
from train.objectives.contract import Description, Loss, WholeBatch, abstract
from train.objectives.router import resolve_router_losses, router_losses


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LabelBatch:
    """The batch of one step.

    Attributes:
        tokens_BT, segment_ids_BT, positions_BT: int32 [B, T], one text a row, padded on the right.
        labels: int32 [B], the number of the label; with several labels, or a number, float32 [B, L]; of tokens, int32
            [B, T], -100 where there is none.
    """

    tokens_BT: Array
    segment_ids_BT: Array
    positions_BT: Array
    labels: Array


@dataclass(frozen=True)
class Classification:
    """The objective of `[classification]`; see `train.objectives`."""

    settings: ClassificationConfig

    @property
    def description(self) -> Description:
        """See `Objective`."""
        of_tokens = self.settings.level == "token"
        return Description(
            name=f"classification of {'words' if of_tokens else 'texts'}",
            table="classification",
            model_class=TokenClassifier if of_tokens else SequenceClassifier,
            loss="classification_loss",
            shown=("accuracy",),
            captions={
                "classification_loss": "cross entropy, or by problem_type binary cross entropy or squared error",
                "accuracy": "share that has the right label; of several labels, of all",
                "macro_f1": "mean over the labels of the F1 score",
            },
        )

    def load_corpus(self, folder: Path, config: TrainConfig) -> Corpus:
        """The labelled texts."""
        return load_corpus(folder, config.data, labelled_kind(self.settings))

    def feed(self, config: TrainConfig, corpus: Corpus, mesh: Mesh, sharding: NamedSharding) -> Feed:
        """The batches of padded texts."""
        labels = Labels(**corpus.summary)
        collate = partial(label_batch, labels=labels, names=self._names(labels), pad_id=corpus.pad_id)
        return example_feed(config, corpus, mesh, sharding, collate)

    def abstract_batch(self, config: TrainConfig, model: ModelConfig) -> LabelBatch:
        """The shapes of a batch."""
        labels = Labels(self._problem_type(model), label_names(model))
        row = blank_row(1, config.data.seq_len)
        if self.settings.level == "sequence":
            several: Any = np.zeros(MOST_LABELS // 8, np.uint8)
            row.numbers["label"] = several if labels.problem_type == MULTI else np.array(0, np.int32)
        rows = [row] * config.data.batch_size
        return abstract(label_batch(rows, labels, labels.names, 0))

    def model_config(self, model: ModelConfig, corpus: Corpus) -> ModelConfig:
        """With the labels of the data, and the token of padding by which transformers finds the last token of a text.

        Raises:
            ConfigError: there is one label only; or the model classifies already, and has the same labels in another
                order.
        """
        labels = Labels(**corpus.summary)
        names, known = self._names(labels), label_names(model)
        if len(names) < 2 and labels.problem_type != REGRESSION:
            raise ConfigError(f"data: found the label {', '.join(names)} alone, expected at least 2 different ones.")
        if names != known and set(names) == set(known):
            raise ConfigError(
                f"classification.labels: found none, and the model has the labels {', '.join(known)} in this order: "
                f"expected it to be given, classification.labels = [{', '.join(map(repr, known))}]."
            )
        return dataclasses.replace(with_labels(model, names, labels.problem_type), pad_token_id=corpus.pad_id)

    def resolve_loss(self, config: LossConfig, model: ModelConfig) -> LossConfig:
        """The settings of the routers' losses."""
        return resolve_router_losses(config, model)

    def whole_batch(self, batch: LabelBatch, micro_batches: int) -> WholeBatch:
        """The counts of a batch; a target is a text, or a word with a label."""
        real_BT = batch.segment_ids_BT > 0
        rows = jnp.sum(jnp.any(real_BT, axis=1), dtype=jnp.int32)
        of_tokens = self.settings.level == "token"
        return WholeBatch(
            targets=jnp.sum(batch.labels != IGNORED, dtype=jnp.int32) if of_tokens else rows,
            tokens=jnp.sum(real_BT, dtype=jnp.int32),
            sequences=rows,
            micro_batches=jnp.int32(micro_batches),
            examples=rows,
        )

    def forward(self, model: Model, batch: LabelBatch, noise_key: jax.Array | None = None) -> ModelOutput:
        """The logits, float32 [B, L], or [B, T, L] of tokens."""
        return model(batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, noise_key=noise_key)

    def training_loss(self, out: ModelOutput, batch: LabelBatch, whole: WholeBatch, config: LossConfig) -> Loss:
        """The mean loss over the targets plus the routers' losses."""
        sums = self.heldout_sum(out, batch)
        targets = jnp.maximum(whole.targets, 1)
        terms = {"classification_loss": sums["loss"] / targets}
        if "right" in sums:
            terms["accuracy"] = sums["right"] / targets
        router = router_losses(out.router, whole, config)
        return Loss(terms["classification_loss"] + router.total, {**terms, **router.terms})

    def heldout_sum(self, out: ModelOutput, batch: LabelBatch) -> dict[str, jax.Array]:
        """The sums over a batch: `loss` over `targets`, and what the metrics of its kind are made of.

        Those are, of labels, `right` and `counts` int32 [L, 3] (of each label: found rightly, found, expected); of a
        number, `distance`, the absolute error.
        """
        real = batch.labels != IGNORED if self.settings.level == "token" else jnp.any(batch.segment_ids_BT > 0, axis=1)
        logits, labels = out.logits, batch.labels
        targets = jnp.sum(real, dtype=jnp.int32)
        if labels.ndim == logits.ndim and self._is_number(logits):
            losses = jnp.mean((logits - labels) ** 2, axis=-1)
            distance = jnp.sum(jnp.abs(logits - labels)[..., 0], where=real)
            return {"loss": jnp.sum(losses, where=real), "targets": targets, "distance": distance}
        if labels.ndim == logits.ndim:
            losses = jnp.mean(jax.nn.softplus(logits) - labels * logits, axis=-1)
            found, expected = logits > 0, labels > 0.5
        else:
            known = jnp.where(real, labels, 0)
            expected = jax.nn.one_hot(known, logits.shape[-1], dtype=bool)
            losses = -jnp.sum(jax.nn.log_softmax(logits), axis=-1, where=expected)
            found = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
        found, expected = found & real[..., None], expected & real[..., None]
        right = jnp.all(found == expected, axis=-1) & real
        axes = tuple(range(real.ndim))
        counts = [jnp.sum(one, axis=axes, dtype=jnp.int32) for one in (found & expected, found, expected)]
        return {
            "loss": jnp.sum(losses, where=real),
            "targets": targets,
            "right": jnp.sum(right, dtype=jnp.int32),
            "counts": jnp.stack(counts, axis=-1),
        }

    def heldout_metrics(self, sums: Any) -> dict[str, float]:
        """Loss, accuracy and macro F1; of a number, loss (the mean squared error) and mean absolute error."""
        metrics = {"loss": float(sums["loss"] / sums["targets"])}
        if "distance" in sums:
            return {**metrics, "mean_absolute_error": float(sums["distance"] / sums["targets"])}
        return {**metrics, "accuracy": float(sums["right"] / sums["targets"]), "macro_f1": macro_f1(sums["counts"])}

    def _names(self, labels: Labels) -> tuple[str, ...]:
        return self.settings.labels or sorted_names(labels.names)

    def _problem_type(self, model: ModelConfig) -> ProblemType:
        return self.settings.problem_type or problem_type(model) or SINGLE

    def _is_number(self, logits: jax.Array) -> bool:
        return logits.shape[-1] == 1


def macro_f1(counts_L3: np.ndarray) -> float:
    """The mean of the F1 scores of the labels that occur, found or expected, as scikit-learn's `average="macro"`.

    Args:
        counts_L3: of each label, how often it was found rightly, found, and expected.
    """
    right, found, expected = np.asarray(counts_L3, float).T
    occurs = found + expected > 0
    return float(np.mean(2 * right[occurs] / (found + expected)[occurs])) if occurs.any() else 0.0


def label_batch(rows: Sequence[ExampleRow], labels: Labels, names: Sequence[str], pad_id: int) -> LabelBatch:
    """The batch of these texts.

    Args:
        rows: of one document each.
        labels: those of the corpus.
        names: in the order of the logits.
        pad_id: the token of padding.
    """
    tokens, real, of_tokens = (
        np.stack([getattr(row, name)[0] for row in rows]) for name in ("tokens_KT", "real_KT", "labels_KT")
    )
    # The label of each number of the corpus, in the order of the logits; IGNORED, the last, stays what it is.
    number_of = {name: number for number, name in enumerate(names)}
    order = np.array([*(number_of[name] for name in labels.names), IGNORED], np.int32)
    given = [row.numbers["label"] for row in rows if "label" in row.numbers]
    found: Any
    if labels.problem_type == REGRESSION:
        found = np.array(given, np.float32)[:, None]
    elif labels.problem_type == MULTI:
        found = np.zeros((len(rows), len(names)), np.float32)
        found[:, order[:-1]] = np.unpackbits(np.stack(given), axis=1)[:, : len(labels.names)]
    elif given:
        found = order[np.array(given, np.int32)]
    else:
        found = order[np.where(real & (of_tokens != IGNORED), of_tokens, len(labels.names))]
    return LabelBatch(
        tokens_BT=np.where(real, tokens, pad_id).astype(np.int32),
        segment_ids_BT=real.astype(np.int32),
        positions_BT=positions_of(real),
        labels=found,
    )
