"""The objective of a run, by the section that its config has."""

from train.config import TrainConfig
from train.objectives import language_modelling
from train.objectives.contract import Objective
from train.objectives.grpo import GRPO


def objective_of(config: TrainConfig) -> Objective:
    """The objective that the config's table chooses; language modelling without one."""
    if config.grpo is not None:
        return GRPO(config.grpo)
    return language_modelling
