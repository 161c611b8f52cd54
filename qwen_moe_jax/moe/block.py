"""The sparse block of a decoder layer: route, dispatch, experts, combine, plus the shared expert."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import Activation, ExecutionConfig, MoEConfig
from qwen_moe_jax.config.resolve import resolve
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.moe import stats
from qwen_moe_jax.moe.dispatch import checked_combined, checked_rows, get_dispatcher
from qwen_moe_jax.moe.experts import Experts
from qwen_moe_jax.moe.router import ForcedRouting, forced_specs, jitter, route
from qwen_moe_jax.nn.linear import Linear
from qwen_moe_jax.nn.matmul import matmul_precision
from qwen_moe_jax.nn.mlp import MLP
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.sharding.explicit import has_explicit_axes, with_explicit_axes
from qwen_moe_jax.sharding.rules import BATCH, CONTEXT, tokens_spec


class SparseMoeBlock(nnx.Module):
    """`sum_k weight_k * expert_k(x)`, plus `sigmoid(shared_expert_gate(x)) * shared_expert(x)` where there is one.

    `e_score_correction_bias` is the router's balancing bias, float32 [E], where the config has one. In a model of your
    own, call the block with ordinary arrays, inside or outside `jax.jit`; inside this package's decoder it sees
    explicitly sharded ones.

    Args:
        hidden_size: D.
        moe: sizes of the experts, and how the router weighs them.
        make: where the parameters come from: mesh, dtype, random numbers.
        act: the experts' activation.
        name: of the block, for messages.
    """

    def __init__(
        self, hidden_size: int, moe: MoEConfig, *, make: ParameterFactory, act: Activation = "silu", name: str = "mlp"
    ):
        width = hidden_size
        floats = make.of_floats()
        self.gate = Linear(f"{name}.gate", ("router", "embed"), (moe.num_experts, width), floats)
        self.e_score_correction_bias = (
            make.untrained(f"{name}.e_score_correction_bias", (moe.num_experts,), ("router",))
            if moe.balancing_bias
            else None
        )
        self.experts = Experts(f"{name}.experts", width, moe, act, make)
        shared = moe.shared_expert_intermediate_size
        self.shared_expert = MLP(f"{name}.shared_expert", width, shared, act, make) if shared else None
        self.shared_expert_gate = (
            Linear(f"{name}.shared_expert_gate", ("router", "embed"), (1, width), floats) if shared else None
        )
        self.moe = moe
        self.mesh = make.mesh

    def __call__(
        self,
        hidden_BTD: jax.Array,
        token_mask_BT: jax.Array | None = None,
        execution: ExecutionConfig = ExecutionConfig(dispatch="dropless"),
        noise_key: jax.Array | None = None,
        forced: ForcedRouting | None = None,
    ) -> tuple[jax.Array, stats.RouterStats, stats.RouterTrace]:
        """Runs the block.

        Args:
            hidden_BTD: normalised hidden states; B a multiple of the devices that share the batch, T one of
                those that share its positions.
            token_mask_BT: False for padding, which is routed nowhere. None: there is no padding.
            execution: how it is run. Of ordinary arrays the dtype is that of the hidden states, and what is None is
                chosen as in training; of explicitly sharded ones, nothing may be None (`config.resolve`).
            noise_key: of the jitter (`config.moe.router_jitter_noise`); None adds none.
            forced: experts that are prescribed to the router, or ruled out; see `ForcedRouting`.

        Returns:
            The block's result [B, T, D], the layer's counts, and the router's decisions about every token.

        Raises:
            RequestError: the hidden states are not [B, T, D], or B does not divide over the mesh.
        """
        if not has_explicit_axes(self.mesh):
            return self._on_ordinary_arrays(hidden_BTD, token_mask_BT, execution, noise_key, forced)
        if token_mask_BT is None:
            token_mask_BT = jnp.ones(hidden_BTD.shape[:2], bool, out_sharding=tokens_spec())
        if noise_key is not None:
            hidden_BTD = jitter(hidden_BTD, noise_key, self.moe.router_jitter_noise)
        with jax.named_scope("router"):
            logits_BTE = self._router_logits(hidden_BTD, execution)
            bias = self.e_score_correction_bias
            routing = route(
                logits_BTE,
                token_mask_BT,
                self.moe,
                bias_E=None if bias is None else bias[...],
                routing=execution.routing,
                dtype=hidden_BTD.dtype,
                forced=forced,
            )
        dispatcher = get_dispatcher(execution.dispatch)
        with jax.named_scope("dispatch"):
            rows, plan = checked_rows(execution.dispatch, dispatcher.dispatch(hidden_BTD, routing, execution))
        with jax.named_scope("experts"):
            rows = self.experts(rows, execution.grouped_matmul)
        with jax.named_scope("combine"):
            combined = dispatcher.combine(rows, plan)
            combined_BTD, drops = checked_combined(execution.dispatch, combined, hidden_BTD.shape)
        if self.shared_expert is not None:
            gate_BT1 = jax.nn.sigmoid(self.shared_expert_gate(hidden_BTD))
            combined_BTD = combined_BTD + gate_BT1 * self.shared_expert(hidden_BTD)
        trace = stats.RouterTrace(
            logits=logits_BTE,
            experts=routing.experts_BTA,
            weights=routing.weights_BTA,
            dropped=drops.dropped_BTA,
        )
        counts = stats.count(logits_BTE, routing, drops)
        return combined_BTD.astype(hidden_BTD.dtype), counts, trace

    def _on_ordinary_arrays(
        self,
        hidden_BTD: jax.Array,
        token_mask_BT: jax.Array | None,
        execution: ExecutionConfig,
        noise_key: jax.Array | None,
        forced: ForcedRouting | None,
    ) -> tuple[jax.Array, stats.RouterStats, stats.RouterTrace]:
        shape, width = jnp.shape(hidden_BTD), self.gate.weight.shape[-1]
        num_shards, parts = math.prod(self.mesh.shape[axis] for axis in BATCH), self.mesh.shape[CONTEXT]
        if len(shape) != 3 or shape[2] != width or shape[0] % num_shards or shape[1] % parts:
            length = f", length one of the {parts} of the mesh axis {CONTEXT}" if parts > 1 else ""
            raise RequestError(
                f"the hidden states have shape {shape}, expected [batch, length, {width}], batch a multiple of the "
                f"{num_shards} devices of the mesh axes {', '.join(BATCH)}{length}."
            )
        execution = resolve(
            dataclasses.replace(execution, dtype=hidden_BTD.dtype.name, param_dtype=None),
            self.moe,
            expert_shards=self.mesh.shape["expert"],
            platform=self.mesh.devices.flat[0].platform,
            training=True,
        )
        mask_BT = jnp.ones(shape[:2], bool) if token_mask_BT is None else token_mask_BT
        return _with_explicit_axes(self, hidden_BTD, mask_BT, noise_key, forced, execution=execution)

    def _router_logits(self, hidden_BTD: jax.Array, execution: ExecutionConfig) -> jax.Array:
        """[B, T, E] in the router's dtype."""
        if execution.router_dtype is None:
            return self.gate(hidden_BTD)
        with matmul_precision(execution.router_dtype):
            return self.gate(hidden_BTD.astype(execution.router_dtype))


@functools.partial(jax.jit, static_argnames="execution")
def _with_explicit_axes(
    block: SparseMoeBlock,
    hidden_BTD: jax.Array,
    token_mask_BT: jax.Array,
    noise_key: jax.Array | None,
    forced: ForcedRouting | None,
    *,
    execution: ExecutionConfig,
) -> tuple[jax.Array, stats.RouterStats, stats.RouterTrace]:
    def run(block: SparseMoeBlock, hidden_BTD: jax.Array, token_mask_BT: jax.Array, noise_key, forced):
        with matmul_precision(hidden_BTD.dtype):
            return block(hidden_BTD, token_mask_BT, execution, noise_key, forced)

    mesh = block.mesh
    specs = (tokens_spec(None, mesh=mesh), tokens_spec(mesh=mesh), P(), forced_specs(forced, mesh=mesh))
    return with_explicit_axes(run, mesh, specs)(block, hidden_BTD, token_mask_BT, noise_key, forced)
