"""One decoder layer, of any kind."""

import jax
from flax import nnx

from qwen_moe_jax.config import ExecutionConfig, LayerKind, ModelConfig
from qwen_moe_jax.model.attention import Attention, TokenContext
from qwen_moe_jax.model.cache import KeyValues, LayerCache
from qwen_moe_jax.moe.block import SparseMoeBlock
from qwen_moe_jax.moe.stats import RouterStats, RouterTrace
from qwen_moe_jax.nn.mlp import MLP
from qwen_moe_jax.nn.norm import RMSNorm
from qwen_moe_jax.nn.parameters import ParameterFactory


class DecoderLayer(nnx.Module):
    """`h += attention(norm(h)); h += mlp(norm(h))`, where the MLP is dense or a mixture of experts."""

    def __init__(self, name: str, kind: LayerKind, config: ModelConfig, make: ParameterFactory):
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(f"{name}.input_layernorm", width, eps, make)
        self.self_attn = Attention(f"{name}.self_attn", config, make)
        self.post_attention_layernorm = RMSNorm(f"{name}.post_attention_layernorm", width, eps, make)
        if kind.mlp == "sparse":
            self.mlp = SparseMoeBlock(f"{name}.mlp", config, make)
        else:
            self.mlp = MLP(f"{name}.mlp", width, config.intermediate_size, config.hidden_act, make)
        self.kind = kind
        self.sliding_window = config.attention.sliding_window if kind.attention == "sliding" else None

    def __call__(
        self,
        hidden_BTD: jax.Array,
        context: TokenContext,
        execution: ExecutionConfig,
        noise_key: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterStats | None, RouterTrace | None]:
        """[B, T, D] to the same; where there is a router, also its counts and what it said of every token.

        With a `noise_key`, what enters a mixture of experts is jittered.
        """
        normed_BTD = self.input_layernorm(hidden_BTD)
        attended_BTD = self.self_attn(normed_BTD, context, self.sliding_window, execution)
        return self._mixed(hidden_BTD + attended_BTD, context, execution, noise_key)

    def extend(
        self, hidden_BTD: jax.Array, context: TokenContext, execution: ExecutionConfig, past: LayerCache
    ) -> tuple[jax.Array, KeyValues]:
        """The same for tokens that follow those in the cache; also what the layer remembers then."""
        normed_BTD = self.input_layernorm(hidden_BTD)
        attended_BTD, stored = self.self_attn.extend(normed_BTD, context, self.sliding_window, past)
        hidden_BTD, _, _ = self._mixed(hidden_BTD + attended_BTD, context, execution, None)
        return hidden_BTD, stored

    def _mixed(
        self, hidden_BTD: jax.Array, context: TokenContext, execution: ExecutionConfig, noise_key: jax.Array | None
    ) -> tuple[jax.Array, RouterStats | None, RouterTrace | None]:
        """The second half of the layer."""
        normed_BTD = self.post_attention_layernorm(hidden_BTD)
        if self.kind.mlp == "dense":
            return hidden_BTD + self.mlp(normed_BTD), None, None
        mixed_BTD, stats, trace = self.mlp(normed_BTD, context.segment_ids_BT != 0, execution, noise_key)
        return hidden_BTD + mixed_BTD, stats, trace
