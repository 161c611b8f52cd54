"""The config of a run: a short TOML file, checked as a whole, with `--section.key value` laid over it.

`sections` and `columns` have the config classes that belong to training, `run_config` the whole of a run. `load` reads
a file, `validate` checks it (by pydantic, which is imported only there), `toml` writes a config and compares two,
`help` describes the keys, `renamed` lists those that are refused.
"""

from train.config.columns import ColumnsConfig
from train.config.grpo import GRPOConfig, RewardConfig
from train.config.help import describe_keys, key_options
from train.config.load import build_config, load_config, split_overrides
from train.config.objectives import ClassificationConfig, DistillationConfig, DpoConfig, RewardModelConfig
from train.config.run_config import OBJECTIVE_TABLES, SECTIONS, TRAINER_DEFAULTS, TrainConfig
from train.config.sections import (
    FORMATS,
    DataConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    TextConfig,
)
from train.config.toml import differences, to_toml

__all__ = [
    "FORMATS",
    "OBJECTIVE_TABLES",
    "SECTIONS",
    "TRAINER_DEFAULTS",
    "ClassificationConfig",
    "ColumnsConfig",
    "DataConfig",
    "DistillationConfig",
    "DpoConfig",
    "GRPOConfig",
    "LossConfig",
    "MeshConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RunConfig",
    "SourceConfig",
    "TextConfig",
    "TrainConfig",
    "build_config",
    "describe_keys",
    "differences",
    "key_options",
    "load_config",
    "split_overrides",
    "to_toml",
]
