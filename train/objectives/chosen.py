"""The objective of a run, by the section that its config has."""

from train.config import TrainConfig
from train.objectives import language_modelling
from train.objectives.classification import Classification
from train.objectives.contract import Objective
from train.objectives.distillation import Distillation
from train.objectives.dpo import Dpo
from train.objectives.grpo import GRPO
from train.objectives.reward import Reward


def objective_of(config: TrainConfig) -> Objective:
    """The objective that the config's table chooses; language modelling without one."""
    if config.grpo is not None:
        return GRPO(config.grpo)
    if config.classification is not None:
        return Classification(config.classification)
    if config.reward is not None:
        return Reward(config.reward)
    if config.dpo is not None:
        return Dpo(config.dpo)
    if config.distillation is not None:
        return Distillation(config.distillation)
    return language_modelling
