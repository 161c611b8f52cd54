"""The decoder: embedding, layers, final norm. One forward for training, prefill and decoding. Start reading here.

Tokens [B, T] → embedding → L × (norm → mixer → add → norm → MLP or mixture of experts → add) → norm → [B, T, D].
The mixer is attention or a gated delta rule.

Layers of one kind are stacked on a leading axis and scanned, so that depth costs no compile time.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_moe_jax.config import ExecutionConfig, ModelConfig
from qwen_moe_jax.model.cache import Cache, LayerCache, Stored
from qwen_moe_jax.model.inputs import ModelInputs, TokenContext, positions_behind
from qwen_moe_jax.model.layer import DecoderLayer, LayerOutput
from qwen_moe_jax.model.remat import with_remat
from qwen_moe_jax.model.rotary import rotary_tables
from qwen_moe_jax.model.segments import Segment, plan_segments
from qwen_moe_jax.moe.block import SparseMoeBlock
from qwen_moe_jax.moe.experts import Experts
from qwen_moe_jax.moe.router import ForcedRouting
from qwen_moe_jax.moe.stats import RouterStats, RouterTrace
from qwen_moe_jax.nn.bits import rows_at
from qwen_moe_jax.nn.embedding import Embedding
from qwen_moe_jax.nn.linear import Linear
from qwen_moe_jax.nn.norm import rms_norm
from qwen_moe_jax.nn.parameters import ParameterFactory


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderOutput:
    """What the decoder returns.

    Attributes:
        hidden_BTD: after the final norm.
        cache: with the new tokens in it, where there is one.
        stats: counts of the sparse layers, stacked [L, …] in layer order; None without sparse layers.
        trace: the routers' decisions about every token, stacked [L, …] likewise, where kept.
        inputs_LBTD: the hidden states that entered each layer, where kept.
    """

    hidden_BTD: jax.Array
    cache: Cache | None
    stats: RouterStats | None
    trace: RouterTrace | None
    inputs_LBTD: jax.Array | None


class Decoder(nnx.Module):
    """Embedding, layers and final norm: what transformers calls the base model."""

    def __init__(self, config: ModelConfig, make: ParameterFactory):
        self.embed_tokens = Embedding(
            "model.embed_tokens", config.vocab_size, config.hidden_size, config.pad_token_id, make
        )
        self.layers = LayerStack(config, make)
        self.norm = rms_norm(
            "model.norm", config.hidden_size, config.rms_norm_eps, make, zero_centered=config.zero_centered_norm
        )
        self.config = config

    def __call__(
        self,
        inputs: ModelInputs,
        execution: ExecutionConfig,
        *,
        cache: Cache | None = None,
        noise_key: jax.Array | None = None,
        keep_trace: bool = False,
        keep_inputs: bool = False,
    ) -> DecoderOutput:
        """Runs the decoder on explicitly sharded arrays.

        Args:
            inputs: tokens, segment ids and positions, and what is prescribed to the routers.
            execution: how, with no setting None (`config.resolve`).
            cache: of the previous tokens, one text a row; the new ones follow them from the left, padding after them.
                None in training and scoring, where all tokens are given.
            noise_key: of the jitter before the experts; every layer draws its own. None adds none.
            keep_trace: also return the routers' decisions about every token.
            keep_inputs: also return what entered each layer.
        """
        config, dtype = self.config, jnp.dtype(execution.dtype)
        token_mask_BT, positions_BT = inputs.segment_ids_BT != 0, inputs.positions_BT
        if cache is not None:
            positions_BT = positions_behind(cache.lengths_B, token_mask_BT)
        rotary = rotary_tables(config.rope, config.rotary_dim, config.max_position_embeddings, positions_BT, dtype)
        with jax.named_scope("embedding"):
            # The token id of padding is ignored: it may be outside the vocabulary.
            tokens_BT = jnp.where(token_mask_BT, inputs.tokens_BT, 0)
            hidden_BTD = self.embed_tokens(tokens_BT, dtype, differentiable=cache is None)
        out = self.layers(
            hidden_BTD,
            TokenContext(
                segment_ids_BT=inputs.segment_ids_BT,
                rotary=rotary,
                row_segment_ids_BT=inputs.row_segment_ids_BT,
                order=inputs.order,
            ),
            execution,
            cache=cache,
            noise_key=noise_key,
            forced=inputs.forced,
            keep_trace=keep_trace,
            keep_inputs=keep_inputs,
        )
        return dataclasses.replace(out, hidden_BTD=self.norm(out.hidden_BTD))


class LayerStack(nnx.Module):
    """All decoder layers. `segments[i][p]` is a DecoderLayer whose weights have a leading axis of `repeats` layers."""

    def __init__(self, config: ModelConfig, make: ParameterFactory):
        self.plan = plan_segments(config.layers)
        self.segments = nnx.List(
            nnx.List(
                DecoderLayer(f"model.layers.{segment.start + position}", kind, config, make.stacked(segment.repeats))
                for position, kind in enumerate(segment.period)
            )
            for segment in self.plan
        )

    def __call__(
        self,
        hidden_BTD: jax.Array,
        context: TokenContext,
        execution: ExecutionConfig,
        *,
        cache: Cache | None,
        noise_key: jax.Array | None,
        forced: ForcedRouting | None,
        keep_trace: bool,
        keep_inputs: bool,
    ) -> DecoderOutput:
        """Runs the layers; see `Decoder.__call__`. The hidden states it returns are those before the final norm."""
        run_layer: Callable[..., Any] = functools.partial(_run_layer, execution=execution)
        if cache is None:  # with a cache nothing is differentiated
            unrolled = any(segment.repeats == 1 for segment in self.plan)  # the compiler unrolls a scan of one step
            run_layer = with_remat(run_layer, execution, unrolled=unrolled)

        def keep(out: LayerOutput, entered_BTD: jax.Array) -> tuple:
            # With a cache, a step is a few tokens, whose statistics are only wanted together with the trace.
            stats = out.stats if cache is None or keep_trace else None
            return stats, out.trace if keep_trace else None, entered_BTD if keep_inputs else None

        def run_period(carry: tuple[jax.Array, _Stored], step: tuple[list[DecoderLayer], _Index, _PerLayer]):
            (hidden_BTD, stored), (layers, index, (keys, forced)) = carry, step
            kept, updated = [], []
            for position, layer in enumerate(layers):
                layer_cache = None
                if stored is not None:
                    layer_cache = LayerCache(
                        stored=stored[position], layer=index, lengths_B=cache.lengths_B, table_BM=cache.table_BM
                    )
                key = None if keys is None else keys[position]
                out = run_layer(layer, hidden_BTD, context, layer_cache, key, forced[position])
                kept.append(keep(out, hidden_BTD))
                hidden_BTD = out.hidden_BTD
                updated.append(None if out.cache is None else out.cache.stored)
            carry = hidden_BTD, None if stored is None else tuple(updated)
            return carry, [_join(jnp.stack, column) for column in zip(*kept, strict=True)]

        kept, segments = [], []
        forced_periods = _by_segment(self.plan, forced)
        for number, (segment, layers) in enumerate(zip(self.plan, self.segments, strict=True)):
            keys = None if noise_key is None else _layer_keys(noise_key, segment)
            per_layer = keys, forced_periods[number]
            stored = None if cache is None else cache.segments[number]
            scan = _scan_layers if cache is None else _index_layers
            (hidden_BTD, stored), columns = scan(
                run_period, (hidden_BTD, stored), list(layers), per_layer, segment.repeats
            )
            segments.append(stored)
            kept.append([jax.tree.map(_in_layer_order, column) for column in columns])
        stats, trace, inputs = (_join(jnp.concatenate, column) for column in zip(*kept, strict=True))
        if cache is not None:
            new_B = jnp.sum(context.token_mask_BT, axis=1, dtype=jnp.int32)
            cache = dataclasses.replace(cache, segments=tuple(segments), lengths_B=cache.lengths_B + new_B)
        return DecoderOutput(hidden_BTD=hidden_BTD, cache=cache, stats=stats, trace=trace, inputs_LBTD=inputs)


_Stored = tuple[Stored, ...] | None
_Index = jax.Array | None
#: The keys of a period's layers, and for each layer what is prescribed to its router.
_PerLayer = tuple[jax.Array | None, list[ForcedRouting | None]]


def _scan_layers(run_period, carry, layers: list[DecoderLayer], per_layer: _PerLayer, repeats: int):
    """Scans over the stacked weights themselves: a gradient is written layer by layer, into an array like theirs."""
    return jax.lax.scan(lambda carry, step: run_period(carry, (step[0], None, step[1])), carry, (layers, per_layer))


def _index_layers(run_period, carry, layers: list[DecoderLayer], per_layer: _PerLayer, repeats: int):
    """Scans over the layers' numbers, for steps of a few tokens: weights are read where they are stored, not copied.

    The cache is in the scan's carry, not in its stacked outputs, so it is updated in place.
    """

    def body(carry, step: tuple[jax.Array, _PerLayer]):
        index, per_layer = step
        return run_period(carry, ([layer_at(layer, index) for layer in layers], index, per_layer))

    return jax.lax.scan(body, carry, (jnp.arange(repeats, dtype=jnp.int32), per_layer))


def layer_at(stacked: DecoderLayer, index: jax.Array) -> DecoderLayer:
    """One layer of a stack. Weights of projections and experts stay stacked, with an index: not all need be copied."""

    def at(node: Any) -> Any:
        return node.of_layer(index) if isinstance(node, Linear | Experts) else rows_at(node, index, 1)[0]

    return jax.tree.map(at, stacked, is_leaf=lambda node: isinstance(node, Linear | Experts))


def _run_layer(
    layer: DecoderLayer,
    hidden_BTD: jax.Array,
    context: TokenContext,
    cache: LayerCache | None,
    noise_key: jax.Array | None,
    forced: ForcedRouting | None,
    *,
    execution: ExecutionConfig,
) -> LayerOutput:
    return layer(hidden_BTD, context, execution, cache=cache, noise_key=noise_key, forced=forced)


def _layers(forced: ForcedRouting | None, part: slice) -> ForcedRouting | None:
    return jax.tree.map(lambda x_L: x_L[part], forced)


def _by_segment(plan: Sequence[Segment], forced: ForcedRouting | None) -> list[list[ForcedRouting | None]]:
    """For each segment and layer of its period, the part [repeats, …] of arrays in layer order [L_sparse, …]."""
    periods: list[list[ForcedRouting | None]] = []
    start = 0
    for segment in plan:
        sparse = [kind.mlp == "sparse" for kind in segment.period]
        step = sum(sparse)
        end = start + segment.repeats * step
        firsts = [start + sum(sparse[:position]) if is_sparse else None for position, is_sparse in enumerate(sparse)]
        periods.append([None if first is None else _layers(forced, slice(first, end, step)) for first in firsts])
        start = end
    return periods


def _layer_keys(noise_key: jax.Array, segment: Segment) -> jax.Array:
    """A key for each layer, [repeats, period], by its number in the model, not by segments."""
    numbers = segment.start + jnp.arange(segment.repeats * len(segment.period), dtype=jnp.int32)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(noise_key, numbers)
    return keys.reshape(segment.repeats, len(segment.period))


def _join(join, results: Sequence):
    """Joins what several layers or segments returned, leaf by leaf; those that returned nothing are left out."""
    present = [result for result in results if result is not None]
    return jax.tree.map(lambda *parts: join(parts), *present) if present else None


def _in_layer_order(x: jax.Array) -> jax.Array:
    """[repeats, period, …] to [repeats * period, …]."""
    return x.reshape(-1, *x.shape[2:])


def sparse_blocks(layers: LayerStack, x_LE: jax.Array) -> Iterator[tuple[SparseMoeBlock, jax.Array]]:
    """Each stacked sparse block with its layers' part, [repeats, …], of an array in layer order [L_sparse, …]."""
    start = 0
    for segment, period in zip(layers.plan, layers.segments, strict=True):
        blocks = [layer.mlp for layer in period if isinstance(layer.mlp, SparseMoeBlock)]
        end = start + segment.repeats * len(blocks)
        for position, block in enumerate(blocks):
            yield block, x_LE[start + position : end : len(blocks)]
        start = end
