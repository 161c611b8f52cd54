"""The routed experts: stacked SwiGLU weights, and their matmuls over tokens that are already in place."""

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import Activation, MoEConfig
from qwen_moe_jax.nn.matmul import weight_einsum
from qwen_moe_jax.nn.mlp import ACTIVATIONS
from qwen_moe_jax.nn.parameters import ParameterFactory

WIDEN = ("expert", "ffn", "expert_embed")
NARROW = ("expert", "expert_embed", "ffn")

#: Places [E, G, C, D] lie with their experts; [E, G, C, F] between the matmuls.
PLACES = P("expert", ("data", "fsdp"), None, None)
WIDE_PLACES = P("expert", ("data", "fsdp"), None, "tensor")

#: Tokens [B, T, D] gathered over `expert`, for methods that bring every token to every expert.
GATHERED_TOKENS = P(("data", "fsdp"), None, None)
WIDE_TOKENS = P(("data", "fsdp"), None, "expert", "tensor")


class Experts(nnx.Module):
    """Weights of all experts of a layer, each in the Hub's [out, in] order: [E, F, D], [E, F, D], [E, D, F].

    They are cut over `expert` and never gathered over it: tokens travel instead.
    """

    def __init__(self, name: str, hidden_size: int, moe: MoEConfig, act: Activation, make: ParameterFactory):
        count, width = moe.num_experts, moe.moe_intermediate_size
        self.gate_proj = make.normal(f"{name}.gate_proj", (count, width, hidden_size), WIDEN)
        self.up_proj = make.normal(f"{name}.up_proj", (count, width, hidden_size), WIDEN)
        self.down_proj = make.normal(f"{name}.down_proj", (count, hidden_size, width), NARROW)
        self.act = act

    def per_expert(self, x_EGCD: jax.Array) -> jax.Array:
        """Each expert on its own places: [E, G, C, D] to the same, E over `expert` and G over data and fsdp."""
        gated_EGCF = weight_einsum("EGCD,EFD->EGCF", x_EGCD, self.gate_proj[...], WIDEN, WIDE_PLACES)
        raised_EGCF = weight_einsum("EGCD,EFD->EGCF", x_EGCD, self.up_proj[...], WIDEN, WIDE_PLACES)
        hidden_EGCF = ACTIVATIONS[self.act](gated_EGCF) * raised_EGCF
        return weight_einsum("EGCF,EDF->EGCD", hidden_EGCF, self.down_proj[...], NARROW, PLACES)

    def every_expert(self, x_BTD: jax.Array, weights_BTE: jax.Array) -> jax.Array:
        """All experts on all tokens, weighted and summed: [B, T, D] to the same, B over data and fsdp."""
        gated_BTEF = weight_einsum("BTD,EFD->BTEF", x_BTD, self.gate_proj[...], WIDEN, WIDE_TOKENS)
        raised_BTEF = weight_einsum("BTD,EFD->BTEF", x_BTD, self.up_proj[...], WIDEN, WIDE_TOKENS)
        hidden_BTEF = ACTIVATIONS[self.act](gated_BTEF) * raised_BTEF
        weighted_BTEF = (hidden_BTEF * weights_BTE[..., None]).astype(x_BTD.dtype)
        return weight_einsum("BTEF,EDF->BTD", weighted_BTEF, self.down_proj[...], NARROW, GATHERED_TOKENS)
