"""Keys and values of the tokens a model has read, so that a new token costs one token's work.

Every row of the batch has a length of its own: position p of a row is in slot `p % S` of its layer. Layers of full
attention have a slot for every token there may be; sliding layers have a ring, as long as their window and what is
written in one step.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.attention_kernels.cached import attend_cached, stored_dtype, write_slots
from qwen_moe_jax.config import LayerKind, ModelConfig
from qwen_moe_jax.model.segments import plan_segments
from qwen_moe_jax.sharding.rules import BATCH

#: Keys and values [L, B, S, K, H] are sharded as their rows and heads are: attention needs no collective.
STORED: Any = P(None, BATCH, None, "tensor", None)
#: Queries, keys and values [B, T, heads, H] of new tokens.
HEADS = P(BATCH, None, "tensor", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValues:
    """Keys and values of the layers at one position of a segment's period, stacked as their weights are.

    Attributes:
        keys_LBSKH: rotated keys, in the dtype that `attention_kernels.cached.stored_dtype` gives.
        values_LBSKH: values, likewise.
    """

    keys_LBSKH: jax.Array
    values_LBSKH: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values of a whole model for a batch.

    Attributes:
        segments: as `Decoder.segments`, one `KeyValues` for each position of each segment's period.
        lengths_B: int32; tokens of each row so far.
    """

    segments: tuple[tuple[KeyValues, ...], ...]
    lengths_B: jax.Array

    def specs(self) -> "Cache":
        """The `PartitionSpec` of every array."""
        segments = jax.tree.map(lambda _: STORED, self.segments)
        rows: Any = P(BATCH)
        return Cache(segments=segments, lengths_B=rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """One layer's part of a cache.

    Attributes:
        stored: of all layers at this position of the period.
        layer: int32 []; which of them this is.
        lengths_B: int32; tokens of each row before the new ones.
    """

    stored: KeyValues
    layer: jax.Array
    lengths_B: jax.Array


def slots(config: ModelConfig, kind: LayerKind, max_length: int, max_write: int) -> int:
    """Slots S of a layer: one for each of `max_length` tokens, or, sliding, for a window and `max_write` tokens more.

    While up to `max_write` tokens are written in one step, the first of them still needs the window before it.
    """
    if kind.mixer == "full":
        return max_length
    return min(max_length, config.attention.sliding_window + max_write - 1)


def abstract_cache(
    config: ModelConfig, mesh: Mesh, *, batch: int, max_length: int, max_write: int, dtype: jax.typing.DTypeLike
) -> Cache:
    """Shapes, dtypes and shardings of a cache, without allocating it.

    Args:
        config: of the model.
        mesh: of the model.
        batch: rows, a multiple of the devices that share the batch.
        max_length: the largest number of tokens of a row.
        max_write: tokens that are written in one step at most.
        dtype: of keys and values.
    """
    attention = config.attention
    dtype = stored_dtype(dtype, mesh.devices.flat[0].platform)

    def abstract(kind: LayerKind, repeats: int) -> KeyValues:
        num_slots = slots(config, kind, max_length, max_write)
        shape = (repeats, batch, num_slots, attention.num_key_value_heads, attention.head_dim)
        one: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, STORED))
        return KeyValues(keys_LBSKH=one, values_LBSKH=one)

    lengths_B: Any = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=NamedSharding(mesh, P(BATCH)))
    return Cache(
        segments=tuple(
            tuple(abstract(kind, segment.repeats) for kind in segment.period)
            for segment in plan_segments(config.layers)
        ),
        lengths_B=lengths_B,
    )


def empty_cache(abstract: Cache) -> Cache:
    """A cache without tokens, allocated as `abstract_cache` gives it."""
    return _zeros(abstract)()


@functools.cache
def _zeros(abstract: Cache) -> Callable[[], Cache]:
    """Compiled once: every request has a cache."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract)
    return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), out_shardings=shardings)


def update_cache(cache: LayerCache, k_BTKH: jax.Array, v_BTKH: jax.Array, token_mask_BT: jax.Array) -> LayerCache:
    """The cache with keys and values of the new tokens after those of their rows; padding is not written."""

    def local(stored: KeyValues, layer, lengths_B, k_BTKH, v_BTKH, token_mask_BT) -> KeyValues:
        return KeyValues(
            keys_LBSKH=write_slots(stored.keys_LBSKH, k_BTKH, layer, lengths_B, token_mask_BT),
            values_LBSKH=write_slots(stored.values_LBSKH, v_BTKH, layer, lengths_B, token_mask_BT),
        )

    spec = KeyValues(keys_LBSKH=STORED, values_LBSKH=STORED)
    in_specs = (spec, P(), P(BATCH), HEADS, HEADS, P(BATCH, None))
    stored = jax.shard_map(local, in_specs=in_specs, out_specs=spec, check_vma=False)(
        cache.stored, cache.layer, cache.lengths_B, k_BTKH, v_BTKH, token_mask_BT
    )
    return dataclasses.replace(cache, stored=stored)


def cached_attention(
    q_BTNH: jax.Array, cache: LayerCache, token_mask_BT: jax.Array, sliding_window: int | None
) -> jax.Array:
    """Attention of the new tokens, stored already, over all of their row so far; see `attend_cached`."""

    def local(q_BTNH, stored: KeyValues, layer, lengths_B, token_mask_BT) -> jax.Array:
        keys, values = stored.keys_LBSKH, stored.values_LBSKH
        return attend_cached(q_BTNH, keys, values, layer, lengths_B, token_mask_BT, sliding_window)

    spec = KeyValues(keys_LBSKH=STORED, values_LBSKH=STORED)
    in_specs = (HEADS, spec, P(), P(BATCH), P(BATCH, None))
    return jax.shard_map(local, in_specs=in_specs, out_specs=HEADS, check_vma=False)(
        q_BTNH, cache.stored, cache.layer, cache.lengths_B, token_mask_BT
    )
