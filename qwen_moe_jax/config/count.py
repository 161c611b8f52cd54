"""Numbers of parameters, from a config alone."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_moe_jax.config.model import LayerKind, ModelConfig


def parameters(config: "ModelConfig", experts_counted: int, exclude_embeddings: bool) -> int:
    """Parameters of the causal language model without its next-token head, tied weights once.

    Args:
        config: of the model.
        experts_counted: how many routed experts of a sparse layer count.
        exclude_embeddings: leave out the input lookup table, unless it is the output head as well.
    """
    table = config.vocab_size * config.hidden_size
    ends = table if config.tie_word_embeddings or exclude_embeddings else 2 * table
    norm = config.hidden_size
    return ends + norm + sum(layer_parameters(config, kind, experts_counted) for kind in config.layers)


def mtp_parameters(config: "ModelConfig") -> int:
    """Parameters of one next-token head: a layer, the projection [D, 2 D] before it, and three norms."""
    width, experts = config.hidden_size, config.moe.num_experts if config.moe else 0
    return layer_parameters(config, config.mtp_layer, experts) + 2 * width**2 + 3 * width


def layer_parameters(config: "ModelConfig", kind: "LayerKind", experts_counted: int) -> int:
    """Parameters of one decoder layer with its two norms; `experts_counted` of its experts, where it is sparse."""
    mixer = _linear_attention(config) if kind.mixer == "linear" else _attention(config)
    mlp = (
        _experts(config, experts_counted) if kind.mlp == "sparse" else 3 * config.hidden_size * config.intermediate_size
    )
    return mixer + mlp + 2 * config.hidden_size


def _attention(config: "ModelConfig") -> int:
    width, attention = config.hidden_size, config.attention
    q_rows = attention.num_attention_heads * attention.head_dim
    into_rows = q_rows * (1 + attention.output_gate) + 2 * attention.num_key_value_heads * attention.head_dim
    weights = width * into_rows + q_rows * width
    biases = into_rows * attention.qkv_bias + width * attention.o_bias
    return weights + biases + 2 * attention.head_dim * attention.qk_norm


def _linear_attention(config: "ModelConfig") -> int:
    width, linear = config.hidden_size, config.linear_attention
    assert linear is not None  # checked by ModelConfig
    heads = linear.num_value_heads
    projections = width * (linear.conv_dim + linear.value_dim + 2 * heads) + linear.value_dim * width
    # The convolution, A_log and dt_bias of each head, and the gated norm, which all heads share.
    return projections + linear.conv_dim * linear.conv_kernel_dim + 2 * heads + linear.value_head_dim


def _experts(config: "ModelConfig", experts_counted: int) -> int:
    width, moe = config.hidden_size, config.moe
    assert moe is not None  # checked by ModelConfig
    router, routed = width * moe.num_experts, experts_counted * 3 * width * moe.moe_intermediate_size
    shared = moe.shared_expert_intermediate_size
    return router + routed + (3 * width * shared + width if shared else 0)
