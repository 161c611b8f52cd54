"""AdamW: clipped gradients, warm-up and cosine, weight decay on matrices only."""

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
    )


def decays(params: Any) -> Any:
    """A tree of bools, shaped as `params`: does this array shrink by weight decay?

    Norm scales and biases do not. They are told by their names, not by their number of axes: layers of one kind are
    stacked, so a norm's scale is [L,D] and looks like a matrix.
    """

    def decay(path: tuple[Any, ...], _: Any) -> bool:
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        return not any("norm" in name or name == "bias" for name in names)

    return jax.tree_util.tree_map_with_path(decay, params)
