"""Where the numbers of metrics.jsonl go besides: TensorBoard's events, Weights & Biases, Trackio (extras)."""

import hashlib
from importlib.util import find_spec
from typing import Any, Protocol

from qwen_moe_jax.errors import ConfigError
from train.config import RunConfig
from train.folder import RunFolder
from train.reporting.tensorboard import Events, scalars

#: The library of each tracker.
LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


class Tracker(Protocol):
    """Takes the records of a run; `train.reporting.tensorboard.Events` is one."""

    def write(self, record: dict[str, Any]) -> None:
        """Writes a record of metrics.jsonl."""

    def close(self) -> None:
        """Writes what is left."""


class Logged:
    """A run of wandb or trackio, which have the same `init`, `log` and `finish`.

    A run that is resumed goes on in the same one. What it had logged after its last checkpoint stays, where
    metrics.jsonl leaves it out.
    """

    def __init__(self, name: str, config: RunConfig, folder: RunFolder, start: dict[str, Any]) -> None:
        """`name` is that of the library; `start` are the numbers of the run's start."""
        path = folder.path.absolute()
        settings: dict[str, Any] = {"project": config.tracker_project, "name": path.name, "config": start}
        if name == "wandb":
            import wandb as library

            # A name need not be one run's alone; a folder is.
            settings["id"] = hashlib.sha256(str(path).encode()).hexdigest()[:16]
        else:
            import trackio as library
        self._library = library
        library.init(**settings, resume="allow")

    def write(self, record: dict[str, Any]) -> None:
        """Logs the scalars of a record at its step."""
        if found := scalars(record):
            self._library.log(found, step=record["step"])

    def close(self) -> None:
        """Ends the run."""
        self._library.finish()


def trackers(config: RunConfig, folder: RunFolder, start: dict[str, Any], *, first_step: int) -> list[Tracker]:
    """The trackers that a run asks for."""
    found: list[Tracker] = []
    for name in config.trackers:
        if name == "tensorboard":
            found.append(Events(folder.tensorboard, first_step=first_step))
        else:
            found.append(Logged(name, config, folder, start))
    return found


def require_trackers(config: RunConfig) -> None:
    """Checks for their libraries before the run begins.

    Raises:
        ConfigError: one is not installed.
    """
    for name in config.trackers:
        if find_spec(LIBRARIES[name]) is None:
            key, found = (
                ("tensorboard", "true") if config.tensorboard and name == "tensorboard" else ("report_to", name)
            )
            raise ConfigError(
                f"run.{key}: found {found}, and {LIBRARIES[name]} is not installed: pip install 'qwen-moe-jax[{name}]'."
            )
