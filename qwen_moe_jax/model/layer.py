"""One decoder layer, of any kind."""

import dataclasses
import functools

import jax
from flax import nnx

from qwen_moe_jax.config import ExecutionConfig, LayerKind, ModelConfig
from qwen_moe_jax.model.attention import Attention
from qwen_moe_jax.model.cache import LayerCache
from qwen_moe_jax.model.inputs import TokenContext
from qwen_moe_jax.model.linear_attention import GatedDeltaNet
from qwen_moe_jax.moe.block import SparseMoeBlock
from qwen_moe_jax.moe.router import ForcedRouting
from qwen_moe_jax.moe.stats import RouterStats, RouterTrace
from qwen_moe_jax.nn.mlp import MLP
from qwen_moe_jax.nn.norm import rms_norm
from qwen_moe_jax.nn.parameters import ParameterFactory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerOutput:
    """What a layer returns.

    Attributes:
        hidden_BTD: hidden states, for the next layer.
        cache: with the new tokens in it, where there is one.
        stats: the router's counts; None where the MLP is dense, as `trace`.
        trace: the router's decisions about every token.
    """

    hidden_BTD: jax.Array
    cache: LayerCache | None
    stats: RouterStats | None
    trace: RouterTrace | None


class DecoderLayer(nnx.Module):
    """`h += mixer(norm(h)); h += mlp(norm(h))`.

    The mixer is attention (`self_attn`) or a gated delta rule (`linear_attn`), whichever is not None; the MLP is dense
    or a mixture of experts.
    """

    def __init__(self, name: str, kind: LayerKind, config: ModelConfig, make: ParameterFactory):
        width = config.hidden_size
        norm = functools.partial(
            rms_norm, size=width, eps=config.rms_norm_eps, make=make, zero_centered=config.zero_centered_norm
        )
        self.input_layernorm = norm(f"{name}.input_layernorm")
        linear = kind.mixer == "linear"
        self.linear_attn = GatedDeltaNet(f"{name}.linear_attn", config, make) if linear else None
        self.self_attn = None if linear else Attention(f"{name}.self_attn", config, make)
        self.post_attention_layernorm = norm(f"{name}.post_attention_layernorm")
        self.mlp: SparseMoeBlock | MLP
        if kind.mlp == "sparse":
            self.mlp = SparseMoeBlock(width, config.moe, act=config.hidden_act, make=make, name=f"{name}.mlp")
        else:
            self.mlp = MLP(f"{name}.mlp", width, config.intermediate_size, config.hidden_act, make)
        self.kind = kind
        self.sliding_window = config.attention.sliding_window if kind.mixer == "sliding" else None

    def __call__(
        self,
        hidden_BTD: jax.Array,
        context: TokenContext,
        execution: ExecutionConfig,
        *,
        cache: LayerCache | None = None,
        noise_key: jax.Array | None = None,
        forced: ForcedRouting | None = None,
    ) -> LayerOutput:
        """Runs the layer on hidden states [B, T, D]; with a `noise_key`, what enters the experts is jittered.

        `forced` is what is prescribed to a sparse layer's router.
        """
        normed_BTD = self.input_layernorm(hidden_BTD)
        if self.linear_attn is not None:
            mixed_BTD, cache = self.linear_attn(normed_BTD, context, execution, cache)
        else:
            mixed_BTD, cache = self.self_attn(normed_BTD, context, self.sliding_window, execution, cache)
        hidden_BTD = hidden_BTD + mixed_BTD
        normed_BTD = self.post_attention_layernorm(hidden_BTD)
        stats: RouterStats | None = None
        trace: RouterTrace | None = None
        if isinstance(self.mlp, SparseMoeBlock):
            mixed_BTD, stats, trace = self.mlp(normed_BTD, context.token_mask_BT, execution, noise_key, forced)
        else:
            mixed_BTD = self.mlp(normed_BTD)
        return LayerOutput(hidden_BTD=hidden_BTD + mixed_BTD, cache=cache, stats=stats, trace=trace)
