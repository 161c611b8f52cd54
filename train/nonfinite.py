"""Handles steps whose loss or gradient is not finite. Such a step leaves weights and moments unchanged."""

import math
from collections.abc import Callable

import jax

from train.config import RunConfig
from train.errors import NonFiniteError
from train.step import StepMetrics


class NonFiniteGuard:
    """Stops the run at a step that is not finite, or counts such steps as skipped.

    A step is checked after the next one has been dispatched, so that the devices never wait. That is safe: a step that
    is not finite leaves weights and moments unchanged.
    """

    def __init__(self, config: RunConfig, *, batch_of: Callable[[int], str], say: Callable[[str], None]) -> None:
        """`batch_of` describes the batch of a step (from 1); `say` prints a line about each skipped step."""
        self._config = config
        self._batch_of = batch_of
        self._say = say
        self._pending: tuple[int, StepMetrics] | None = None
        self._skipped = 0
        self._saved = "there is no checkpoint yet"

    def step(self, step: int, metrics: StepMetrics) -> None:
        """Takes the metrics of a step that has been dispatched, and checks the step before it.

        Raises:
            NonFiniteError: see `settle`.
        """
        self.settle()
        self._pending = (step, metrics)

    def saved(self, step: int) -> None:
        """Records that this step has a checkpoint, for the message."""
        self._saved = f"the last checkpoint is that of step {step}"

    def settle(self) -> None:
        """Waits for the last dispatched step and checks it.

        Raises:
            NonFiniteError: it is not finite, and `run.nonfinite` is "stop" or `run.max_skipped` is exceeded.
        """
        if self._pending is None:
            return
        step, on_device = self._pending
        self._pending = None
        if jax.device_get(on_device.finite):
            return
        loss, norm = float(on_device.loss), float(on_device.gradient_norm)
        found = (
            f"step {step}: the loss is {_spell(loss)} and the gradient's norm {_spell(norm)}, {self._batch_of(step)}"
        )
        if self._config.nonfinite == "skip":
            self._skipped += 1
            if self._skipped <= self._config.max_skipped:
                self._say(f"{found}; skipped ({self._skipped} of {self._config.max_skipped})")
                return
            ways_out = f"{self._skipped} such steps are more than run.max_skipped = {self._config.max_skipped}."
        else:
            ways_out = "--run.nonfinite skip leaves such batches out."
        raise NonFiniteError(
            f"{found}. Nothing of it went into the weights, and {self._saved}. {ways_out} A smaller optimizer."
            'learning_rate, a longer warm-up, loss.z_loss_coef or execution.router_dtype = "float32" may help.'
        )


def _spell(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else {math.inf: "inf", -math.inf: "-inf"}.get(value, "NaN")
