"""Attention over a cache whose slots are sharded over the mesh axis `context`, inside a `jax.shard_map`.

Position p of a row is on device p % X, where it is the row's token number p // X: a row of any length, and the keys
under any sliding window, are shared by all devices. Whole parts of a row would leave most devices without work until it
is nearly full, and under a window for ever. What is true of positions in `cached.py` is true here of a device's own
numbers: number j is in slot `j % S`, or in block `table_BM[row, j // S]`, of S slots on each device.

Each device stores those of the new tokens that are its own, and attends to its own keys; then the largest scores, sums
of weights and sums of values are combined. What is in the cache is never sent. A few new tokens are on all devices, and
so are their results, by all-reduces. Of a chunk of a prompt, each device has the x-th part: queries, keys and values of
the chunk are gathered, and a reduce-scatter gives every device the results of its own.

Letters of this file besides the package's: X devices of the axis, M blocks of a row.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.attention_kernels.cached import (
    GATHERED,
    Online,
    add_many_queries,
    add_one_query,
    write_blocks_at,
    write_slots_at,
)
from qwen_moe_jax.nn.bits import from_bits
from qwen_moe_jax.rounding import ceil_div
from qwen_moe_jax.sharding.rules import CONTEXT

#: Slots of each row that are read at a time: of many queries, the scores of all of them are in memory.
_READ_BY_ONE, _READ_BY_MANY = 2048, 512


def write_own(
    store: jax.Array,
    x_BTKH: jax.Array,
    layer: jax.Array,
    lengths_B: jax.Array,
    token_mask_BT: jax.Array,
    table_BM: jax.Array | None = None,
) -> jax.Array:
    """Writes keys or values of this device's own among the new tokens; as `cached.write_slots` and `write_blocks`.

    Args:
        store: of all layers, [L, B, S, K, H], or in blocks, [L, P, S, K, H].
        x_BTKH: of the new tokens.
        layer: int32 []; which layer's they are.
        lengths_B: int32; tokens of each row before these.
        token_mask_BT: False for padding, which is not written.
        table_BM: int32; the blocks of each row, where there are blocks.
    """
    position_BT = lengths_B[:, None] + jnp.arange(x_BTKH.shape[1], dtype=jnp.int32)
    number_BT, device_BT = position_BT // jax.lax.axis_size(CONTEXT), position_BT % jax.lax.axis_size(CONTEXT)
    is_own_BT = token_mask_BT & (device_BT == jax.lax.axis_index(CONTEXT))
    if table_BM is None:
        return write_slots_at(store, x_BTKH, layer, number_BT, is_own_BT)
    return write_blocks_at(store, x_BTKH, layer, number_BT, is_own_BT, table_BM)


def attend_over_devices(
    q_BTNH: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    lengths_B: jax.Array,
    token_mask_BT: jax.Array,
    *,
    sliding_window: int | None = None,
    table_BM: jax.Array | None = None,
    shared: bool = False,
) -> jax.Array:
    """Attention of new tokens, stored already, over all of their row so far, [B, T, N, H]; as `cached.attend_cached`.

    With `shared`, each device has the results of its own part of the tokens alone, [B, T / X, N, H].

    Args:
        q_BTNH: queries of all new tokens, on every device of `context`.
        keys, values: this device's, of all layers, [L, B, S, K, H], or in blocks, [L, P, S, K, H].
        layer: int32 []; which layer to attend in.
        lengths_B: int32; tokens of each row before these.
        token_mask_BT: False for padding, which follows the tokens of a row; its results mean nothing.
        sliding_window: number of keys a query sees, itself included; None for all.
        table_BM: int32; the blocks of each row, where keys and values are in blocks.
        shared: whether the devices share the new tokens.
    """
    shards, own, length = jax.lax.axis_size(CONTEXT), jax.lax.axis_index(CONTEXT), q_BTNH.shape[1]
    query_BT = lengths_B[:, None] + jnp.arange(length, dtype=jnp.int32)
    end_B = lengths_B + jnp.sum(token_mask_BT, axis=1, dtype=jnp.int32)
    last_B = (end_B - 1 - own) // shards  # the number of each row's last token here; -1 where it has none
    slots, count = _slots_of(keys, table_BM), _at_a_time(keys, table_BM, length)
    attend = add_one_query if length == 1 else add_many_queries

    def step(index: jax.Array, carry: Online) -> Online:
        start = index * count
        first = jnp.minimum(start, slots - count)  # the last of them may begin before the end of those read already
        keys_BSKH, values_BSKH = (
            from_bits(_read(x, layer, first, count, table_BM)).astype(q_BTNH.dtype) for x in (keys, values)
        )
        slot_S = first + jnp.arange(count, dtype=jnp.int32)
        number_BS = last_B[:, None] - (last_B[:, None] - slot_S) % slots  # negative where nothing was written yet
        distance_BTS = query_BT[:, :, None] - (number_BS * shards + own)[:, None]
        seen_BTS = (distance_BTS >= 0) & ((number_BS >= 0) & (slot_S >= start))[:, None]
        if sliding_window is not None:
            seen_BTS &= distance_BTS < sliding_window
        return attend(carry, q_BTNH, keys_BSKH, values_BSKH, seen_BTS)

    # The loop's length does not depend on the rows, so that its work can be counted before it runs.
    def step_if_used(index: jax.Array, carry: Online) -> Online:
        return jax.lax.cond(index * count <= jnp.max(last_B), step, lambda _, carry: carry, index, carry)

    done = jax.lax.fori_loop(0, ceil_div(slots, count), step_if_used, Online.nothing(q_BTNH))
    return _combined(done, shared=shared).result().astype(q_BTNH.dtype)


def gather_tokens(*parts: jax.Array) -> list[jax.Array]:
    """Queries, keys and values [B, T / X, heads, H] of all devices' new tokens, [B, T, heads, H], by one all-gather."""
    ends = np.cumsum([part.shape[2] for part in parts])[:-1]
    gathered = jax.lax.all_gather(jnp.concatenate(parts, axis=2), CONTEXT, axis=1, tiled=True)
    return jnp.split(gathered, ends, axis=2)


