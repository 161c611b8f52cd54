"""Attention over rows whose positions are sharded over the mesh axis `context`, inside a `jax.shard_map`.

Each device has the queries, keys and values of some blocks of a row (`sharding.positions.RowOrder`). Queries stay; keys
and values come to them in one of three ways, with the same result:

- *all-gather*: all keys and values at once, again in the backward pass, whose gradients are summed and scattered.
- *ring*: the keys and values of one device after the other, each passed on to the next device while they are met. The
  sums over the keys met so far (`blockwise.Met`) are the queries' own, so that nothing is merged afterwards. Backward,
  the gradients of keys and values travel with them, and arrive where they are stored.
- *halo*: under a window that is no longer than a chunk, the last blocks of the chunk before each of the device's own.

Source: Liu, Zaharia and Abbeel, Ring Attention, arXiv 2310.01889.

Letters of this file besides those of `blockwise.py`: X devices of the axis, P pairs of blocks.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from qwen_moe_jax.attention_kernels.blockwise import (
    ATTENDED,
    Arrays,
    Blocks,
    Gradients,
    Met,
    Queries,
    attend_pairs,
    meet,
    meet_backward,
    no_gradients,
    split,
)
from qwen_moe_jax.attention_kernels.splash import attend_rows_by_splash
from qwen_moe_jax.config import Attention, ContextParallel
from qwen_moe_jax.sharding.positions import RowOrder
from qwen_moe_jax.sharding.rules import CONTEXT

#: A pair of blocks of which no query sees a key.
_NOTHING = (0, 0, 0, 1)
#: The number of a block that is not there.
_ABSENT = -1


def attend_over_context(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    row_segment_ids_BS: jax.Array,
    *,
    order: RowOrder,
    window: int | None,
    method: ContextParallel,
    attention: Attention = "blocks",
) -> jax.Array:
    """Causal grouped-query attention within segments over whole rows; see `blockwise.attend_in_blocks`.

    Args:
        q_BTNH: this device's queries.
        k_BTKH: its keys.
        v_BTKH: its values.
        row_segment_ids_BS: int32; of the whole rows, as they are stored.
        order: the blocks of each device.
        window: keys that a query sees, itself included; None sees all before it.
        method: how keys and values come to the queries where there is no halo.
        attention: the kernels; "splash" takes keys and values of whole rows, and so goes with "all_gather".
    """
    if attention == "splash":
        return _by_splash(q_BTNH, k_BTKH, v_BTKH, row_segment_ids_BS, order, window)
    if halo_blocks(order, window):
        return _by_halo(q_BTNH, k_BTKH, v_BTKH, row_segment_ids_BS, order, window)
    methods: dict[ContextParallel, Callable[..., jax.Array]] = {"all_gather": _by_all_gather, "ring": _by_ring}
    return methods[method](q_BTNH, k_BTKH, v_BTKH, row_segment_ids_BS, order, window)


def halo_blocks(order: RowOrder, window: int | None) -> int:
    """Blocks before a chunk that its queries see, where they are not more than a chunk; else, and without any, 0."""
    needed = 0 if window is None else math.ceil((window - 1) / order.block)
    return needed if needed <= order.count else 0


def sent_bytes(
    order: RowOrder, window: int | None, method: ContextParallel, *, token_bytes: int, sum_bytes: int
) -> int:
    """Bytes that a device sends for one row in one layer, forward and backward without rematerialisation.

    Forward, the keys and values of a device go to X - 1 others. Backward they go there again; their gradients come
    back, summed on the way: X - 1 parts under all-gather, X under the ring, which sends them home in the end. A halo
    is sent forward, and its gradients backward. Segments are not sent: every device knows those of whole rows.

    Args:
        order: of the row.
        window: see `attend_over_context`.
        method: likewise.
        token_bytes: of the keys and values of one token.
        sum_bytes: of their gradients where they are summed: float32 in the ring.
    """
    others = order.shards - 1
    if halo := halo_blocks(order, window):
        return 2 * order.chunks * halo * order.block * token_bytes
    if method == "all_gather":
        return 3 * others * order.local * token_bytes
    return order.local * (2 * others * token_bytes + order.shards * sum_bytes)


def block_pairs(order: RowOrder, keys: Sequence[Sequence[int]], window: int | None) -> np.ndarray:
    """The pairs of blocks that each device computes, int32 [X, P, 4]; see `blockwise.attend_pairs`.

    Devices with fewer than others compute pairs of which no query sees a key.

    Args:
        order: the blocks of the queries.
        keys: for each device, the blocks of the keys it has, numbered from the start of the row.
        window: see `attend_over_context`.
    """
    found = []
    for device, key_blocks in enumerate(keys):
        query_row, key_row = np.array(order.blocks_of(device)), np.array(key_blocks)
        ahead = query_row[:, None] - key_row
        seen = (ahead >= 0) & (key_row != _ABSENT)
        if window is not None:
            seen &= ahead * order.block - (order.block - 1) < window
        i, j = np.nonzero(seen)
        found.append(np.stack([i, j, query_row[i], key_row[j]], axis=1))
    most = max(1, *(len(pairs) for pairs in found))
    padded = [np.concatenate([pairs, np.tile(_NOTHING, (most - len(pairs), 1))]) for pairs in found]
    return np.stack(padded).astype(np.int32)


def _own(x_X: np.ndarray | jax.Array) -> jax.Array:
    """This device's part of an array with a leading axis X."""
    return jnp.asarray(x_X)[jax.lax.axis_index(CONTEXT)]


