"""The labels of a classifier, which a config carries for the Hub: id2label, label2id and problem_type."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.huggingface.fields import freeze, thaw

_FIELDS = ("id2label", "label2id", "num_labels", "problem_type")


def with_labels(config: ModelConfig, labels: Sequence[str] | int, problem_type: str | None = None) -> ModelConfig:
    """A config of the same model with other labels.

    Args:
        config: of the model.
        labels: their names in the order of the logits; or their number, for names as transformers makes them.
        problem_type: how transformers computes the loss: single_label_classification, multi_label_classification or
            regression; None leaves it to the labels of its data.
    """
    count = labels if isinstance(labels, int) else len(labels)
    names = [f"LABEL_{number}" for number in range(count)] if isinstance(labels, int) else [*labels]
    fields = {name: value for name, value in thaw(config.hub_fields).items() if name not in _FIELDS}
    own: dict[str, Any] = {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        **({"problem_type": problem_type} if problem_type else {}),
    }
    return dataclasses.replace(config, num_labels=count, hub_fields=freeze(fields | own))


def label_names(config: ModelConfig) -> tuple[str, ...]:
    """The names of the labels in the order of the logits."""
    given = thaw(config.hub_fields).get("id2label") or {}
    return tuple(str(given.get(str(number), f"LABEL_{number}")) for number in range(config.num_labels))


def problem_type(config: ModelConfig) -> str | None:
    """How transformers computes the loss; None where the config does not say."""
    return thaw(config.hub_fields).get("problem_type")
