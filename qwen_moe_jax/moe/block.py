"""The sparse block of a decoder layer: route, dispatch, experts, combine, plus the shared expert."""

import jax
from flax import nnx

from qwen_moe_jax.config import ExecutionConfig, ModelConfig
from qwen_moe_jax.moe import capacity, dense, dropless, stats
from qwen_moe_jax.moe.experts import Experts
from qwen_moe_jax.moe.router import route
from qwen_moe_jax.nn.linear import Linear
from qwen_moe_jax.nn.mlp import MLP
from qwen_moe_jax.nn.parameters import ParameterFactory

#: Each takes (hidden_BTD, routing, experts, execution) and returns the weighted sum [B, T, D] and the drops.
DISPATCH = {"capacity": capacity.run, "dropless": dropless.run, "dense": dense.run}


class SparseMoeBlock(nnx.Module):
    """`sum_k weight_k * expert_k(x)`, plus `sigmoid(shared_expert_gate(x)) * shared_expert(x)` where there is one."""

    def __init__(self, name: str, config: ModelConfig, make: ParameterFactory):
        moe, width = config.moe, config.hidden_size
        self.gate = Linear(f"{name}.gate", ("router", "embed"), (moe.num_experts, width), make)
        self.experts = Experts(f"{name}.experts", width, moe, config.hidden_act, make)
        shared = moe.shared_expert_intermediate_size
        self.shared_expert = MLP(f"{name}.shared_expert", width, shared, config.hidden_act, make) if shared else None
        self.shared_expert_gate = (
            Linear(f"{name}.shared_expert_gate", ("router", "embed"), (1, width), make) if shared else None
        )
        self.moe = moe

    def __call__(
        self, hidden_BTD: jax.Array, real_BT: jax.Array, execution: ExecutionConfig
    ) -> tuple[jax.Array, stats.RouterStats, stats.RouterTrace]:
        """Runs the block.

        Args:
            hidden_BTD: normalised hidden states.
            real_BT: False for padding, which is routed nowhere.
            execution: with nothing left open (`moe.choices.choose`).

        Returns:
            The block's result [B, T, D], the layer's counts, and what the router said of every token.
        """
        logits_BTE = self.gate(hidden_BTD)
        routing = route(logits_BTE, real_BT, self.moe)
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
