"""Rotary position embedding (Su et al., 2021) in the half-rotation layout, with the Hub's scalings."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.config import RopeConfig


class RotaryTables(NamedTuple):
    """Cosines and sines of every token's angles, each [B, T, H], in the model's dtype.

    H is here the number of dimensions that are rotated, `ModelConfig.rotary_dim`; the functions below call it
    `head_dim`.
    """

    cos_BTH: jax.Array
    sin_BTH: jax.Array


def rotary_tables(
    rope: RopeConfig, head_dim: int, max_position_embeddings: int, positions_BT: jax.Array, dtype: jnp.dtype
) -> RotaryTables:
    """The tables for these positions. Angles are float32; cosines and sines are rounded to `dtype` afterwards."""
    if rope.rope_type == "dynamic":
        inv_freq: jax.typing.ArrayLike
        inv_freq, scaling = _dynamic(rope, head_dim, max_position_embeddings, positions_BT), 1.0
    else:
        inv_freq, scaling = inverse_frequencies(rope, head_dim)
    angles = positions_BT.astype(jnp.float32)[..., None] * jnp.asarray(inv_freq)
    angles_BTH = jnp.concatenate([angles, angles], axis=-1)
    return RotaryTables((jnp.cos(angles_BTH) * scaling).astype(dtype), (jnp.sin(angles_BTH) * scaling).astype(dtype))


def apply_rotary(x_BTNH: jax.Array, tables: RotaryTables) -> jax.Array:
    """Rotates each pair (i, i + R/2) of the first R dimensions of every head by its token's angle.

    R is the width of the tables; the dimensions beyond it pass as they are. The result has the dtype of the input.
    """
    width = tables.cos_BTH.shape[-1]
    turned, passed = x_BTNH[..., :width], x_BTNH[..., width:]
    first, second = jnp.split(turned, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    turned = turned * tables.cos_BTH[:, :, None] + rotated * tables.sin_BTH[:, :, None]
    return jnp.concatenate([turned, passed], axis=-1) if passed.shape[-1] else turned


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """inv_freq [H/2] in float32 and the factor on cosines and sines, for the types that ignore the sequence's length.

    Follows transformers' `modeling_rope_utils`, in float32 like it.
    """
    base = _base_frequencies(rope.rope_theta, head_dim)
    if rope.rope_type == "default":
        return base, 1.0
    if rope.rope_type == "linear":
        return base / np.float32(rope.factor), 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, base), 1.0
    return _yarn(rope, base, head_dim)


def _base_frequencies(theta: float, head_dim: int) -> np.ndarray:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1.0) / np.power(np.float32(theta), exponents, dtype=np.float32)


def _dynamic(rope: RopeConfig, head_dim: int, longest: int, positions_BT: jax.Array) -> jax.Array:
    """NTK scaling, [B, 1, H/2]: beyond the pretrained length the base grows with a row's longest segment.

    Each row has a base of its own, that of the row alone in transformers, which lets the longest row of a batch decide.
    """
    length_B11 = jnp.maximum(jnp.max(positions_BT, axis=1)[:, None, None] + 1, longest)
    length = length_B11.astype(jnp.float32)
    growth = (rope.factor * length / longest) - (rope.factor - 1)
    theta = rope.rope_theta * growth ** (head_dim / (head_dim - 2))
    return 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))


def _llama3(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    """Slow rotations are divided by the factor, fast ones kept, those between interpolated (Llama 3.1)."""
    context, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    turns = context * base / np.float32(2 * math.pi)  # full rotations within the pretrained context
    smooth = (turns - low) / (high - low)
    between = (1 - smooth) * base / rope.factor + smooth * base
    scaled = np.where(turns < low, base / rope.factor, np.where(turns > high, base, between))
    return scaled.astype(np.float32)


def _yarn(rope: RopeConfig, base: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al., 2023): a ramp over the dimensions from extrapolation to interpolation."""

    def dimension(rotations: float) -> float:
        context = rope.original_max_position_embeddings
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    inv_freq = base / rope.factor * ramp + base * (1 - ramp)
    return inv_freq.astype(np.float32), yarn_attention_factor(rope)


def yarn_attention_factor(rope: RopeConfig) -> float:
    """What yarn multiplies both cosines and sines by."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
