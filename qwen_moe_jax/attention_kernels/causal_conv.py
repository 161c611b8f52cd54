"""The short convolution before the gated delta rule: of each channel, a weighted sum of its last W values.

Letters of this file: C channels, W taps, the last of which is the token itself; n blocks of a row, L tokens of a block;
S the columns before tokens and the tokens, or tokens and those behind them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.attention_kernels.runs import PADDING, runs_of
from qwen_moe_jax.nn.bits import as_bits, from_bits

#: The most tokens of a row that the backward pass computes at once.
BLOCK = 64


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
    return _where_padding_allows(_sums, _sums_anywhere, run_BT, x_BTC, weight_CW, columns_BWC)


def _forward(x_BTC, weight_CW, columns_BWC, run_BT):
    return _convolve(x_BTC, weight_CW, columns_BWC, run_BT), (x_BTC, weight_CW, columns_BWC, run_BT)


def _backward(saved, gradients):
    *inputs, run_BT = saved
    return *_where_padding_allows(_gradients, _gradients_anywhere, run_BT, *inputs, *gradients), None


_convolve.defvjp(_forward, _backward)


def _where_padding_allows(behind, anywhere, run_BT: jax.Array, *arrays: jax.Array):
    """`behind` where all padding is behind the tokens of its row, else `anywhere`, which moves every token twice."""
    if run_BT.shape[1] < 2:
        return behind(run_BT, *arrays)
    real_BT = run_BT != PADDING
    return jax.lax.cond(jnp.any(real_BT[:, 1:] & ~real_BT[:, :-1]), anywhere, behind, run_BT, *arrays)


def _sums(run_BT: jax.Array, x_BTC: jax.Array, weight_CW: jax.Array, columns_BWC: jax.Array):
    """Sums and last columns where all padding is behind the tokens of its row."""
    before = columns_BWC.shape[1]
    run_BS = jnp.pad(run_BT, ((0, 0), (before, 0)))  # the columns are of run 0

    def sums(x_BSC: jax.Array, run_BS: jax.Array) -> jax.Array:
        tokens = x_BSC.shape[1] - before
        real_BT = run_BS[:, before:] != PADDING
        y_BTC = jnp.zeros((x_BSC.shape[0], tokens, x_BSC.shape[2]), jnp.float32)
        for tap in range(before + 1):
            seen_BT = real_BT & (run_BS[:, tap : tap + tokens] == run_BS[:, before:])
            term_BTC = x_BSC[:, tap : tap + tokens].astype(jnp.float32) * weight_CW[:, tap].astype(jnp.float32)
            y_BTC += jnp.where(seen_BT[..., None], term_BTC, 0)
        return y_BTC.astype(x_BTC.dtype)

    # Only the first tokens see columns: the others are read where they are.
    first_BSC = jnp.concatenate([columns_BWC, x_BTC[:, :before]], axis=1)
    y_BTC = sums(first_BSC, run_BS[:, : first_BSC.shape[1]])
    if x_BTC.shape[1] > before:
        y_BTC = jnp.concatenate([y_BTC, sums(x_BTC, run_BT)], axis=1)

    slot_BW, stays_BW = _last_slots(run_BT, before)
    kept_BWC = jnp.take_along_axis(jnp.concatenate([columns_BWC, x_BTC], axis=1), slot_BW[..., None], axis=1)
    return y_BTC, jnp.where(stays_BW[..., None], kept_BWC, 0)


def _last_slots(run_BT: jax.Array, before: int) -> tuple[jax.Array, jax.Array]:
    """Where the last tokens are in (columns, row), [B, W - 1], and whether the next one may see them."""
    run_BS = jnp.pad(run_BT, ((0, 0), (before, 0)))
    last_B1 = jnp.max(run_BT, axis=1, keepdims=True, initial=0)
    slot_BW = jnp.sum(run_BT != PADDING, axis=1, keepdims=True, dtype=jnp.int32) + jnp.arange(before, dtype=jnp.int32)
    return slot_BW, jnp.take_along_axis(run_BS, slot_BW, axis=1) == last_B1


def _gradients(run_BT, x_BTC, weight_CW, columns_BWC, of_y_BTC, of_last_BWC):
    """Gradients of inputs, weights and columns where all padding is behind the tokens of its row.

    Block by block of tokens from the last: products that are summed over all tokens are then never in memory at once.
    """
    (batch, tokens, channels), before = x_BTC.shape, columns_BWC.shape[1]
    length = max(min(BLOCK, tokens), before, 1)
    count = -(-tokens // length)
    padding = (0, 0), (0, count * length - tokens)
    run_BnL = jnp.pad(run_BT, padding, constant_values=PADDING).reshape(batch, count, length)
    x_BnLC, of_y_BnLC = (
        jnp.pad(as_bits(x), (*padding, (0, 0))).reshape(batch, count, length, channels) for x in (x_BTC, of_y_BTC)
    )
    weight_WC = weight_CW.astype(jnp.float32).T

    def at(x: jax.Array, index: jax.Array) -> jax.Array:
        return from_bits(jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False))

    def of_seen(run_BL: jax.Array, of_y_BSC: jax.Array, run_BS: jax.Array) -> jax.Array:
        """Gradient of inputs, of the sums of the tokens from the first of them on that see them."""
        reach = [(before - tap, before - tap + run_BL.shape[1]) for tap in range(before + 1)]
        of_x_BLC = jnp.zeros((*run_BL.shape, channels), jnp.float32)
        for (start, end), weight_C in zip(reach, weight_WC, strict=True):
            same_BL1 = (run_BS[:, start:end] == run_BL)[..., None]
            of_x_BLC += jnp.where(same_BL1, of_y_BSC[:, start:end] * weight_C, 0)
        return of_x_BLC

    def block(carry, index):
        of_x_BnLC, of_weight_WC, of_next_BWC, run_next_BW = carry
        run_BL, x_BLC, earlier = at(run_BnL, index), at(x_BnLC, index).astype(jnp.float32), jnp.maximum(index - 1, 0)
        real_BL1 = (run_BL != PADDING)[..., None]
        of_y_BLC = jnp.where(real_BL1, at(of_y_BnLC, index).astype(jnp.float32), 0)
        run_before_BW = jnp.where(index > 0, at(run_BnL, earlier)[:, length - before :], 0)
        x_before_BWC = jnp.where(index > 0, at(x_BnLC, earlier)[:, length - before :], columns_BWC)
        x_BSC = jnp.concatenate([x_before_BWC.astype(jnp.float32), x_BLC], axis=1)
        run_BS = jnp.concatenate([run_before_BW, run_BL], axis=1)
        for tap in range(before + 1):
            seen_BL1 = real_BL1 & (run_BS[:, tap : tap + length] == run_BL)[..., None]
            product_BLC = jnp.where(seen_BL1, x_BSC[:, tap : tap + length], 0) * of_y_BLC
            of_weight_WC = of_weight_WC.at[tap].add(jnp.sum(product_BLC, axis=(0, 1)))
        behind = jnp.concatenate([of_y_BLC, of_next_BWC], 1), jnp.concatenate([run_BL, run_next_BW], 1)
        of_x_BLC = as_bits(of_seen(run_BL, *behind).astype(x_BTC.dtype))
        of_x_BnLC = jax.lax.dynamic_update_index_in_dim(of_x_BnLC, of_x_BLC, index, axis=1)
        return (of_x_BnLC, of_weight_WC, of_y_BLC[:, :before], run_BL[:, :before]), None

    nothing_BWC, nobody_BW = (
        jnp.zeros((batch, before, channels), jnp.float32),
        jnp.full((batch, before), PADDING, jnp.int32),
    )
    start = jnp.zeros_like(x_BnLC), jnp.zeros_like(weight_WC), nothing_BWC, nobody_BW
    carry, _ = jax.lax.scan(block, start, np.arange(count, dtype=np.int32), reverse=True)
    of_x_BnLC, of_weight_WC, of_next_BWC, run_next_BW = carry
    of_x_BTC = from_bits(of_x_BnLC.reshape(batch, -1, channels)[:, :tokens])
    behind = jnp.concatenate([nothing_BWC, of_next_BWC], 1), jnp.concatenate([nobody_BW, run_next_BW], 1)
    of_columns_BWC = of_seen(jnp.zeros_like(nobody_BW), *behind).astype(columns_BWC.dtype)

    slot_BW, stays_BW = _last_slots(run_BT, before)
    of_last_BWC, row_B1 = jnp.where(stays_BW[..., None], of_last_BWC, 0), jnp.arange(batch, dtype=jnp.int32)[:, None]
    in_row_BW, in_columns_BW = jnp.where(slot_BW < before, tokens, slot_BW - before), slot_BW
    of_x_BTC = of_x_BTC.at[row_B1, in_row_BW].add(of_last_BWC, mode="drop")
    of_columns_BWC = of_columns_BWC.at[row_B1, in_columns_BW].add(of_last_BWC, mode="drop")
    return of_x_BTC, of_weight_WC.T.astype(weight_CW.dtype), of_columns_BWC


def _sums_anywhere(run_BT: jax.Array, x_BTC: jax.Array, weight_CW: jax.Array, columns_BWC: jax.Array):
    """`_sums` wherever padding is: the tokens of each row are moved together, and their sums moved back."""
    run_BT, together, back = _moves(run_BT)
    y_BTC, columns_BWC = _sums(run_BT, together(x_BTC), weight_CW, columns_BWC)
    return back(y_BTC), columns_BWC


def _gradients_anywhere(run_BT, x_BTC, weight_CW, columns_BWC, of_y_BTC, of_last_BWC):
    """`_gradients` wherever padding is."""
    run_BT, together, back = _moves(run_BT)
    of_x_BTC, *others = _gradients(run_BT, together(x_BTC), weight_CW, columns_BWC, together(of_y_BTC), of_last_BWC)
    return back(of_x_BTC), *others


def _moves(run_BT: jax.Array):
    """Runs with the tokens of each row together and padding behind them, the move of [B, T, C] there, and back."""
    order_BT = jnp.argsort(run_BT == PADDING, axis=1, stable=True)
    there_BT1, back_BT1 = order_BT[..., None], jnp.argsort(order_BT, axis=1)[..., None]
    together, back = (functools.partial(jnp.take_along_axis, indices=each, axis=1) for each in (there_BT1, back_BT1))
    return jnp.take_along_axis(run_BT, order_BT, axis=1), together, back
