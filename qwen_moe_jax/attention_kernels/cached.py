"""Attention over a cache of keys and values, on one device's arrays.

Every row has a length of its own: position p of a row is in slot `p % S`.

bfloat16 is stored as its bits (uint16) in the caches of CPUs: there XLA widens the whole of a bfloat16 array before it
reads or writes a part. `stored_dtype` decides; the functions below take either.
"""

import jax
import jax.numpy as jnp

from qwen_moe_jax.attention_kernels.blockwise import UNSEEN
from qwen_moe_jax.nn.bits import as_bits, from_bits


def stored_dtype(dtype: jax.typing.DTypeLike, platform: str) -> jnp.dtype:
    """The dtype in which keys and values of this dtype are stored on devices of this platform."""
    bits = platform == "cpu" and jnp.dtype(dtype) == jnp.bfloat16
    return jnp.dtype(jnp.uint16) if bits else jnp.dtype(dtype)


def write_slots(
    store_LBSKH: jax.Array, x_BTKH: jax.Array, layer: jax.Array, lengths_B: jax.Array, token_mask_BT: jax.Array
) -> jax.Array:
    """Writes keys or values of new tokens behind those of their rows, in place where the store is donated.

    Args:
        store_LBSKH: keys or values of all layers.
        x_BTKH: those of the new tokens.
        layer: int32 []; which layer's they are.
        lengths_B: int32; tokens of each row before these.
        token_mask_BT: False for padding, which is not written.
    """
    num_slots = store_LBSKH.shape[2]
    slot_BT = (lengths_B[:, None] + jnp.arange(x_BTKH.shape[1])) % num_slots
    slot_BT = jnp.where(token_mask_BT, slot_BT, num_slots)  # outside: not written
    row_B1 = jnp.arange(x_BTKH.shape[0])[:, None]
    x_BTKH = x_BTKH.astype(from_bits(store_LBSKH).dtype)
    x_BTKH = as_bits(x_BTKH) if store_LBSKH.dtype == jnp.uint16 else x_BTKH
    return store_LBSKH.at[layer, row_B1, slot_BT].set(x_BTKH, mode="drop", unique_indices=True)


def attend_cached(
    q_BTNH: jax.Array,
    keys_LBSKH: jax.Array,
    values_LBSKH: jax.Array,
    layer: jax.Array,
    lengths_B: jax.Array,
    token_mask_BT: jax.Array,
    sliding_window: int | None,
) -> jax.Array:
    """Attention of new tokens, whose keys and values are stored already, over all of their row so far, [B, T, N, H].

    Scores and softmax are float32. A padding query's result is finite and means nothing.

    Args:
        q_BTNH: queries of the new tokens.
        keys_LBSKH, values_LBSKH: of all layers.
        layer: int32 []; which layer to attend in.
        lengths_B: int32; tokens of each row before these.
        token_mask_BT: False for padding, which follows the tokens of a row.
        sliding_window: number of keys a query sees, itself included; None for all.
    """
    keys_BSKH, values_BSKH = (
        from_bits(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)).astype(q_BTNH.dtype)
        for x in (keys_LBSKH, values_LBSKH)
    )
    num_slots, length = keys_BSKH.shape[1], q_BTNH.shape[1]
    # Slot s has the last position that is s modulo the slots; negative where nothing was written yet.
    last_B1 = lengths_B[:, None] + jnp.sum(token_mask_BT, axis=1, keepdims=True) - 1
    position_BS = last_B1 - (last_B1 - jnp.arange(num_slots)) % num_slots
    query_BT = lengths_B[:, None] + jnp.arange(length)
    distance_BTS = query_BT[:, :, None] - position_BS[:, None, :]
    seen_BTS = (distance_BTS >= 0) & (position_BS >= 0)[:, None, :]
    if sliding_window is not None:
        seen_BTS &= distance_BTS < sliding_window
    attend = _one_query if length == 1 else _many_queries
    return attend(q_BTNH, keys_BSKH, values_BSKH, seen_BTS)


def _many_queries(q_BTNH: jax.Array, keys_BSKH: jax.Array, values_BSKH: jax.Array, seen_BTS: jax.Array) -> jax.Array:
    """Head by head. Keys and values are transposed, head before slot: many queries share the price of that."""
    batch, length, heads, head_dim = q_BTNH.shape
    kv_heads = keys_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, keys_BSKH, preferred_element_type=jnp.float32)
    scores_BKGTS = jnp.where(seen_BTS[:, None, None], scores_BKGTS * head_dim**-0.5, UNSEEN)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(q_BTNH.dtype)
    mixed_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, values_BSKH)
    return mixed_BTKGH.reshape(q_BTNH.shape)


def _one_query(q_BTNH: jax.Array, keys_BSKH: jax.Array, values_BSKH: jax.Array, seen_BTS: jax.Array) -> jax.Array:
    """The same for one query a row: all heads in one matmul over keys and values in the order they are stored in.

    Every query head is multiplied with the keys of all heads, with zeros where they are not its own: K times the
    products, of which a single query has so few that reading the cache is what takes the time, on any device.
    """
    batch, _, heads, head_dim = q_BTNH.shape
    num_slots, kv_heads = keys_BSKH.shape[1:3]
    keys_BSI, values_BSI = (x.reshape(batch, num_slots, kv_heads * head_dim) for x in (keys_BSKH, values_BSKH))
    own_KN = jnp.repeat(jnp.eye(kv_heads, dtype=q_BTNH.dtype), heads // kv_heads, axis=1)
    q_BIN = jnp.einsum("BNH,KN->BKHN", q_BTNH[:, 0], own_KN).reshape(batch, kv_heads * head_dim, heads)
    scores_BSN = jnp.einsum("BSI,BIN->BSN", keys_BSI, q_BIN, preferred_element_type=jnp.float32)
    scores_BSN = jnp.where(seen_BTS[:, 0, :, None], scores_BSN * head_dim**-0.5, UNSEEN)
    weights_BSN = jax.nn.softmax(scores_BSN, axis=1).astype(q_BTNH.dtype)
    mixed_BNI = jnp.einsum("BSN,BSI->BNI", weights_BSN, values_BSI)
    mixed_BNKH = mixed_BNI.reshape(batch, heads, kv_heads, head_dim)
    return jnp.einsum("BNKH,KN->BNH", mixed_BNKH, own_KN).reshape(q_BTNH.shape)
