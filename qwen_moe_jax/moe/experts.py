"""The routed experts: stacked SwiGLU weights, and their matmuls over tokens that are already in place."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import Activation, MoEConfig
from qwen_moe_jax.nn.mlp import ACTIVATIONS
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.sharding.rules import as_used

WIDEN = ("expert", "ffn", "expert_embed")
NARROW = ("expert", "expert_embed", "ffn")


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
        gate_EFD, up_EFD, down_EDF = self._weights(x_EGCD.dtype)
        gated_EGCF = jnp.einsum("EGCD,EFD->EGCF", x_EGCD, gate_EFD)
        raised_EGCF = jnp.einsum("EGCD,EFD->EGCF", x_EGCD, up_EFD)
        hidden_EGCF = ACTIVATIONS[self.act](gated_EGCF) * raised_EGCF
        out = P("expert", ("data", "fsdp"), None, None)
        return jnp.einsum("EGCF,EDF->EGCD", hidden_EGCF, down_EDF, out_sharding=out)

    def every_expert(self, x_BTD: jax.Array, weights_BTE: jax.Array) -> jax.Array:
        """All experts on all tokens, weighted and summed: [B, T, D] to the same, B over data and fsdp."""
        gate_EFD, up_EFD, down_EDF = self._weights(x_BTD.dtype)
        gated_BTEF = jnp.einsum("BTD,EFD->BTEF", x_BTD, gate_EFD)
        raised_BTEF = jnp.einsum("BTD,EFD->BTEF", x_BTD, up_EFD)
        hidden_BTEF = ACTIVATIONS[self.act](gated_BTEF) * raised_BTEF
        weighted_BTEF = (hidden_BTEF * weights_BTE[..., None]).astype(x_BTD.dtype)
        return jnp.einsum("BTEF,EDF->BTD", weighted_BTEF, down_EDF, out_sharding=P(("data", "fsdp"), None, None))

    def _weights(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
        return (
            as_used(self.gate_proj[...].astype(dtype), *WIDEN),
            as_used(self.up_proj[...].astype(dtype), *WIDEN),
            as_used(self.down_proj[...].astype(dtype), *NARROW),
        )
