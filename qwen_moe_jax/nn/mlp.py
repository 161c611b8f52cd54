"""The gated MLP of dense layers and shared experts."""

from collections.abc import Callable

import jax
from flax import nnx

from qwen_moe_jax.config import Activation
from qwen_moe_jax.nn.linear import Linear, project
from qwen_moe_jax.nn.parameters import ParameterFactory

#: transformers' names; its "gelu" is the exact one.
ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    """`down(act(gate(x)) * up(x))` (SwiGLU, Shazeer 2020), without biases."""

    def __init__(self, name: str, hidden_size: int, intermediate_size: int, act: Activation, make: ParameterFactory):
        widen, narrow = (intermediate_size, hidden_size), (hidden_size, intermediate_size)
        self.gate_proj = Linear(f"{name}.gate_proj", ("ffn", "embed"), widen, make)
        self.up_proj = Linear(f"{name}.up_proj", ("ffn", "embed"), widen, make)
        self.down_proj = Linear(f"{name}.down_proj", ("embed", "ffn"), narrow, make)
        self.act = act

    def __call__(self, hidden_BTD: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        gate_BTF, up_BTF = project(hidden_BTD, self.gate_proj, self.up_proj)
        return self.down_proj(ACTIVATIONS[self.act](gate_BTF) * up_BTF)
