"""The short convolution before the gated delta rule: of each channel, a weighted sum of its last W values.

Letters of this file: C channels, W taps, the last of which is the token itself.
"""

import functools

import jax
import jax.numpy as jnp

from qwen_moe_jax.attention_kernels.runs import PADDING, runs_of


def causal_conv1d(
    x_BTC: jax.Array,
    weight_CW: jax.Array,
    segment_ids_BT: jax.Array,
    initial_columns_BWC: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Depthwise causal convolution, without bias, before its activation; on one device's rows and channels.

    Sums are float32, and rounded once. A real token whose segment is not that of the real token before it sees zeros
    before itself; the first real token of a row sees the initial columns. Padding is in nobody's sum, wherever it is:
    its results are zeros, it passes no gradient on, and its inputs may be anything.

    The backward pass keeps nothing but the inputs.

    Args:
        x_BTC: inputs.
        weight_CW: weights of the taps.
        segment_ids_BT: int32; 0 is padding.
        initial_columns_BWC: the W - 1 inputs before these, [B, W - 1, C]; None is zeros.

    Returns:
        Sums [B, T, C] and the last W - 1 inputs that the next token may see, [B, W - 1, C], in the dtype of the inputs.
    """
    batch, _, channels = x_BTC.shape
    if initial_columns_BWC is None:
        initial_columns_BWC = jnp.zeros((batch, weight_CW.shape[1] - 1, channels), x_BTC.dtype)
    return _convolve(x_BTC, weight_CW, initial_columns_BWC.astype(x_BTC.dtype), runs_of(segment_ids_BT))


@jax.custom_vjp
def _convolve(x_BTC: jax.Array, weight_CW: jax.Array, columns_BWC: jax.Array, run_BT: jax.Array):
    return _where_padding_allows(_padded_behind, _padded_anywhere, run_BT, x_BTC, weight_CW, columns_BWC)


def _forward(x_BTC, weight_CW, columns_BWC, run_BT):
    return _convolve(x_BTC, weight_CW, columns_BWC, run_BT), (x_BTC, weight_CW, columns_BWC, run_BT)


def _backward(saved, gradients):
    *inputs, run_BT = saved

    def pulled(convolve, gradients, run_BT, *inputs):
        return jax.vjp(functools.partial(convolve, run_BT), *inputs)[1](gradients)

    behind, anywhere = (functools.partial(pulled, each, gradients) for each in (_padded_behind, _padded_anywhere))
    return *_where_padding_allows(behind, anywhere, run_BT, *inputs), None


_convolve.defvjp(_forward, _backward)


def _where_padding_allows(behind, anywhere, run_BT: jax.Array, *inputs: jax.Array):
    """`behind` where all padding is behind the tokens of its row, else `anywhere`, which moves every token twice."""
    if run_BT.shape[1] < 2:
        return behind(run_BT, *inputs)
    real_BT = run_BT != PADDING
    return jax.lax.cond(jnp.any(real_BT[:, 1:] & ~real_BT[:, :-1]), anywhere, behind, run_BT, *inputs)


def _padded_behind(run_BT: jax.Array, x_BTC: jax.Array, weight_CW: jax.Array, columns_BWC: jax.Array):
    """Sums and last columns where all padding is behind the tokens of its row."""
    tokens, before = x_BTC.shape[1], columns_BWC.shape[1]
    real_BT = run_BT != PADDING
    x_BSC = jnp.concatenate([columns_BWC, jnp.where(real_BT[..., None], x_BTC, 0)], axis=1)
    run_BS = jnp.pad(run_BT, ((0, 0), (before, 0)))  # the columns are of run 0
    y_BTC = jnp.zeros(x_BTC.shape, jnp.float32)
    for tap in range(before + 1):
        seen_BT = real_BT & (run_BS[:, tap : tap + tokens] == run_BT)
        term_BTC = x_BSC[:, tap : tap + tokens].astype(jnp.float32) * weight_CW[:, tap].astype(jnp.float32)
        y_BTC += jnp.where(seen_BT[..., None], term_BTC, 0)

    last_B1 = jnp.max(run_BT, axis=1, keepdims=True, initial=0)
    slot_BW = jnp.sum(real_BT, axis=1, keepdims=True) + jnp.arange(before)
    stays_BW = jnp.take_along_axis(run_BS, slot_BW, axis=1) == last_B1
    columns_BWC = jnp.where(stays_BW[..., None], jnp.take_along_axis(x_BSC, slot_BW[..., None], axis=1), 0)
    return y_BTC.astype(x_BTC.dtype), columns_BWC


def _padded_anywhere(run_BT: jax.Array, x_BTC: jax.Array, weight_CW: jax.Array, columns_BWC: jax.Array):
    """The same, with the tokens of each row moved together, and their sums moved back."""
    order_BT = jnp.argsort(run_BT == PADDING, axis=1, stable=True)
    run_BT, x_BTC = jnp.take_along_axis(run_BT, order_BT, 1), jnp.take_along_axis(x_BTC, order_BT[..., None], 1)
    y_BTC, columns_BWC = _padded_behind(run_BT, x_BTC, weight_CW, columns_BWC)
    return jnp.take_along_axis(y_BTC, jnp.argsort(order_BT, axis=1)[..., None], 1), columns_BWC
