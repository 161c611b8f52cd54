"""Root-mean-square normalisation (Zhang & Sennrich, 2019), in transformers' order of casts."""

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_moe_jax.nn.kernels.cpu import on_cpu
from qwen_moe_jax.nn.parameters import ParameterFactory


class RMSNorm(nnx.Module):
    """`weight * x / rms(x)` over the last axis.

    The mean square is taken in float32 and the quotient is rounded to the input's dtype *before* the weight
    multiplies it.
    """

    def __init__(self, name: str, size: int, eps: float, make: ParameterFactory):
        self.weight = make.ones(f"{name}.weight", (size,), ("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] to the same shape and dtype."""
        normalized = _normalized(x, self.eps).astype(x.dtype)
        if x.dtype == jnp.bfloat16 and jax.sharding.get_abstract_mesh().size == 1 and on_cpu():
            return _scaled(self.weight[...], normalized)
        return self.weight[...].astype(x.dtype) * normalized


class ZeroCenteredRMSNorm(nnx.Module):
    """`(1 + weight) * x / rms(x)` over the last axis, in float32 and rounded once; the weight starts at zero."""

    def __init__(self, name: str, size: int, eps: float, make: ParameterFactory):
        self.weight = make.zeros(f"{name}.weight", (size,), ("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] to the same shape and dtype."""
        return (_normalized(x, self.eps) * (1 + self.weight[...].astype(jnp.float32))).astype(x.dtype)


class GatedRMSNorm(nnx.Module):
    """`weight * x / rms(x) * silu(gate)` over the last axis: the norm behind a gated delta rule.

    Quotient and weight are multiplied in the input's dtype, as in `RMSNorm`, the gate in float32.
    """

    def __init__(self, name: str, size: int, eps: float, make: ParameterFactory):
        self.weight = make.ones(f"{name}.weight", (size,), ("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        """[..., size] of each to the same shape and dtype."""
        scaled = self.weight[...].astype(x.dtype) * _normalized(x, self.eps).astype(x.dtype)
        return (scaled.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)


def rms_norm(
    name: str, size: int, eps: float, make: ParameterFactory, *, zero_centered: bool
) -> RMSNorm | ZeroCenteredRMSNorm:
    """The norm of a model, by `ModelConfig.zero_centered_norm`."""
    return (ZeroCenteredRMSNorm if zero_centered else RMSNorm)(name, size, eps, make)


@jax.custom_vjp
def _scaled(weight: jax.Array, x: jax.Array) -> jax.Array:
    """The weight times [..., size], with the weight's gradient summed in float32: XLA on CPUs is slow in bfloat16."""
    return weight.astype(x.dtype) * x


def _of_scaled(saved: tuple[jax.Array, jax.Array], of_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    weight, x = saved
    of_weight = jnp.sum((of_y * x).astype(jnp.float32), axis=tuple(range(x.ndim - 1)))
    return of_weight.astype(weight.dtype), weight.astype(x.dtype) * of_y


_scaled.defvjp(lambda weight, x: (_scaled(weight, x), (weight, x)), _of_scaled)


def _normalized(x: jax.Array, eps: float) -> jax.Array:
    """`x / rms(x)` in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
