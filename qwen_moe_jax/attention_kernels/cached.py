"""Attention over a cache of keys and values, on one device's arrays.

Every row has a length of its own: position p of a row is in slot `p % S`. Or its keys and values are in blocks of S
tokens that any row may have: those of position p are in block `table_BM[row, p // S]`, P of which are stored.

bfloat16 is stored as its bits (uint16) in the caches of CPUs: there XLA widens the whole of a bfloat16 array before it
reads or writes a part. `stored_dtype` decides; the functions below take either.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_moe_jax.attention_kernels.blockwise import UNSEEN
from qwen_moe_jax.nn.bits import as_bits, from_bits

#: Tokens of each row that attention over blocks gathers at a time.
GATHERED = 256


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
    position_BT = lengths_B[:, None] + jnp.arange(x_BTKH.shape[1], dtype=jnp.int32)
    return write_slots_at(store_LBSKH, x_BTKH, layer, position_BT, token_mask_BT)


def write_slots_at(
    store_LBSKH: jax.Array, x_BTKH: jax.Array, layer: jax.Array, position_BT: jax.Array, written_BT: jax.Array
) -> jax.Array:
    """`write_slots` at these positions, of the tokens that are to be written."""
    num_slots = store_LBSKH.shape[2]
    slot_BT = jnp.where(written_BT, position_BT % num_slots, num_slots)  # outside: not written
    row_B1 = jnp.arange(x_BTKH.shape[0], dtype=jnp.int32)[:, None]
    x_BTKH = as_stored(x_BTKH, store_LBSKH)
    return store_LBSKH.at[layer, row_B1, slot_BT].set(x_BTKH, mode="drop", unique_indices=True)


def as_stored(x: jax.Array, store: jax.Array) -> jax.Array:
    """Keys or values as `store` has them: in its dtype, bfloat16 as its bits where it has bits."""
    x = x.astype(from_bits(store).dtype)
    return as_bits(x) if store.dtype == jnp.uint16 else x


def write_blocks(
    store_LPSKH: jax.Array,
    x_BTKH: jax.Array,
    layer: jax.Array,
    lengths_B: jax.Array,
    token_mask_BT: jax.Array,
    table_BM: jax.Array,
) -> jax.Array:
    """`write_slots` into blocks: `table_BM` int32 has those of each row, one for every S tokens."""
    position_BT = lengths_B[:, None] + jnp.arange(x_BTKH.shape[1], dtype=jnp.int32)
    return write_blocks_at(store_LPSKH, x_BTKH, layer, position_BT, token_mask_BT, table_BM)


def write_blocks_at(
    store_LPSKH: jax.Array,
    x_BTKH: jax.Array,
    layer: jax.Array,
    position_BT: jax.Array,
    written_BT: jax.Array,
    table_BM: jax.Array,
) -> jax.Array:
    """`write_blocks` at these positions, of the tokens that are to be written."""
    num_blocks, size = store_LPSKH.shape[1:3]
    index_BT = jnp.minimum(position_BT // size, table_BM.shape[1] - 1)
    block_BT = jnp.where(written_BT, jnp.take_along_axis(table_BM, index_BT, axis=1), num_blocks)
    x_BTKH = as_stored(x_BTKH, store_LPSKH)
    return store_LPSKH.at[layer, block_BT, position_BT % size].set(x_BTKH, mode="drop", unique_indices=True)


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
    last_B1 = lengths_B[:, None] + jnp.sum(token_mask_BT, axis=1, keepdims=True, dtype=jnp.int32) - 1
    position_BS = last_B1 - (last_B1 - jnp.arange(num_slots, dtype=jnp.int32)) % num_slots
    query_BT = lengths_B[:, None] + jnp.arange(length, dtype=jnp.int32)
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


def attend_blocks(
    q_BTNH: jax.Array,
    keys_LPSKH: jax.Array,
    values_LPSKH: jax.Array,
    layer: jax.Array,
    lengths_B: jax.Array,
    token_mask_BT: jax.Array,
    table_BM: jax.Array,
) -> jax.Array:
    """`attend_cached` over blocks: `GATHERED` tokens of each row at a time, up to the end of the longest row.

    Softmax is computed online (arXiv 1805.02867). Blocks of no row, and slots beyond a row's end, hold finite numbers.
    """
    size, length = keys_LPSKH.shape[2], q_BTNH.shape[1]
    group = max(min(GATHERED // size, table_BM.shape[1]), 1)
    table_BM = jnp.pad(table_BM, ((0, 0), (0, -table_BM.shape[1] % group)))
    end_B = lengths_B + jnp.sum(token_mask_BT, axis=1, dtype=jnp.int32)
    query_BT = lengths_B[:, None] + jnp.arange(length, dtype=jnp.int32)
    attend = add_one_query if length == 1 else add_many_queries
    tokens = group * size

    def step(index: jax.Array, carry: Online) -> Online:
        block_BG = jax.lax.dynamic_slice_in_dim(table_BM, index * group, group, axis=1)
        keys_BSKH, values_BSKH = (
            from_bits(x[layer, block_BG]).reshape(q_BTNH.shape[0], tokens, *x.shape[3:]).astype(q_BTNH.dtype)
            for x in (keys_LPSKH, values_LPSKH)
        )
        position_S = index * tokens + jnp.arange(tokens, dtype=jnp.int32)
        seen_BTS = (position_S <= query_BT[:, :, None]) & (position_S < end_B[:, None, None])
        return attend(carry, q_BTNH, keys_BSKH, values_BSKH, seen_BTS)

    steps = (jnp.max(end_B) + tokens - 1) // tokens
    return jax.lax.fori_loop(0, steps, step, Online.nothing(q_BTNH)).result().astype(q_BTNH.dtype)


class Online(NamedTuple):
    """Softmax over the keys so far, float32: the largest score, the sum of weights, and the weighted sum of values."""

    top_BTN: jax.Array
    sum_BTN: jax.Array
    mixed_BTNH: jax.Array

    @classmethod
    def nothing(cls, q_BTNH: jax.Array) -> "Online":
        """Before the first key."""
        shape = q_BTNH.shape
        none_BTN = jnp.zeros(shape[:-1], jnp.float32)
        return cls(jnp.full(shape[:-1], UNSEEN, jnp.float32), none_BTN, jnp.zeros(shape, jnp.float32))

    def result(self) -> jax.Array:
        """Attention [B, T, N, H], float32; zeros for a query that saw no key."""
        return self.mixed_BTNH / jnp.maximum(self.sum_BTN, 1e-30)[..., None]


def _rescaled(carry: Online, top_BTN: jax.Array) -> tuple[jax.Array, Online]:
    """The new largest score, and the sums so far by it."""
    top_BTN = jnp.maximum(carry.top_BTN, top_BTN)
    scale_BTN = jnp.exp(carry.top_BTN - top_BTN)
    return top_BTN, Online(top_BTN, carry.sum_BTN * scale_BTN, carry.mixed_BTNH * scale_BTN[..., None])


def add_many_queries(
    carry: Online, q_BTNH: jax.Array, keys_BSKH: jax.Array, values_BSKH: jax.Array, seen_BTS: jax.Array
) -> Online:
    """More keys for many queries a row; see `_many_queries`."""
    batch, length, heads, head_dim = q_BTNH.shape
    kv_heads = keys_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, keys_BSKH, preferred_element_type=jnp.float32)
    scores_BKGTS = jnp.where(seen_BTS[:, None, None], scores_BKGTS * head_dim**-0.5, UNSEEN)

    def by_query(x_BKGT: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_BKGT, 3, 1).reshape(batch, length, heads)

    top_BTN, carry = _rescaled(carry, by_query(jnp.max(scores_BKGTS, axis=-1)))
    top_BKGT = jnp.moveaxis(top_BTN.reshape(batch, length, kv_heads, -1), 1, 3)
    weights_BKGTS = jnp.where(seen_BTS[:, None, None], jnp.exp(scores_BKGTS - top_BKGT[..., None]), 0)
    mixed_BTKGH = jnp.einsum(
        "BKGTS,BSKH->BTKGH", weights_BKGTS.astype(q_BTNH.dtype), values_BSKH, preferred_element_type=jnp.float32
    )
    sum_BTN = carry.sum_BTN + by_query(jnp.sum(weights_BKGTS, axis=-1))
    return Online(top_BTN, sum_BTN, carry.mixed_BTNH + mixed_BTKGH.reshape(carry.mixed_BTNH.shape))


def add_one_query(
    carry: Online, q_BTNH: jax.Array, keys_BSKH: jax.Array, values_BSKH: jax.Array, seen_BTS: jax.Array
) -> Online:
    """More keys for one query a row; see `_one_query`."""
    batch, _, heads, head_dim = q_BTNH.shape
    num_slots, kv_heads = keys_BSKH.shape[1:3]
    keys_BSI, values_BSI = (x.reshape(batch, num_slots, kv_heads * head_dim) for x in (keys_BSKH, values_BSKH))
    own_KN = jnp.repeat(jnp.eye(kv_heads, dtype=q_BTNH.dtype), heads // kv_heads, axis=1)
    q_BIN = jnp.einsum("BNH,KN->BKHN", q_BTNH[:, 0], own_KN).reshape(batch, kv_heads * head_dim, heads)
    scores_BSN = jnp.einsum("BSI,BIN->BSN", keys_BSI, q_BIN, preferred_element_type=jnp.float32)
    seen_BS1 = seen_BTS[:, 0, :, None]
    scores_BSN = jnp.where(seen_BS1, scores_BSN * head_dim**-0.5, UNSEEN)
    top_B1N, carry = _rescaled(carry, jnp.max(scores_BSN, axis=1)[:, None])
    weights_BSN = jnp.where(seen_BS1, jnp.exp(scores_BSN - top_B1N), 0)
    mixed_BNI = jnp.einsum(
        "BSN,BSI->BNI", weights_BSN.astype(q_BTNH.dtype), values_BSI, preferred_element_type=jnp.float32
    )
    mixed_BNH = jnp.einsum("BNKH,KN->BNH", mixed_BNI.reshape(batch, heads, kv_heads, head_dim), own_KN)
    return Online(top_B1N, carry.sum_BTN + jnp.sum(weights_BSN, axis=1)[:, None], carry.mixed_BTNH + mixed_BNH[:, None])
