"""What the layers keep of the tokens a model has read, so that a new token costs one token's work.

Attention keeps keys and values. Every row of the batch has a length of its own: position p of a row is in slot `p % S`
of its layer. Layers of full attention have a slot for every token there may be; sliding layers have a ring, as long as
their window and what is written in one step. Linear layers keep a state that does not grow; it cannot go back to an
earlier token, only to none: a row of length 0 starts from zeros, whatever is stored.

The mesh axis `context` shards the slots of attention, and the tokens of a chunk of a prompt. A few new tokens, and the
states of linear layers, are on all devices of it.

Letters of this file besides the package's: W columns of a convolution, C its channels. In the state of a linear layer
[B, N, H, H], N are value heads, and the sizes are those of a key head and of a value head.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.attention_kernels.cached import (
    as_stored,
    attend_blocks,
    attend_cached,
    stored_dtype,
    write_blocks,
    write_slots,
)
from qwen_moe_jax.attention_kernels.cached_context import attend_over_devices, gather_tokens, write_own
from qwen_moe_jax.attention_kernels.cached_cpu import attends_in_place, write_and_attend
from qwen_moe_jax.attention_kernels.flash_cpu import attend_stored, attends_many
from qwen_moe_jax.config import LayerKind, ModelConfig
from qwen_moe_jax.errors import ShardingError
from qwen_moe_jax.model.segments import plan_segments
from qwen_moe_jax.nn.bits import from_bits
from qwen_moe_jax.rounding import ceil_div, round_up
from qwen_moe_jax.sharding.rules import BATCH, CONTEXT, positions_axis, tokens_spec

#: Keys and values [L, B, S, K, H] are sharded as their rows and heads are, which needs no collective, and their slots
#: over `context` (`attention_kernels.cached_context`).
STORED: Any = P(None, BATCH, CONTEXT, "tensor", None)
#: Queries, keys and values [B, T, heads, H] of a few new tokens.
HEADS = P(BATCH, None, "tensor", None)
#: The state [B, N, H, H] of a linear layer, and the columns [B, W, C] of its convolution.
STATE, COLUMNS = P(BATCH, "tensor", None, None), P(BATCH, None, "tensor")
#: The states [B, T, N, H, H] after each of T tokens.
STATES = P(BATCH, None, "tensor", None, None)


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

    @staticmethod
    def specs() -> "KeyValues":
        """The `PartitionSpec` of every array."""
        return KeyValues(keys_LBSKH=STORED, values_LBSKH=STORED)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedKeyValues:
    """`KeyValues` of layers of full attention in blocks, which the rows take as their texts grow (`Cache.table_BM`).

    P blocks of S tokens are stored, as many on each device that shares the batch; a row uses those of its own device.

    Attributes:
        keys_LPSKH, values_LPSKH: as `KeyValues`; of the first block of each device zeros, which no row writes.
    """

    keys_LPSKH: jax.Array
    values_LPSKH: jax.Array

    @staticmethod
    def specs() -> "PagedKeyValues":
        """The `PartitionSpec` of every array."""
        return PagedKeyValues(keys_LPSKH=STORED, values_LPSKH=STORED)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentState:
    """What linear layers at one position of a segment's period keep, stacked as their weights are.

    Attributes:
        state_LBNHH: of the gated delta rule, float32: a matrix from keys to values for each value head.
        conv_LBWC: what entered the convolution at the last W tokens of each row, the newest last, as `KeyValues` are
            stored; zeros before its first token.
    """

    state_LBNHH: jax.Array
    conv_LBWC: jax.Array

    @staticmethod
    def specs() -> "RecurrentState":
        """The `PartitionSpec` of every array."""
        state: Any = P(None, *STATE)
        columns: Any = P(None, *COLUMNS)
        return RecurrentState(state_LBNHH=state, conv_LBWC=columns)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentSteps:
    """A `RecurrentState`, and what it becomes with each of a few tokens: any number of them can be kept later.

    Attributes:
        before: the state before the tokens; reading them leaves it as it is.
        states_LBTNHH: float32; the state after each token.
        inputs_LBTC: what entered the convolution at each token, stored as `conv_LBWC`.
    """

    before: RecurrentState
    states_LBTNHH: jax.Array
    inputs_LBTC: jax.Array

    @staticmethod
    def specs() -> "RecurrentSteps":
        """The `PartitionSpec` of every array."""
        states: Any = P(None, *STATES)
        inputs: Any = P(None, *COLUMNS)
        return RecurrentSteps(before=RecurrentState.specs(), states_LBTNHH=states, inputs_LBTC=inputs)


#: What the layers of one kind keep.
Stored = KeyValues | PagedKeyValues | RecurrentState | RecurrentSteps
Kept = TypeVar("Kept", bound=Stored)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """What a whole model keeps for a batch.

    Attributes:
        segments: as `Decoder.segments`: for each position of each segment's period `KeyValues`, or a `RecurrentState`
            where the layer is linear.
        lengths_B: int32; tokens of each row so far.
        table_BM: int32; the blocks of each row, by their numbers on its device, in the order of its tokens, and 0 after
            them; None where keys and values are not in blocks.
    """

    segments: tuple[tuple[Stored, ...], ...]
    lengths_B: jax.Array
    table_BM: jax.Array | None = None

    def specs(self) -> "Cache":
        """The `PartitionSpec` of every array."""
        segments = tuple(tuple(stored.specs() for stored in period) for period in self.segments)
        rows: Any = P(BATCH)
        return Cache(segments=segments, lengths_B=rows, table_BM=None if self.table_BM is None else rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache(Generic[Kept]):
    """One layer's part of a cache.

    Attributes:
        stored: of all layers at this position of the period.
        layer: int32 []; which of them this is.
        lengths_B: int32; tokens of each row before the new ones.
        table_BM: see `Cache`.
    """

    stored: Kept
    layer: jax.Array
    lengths_B: jax.Array
    table_BM: jax.Array | None = None


def slots(config: ModelConfig, kind: LayerKind, max_length: int, max_write: int) -> int:
    """Slots S of attention: one for each of `max_length` tokens, or, sliding, for a window and `max_write` tokens more.

    While up to `max_write` tokens are written in one step, the first of them still needs the window before it.
    """
    if kind.mixer == "full":
        return max_length
    return min(max_length, config.attention.sliding_window + max_write - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Blocks of a cache: how many, on all devices that share the batch together, and the tokens of each."""

    count: int
    size: int


