"""The numbers of metrics.jsonl as TensorBoard's events (extra `tensorboard`)."""

from pathlib import Path
from typing import Any

import numpy as np


class Events:
    """Writes the records of a run as scalars under their own names."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Hides events of an earlier start after `first_step`."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0)

    def write(self, record: dict[str, Any]) -> None:
        """Writes a record of metrics.jsonl."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The scalars of a record; four for each layer: entropy, share of drops, rounds, largest load over the mean."""
    found = {key: value for key, value in record.items() if key != "step" and isinstance(value, int | float)}
    layers = record.get("layers")
    if layers is None:
        return found
    for layer, load_E in enumerate(np.asarray(layers["load"])):
        found[f"entropy/{layer}"] = layers["entropy"][layer]
        found[f"dropped/{layer}"] = layers["dropped"][layer] / max(int(load_E.sum()), 1)
        found[f"rounds/{layer}"] = layers["rounds"][layer]
        found[f"load_imbalance/{layer}"] = float(load_E.max() / max(load_E.mean(), 1e-9))
    return found
