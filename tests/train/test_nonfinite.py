"""A run stops at a loss that is no number, naming its batch, or skips so many of them and no more."""

import jax.numpy as jnp
import pytest

from train.config import RunConfig
from train.errors import NonFiniteError
from train.nonfinite import NonFiniteGuard
from train.step import StepMetrics


def metrics(loss: float) -> StepMetrics:
    values = dict.fromkeys(StepMetrics.__dataclass_fields__, jnp.float32(0))
    return StepMetrics(**{**values, "loss": jnp.float32(loss), "finite": jnp.isfinite(loss)})


def guard(**settings):
    said = []
    return NonFiniteGuard(RunConfig(**settings), batch_of=lambda step: f"on rows of {step}", say=said.append), said


def test_the_error_names_step_batch_last_checkpoint_and_ways_out():
    stopping, _ = guard()
    stopping.step(1, metrics(2.0))
    stopping.saved(1)
    stopping.step(2, metrics(float("nan")))
    with pytest.raises(NonFiniteError) as refusal:
        stopping.settle()
    for part in ("step 2: the loss is NaN", "on rows of 2", "the last checkpoint is that of step 1", "--run.nonfinite"):
        assert part in str(refusal.value)


def test_without_a_checkpoint_the_error_says_so():
    stopping, _ = guard()
    stopping.step(1, metrics(float("inf")))
    with pytest.raises(NonFiniteError, match="the loss is inf .* there is no checkpoint yet"):
        stopping.step(2, metrics(1.0))


def test_skipped_steps_are_told_and_bounded():
    skipping, said = guard(nonfinite="skip", max_skipped=2)
    for step, loss in enumerate([float("nan"), 1.0, float("nan"), 1.0], start=1):
        skipping.step(step, metrics(loss))
    skipping.settle()
    assert len(said) == 2 and "step 1" in said[0] and "(1 of 2)" in said[0] and "step 3" in said[1]
    skipping.step(5, metrics(float("nan")))
    with pytest.raises(NonFiniteError, match="step 5.*3 such steps are more than run.max_skipped = 2"):
        skipping.settle()
