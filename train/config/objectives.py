"""The sections of a TOML file that choose an objective, one frozen dataclass each; their fields have the field's names.

A file has one of them at most (`OBJECTIVE_TABLES`); without one the run is language modelling.
"""

import math
from dataclasses import dataclass
from typing import Literal

from qwen_moe_jax.config.checks import Checks
from train.config.sections import ABOVE_ZERO, NOT_NEGATIVE


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """A classifier: one label for each text, several, a number, or a label for each word.

    Attributes:
        level: sequence (of {"text" or "prompt" or "messages", "label"}) or token (of {"tokens", "labels"}: words).
        problem_type: transformers' name: single_label_classification, multi_label_classification or regression; left
            out, by the labels of the data: names or integers, lists of them, or numbers with a point.
        labels: names of the labels in the order of the logits; left out, those of the training data, sorted.
    """

    level: Literal["sequence", "token"] = "sequence"
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check.literals()
            check(len(set(self.labels)) == len(self.labels), "labels", "different names")
            check(len(self.labels) != 1, "labels", "at least 2 names, or none")
            single = self.problem_type in (None, "single_label_classification")
            expected = "single_label_classification, or none, with level token"
            check(self.level == "sequence" or single, "problem_type", expected, given=("level",))
            expected = "none with problem_type regression: a number has no name"
            check(not self.labels or self.problem_type != "regression", "labels", expected, given=("problem_type",))


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """A reward model: one number for each text, larger for the chosen one of a pair (Bradley-Terry).

    Attributes:
        center_rewards_coefficient: weight of the mean squared sum of a pair's rewards, which keeps them around zero.
    """

    center_rewards_coefficient: float = 0.0

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check(0 <= self.center_rewards_coefficient < math.inf, "center_rewards_coefficient", NOT_NEGATIVE)


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """Direct preference optimization: the chosen one of a pair becomes more probable than the rejected one.

    Attributes:
        beta: how near the model stays to the reference: a larger value is nearer.
        loss_type: sigmoid (DPO), ipo, hinge (SLiC) or robust (of labels of which a share is wrong), as TRL has them.
        label_smoothing: with sigmoid and robust, the share of pairs that are taken to be the wrong way round.
        reference_free: take a reference under which all completions are equally probable, instead of the initial model.
    """

    beta: float = 0.1
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    label_smoothing: float = 0.0
    reference_free: bool = False

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check.literals()
            check(0 < self.beta < math.inf, "beta", ABOVE_ZERO)
            check(0 <= self.label_smoothing < 0.5, "label_smoothing", "at least 0 and less than 0.5")
            smooth = self.loss_type in ("sigmoid", "robust") or not self.label_smoothing
            expected = f"0 with loss_type {self.loss_type}: it belongs to sigmoid and robust"
            check(smooth, "label_smoothing", expected, given=("loss_type",))


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Distillation: the model learns the distributions of a teacher over the next token.

    Attributes:
        teacher: a checkpoint with the same tokenizer, a folder or a name on the Hub; it is loaded onto the same mesh.
        top_k: of the teacher's distribution, the most probable tokens that are compared one by one; all others are
            compared as one.
        divergence: forward_kl, of the teacher from the model, or reverse_kl, of the model from the teacher.
        temperature: by which the logits of both are divided; the loss is multiplied by its square.
        cross_entropy_coef: share of the cross entropy of the text in the loss, 0 to 1.
    """

    teacher: str
    top_k: int = 64
    divergence: Literal["forward_kl", "reverse_kl"] = "forward_kl"
    temperature: float = 1.0
    cross_entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check.literals()
            check.at_least(1, "top_k")
            check(self.teacher != "", "teacher", "a checkpoint")
            check(0 < self.temperature < math.inf, "temperature", ABOVE_ZERO)
            check(0 <= self.cross_entropy_coef <= 1, "cross_entropy_coef", "a number from 0 to 1")
