"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_moe_jax.nn.parameters import ParameterFactory


class RMSNorm(nnx.Module):
    """`weight * x / rms(x)` over the last axis (Zhang & Sennrich, 2019), in transformers' order of casts.

    The mean square is taken in float32 and the quotient is rounded to the input's dtype *before* the weight
    multiplies it.
    """

    def __init__(self, name: str, size: int, eps: float, make: ParameterFactory):
        self.weight = make.ones(f"{name}.weight", (size,), ("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] to the same shape and dtype."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return self.weight[...].astype(x.dtype) * wide.astype(x.dtype)
