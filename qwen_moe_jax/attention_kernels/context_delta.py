"""The gated delta rule and its convolution over rows whose positions are sharded over the mesh axis `context`.

Over any number of tokens the state is an affine function of the one before them, S -> A S + B, and so are the results,
O + R S. One pass over a device's own tokens gives all four: A and R are state and results of values that are zero and a
state that is the identity, next to O and B from a state of zeros, as further columns of the values. The A and B of all
devices are gathered, the state before each device follows from them, and R S is added to O. The rule is computed over
H + P columns of values instead of P, and no device waits for another.

Device x has the x-th part of each row (`RowOrder` with one chunk). Letters of this file besides those of
`delta_rule.py`: X devices of the axis, S positions of a whole row, C channels and W - 1 columns of the convolution.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_moe_jax.attention_kernels.delta_rule import chunk_gated_delta_rule
from qwen_moe_jax.attention_kernels.runs import PADDING, runs_of
from qwen_moe_jax.nn.matmul import matmul_precision
from qwen_moe_jax.sharding.rules import CONTEXT


class Parts(NamedTuple):
    """What segments say of the X parts of each row, known to every device without communication.

    Attributes:
        ids_XBT: segments of each part.
        goes_on_XB: whether a part's first real token is of the segment before it, or the part is padding.
        is_one_XB: whether all real tokens of a part are of one segment.
        count_XB: real tokens of a part that are of its last segment, without another between them.
    """

    ids_XBT: jax.Array
    goes_on_XB: jax.Array
    is_one_XB: jax.Array
    count_XB: jax.Array

    @classmethod
    def of(cls, row_segment_ids_BS: jax.Array, shards: int, segment_before: int = 0) -> "Parts":
        """From whole rows, which are behind tokens of a segment, 0 for none."""
        batch = row_segment_ids_BS.shape[0]
        ids_XBT = jnp.moveaxis(row_segment_ids_BS.reshape(batch, shards, -1), 1, 0)
        real_XBT = ids_XBT != 0
        some_XB = jnp.any(real_XBT, axis=-1)
        at_first_XB1 = jnp.argmax(real_XBT, axis=-1)[..., None]
        at_last_XB1 = ids_XBT.shape[-1] - 1 - jnp.argmax(real_XBT[..., ::-1], axis=-1)[..., None]
        first_XB, last_XB = (jnp.take_along_axis(ids_XBT, at, axis=-1)[..., 0] for at in (at_first_XB1, at_last_XB1))
        before_B, goes_on = jnp.full(batch, segment_before, ids_XBT.dtype), []
        for part in range(shards):
            goes_on.append(~some_XB[part] | (first_XB[part] == before_B))
            before_B = jnp.where(some_XB[part], last_XB[part], before_B)
        run_XBT = jax.vmap(runs_of)(ids_XBT)
        last_run_XB = jnp.max(run_XBT, axis=-1)
        in_last_XBT = real_XBT & (run_XBT == last_run_XB[..., None])
        return cls(ids_XBT, jnp.stack(goes_on), last_run_XB <= 0, jnp.sum(in_last_XBT, axis=-1, dtype=jnp.int32))

    def own(self) -> jax.Array:
        """Segments of this device's part, [B, T]."""
        return self.ids_XBT[jax.lax.axis_index(CONTEXT)]


