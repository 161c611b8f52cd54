"""The stack of layers: layers of a kind are stacked on a leading axis and scanned, so depth costs no compile time."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from flax import nnx

from qwen_moe_jax.attention_kernels.blockwise import ATTENDED
from qwen_moe_jax.config import ExecutionConfig, ModelConfig
from qwen_moe_jax.model.attention import TokenContext
from qwen_moe_jax.model.cache import Cache, KeyValues, LayerCache
from qwen_moe_jax.model.layer import DecoderLayer
from qwen_moe_jax.model.segments import Segment, plan_segments
from qwen_moe_jax.moe.block import SparseMoeBlock
from qwen_moe_jax.moe.experts import EXCHANGED, LayerOfExperts
from qwen_moe_jax.moe.stats import RouterStats, RouterTrace
from qwen_moe_jax.nn.bits import rows_at
from qwen_moe_jax.nn.matmul import WEIGHT_MATMUL
from qwen_moe_jax.nn.parameters import ParameterFactory


def _all_but_reshards(primitive: jax.extend.core.Primitive, *_: Any, **__: Any) -> bool:
    """Everything may be saved but what lies elsewhere already: a weight whose sharding is only spelt otherwise would be
    copied into the residuals of every layer.
    """
    return primitive.name != "reshard"


#: What jax.checkpoint may save, by the name ExecutionConfig.remat gives it.
SAVEABLE = {
    "none": _all_but_reshards,
    "full": jax.checkpoint_policies.nothing_saveable,
    "exchange": jax.checkpoint_policies.save_only_these_names(EXCHANGED),
    "dots": jax.checkpoint_policies.save_only_these_names(EXCHANGED, WEIGHT_MATMUL, ATTENDED),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackOutput:
    """What the stack returns.

    Attributes:
        hidden_BTD: after the last layer.
        stats: counts of the sparse layers, stacked [L, …] in layer order; None without sparse layers.
        trace: what the routers said of every token, stacked [L, …] likewise, where kept.
        inputs_LBTD: the hidden states that entered each layer, where kept.
    """

    hidden_BTD: jax.Array
    stats: RouterStats | None
    trace: RouterTrace | None
    inputs_LBTD: jax.Array | None


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
        noise_key: jax.Array | None,
        keep_trace: bool,
        keep_inputs: bool,
    ) -> StackOutput:
        """Runs the layers.

        Args:
            hidden_BTD: embeddings.
            context: where every token stands.
            execution: how, with nothing left open (`config.resolve.resolve`).
            noise_key: of the jitter before the experts; every layer draws its own. None adds none.
            keep_trace: also return what the routers said of every token.
            keep_inputs: also return what entered each layer.
        """
        # The compiler unrolls a scan of one step, and would then undo the recomputation without a barrier. In a longer
        # one it cannot, and the barrier (prevent_cse) would only cost.
        unrolled = any(segment.repeats == 1 for segment in self.plan)
        run_layer = jax.checkpoint(
            functools.partial(_run_layer, execution=execution),
            policy=SAVEABLE[execution.remat],
            prevent_cse=unrolled and execution.remat != "none",
        )

        def body(hidden_BTD: jax.Array, repeat: tuple[list[DecoderLayer], jax.Array | None]):
            kept = []
            period, keys = repeat
            for position, layer in enumerate(period):
                entered_BTD = hidden_BTD
                key = None if keys is None else keys[position]
                hidden_BTD, stats, trace = run_layer(layer, hidden_BTD, context, key)
                kept.append((stats, trace if keep_trace else None, entered_BTD if keep_inputs else None))
            return hidden_BTD, [_join(jnp.stack, column) for column in zip(*kept, strict=True)]

        kept = []
        for segment, layers in zip(self.plan, self.segments, strict=True):
            keys = None if noise_key is None else _layer_keys(noise_key, segment)
            hidden_BTD, columns = jax.lax.scan(body, hidden_BTD, (list(layers), keys))
            kept.append([jax.tree.map(_in_layer_order, column) for column in columns])
        stats, trace, inputs = (_join(jnp.concatenate, column) for column in zip(*kept, strict=True))
        return StackOutput(hidden_BTD=hidden_BTD, stats=stats, trace=trace, inputs_LBTD=inputs)

    def extend(
        self, hidden_BTD: jax.Array, context: TokenContext, execution: ExecutionConfig, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Runs the layers on tokens that follow those in the cache.

        The cache is part of what the scan carries, not of what it collects: so it is written where it lies. Nor are the
        weights what it runs over: a layer is taken out of the stack in the body (see `nn.bits`).

        Args:
            hidden_BTD: embeddings.
            context: where the tokens stand.
            execution: how, with nothing left open (`config.resolve.resolve`).
            cache: of the tokens before.

        Returns:
            Hidden states after the last layer, and the cache with these tokens in it.
        """

        def body(
            layers: Sequence[DecoderLayer], carry: tuple[jax.Array, tuple[KeyValues, ...]], index: jax.Array
        ) -> tuple[tuple[jax.Array, tuple[KeyValues, ...]], None]:
            hidden_BTD, stored = carry
            written = []
            for whole, own in zip(layers, stored, strict=True):
                layer = jax.tree.map(lambda x: rows_at(x, index, 1)[0], whole)
                if layer.kind.mlp == "sparse":  # a few tokens need a few experts: they are not cut out of the stack
                    layer.mlp.experts = LayerOfExperts(stacked=whole.mlp.experts, layer=index)
                past = LayerCache(stored=own, layer=index, lengths_B=cache.lengths_B)
                hidden_BTD, own = layer.extend(hidden_BTD, context, execution, past)
                written.append(own)
            return (hidden_BTD, tuple(written)), None

        segments = []
        for segment, layers, stored in zip(self.plan, self.segments, cache.segments, strict=True):
            run_period, indices = functools.partial(body, layers), jnp.arange(segment.repeats)
            (hidden_BTD, stored), _ = jax.lax.scan(run_period, (hidden_BTD, stored), indices)
            segments.append(stored)
        counts_B = jnp.sum(context.segment_ids_BT != 0, axis=1, dtype=jnp.int32)
        return hidden_BTD, Cache(segments=tuple(segments), lengths_B=cache.lengths_B + counts_B)


def _run_layer(
    layer: DecoderLayer,
    hidden_BTD: jax.Array,
    context: TokenContext,
    noise_key: jax.Array | None,
    *,
    execution: ExecutionConfig,
):
    return layer(hidden_BTD, context, execution, noise_key)


def _layer_keys(noise_key: jax.Array, segment: Segment) -> jax.Array:
    """A key for each layer, [repeats, period], by its number in the model: the plan has no part in the noise."""
    numbers = segment.start + jnp.arange(segment.repeats * len(segment.period))
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
    """Each stacked sparse block with its layers' part, [repeats, …], of what lies in layer order [L_sparse, …]."""
    start = 0
    for segment, period in zip(layers.plan, layers.segments, strict=True):
        blocks = [layer.mlp for layer in period if layer.kind.mlp == "sparse"]
        end = start + segment.repeats * len(blocks)
        for position, block in enumerate(blocks):
            yield block, x_LE[start + position : end : len(blocks)]
        start = end
