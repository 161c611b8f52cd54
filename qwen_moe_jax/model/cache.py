"""Keys and values of the tokens a model has seen, so that a new token costs one token's work.

Every row of the batch has a length of its own: token p of a row stands in slot `p % S` of its layer. Layers that see
everything have a slot for every token there may be; sliding layers have a ring, as long as their window and what is
written at once.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.attention_kernels.blockwise import UNSEEN
from qwen_moe_jax.config import LayerKind, ModelConfig
from qwen_moe_jax.model.segments import plan_segments
from qwen_moe_jax.nn.bits import as_bits, from_bits
from qwen_moe_jax.sharding.rules import BATCH

#: Keys and values [L, B, S, K, H] lie with their sequences and heads: nothing is exchanged for attention.
STORED = P(None, BATCH, None, "tensor", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValues:
    """What the layers at one place of a segment's period update_cache, stacked as their weights are.

    Attributes:
        keys_LBSKH: rotated keys; bfloat16 as its bits, uint16 (see `nn.bits`).
        values_LBSKH: values, likewise.
    """

    keys_LBSKH: jax.Array
    values_LBSKH: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """What a whole model remembers of a batch.

    Attributes:
        segments: as `LayerStack.segments`, one `KeyValues` for each place of each segment's period.
        lengths_B: int32; tokens of each row so far.
    """

    segments: tuple[tuple[KeyValues, ...], ...]
    lengths_B: jax.Array


def slots(config: ModelConfig, kind: LayerKind, max_length: int, max_write: int) -> int:
    """Slots S of a layer: one for each of `max_length` tokens, or, sliding, for a window and `max_write` tokens more.

    While up to `max_write` tokens are written at once, the first of them still needs the window before it.
    """
    if kind.attention == "full":
        return max_length
    return min(max_length, config.attention.sliding_window + max_write - 1)


def abstract_cache(
    config: ModelConfig, mesh: Mesh, *, batch: int, max_length: int, max_write: int, dtype: str
) -> Cache:
    """Shapes, dtypes and shardings of a cache, without allocating it.

    Args:
        config: of the model.
        mesh: of the model.
        batch: rows, a multiple of the devices that share the batch.
        max_length: tokens that a row may come to.
        max_write: tokens that are written at once at most.
        dtype: of keys and values.
    """
    attention = config.attention

    def described(kind: LayerKind, repeats: int) -> KeyValues:
        room = slots(config, kind, max_length, max_write)
        shape = (repeats, batch, room, attention.num_key_value_heads, attention.head_dim)
        bits = jax.eval_shape(as_bits, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
        one = jax.ShapeDtypeStruct(shape, bits.dtype, sharding=NamedSharding(mesh, STORED))
        return KeyValues(keys_LBSKH=one, values_LBSKH=one)

    return Cache(
        segments=tuple(
            tuple(described(kind, segment.repeats) for kind in segment.period)
            for segment in plan_segments(config.layers)
        ),
        lengths_B=jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=NamedSharding(mesh, P(BATCH))),
    )


def empty_cache(described: Cache) -> Cache:
    """The cache that `abstract_cache` told of, in place on its devices, with nothing in it."""
    return _zeros(described)()


@functools.cache
def _zeros(described: Cache) -> Callable[[], Cache]:
    """Compiled once: every request has a cache."""
    shardings = jax.tree.map(lambda x: x.sharding, described)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), described)
    return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), out_shardings=shardings)


def cache_bytes(config: ModelConfig, *, batch: int, max_length: int, max_write: int, dtype: str) -> int:
    """Bytes of keys and values on all devices together: 2 * sum over layers of B * S * K * H * itemsize."""
    attention = config.attention
    places = sum(slots(config, kind, max_length, max_write) for kind in config.layers)
    per_slot = 2 * attention.num_key_value_heads * attention.head_dim * jnp.dtype(dtype).itemsize
    return batch * places * per_slot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """One layer's share of the cache, as attention meets it.

    Attributes:
        stored: of all layers at this place of the period.
        layer: int32 []; which of them this is.
        lengths_B: int32; tokens of each row before the present ones.
    """

    stored: KeyValues
    layer: jax.Array
    lengths_B: jax.Array


def update_cache(past: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, token_mask_BT: jax.Array) -> KeyValues:
    """Writes the keys and values of the present tokens behind those of their rows; padding is not written."""

    def local(stored: KeyValues, layer, lengths_B, k_BTKH, v_BTKH, token_mask_BT) -> KeyValues:
        batch, length = token_mask_BT.shape
        room = stored.keys_LBSKH.shape[2]
        slot_BT = (lengths_B[:, None] + jnp.arange(length)) % room
        slot_BT = jnp.where(token_mask_BT, slot_BT, room)  # outside: dropped
        row_B1 = jnp.arange(batch)[:, None]

        def write(store_LBSKH: jax.Array, x_BTKH: jax.Array) -> jax.Array:
            x_BTKH = as_bits(x_BTKH.astype(from_bits(store_LBSKH).dtype))
            return store_LBSKH.at[layer, row_B1, slot_BT].set(x_BTKH, mode="drop", unique_indices=True)

        return KeyValues(keys_LBSKH=write(stored.keys_LBSKH, k_BTKH), values_LBSKH=write(stored.values_LBSKH, v_BTKH))

    heads, spec = P(BATCH, None, "tensor", None), KeyValues(keys_LBSKH=STORED, values_LBSKH=STORED)
    in_specs = (spec, P(), P(BATCH), heads, heads, P(BATCH, None))
    return jax.shard_map(local, in_specs=in_specs, out_specs=spec, check_vma=False)(
        past.stored, past.layer, past.lengths_B, k_BTKH, v_BTKH, token_mask_BT
    )


def cached_attention(
    q_BTNH: jax.Array, past: LayerCache, token_mask_BT: jax.Array, sliding_window: int | None
) -> jax.Array:
    """Attention of the present tokens over all of their row so far, themselves included.

    The present tokens' keys and values are stored already. Scores and softmax are float32. A padding query's result is
    finite and means nothing.
    """

    def local(q_BTNH, stored: KeyValues, layer, lengths_B, token_mask_BT) -> jax.Array:
        keys_BSKH, values_BSKH = (
            from_bits(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)).astype(q_BTNH.dtype)
            for x in (stored.keys_LBSKH, stored.values_LBSKH)
        )
        room, length = keys_BSKH.shape[1], q_BTNH.shape[1]
        # Slot s holds the last position that is s modulo the room; negative where nothing was written yet.
        last_B1 = lengths_B[:, None] + jnp.sum(token_mask_BT, axis=1, keepdims=True) - 1
        position_BS = last_B1 - (last_B1 - jnp.arange(room)) % room
        query_BT = lengths_B[:, None] + jnp.arange(length)
        distance_BTS = query_BT[:, :, None] - position_BS[:, None, :]
        seen_BTS = (distance_BTS >= 0) & (position_BS >= 0)[:, None, :]
        if sliding_window is not None:
            seen_BTS &= distance_BTS < sliding_window
        attend = _attend_alone if length == 1 else _attend_together
        return attend(q_BTNH, keys_BSKH, values_BSKH, seen_BTS)

    heads, spec = P(BATCH, None, "tensor", None), KeyValues(keys_LBSKH=STORED, values_LBSKH=STORED)
    in_specs = (heads, spec, P(), P(BATCH), P(BATCH, None))
    return jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=False)(
        q_BTNH, past.stored, past.layer, past.lengths_B, token_mask_BT
    )


def _attend_together(q_BTNH: jax.Array, keys_BSKH: jax.Array, values_BSKH: jax.Array, seen_BTS: jax.Array) -> jax.Array:
    """Head by head. It takes keys and values turned round, head before slot: many queries share the price of that."""
    batch, length, heads, head_dim = q_BTNH.shape
    kv_heads = keys_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, keys_BSKH, preferred_element_type=jnp.float32)
    scores_BKGTS = jnp.where(seen_BTS[:, None, None], scores_BKGTS * head_dim**-0.5, UNSEEN)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(q_BTNH.dtype)
    mixed_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, values_BSKH)
    return mixed_BTKGH.reshape(q_BTNH.shape)


def _attend_alone(q_BTNH: jax.Array, keys_BSKH: jax.Array, values_BSKH: jax.Array, seen_BTS: jax.Array) -> jax.Array:
    """The same for one query a row: all heads in one matmul over keys and values as they lie.

    Every query head meets the keys of all heads, with zeros where they are not its own: K times the products, of
    which a single query has so few that reading the cache is what takes the time, on any device.
    """
    batch, _, heads, head_dim = q_BTNH.shape
    room, kv_heads = keys_BSKH.shape[1:3]
    keys_BSI, values_BSI = (x.reshape(batch, room, kv_heads * head_dim) for x in (keys_BSKH, values_BSKH))
    own_KN = jnp.repeat(jnp.eye(kv_heads, dtype=q_BTNH.dtype), heads // kv_heads, axis=1)
    q_BIN = jnp.einsum("BNH,KN->BKHN", q_BTNH[:, 0], own_KN).reshape(batch, kv_heads * head_dim, heads)
    scores_BSN = jnp.einsum("BSI,BIN->BSN", keys_BSI, q_BIN, preferred_element_type=jnp.float32)
    scores_BSN = jnp.where(seen_BTS[:, 0, :, None], scores_BSN * head_dim**-0.5, UNSEEN)
    weights_BSN = jax.nn.softmax(scores_BSN, axis=1).astype(q_BTNH.dtype)
    mixed_BNI = jnp.einsum("BSN,BSI->BNI", weights_BSN, values_BSI)
    mixed_BNKH = mixed_BNI.reshape(batch, heads, kv_heads, head_dim)
    return jnp.einsum("BNKH,KN->BNH", mixed_BNKH, own_KN).reshape(q_BTNH.shape)
