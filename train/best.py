"""The best evaluation of a run by `run.metric_for_best_model`, and whether the run is to end early."""

from collections.abc import Mapping
from pathlib import Path

from qwen_moe_jax.errors import ConfigError
from train.config import RunConfig
from train.reporting.metrics import read_records


class Best:
    """Remembers the held-out metrics of a run; those of step 0, of the model that is not trained yet, do not count.

    Attributes:
        step: of the best evaluation so far; None before the first.
        metrics: of that evaluation.
    """

    def __init__(self, config: RunConfig) -> None:
        self._name = config.metric_for_best_model.removeprefix("heldout_")
        greater = config.greater_is_better
        self._greater = not self._name.endswith("loss") if greater is None else greater
        self._patience = config.early_stopping_patience
        self._since = 0  # evaluations since the best
        self.step: int | None = None
        self.metrics: Mapping[str, float] = {}

    def add(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Takes an evaluation; whether it is the best so far.

        Raises:
            ConfigError: it has no metric of the configured name.
        """
        if self._name not in metrics:
            raise ConfigError(
                f"run.metric_for_best_model: found {self._name!r}, expected one of the held-out metrics of this run: "
                f"{', '.join(metrics)}."
            )
        if step == 0:
            return False
        new, old = metrics[self._name], self.metrics.get(self._name)
        if old is None or (new > old if self._greater else new < old):
            self.step, self.metrics, self._since = step, metrics, 0
            return True
        self._since += 1
        return False

    @property
    def stops(self) -> bool:
        """Whether the run ends here (`run.early_stopping_patience`)."""
        return self._patience is not None and self._since >= self._patience


def best_so_far(config: RunConfig, metrics_file: Path, first_step: int) -> Best | None:
    """That of a run which goes on after `first_step`, from its metrics.jsonl; None without a metric to compare."""
    if not config.metric_for_best_model:
        return None
    best = Best(config)
    for record in read_records(metrics_file) if first_step else []:
        if "heldout_loss" in record and record["step"] <= first_step:
            values = {key.removeprefix("heldout_"): value for key, value in record.items() if key != "step"}
            best.add(record["step"], values)
    return best