def _blocks(order: RowOrder, window: int | None, count: int | None = None) -> Blocks:
    """So many blocks of a row; None are those of a device."""
    return Blocks(count=order.chunks * order.count if count is None else count, length=order.block, window=window)


def _ids_of(row_segment_ids_BS: jax.Array, order: RowOrder, device: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(row_segment_ids_BS, device * order.local, order.local, axis=1)


def _with_ids(
    keys: tuple[jax.Array, jax.Array], row_segment_ids_BS: jax.Array, order: RowOrder, device: jax.Array
) -> Arrays:
    """Keys and values of a device, in blocks, with their segments."""
    return Arrays(*keys, _blocks(order, None).split_ids(_ids_of(row_segment_ids_BS, order, device)))


def _by_all_gather(q_BTNH, k_BTKH, v_BTKH, row_segment_ids_BS, order: RowOrder, window: int | None) -> jax.Array:
    everywhere = [block for device in range(order.shards) for block in order.blocks_of(device)]
    pairs_P4 = _own(block_pairs(order, [everywhere] * order.shards, window))
    ids_BT = _ids_of(row_segment_ids_BS, order, jax.lax.axis_index(CONTEXT))
    blocks = _blocks(order, window), _blocks(order, window, len(everywhere))

    def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
        return attend_pairs(q_BTNH, k_BSKH, v_BSKH, (ids_BT, row_segment_ids_BS), pairs_P4, *blocks)

    return _with_whole_rows(attend, q_BTNH, k_BTKH, v_BTKH)


def _by_splash(q_BTNH, k_BTKH, v_BTKH, row_segment_ids_BS, order: RowOrder, window: int | None) -> jax.Array:
    def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
        return attend_rows_by_splash(q_BTNH, k_BSKH, v_BSKH, row_segment_ids_BS, order, window)

    return _with_whole_rows(attend, q_BTNH, k_BTKH, v_BTKH)


def _with_whole_rows(attend: Callable[..., jax.Array], q_BTNH, k_BTKH, v_BTKH) -> jax.Array:
    """`attend` with keys and values of whole rows, which are not kept for the backward pass but gathered again."""

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(ATTENDED))
    def gathered(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        k_BSKH, v_BSKH = (jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True) for x in (k_BTKH, v_BTKH))
        return attend(q_BTNH, k_BSKH, v_BSKH)

    return gathered(q_BTNH, k_BTKH, v_BTKH)


def _by_halo(q_BTNH, k_BTKH, v_BTKH, row_segment_ids_BS, order: RowOrder, window: int | None) -> jax.Array:
    """Device x has the chunk before its first one from device x - 1, and that before its second one from x + 1."""
    halo, chunk = halo_blocks(order, window), order.count * order.block
    shards, reach = order.shards, halo * order.block
    to_next = [(x, x + 1) for x in range(shards - 1)]
    to_previous = [(x + 1, x) for x in range(shards - 1)]
    ends = [slice(start - reach, start) for start in (chunk, 2 * chunk)][: order.chunks]

    def with_halo(x_BTKH: jax.Array) -> jax.Array:
        parts = [
            jax.lax.ppermute(x_BTKH[:, end], CONTEXT, way)
            for end, way in zip(ends, (to_next, to_previous), strict=False)
        ]
        return jnp.concatenate([x_BTKH, *parts], axis=1)

    def before(chunk_number: int) -> list[int]:
        """The last blocks of a chunk."""
        end = (chunk_number + 1) * order.count
        return list(range(end - halo, end))

    keys = []
    for device in range(shards):
        first = before(device - 1) if device else [_ABSENT] * halo
        # Before the second chunk of the last device is its own first one.
        second = before(2 * shards - 2 - device) if device < shards - 1 else [_ABSENT] * halo
        keys.append([*order.blocks_of(device), *first, *(second if order.chunks == 2 else [])])
    pairs_P4 = _own(block_pairs(order, keys, window))
    blocks = _blocks(order, window), _blocks(order, window, len(keys[0]))
    own, previous, following = (
        _ids_of(row_segment_ids_BS, order, (jax.lax.axis_index(CONTEXT) + step) % shards) for step in (0, -1, 1)
    )
    halo_ids = [ids_BT[:, end] for ids_BT, end in zip((previous, following), ends, strict=False)]
    ids = own, jnp.concatenate([own, *halo_ids], axis=1)
    return attend_pairs(q_BTNH, with_halo(k_BTKH), with_halo(v_BTKH), ids, pairs_P4, *blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _by_ring(q_BTNH, k_BTKH, v_BTKH, row_segment_ids_BS, order: RowOrder, window: int | None) -> jax.Array:
    return _ring_forward(q_BTNH, k_BTKH, v_BTKH, row_segment_ids_BS, order, window)[0]


def _ring_pairs(order: RowOrder, window: int | None) -> list[np.ndarray]:
    """The pairs [X, P, 4] of each step of the ring: in step r, a device has the keys of the device r before it."""
    return [
        block_pairs(order, [order.blocks_of((device - step) % order.shards) for device in range(order.shards)], window)
        for step in range(order.shards)
    ]


def _pass_on(tree, order: RowOrder):
    """Each device's arrays on the next one."""
    way = [(device, (device + 1) % order.shards) for device in range(order.shards)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, CONTEXT, way), tree)


