"""One token of each row through convolution and gated delta rule, on CPUs: a C function that updates states in place.

By XLA's products a step moves the states of a layer several times: out of the stack of all layers, through two products
and back. The function (`nn.kernels.functions.delta_rule`) reads and writes a state once, and computes the convolution
with it.

Letters of this file besides the package's: C channels, W taps of the convolution, N value heads. In the state
[B, N, H, H], the sizes are those of a key head and of a value head.
"""

import jax
import jax.numpy as jnp

from qwen_moe_jax.attention_kernels.cached import as_stored
from qwen_moe_jax.attention_kernels.cached_cpu import FORMATS
from qwen_moe_jax.nn.kernels import LANES, cpu

#: Taps of the convolution of the C function.
TAPS = 4


def steps_in_place(state_LBNHH: jax.Array, conv_LBWC: jax.Array) -> bool:
    """Whether `step` can be used for these states and columns; call it as `cpu.is_available`."""
    sizes = state_LBNHH.shape[-2:]
    return (
        conv_LBWC.shape[2] == TAPS - 1
        and conv_LBWC.dtype.name in FORMATS
        and all(size % LANES == 0 for size in sizes)
        and cpu.on_cpu()
        and cpu.target("delta_rule", FORMATS[conv_LBWC.dtype.name]) is not None
    )


def step(
    qkv_BC: jax.Array,
    weight_CW: jax.Array,
    decay_BN: jax.Array,
    strength_BN: jax.Array,
    state_LBNHH: jax.Array,
    conv_LBWC: jax.Array,
    layer: jax.Array,
    lengths_B: jax.Array,
    count_B: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`causal_conv1d`, the activation silu and `recurrent_gated_delta_rule` of one token, in float32, rounded once.

    Args:
        qkv_BC: what enters the convolution; channels grouped by key head: query, key, values of its value heads.
        weight_CW: weights of the taps.
        decay_BN, strength_BN: by what the state is multiplied, and how much of a difference is written.
        state_LBNHH: float32; of all layers.
        conv_LBWC: columns of all layers, as they are stored.
        layer: int32 []; which layer's they are.
        lengths_B: int32; tokens of each row before this. A row without any starts from zeros, whatever is stored.
        count_B: int32; 0 for padding, which leaves states and columns as they are, and whose results are zeros.

    Returns:
        Results [B, N, H] in the dtype of the inputs, and states and columns one token later, in place where they are
        donated.
    """
    name = cpu.target("delta_rule", FORMATS[conv_LBWC.dtype.name])
    assert name is not None  # steps_in_place
    mixed = jax.ShapeDtypeStruct((*decay_BN.shape, state_LBNHH.shape[-1]), jnp.float32)
    shapes = [mixed, *(jax.typeof(x) for x in (state_LBNHH, conv_LBWC))]
    call = jax.ffi.ffi_call(name, shapes, input_output_aliases={8: 1, 9: 2})
    mixed_BNH, state_LBNHH, conv_LBWC = call(
        qkv_BC.astype(jnp.float32),
        as_stored(qkv_BC, conv_LBWC),
        weight_CW.astype(jnp.float32).T,
        decay_BN.astype(jnp.float32),
        strength_BN.astype(jnp.float32),
        layer.astype(jnp.int32)[None],
        lengths_B.astype(jnp.int32),
        count_B.astype(jnp.int32),
        state_LBNHH,
        conv_LBWC,
    )
    return mixed_BNH.astype(qkv_BC.dtype), state_LBNHH, conv_LBWC
