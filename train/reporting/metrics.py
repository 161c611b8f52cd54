"""Reads the metrics.jsonl of a finished, running or interrupted run; `train.reporting.progress.Report` writes it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_moe_jax.errors import ConfigError

#: Kinds of work between steps; the record of each has `…_seconds`.
ASIDES = ("evaluation", "sample", "checkpoint", "profile")


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The records of a run by kind, each kind in order of steps; several `starts` where a run was resumed."""

    starts: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    asides: list[dict[str, Any]]

    @property
    def timed_steps(self) -> list[dict[str, Any]]:
        """The steps without those that compiled, the first of every start."""
        compiled = {start["step"] + 1 for start in self.starts}
        return [record for record in self.steps if record["step"] not in compiled]


def read_metrics(file: Path) -> Metrics:
    """The records of a run.

    Raises:
        ConfigError: there is no such file, or it holds no training step yet.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file; the folder of a run holds one.")
    records = read_records(file)

    def having(*keys: str) -> list[dict[str, Any]]:
        return [record for record in records if any(key in record for key in keys)]

    metrics = Metrics(
        starts=having("start"),
        steps=having("loss"),
        layers=having("layers"),
        heldout=having("heldout_loss"),
        samples=having("sample"),
        asides=having(*(f"{name}_seconds" for name in ASIDES)),
    )
    if not (metrics.starts and metrics.steps):
        raise ConfigError(f"{file}: it holds no training step yet.")
    return metrics


def read_records(file: Path) -> list[dict[str, Any]]:
    """All complete lines; the last line may be incomplete, while it is written or after the run was killed."""
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