def abstract_cache(
    config: ModelConfig,
    mesh: Mesh,
    *,
    batch: int,
    max_length: int,
    max_write: int,
    dtype: jax.typing.DTypeLike,
    blocks: Blocks | None = None,
) -> Cache:
    """Shapes, dtypes and shardings of a cache, without allocating it.

    Args:
        config: of the model.
        mesh: of the model.
        batch: rows, a multiple of the devices that share the batch.
        max_length: the largest number of tokens of a row.
        max_write: tokens that are written in one step at most.
        dtype: of keys, values and the columns of convolutions; the state of linear layers is float32.
        blocks: in which full layers keep keys and values; None gives every row `max_length` slots.

    Raises:
        ShardingError: the tokens of a block do not divide over the mesh axis `context`.
    """
    shards = mesh.shape[CONTEXT]
    if blocks is not None and blocks.size % shards:
        raise ShardingError(
            f"blocks of {blocks.size} tokens do not divide over the mesh axis {CONTEXT}={shards}: each device has the "
            f"same number of slots of a block. Choose a block size that {shards} divides."
        )
    attention, linear = config.attention, config.linear_attention
    dtype = stored_dtype(dtype, mesh.devices.flat[0].platform)

    def zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, spec: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def abstract(kind: LayerKind, repeats: int) -> Stored:
        if kind.mixer == "linear" and linear is not None:
            state = (repeats, batch, linear.num_value_heads, linear.key_head_dim, linear.value_head_dim)
            columns, specs = (repeats, batch, linear.conv_kernel_dim - 1, linear.conv_dim), RecurrentState.specs()
            return RecurrentState(
                state_LBNHH=zeros(state, jnp.float32, specs.state_LBNHH),
                conv_LBWC=zeros(columns, dtype, specs.conv_LBWC),
            )
        if kind.mixer == "full" and blocks is not None:
            shape = (repeats, blocks.count, blocks.size, attention.num_key_value_heads, attention.head_dim)
            one = zeros(shape, dtype, STORED)
            return PagedKeyValues(keys_LPSKH=one, values_LPSKH=one)
        num_slots = round_up(slots(config, kind, max_length, max_write), shards)
        one = zeros((repeats, batch, num_slots, attention.num_key_value_heads, attention.head_dim), dtype, STORED)
        return KeyValues(keys_LBSKH=one, values_LBSKH=one)

    table_BM = None if blocks is None else zeros((batch, ceil_div(max_length, blocks.size)), jnp.int32, P(BATCH))
    return Cache(
        segments=tuple(
            tuple(abstract(kind, segment.repeats) for kind in segment.period)
            for segment in plan_segments(config.layers)
        ),
        lengths_B=zeros((batch,), jnp.int32, P(BATCH)),
        table_BM=table_BM,
    )


def recurrent_states(cache: Cache) -> list[RecurrentState]:
    """What the linear layers keep, in the order of the segments; empty for a model without linear layers."""
    return [stored for period in cache.segments for stored in period if isinstance(stored, RecurrentState)]


