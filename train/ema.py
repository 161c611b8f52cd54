"""The exponential moving average of the trained weights, which is evaluated and exported in their place.

The decay of the first steps is smaller, so that a short run's average is not still that of its start: after n steps it
is min(decay, (1 + n) / (10 + n)), as in TensorFlow's ExponentialMovingAverage and in diffusers' EMAModel.
"""

import jax
import jax.numpy as jnp

from train.parameters import Params


def first_average(params: Params) -> Params:
    """The average before the first step: float32 copies, which share no memory with the parameters."""
    return jax.tree.map(lambda param: jnp.copy(param).astype(jnp.float32), params)


def next_average(average: Params, params: Params, done: jax.Array, decay: float) -> Params:
    """The average after one more step.

    Args:
        average: float32. In bfloat16 it could not move, since a change by 1 - decay is less than its rounding.
        params: after the step.
        done: the number of steps up to this one.
        decay: of later steps, 0 to 1.
    """
    of_this_step = jnp.minimum(decay, (1 + done) / (10 + done)).astype(jnp.float32)
    return jax.tree.map(lambda mean, param: mean + (1 - of_this_step) * (_as_stored(param) - mean), average, params)


def _as_stored(param: jax.Array) -> jax.Array:
    """The parameter in float32. XLA would leave out its rounding to bfloat16 where both are in one program."""
    stored = jnp.finfo(param.dtype)
    return jax.lax.reduce_precision(param.astype(jnp.float32), stored.nexp, stored.nmant)
