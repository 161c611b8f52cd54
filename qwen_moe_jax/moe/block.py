"""The sparse block of a decoder layer: route, dispatch, experts, combine, plus the shared expert."""

import jax
from flax import nnx

from qwen_moe_jax.config import Activation, ExecutionConfig, MoEConfig
from qwen_moe_jax.moe import stats
from qwen_moe_jax.moe.dispatch import get_dispatcher
from qwen_moe_jax.moe.experts import Experts
from qwen_moe_jax.moe.router import jitter, route
from qwen_moe_jax.nn.linear import Linear
from qwen_moe_jax.nn.matmul import matmul_precision
from qwen_moe_jax.nn.mlp import MLP
from qwen_moe_jax.nn.parameters import ParameterFactory


class SparseMoeBlock(nnx.Module):
    """`sum_k weight_k * expert_k(x)`, plus `sigmoid(shared_expert_gate(x)) * shared_expert(x)` where there is one.

    `e_score_correction_bias` is the router's balancing bias, float32 [E], where the config has one.

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
        self.gate = Linear(f"{name}.gate", ("router", "embed"), (moe.num_experts, width), make)
        self.e_score_correction_bias = (
            make.untrained(f"{name}.e_score_correction_bias", (moe.num_experts,), ("router",))
            if moe.balancing_bias
            else None
        )
        self.experts = Experts(f"{name}.experts", width, moe, act, make)
        shared = moe.shared_expert_intermediate_size
        self.shared_expert = MLP(f"{name}.shared_expert", width, shared, act, make) if shared else None
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
            The block's result [B, T, D], the layer's counts, and the router's decisions about every token.
        """
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
            )
        dispatcher = get_dispatcher(execution.dispatch)
        with jax.named_scope("dispatch"):
            rows, plan = dispatcher.dispatch(hidden_BTD, routing, execution)
        with jax.named_scope("experts"):
            rows = self.experts(rows, execution.grouped_matmul)
        with jax.named_scope("combine"):
            combined_BTD, drops = dispatcher.combine(rows, plan)
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

    def _router_logits(self, hidden_BTD: jax.Array, execution: ExecutionConfig) -> jax.Array:
        """[B, T, E] in the router's dtype."""
        if execution.router_dtype is None:
            return self.gate(hidden_BTD)
        with matmul_precision(execution.router_dtype):
            return self.gate(hidden_BTD.astype(execution.router_dtype))