def abstract_mtp_cache(
    config: ModelConfig, mesh: Mesh, *, batch: int, max_length: int, max_write: int, dtype: jax.typing.DTypeLike
) -> Cache:
    """`abstract_cache` for the one layer of the next-token head."""
    one_layer = dataclasses.replace(config, layers=(config.mtp_layer,), linear_attention=None)
    return abstract_cache(one_layer, mesh, batch=batch, max_length=max_length, max_write=max_write, dtype=dtype)


def empty_cache(abstract: Cache) -> Cache:
    """A cache without tokens, allocated as `abstract_cache` gives it."""
    return _zeros(abstract)()


@functools.cache
def _zeros(abstract: Cache) -> Callable[[], Cache]:
    """Compiled once: every request has a cache."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract)
    return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), out_shardings=shardings)


def update_and_attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    cache: LayerCache[KeyValues] | LayerCache[PagedKeyValues],
    token_mask_BT: jax.Array,
    sliding_window: int | None,
) -> tuple[jax.Array, LayerCache]:
    """Attention of new tokens over all of their row so far, and the cache with their keys and values.

    Padding is not written, and its results mean nothing; see `attend_cached`. CPUs read the cache in place, few tokens
    by `attention_kernels.cached_cpu`, many by `attention_kernels.flash_cpu`.

    Args:
        q_BTNH, k_BTKH, v_BTKH: of the new tokens, which `context` shards or does not.
        cache: of their layer.
        token_mask_BT: False for padding; of whole rows on every device of `context`.
        sliding_window: number of keys a query sees, itself included; None for all.
    """
    specs, heads = cache.stored.specs(), tokens_spec("tensor", None)

    def local(q_BTNH, k_BTKH, v_BTKH, stored, layer, lengths_B, token_mask_BT, table_BM) -> tuple:
        (keys, values), structure = jax.tree.flatten(stored)
        new = layer, lengths_B, token_mask_BT
        mixed_BTNH, *both = _store_and_attend(
            q_BTNH, k_BTKH, v_BTKH, keys, values, new, sliding_window=sliding_window, table_BM=table_BM
        )
        return mixed_BTNH, jax.tree.unflatten(structure, both)

    rows: Any = P(BATCH)
    table_BM = cache.table_BM if isinstance(cache.stored, PagedKeyValues) else None
    in_specs = (heads, heads, heads, specs, P(), rows, P(BATCH, None), None if table_BM is None else rows)
    mapped = jax.shard_map(local, in_specs=in_specs, out_specs=(heads, specs), check_vma=False)
    mixed_BTNH, stored = mapped(
        q_BTNH, k_BTKH, v_BTKH, cache.stored, cache.layer, cache.lengths_B, token_mask_BT, table_BM
    )
    return mixed_BTNH, dataclasses.replace(cache, stored=stored)


def _store_and_attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    new: tuple[jax.Array, jax.Array, jax.Array],
    *,
    sliding_window: int | None,
    table_BM: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same on one device's arrays; `new` are the layer, the lengths of the rows and the mask of the new tokens."""
    if jax.lax.axis_size(CONTEXT) > 1:
        shared = positions_axis() is not None
        if shared:
            q_BTNH, k_BTKH, v_BTKH = gather_tokens(q_BTNH, k_BTKH, v_BTKH)
        keys, values = write_own(keys, k_BTKH, *new, table_BM), write_own(values, v_BTKH, *new, table_BM)
        mixed_BTNH = attend_over_devices(
            q_BTNH, keys, values, *new, sliding_window=sliding_window, table_BM=table_BM, shared=shared
        )
        return mixed_BTNH, keys, values
    if attends_in_place(q_BTNH, keys):
        return write_and_attend(
            q_BTNH, k_BTKH, v_BTKH, keys, values, *new, sliding_window=sliding_window, table_BM=table_BM
        )
    if table_BM is None:
        keys, values = write_slots(keys, k_BTKH, *new), write_slots(values, v_BTKH, *new)
    else:
        keys, values = write_blocks(keys, k_BTKH, *new, table_BM), write_blocks(values, v_BTKH, *new, table_BM)
    if attends_many(q_BTNH, keys):
        mixed_BTNH = attend_stored(q_BTNH, keys, values, *new, sliding_window=sliding_window, table_BM=table_BM)
    elif table_BM is None:
        mixed_BTNH = attend_cached(q_BTNH, keys, values, *new, sliding_window)
    else:
        mixed_BTNH = attend_blocks(q_BTNH, keys, values, *new, table_BM)
    return mixed_BTNH, keys, values