def combined_bytes(rows: int, tokens: int, heads: int, head_dim: int) -> int:
    """Bytes that are all-reduced over `context` in one layer: a device's rows, their new tokens, its query heads."""
    return rows * tokens * heads * (head_dim + 2) * 4


def chunk_bytes(
    rows: int, tokens: int, heads: int, kv_heads: int, head_dim: int, *, itemsize: int
) -> tuple[int, int, int]:
    """The same of chunks of prompts: bytes that are all-gathered, all-reduced, and reduced and scattered.

    Args:
        rows, tokens, heads, kv_heads: a device's rows, the tokens of a whole chunk, the device's heads.
        head_dim: of a head.
        itemsize: bytes of a number of queries, keys and values; sums are float32.
    """
    each = rows * tokens
    return each * (heads + 2 * kv_heads) * head_dim * itemsize, each * heads * 4, each * heads * (head_dim + 1) * 4


def read_at_a_time(slots: int, length: int) -> int:
    """Slots that are read at a time, of so many of a row on a device, for so many new tokens."""
    return min(slots, _READ_BY_ONE if length == 1 else _READ_BY_MANY)


def _combined(own: Online, *, shared: bool) -> Online:
    """Softmax over the keys of all devices: on each of them, or, `shared`, of the part of the tokens that it has."""
    top_BTN = jax.lax.pmax(own.top_BTN, CONTEXT)
    sums_BTNH = jnp.concatenate([own.mixed_BTNH, own.sum_BTN[..., None]], axis=-1)
    sums_BTNH = sums_BTNH * jnp.exp(own.top_BTN - top_BTN)[..., None]
    if shared:
        sums_BTNH = jax.lax.psum_scatter(sums_BTNH, CONTEXT, scatter_dimension=1, tiled=True)
        length = sums_BTNH.shape[1]
        top_BTN = jax.lax.dynamic_slice_in_dim(top_BTN, jax.lax.axis_index(CONTEXT) * length, length, axis=1)
    else:
        sums_BTNH = jax.lax.psum(sums_BTNH, CONTEXT)
    return Online(top_BTN, sums_BTNH[..., -1], sums_BTNH[..., :-1])


def _slots_of(keys: jax.Array, table_BM: jax.Array | None) -> int:
    """Slots that a row has on a device."""
    return keys.shape[2] if table_BM is None else keys.shape[2] * table_BM.shape[1]


def _at_a_time(keys: jax.Array, table_BM: jax.Array | None, length: int) -> int:
    """Slots that are read at a time, whole blocks of them."""
    if table_BM is None:
        return read_at_a_time(keys.shape[2], length)
    return keys.shape[2] * max(min(GATHERED // keys.shape[2], table_BM.shape[1]), 1)


def _read(store: jax.Array, layer: jax.Array, first: jax.Array, count: int, table_BM: jax.Array | None) -> jax.Array:
    """Keys or values of some slots of every row, [B, count, K, H]."""
    if table_BM is None:
        sizes = (1, store.shape[1], count, *store.shape[3:])
        return jax.lax.dynamic_slice(store, (layer, 0, first, 0, 0), sizes)[0]
    size = store.shape[2]
    block_BG = jax.lax.dynamic_slice_in_dim(table_BM, first // size, count // size, axis=1)
    return store[layer, block_BG].reshape(table_BM.shape[0], count, *store.shape[3:])
