"""Reads the metrics.jsonl of a finished, running or interrupted run; `train.reporting.progress.Report` writes it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_moe_jax.errors import ConfigError

#: Kinds of work between steps; the record of each has `…_seconds`.
ASIDES = ("evaluation", "rollout", "sample", "checkpoint", "profile", "reference")


#: Keys of every record of a step, and of language modelling's.
_OF_EVERY_STEP = frozenset(
    "step finite loss z_loss balance_loss router_z mtp_loss mtp_balance_loss gradient_norm learning_rate dropped "
    "load_imbalance tokens learned_tokens step_seconds data_seconds tokens_per_second tokens_per_second_per_device "
    "mfu".split()
)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The records of a run by kind, each kind in order of steps; several `starts` where a run was resumed."""

    starts: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    completions: list[dict[str, Any]]
    asides: list[dict[str, Any]]

    @property
    def loss_term(self) -> str:
        """The key of the loss in the records of steps."""
        return self.starts[-1]["start"].get("loss_term", "cross_entropy")

    @property
    def captions(self) -> dict[str, str]:
        """Captions of the objective's terms."""
        return self.starts[-1]["start"].get("captions", {})

    @property
    def terms(self) -> list[str]:
        """Names of the objective's own numbers: in the records of steps, or held out, or both."""
        names = [key for record in self.steps[:1] + self.steps[-1:] for key in record if key not in _OF_EVERY_STEP]
        held = [key.removeprefix("heldout_") for record in self.heldout[-1:] for key in record if key != "step"]
        return [name for name in dict.fromkeys([*names, *held]) if name not in (self.loss_term, "loss")]

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
        completions=having("completions"),
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
