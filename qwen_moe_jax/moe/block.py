"""The sparse block of a decoder layer: route, dispatch, experts, combine, plus the shared expert."""

import jax
from flax import nnx

from qwen_moe_jax.config import ExecutionConfig, ModelConfig
from qwen_moe_jax.moe import stats
from qwen_moe_jax.moe.dispatch import capacity, dense, dropless
from qwen_moe_jax.moe.experts import Experts
from qwen_moe_jax.moe.router import jitter, route
from qwen_moe_jax.nn.linear import Linear
from qwen_moe_jax.nn.matmul import as_precise_as
from qwen_moe_jax.nn.mlp import MLP
from qwen_moe_jax.nn.parameters import ParameterFactory

#: Each takes (hidden_BTD, routing, experts, execution) and returns the weighted sum [B, T, D] and the drops.
DISPATCH = {"capacity": capacity.run, "dropless": dropless.run, "dense": dense.run}


class SparseMoeBlock(nnx.Module):
    """`sum_k weight_k * expert_k(x)`, plus `sigmoid(shared_expert_gate(x)) * shared_expert(x)` where there is one.

    `e_score_correction_bias` is the router's balancing bias, float32 [E], where the config has one.
    """

    def __init__(self, name: str, config: ModelConfig, make: ParameterFactory):
        moe, width = config.moe, config.hidden_size
        self.gate = Linear(f"{name}.gate", ("router", "embed"), (moe.num_experts, width), make)
        self.e_score_correction_bias = (
            make.untrained(f"{name}.e_score_correction_bias", (moe.num_experts,), ("router",))
            if moe.balancing_bias
            else None
        )
        self.experts = Experts(f"{name}.experts", width, moe, config.hidden_act, make)
        shared = moe.shared_expert_intermediate_size
        self.shared_expert = MLP(f"{name}.shared_expert", width, shared, config.hidden_act, make) if shared else None
        self.shared_expert_gate = (
            Linear(f"{name}.shared_expert_gate", ("router", "embed"), (1, width), make) if shared else None
        )
        self.moe = moe

    def __call__(
        self,
        hidden_BTD: jax.Array,
        token_mask_BT: jax.Array,
        execution: ExecutionConfig,
        noise_key: jax.Array | None = None,
    ) -> tuple[jax.Array, stats.RouterStats, stats.RouterTrace]:
        """Runs the block.

        Args:
            hidden_BTD: normalised hidden states.
            token_mask_BT: False for padding, which is routed nowhere.
            execution: with nothing left open (`config.resolve.resolve`).
            noise_key: of the jitter (`config.moe.router_jitter_noise`); None adds none.

        Returns:
            The block's result [B, T, D], the layer's counts, and what the router said of every token.
        """
        if noise_key is not None:
            hidden_BTD = jitter(hidden_BTD, noise_key, self.moe.router_jitter_noise)
        logits_BTE = self._router_logits(hidden_BTD, execution)
        bias = self.e_score_correction_bias
        routing = route(
            logits_BTE,
            token_mask_BT,
            self.moe,
            bias_E=None if bias is None else bias[...],
            routing=execution.routing,
            dtype=hidden_BTD.dtype,
        )
        combined_BTD, drops = DISPATCH[execution.dispatch](hidden_BTD, routing, self.experts, execution)
        if self.shared_expert is not None:
            opening_BT1 = jax.nn.sigmoid(self.shared_expert_gate(hidden_BTD))
            combined_BTD = combined_BTD + opening_BT1 * self.shared_expert(hidden_BTD)
        trace = stats.RouterTrace(
            logits=logits_BTE,
            experts=routing.experts_BTA,
            weights=routing.weights_BTA,
            dropped=drops.by_capacity_BTA | drops.by_buffer_BTA,
        )
        counts = stats.count(logits_BTE, routing, drops)
        return combined_BTD.astype(hidden_BTD.dtype), counts, trace

    def _router_logits(self, hidden_BTD: jax.Array, execution: ExecutionConfig) -> jax.Array:
        """[B, T, E] in the router's dtype."""
        if execution.router_dtype is None:
            return self.gate(hidden_BTD)
        with as_precise_as(execution.router_dtype):
            return self.gate(hidden_BTD.astype(execution.router_dtype))