def _walk(step, order: RowOrder, window: int | None, state, keys: tuple[jax.Array, jax.Array]):
    """Runs `step(state, keys and values, their device, pairs)` for those of each device, passed on meanwhile.

    The steps between the first and the last have pairs of one number, and are one program.
    """
    first, *others = _ring_pairs(order, window)
    own = jax.lax.axis_index(CONTEXT)
    following = _pass_on(keys, order)
    state = step(state, keys, own, _own(first))
    if len(others) > 1:
        most = max(pairs.shape[1] for pairs in others)
        pad = [np.tile(_NOTHING, (order.shards, most - pairs.shape[1], 1)) for pairs in others]
        table_RXP4 = np.stack([np.concatenate(both, axis=1) for both in zip(others, pad, strict=True)])[:-1]

        def body(carry, turn):
            (state, keys), (number, pairs_XP4) = carry, turn
            following = _pass_on(keys, order)
            return (step(state, keys, (own - number) % order.shards, _own(pairs_XP4)), following), None

        turns = np.arange(1, order.shards - 1, dtype=np.int32), table_RXP4.astype(np.int32)
        (state, following), _ = jax.lax.scan(body, (state, following), turns)
    return step(state, following, (own + 1) % order.shards, _own(others[-1]))


def _ring_forward(q_BTNH, k_BTKH, v_BTKH, row_segment_ids_BS, order: RowOrder, window: int | None):
    blocks, kv_heads = _blocks(order, window), k_BTKH.shape[2]
    q_nBKMH = split(blocks, q_BTNH, kv_heads)
    ids_nBC = blocks.split_ids(_ids_of(row_segment_ids_BS, order, jax.lax.axis_index(CONTEXT)))

    def step(met: Met, keys: tuple[jax.Array, jax.Array], device: jax.Array, pairs_P4: jax.Array) -> Met:
        return meet(met, q_nBKMH, ids_nBC, _with_ids(keys, row_segment_ids_BS, order, device), pairs_P4, blocks)

    keys = split(blocks, k_BTKH, kv_heads), split(blocks, v_BTKH, kv_heads)
    met = _walk(step, order, window, Met.nothing(q_nBKMH), keys)
    out_nBKMH, logsumexp_nBKM = met.result()
    out_BTNH = blocks.join(out_nBKMH.astype(q_BTNH.dtype), q_BTNH.shape[1]).reshape(q_BTNH.shape)
    out_BTNH = checkpoint_name(out_BTNH, ATTENDED)
    logsumexp_nBKM = checkpoint_name(logsumexp_nBKM, ATTENDED)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, row_segment_ids_BS, out_BTNH, logsumexp_nBKM)


def _ring_backward(order: RowOrder, window: int | None, saved, gradient_BTNH):
    q_BTNH, k_BTKH, v_BTKH, row_segment_ids_BS, out_BTNH, logsumexp_nBKM = saved
    blocks, kv_heads = _blocks(order, window), k_BTKH.shape[2]
    ids_BT = _ids_of(row_segment_ids_BS, order, jax.lax.axis_index(CONTEXT))
    queries = Queries.of(q_BTNH, out_BTNH, logsumexp_nBKM, gradient_BTNH, ids_BT, blocks, kv_heads)

    def step(sums: Gradients, keys: tuple[jax.Array, jax.Array], device: jax.Array, pairs_P4: jax.Array) -> Gradients:
        there = _with_ids(keys, row_segment_ids_BS, order, device)
        of_q_nBKMH, *of_keys = meet_backward(sums, queries, there, pairs_P4, blocks)
        return of_q_nBKMH, *_pass_on(of_keys, order)  # on to where the keys are in the next step, and in the end home

    keys = split(blocks, k_BTKH, kv_heads), split(blocks, v_BTKH, kv_heads)
    of_all = _walk(step, order, window, no_gradients(queries.q_nBKMH, *keys), keys)
    inputs = q_BTNH, k_BTKH, v_BTKH
    of_inputs = (blocks.join(x, like.shape[1]).reshape(like.shape) for x, like in zip(of_all, inputs, strict=True))
    return *(x.astype(like.dtype) for x, like in zip(of_inputs, inputs, strict=True)), None


_by_ring.defvjp(_ring_forward, _ring_backward)