def read_state(
    cache: LayerCache[RecurrentState] | LayerCache[RecurrentSteps], dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """A linear layer's state [B, N, H, H] and columns [B, W, C], these in `dtype`.

    In rows without tokens, columns are zeros, and the state is whatever is stored: to replace it here would be a pass
    over the states of all rows for every token.
    """
    stored = cache.stored.before if isinstance(cache.stored, RecurrentSteps) else cache.stored
    state_BNHH = jax.lax.dynamic_index_in_dim(stored.state_LBNHH, cache.layer, keepdims=False)
    columns_BWC = from_bits(jax.lax.dynamic_index_in_dim(stored.conv_LBWC, cache.layer, keepdims=False))
    return state_BNHH, jnp.where(cache.lengths_B[:, None, None] == 0, 0, columns_BWC).astype(dtype)


def update_state(
    cache: LayerCache[RecurrentState], state_BNHH: jax.Array, columns_BWC: jax.Array
) -> LayerCache[RecurrentState]:
    """The cache with a linear layer's new state and columns."""
    stored = cache.stored
    put = jax.lax.dynamic_update_index_in_dim
    stored = RecurrentState(
        state_LBNHH=put(stored.state_LBNHH, state_BNHH, cache.layer, 0),
        conv_LBWC=put(stored.conv_LBWC, as_stored(columns_BWC, stored.conv_LBWC), cache.layer, 0),
    )
    return dataclasses.replace(cache, stored=stored)


def update_steps(
    cache: LayerCache[RecurrentSteps], states_BTNHH: jax.Array, inputs_BTC: jax.Array
) -> LayerCache[RecurrentSteps]:
    """The cache with a linear layer's state after each token, and what entered its convolution."""
    stored = cache.stored
    put = jax.lax.dynamic_update_index_in_dim
    stored = RecurrentSteps(
        before=stored.before,
        states_LBTNHH=put(stored.states_LBTNHH, states_BTNHH, cache.layer, 0),
        inputs_LBTC=put(stored.inputs_LBTC, as_stored(inputs_BTC, stored.inputs_LBTC), cache.layer, 0),
    )
    return dataclasses.replace(cache, stored=stored)


def with_steps(cache: Cache, tokens: int) -> Cache:
    """The cache for reading T tokens of which `keep_tokens` keeps some: linear layers keep the state after each."""

    def steps(stored: Stored) -> Stored:
        if not isinstance(stored, RecurrentState):
            return stored
        layers, rows, *state = stored.state_LBNHH.shape
        return RecurrentSteps(
            before=stored,
            states_LBTNHH=jnp.zeros((layers, rows, tokens, *state), jnp.float32),
            inputs_LBTC=jnp.zeros((layers, rows, tokens, stored.conv_LBWC.shape[-1]), stored.conv_LBWC.dtype),
        )

    return dataclasses.replace(cache, segments=tuple(tuple(map(steps, period)) for period in cache.segments))


def keeps_steps(cache: Cache) -> bool:
    """Whether it keeps states after each of the tokens that are read into it (`with_steps`)."""
    return any(isinstance(stored, RecurrentSteps) for period in cache.segments for stored in period)


def keep_tokens(cache: Cache, lengths_B: jax.Array, count_B: jax.Array) -> Cache:
    """The cache with the first tokens of those that were read into `with_steps(…)`, as if no other had been read.

    Keys and values of the others stay in their slots, where nothing attends to them and later tokens replace them.

    Args:
        cache: after the tokens were read.
        lengths_B: int32; tokens of each row before them.
        count_B: int32; how many of them are kept; 0 leaves the row as it was.
    """

    def kept(stored: Stored) -> Stored:
        if not isinstance(stored, RecurrentSteps):
            return stored
        chosen = jnp.maximum(count_B - 1, 0)[None, :, None, None, None, None]
        state_LBNHH = jnp.take_along_axis(stored.states_LBTNHH, chosen, axis=2)[:, :, 0]
        none = (count_B == 0)[None, :, None, None, None]
        columns_LBWC = stored.before.conv_LBWC
        columns_LBWC = jnp.where((lengths_B == 0)[None, :, None, None], 0, columns_LBWC)
        both_LBSC = jnp.concatenate([columns_LBWC, stored.inputs_LBTC], axis=2)
        slots_BW = count_B[:, None] + jnp.arange(columns_LBWC.shape[2], dtype=jnp.int32)
        return RecurrentState(
            state_LBNHH=jnp.where(none, stored.before.state_LBNHH, state_LBNHH),
            conv_LBWC=jnp.take_along_axis(both_LBSC, slots_BW[None, :, :, None], axis=2),
        )

    segments = tuple(tuple(map(kept, period)) for period in cache.segments)
    return dataclasses.replace(cache, segments=segments, lengths_B=lengths_B + count_B)
