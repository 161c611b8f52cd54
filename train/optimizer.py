"""AdamW: clipped gradients, warm-up and cosine, weight decay on matrices only."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from train.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: 0 up to `learning_rate`, then down a cosine to `final_learning_rate` at step `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.final_learning_rate,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The whole chain. Its moments have the shapes and dtypes of the parameters."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
        optax.masked(optax.set_to_zero(), moves_by_itself),
    )


def decays(params: Any) -> Any:
    """A tree of bools, shaped as `params`: does this array shrink by weight decay?

    Norm scales and biases do not. They are told by their names, not by their number of axes: layers of one kind are
    stacked, so a norm's scale is [L,D] and looks like a matrix.
    """
    return _by_name(lambda names: not any("norm" in name or name.endswith("bias") for name in names), params)


def moves_by_itself(params: Any) -> Any:
    """A tree of bools, shaped as `params`: is this a balancing bias, which a rule moves (`train/step.py`)?"""
    return _by_name(lambda names: names[-1] == "e_score_correction_bias", params)


def _by_name(holds: Callable[[list[str]], bool], params: Any) -> Any:
    def of_leaf(path: tuple[Any, ...], _: Any) -> bool:
        return holds(jax.tree_util.keystr(path, simple=True, separator=".").split("."))

    return jax.tree_util.tree_map_with_path(of_leaf, params)
