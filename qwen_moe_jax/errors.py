"""The named refusals of the package. Every message says what was found, what was expected and the way out."""

from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot mean anything, or means something this package does not do.

    Attributes:
        problems: the wrong fields (`config.checks.Problem`), where fields of a config are what is wrong.
    """

    problems: tuple[Any, ...] = ()


class CheckpointError(ValueError):
    """A checkpoint folder that is incomplete, damaged, or disagrees with its config."""


class ShardingError(ValueError):
    """A mesh or a sharding that does not fit the devices or the sizes."""


class RequestError(ValueError):
    """Tokens or a prompt that the model cannot take."""
