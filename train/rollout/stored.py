"""The rollout that a checkpoint was taken in the middle of, stored for the run that goes on from there."""

import os
from dataclasses import fields
from pathlib import Path

import numpy as np

from qwen_moe_jax.errors import CheckpointError
from train.rollout.batch import RolloutBatch


class StoredRollouts:
    """A folder with the batches of checkpoints after which more steps learn from the same rollout.

    Args:
        folder: `rollouts` in the run's folder.
        checkpoints: the folder of checkpoints, each in a folder named by its step.
    """

    def __init__(self, folder: Path, checkpoints: Path) -> None:
        self._folder, self._checkpoints = folder, checkpoints
        self._latest: int | None = None  # its checkpoint may still be on its way to the disk

    def save(self, step: int, batch: RolloutBatch) -> None:
        """Writes the batch of the checkpoint of a step, and deletes those of checkpoints that are gone.

        Args:
            step: finished steps.
            batch: all rows, on the host.

        Raises:
            OSError: it cannot be written.
        """
        self._folder.mkdir(exist_ok=True)
        for file in self._folder.glob("*.npz"):
            if file.stem != str(self._latest) and not (self._checkpoints / file.stem).exists():
                file.unlink()
        arrays = {field.name: getattr(batch, field.name) for field in fields(batch)}
        partial = self._folder / f".{step}.partial"
        with partial.open("wb") as opened:
            np.savez(opened, **{name: array for name, array in arrays.items() if array is not None})
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, self._path(step))
        self._latest = step

    def load(self, step: int) -> RolloutBatch:
        """The batch of the checkpoint of a step.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        try:
            with np.load(self._path(step)) as arrays:
                return RolloutBatch(**{name: arrays[name] for name in arrays.files})
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise CheckpointError(
                f"{self._path(step)}: the rollout that the checkpoint of step {step} learns from cannot be read "
                f"({error}). Go on from an earlier checkpoint by deleting {self._checkpoints / str(step)}, or start "
                "anew with --fresh."
            ) from None

    def _path(self, step: int) -> Path:
        return self._folder / f"{step}.npz"