def columns_before(
    x_BTC: jax.Array, parts: Parts, count: int, columns_BWC: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The last inputs of the convolution before this device's part that its first token sees, [B, W - 1, C], and those
    of whole rows.

    Args:
        x_BTC: inputs of this device's tokens.
        parts: of the rows.
        count: W - 1.
        columns_BWC: inputs before the rows; None are zeros.
    """
    last_XBWC = jax.lax.all_gather(_last_inputs(x_BTC, parts.own(), count), CONTEXT)
    columns_BWC, before = jnp.zeros_like(last_XBWC[0]) if columns_BWC is None else columns_BWC, []
    slot_1W = jnp.arange(count, dtype=jnp.int32)[None]
    for part, last_BWC in enumerate(last_XBWC):
        before.append(_where(parts.goes_on_XB[part], columns_BWC))
        earlier_BWC = _where(parts.is_one_XB[part], before[-1])
        count_B1 = jnp.minimum(parts.count_XB[part], count)[:, None]
        moved_BW = jnp.minimum(slot_1W + count_B1, count - 1)
        earlier_BWC = jnp.take_along_axis(earlier_BWC, moved_BW[..., None], axis=1)
        columns_BWC = jnp.where((slot_1W >= count - count_B1)[..., None], last_BWC, earlier_BWC)
    return jnp.stack(before)[jax.lax.axis_index(CONTEXT)], columns_BWC


def delta_rule_over_context(
    inputs: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array],
    parts: Parts,
    state_BNHP: jax.Array | None = None,
    *,
    chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
    """The results of `chunk_gated_delta_rule` over whole rows, for this device's tokens, and the state after the rows.

    Args:
        inputs: the first five arguments of `chunk_gated_delta_rule`.
        parts: of the rows.
        state_BNHP: before the rows, float32; None is zeros.
        chunk_size: see there.
    """
    q_BTKH, k_BTKH, v_BTNP, g_BTN, beta_BTN = inputs
    (batch, _, value_heads, value_size), key_size = v_BTNP.shape, k_BTKH.shape[-1]
    wide_BTNP = jnp.pad(v_BTNP.astype(jnp.float32), ((0, 0), (0, 0), (0, 0), (0, key_size)))
    zeros_HP, eye_HH = jnp.zeros((key_size, value_size), jnp.float32), jnp.eye(key_size, dtype=jnp.float32)
    start_HP = jnp.concatenate([zeros_HP, eye_HH], axis=1)
    start_BNHP = jnp.broadcast_to(start_HP, (batch, value_heads, *start_HP.shape))
    out_BTNP, after_BNHP = chunk_gated_delta_rule(
        q_BTKH, k_BTKH, wide_BTNP, g_BTN, beta_BTN, parts.own(), start_BNHP, chunk_size=chunk_size
    )
    state_BNHP, before = jnp.zeros_like(after_BNHP[..., :value_size]) if state_BNHP is None else state_BNHP, []
    with matmul_precision(jnp.float32):
        for part, part_BNHP in enumerate(jax.lax.all_gather(after_BNHP, CONTEXT)):
            before.append(_where(parts.goes_on_XB[part], state_BNHP))
            state_BNHP = part_BNHP[..., value_size:] @ before[-1] + part_BNHP[..., :value_size]
        own_BNHP = jnp.stack(before)[jax.lax.axis_index(CONTEXT)]
        added_BTNP = jnp.einsum("BTNH,BNHP->BTNP", out_BTNP[..., value_size:], own_BNHP)
    return (out_BTNP[..., :value_size] + added_BTNP).astype(v_BTNP.dtype), state_BNHP


def part_bytes(heads: int, key_size: int, value_size: int, *, columns: int, channels: int, itemsize: int) -> int:
    """Bytes that a device sends to each other one for a row in a layer, forward: A, B and the last inputs of its part.

    Args:
        heads, channels: a device's value heads, and channels of its convolution.
        key_size, value_size: of a head.
        columns: W - 1.
        itemsize: bytes of an input of the convolution; states are float32.
    """
    return heads * key_size * (key_size + value_size) * 4 + columns * channels * itemsize


def _last_inputs(x_BTC: jax.Array, ids_BT: jax.Array, count: int) -> jax.Array:
    """The last inputs of this part's last segment, the newest last, zeros where there are fewer, [B, W - 1, C]."""
    run_BT = runs_of(ids_BT)
    in_last_BT = (run_BT != PADDING) & (run_BT == jnp.max(run_BT, axis=1, keepdims=True))
    behind_BT = jnp.cumsum(in_last_BT[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]  # of a token, itself included
    is_slot_BWT = in_last_BT[:, None] & (
        behind_BT[:, None] == count - jnp.arange(count, dtype=jnp.int32)[None, :, None]
    )
    found_BWC = jnp.take_along_axis(x_BTC, jnp.argmax(is_slot_BWT, axis=-1)[..., None], axis=1)
    return jnp.where(jnp.any(is_slot_BWT, axis=-1)[..., None], found_BWC, 0)


def _where(holds_B: jax.Array, x: jax.Array) -> jax.Array:
    """The rows for which it holds, zeros for the others."""
    return jnp.where(holds_B.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
