"""A step of the gated delta rule that updates states where they are stored, against XLA's convolution and rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_moe_jax.attention_kernels.cached import as_stored, stored_dtype
from qwen_moe_jax.attention_kernels.causal_conv import causal_conv1d
from qwen_moe_jax.attention_kernels.delta_rule import recurrent_gated_delta_rule
from qwen_moe_jax.attention_kernels.delta_rule_cpu import step, steps_in_place
from qwen_moe_jax.nn.bits import from_bits

pytest.importorskip("llvmlite")

LAYERS, ROWS, KEY_HEADS, HEADS = 2, 3, 2, 4
#: Sizes of a key head and of a value head: one thread, and states that are worth two.
SIZES = [(16, 48), (32, 144)]
#: Tokens of each row before this one, and which row has one: the first is new, the last padding.
LENGTHS_B, COUNT_B = np.array([0, 7, 3], np.int32), np.array([1, 1, 0], np.int32)


@jax.jit
def by_xla(qkv_BC, weight_CW, decay_BN, strength_BN, state_LBNHH, conv_LBWC, layer, lengths_B, count_B):
    """The step in float32 on [B, 1, …], and what is stored then."""
    new_B, size = lengths_B == 0, state_LBNHH.shape[-2]
    columns_BWC = jnp.where(new_B[:, None, None], 0, from_bits(conv_LBWC[layer]).astype(jnp.float32))
    inputs_BTC, ids_BT = qkv_BC.astype(jnp.float32)[:, None], count_B[:, None]
    mixed_BTC, columns_BWC = causal_conv1d(inputs_BTC, weight_CW.astype(jnp.float32), ids_BT, columns_BWC)
    by_head = jax.nn.silu(mixed_BTC).reshape(ROWS, 1, KEY_HEADS, -1)
    q, k, v = jnp.split(by_head, [size, 2 * size], axis=-1)
    v = v.reshape(ROWS, 1, HEADS, -1)
    rest = jnp.log(decay_BN)[:, None], strength_BN[:, None], ids_BT, state_LBNHH[layer]
    mixed_BTNH, state_BNHH = recurrent_gated_delta_rule(q, k, v, *rest, new_B=new_B)
    return (
        mixed_BTNH[:, 0],
        state_LBNHH.at[layer].set(state_BNHH),
        conv_LBWC.at[layer].set(as_stored(columns_BWC, conv_LBWC)),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_step_in_place_is_the_step_of_the_rule(sizes, dtype):
    key_size, value_size = sizes
    channels = 2 * KEY_HEADS * key_size + HEADS * value_size
    numbers = np.random.default_rng(0)
    qkv_BC = jnp.asarray(numbers.standard_normal((ROWS, channels)), dtype)
    weight_CW = jnp.asarray(numbers.standard_normal((channels, 4)), dtype)
    decay_BN, strength_BN = (jnp.asarray(numbers.uniform(0.1, 0.9, (ROWS, HEADS)), jnp.float32) for _ in range(2))
    state_LBNHH = jnp.asarray(numbers.standard_normal((LAYERS, ROWS, HEADS, *sizes)), jnp.float32)
    columns = jnp.asarray(numbers.standard_normal((LAYERS, ROWS, 3, channels)))
    conv_LBWC = as_stored(columns, jnp.zeros(0, stored_dtype(dtype, "cpu")))
    assert steps_in_place(state_LBNHH, conv_LBWC)
    stored = state_LBNHH, conv_LBWC, jnp.int32(1), LENGTHS_B, COUNT_B
    arguments = qkv_BC, weight_CW, decay_BN, strength_BN, *stored
    mixed, state, conv = jax.jit(step)(*arguments)
    expected_mixed, expected_state, expected_conv = by_xla(*arguments)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(mixed.astype(jnp.float32), expected_mixed, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(state, expected_state, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(conv, expected_conv)
