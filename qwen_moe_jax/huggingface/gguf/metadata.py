"""What a GGUF file says of a model, and what llama.cpp's graph of an architecture cannot express."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_moe_jax.config import LinearAttentionConfig, ModelConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.checkpoint import Checkpoint
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.model.rotary import yarn_attention_factor

if TYPE_CHECKING:
    import gguf

#: Name of the architecture, and whether its top-k weights sum to one; None of a dense one.
_ARCHITECTURES: dict[str, tuple[str, bool | None]] = {
    "qwen2": ("qwen2", None),
    "qwen3": ("qwen3", None),
    "qwen2_moe": ("qwen2moe", False),
    "qwen3_moe": ("qwen3moe", True),
    "mixtral": ("llama", True),
    "qwen3_next": ("qwen3next", True),
    "qwen3_5_text": ("qwen35", None),
    "qwen3_5_moe_text": ("qwen35moe", True),
}
_ROPES = ("default", "linear", "yarn")


def architecture_of(checkpoint: Checkpoint) -> str:
    """The architecture's name, if llama.cpp's graph of it is this model's.

    Raises:
        ConfigError: it is not, with the field of config.json that says so.
    """
    config, where = checkpoint.config, checkpoint.folder
    name, renormalised = _ARCHITECTURES.get(config.model_type, ("", None))

    def refuse(field: str, found: object, expected: str) -> ConfigError:
        return ConfigError(f"{where}: {field}={found} cannot be written as GGUF: expected {expected}.")

    if not name:
        raise refuse("model_type", repr(config.model_type), f"one of {', '.join(_ARCHITECTURES)}")
    if checkpoint.head is not CausalLM:
        raise refuse("architectures", checkpoint.head.__name__, "a causal language model")
    if config.moe is not None and config.moe.norm_topk_prob is not renormalised:
        raise refuse("norm_topk_prob", config.moe.norm_topk_prob, f"{renormalised}, which llama.cpp takes for granted")
    if config.moe is not None and any(kind.mlp == "dense" for kind in config.layers):
        raise refuse("mlp_only_layers", "dense layers", "every layer to be sparse")
    window = config.attention.sliding_window
    if any(kind.mixer == "sliding" for kind in config.layers) and window < config.max_position_embeddings:
        raise refuse(
            "sliding_window",
            window,
            f"full attention in every layer, or a window of all {config.max_position_embeddings} positions: "
            f"llama.cpp's {name} has no windows",
        )
    if config.hidden_act != "silu":
        raise refuse("hidden_act", repr(config.hidden_act), "'silu'")
    if config.attention.o_bias:
        raise refuse("attention_bias", True, "no bias of o_proj")
    if config.rope.rope_type not in _ROPES:
        raise refuse("rope_type", repr(config.rope.rope_type), f"one of {', '.join(_ROPES)}")
    if config.rope.rope_type == "yarn" and not config.rope.truncate:
        raise refuse("truncate", False, "True, by which llama.cpp's yarn rounds the bounds of its ramp")
    if config.linear_attention is not None:
        _require_hybrid(config, refuse)
    return name


def _require_hybrid(config: ModelConfig, refuse) -> None:
    linear = config.linear_attention
    if config.attention.qkv_bias:
        raise refuse("attention_bias", True, "no biases of attention")
    if linear.key_head_dim != linear.value_head_dim:
        found = f"{linear.value_head_dim} with linear_key_head_dim={linear.key_head_dim}"
        raise refuse("linear_value_head_dim", found, "the same size, which llama.cpp's delta rule has")
    kinds = [kind.mixer for kind in config.layers]
    interval = _interval(config)
    if kinds != ["linear" if (number + 1) % interval else "full" for number in range(len(kinds))]:
        raise refuse("layer_types", "another order", "every nth layer to have full attention, and no other")


def _interval(config: ModelConfig) -> int:
    """Number of layers from one with full attention to the next, as far as the first says."""
    kinds = [kind.mixer for kind in config.layers]
    return kinds.index("full") + 1 if "full" in kinds else len(kinds) + 1


def add_metadata(writer: "gguf.GGUFWriter", config: ModelConfig, folder: Path) -> None:
    import gguf

    kinds = {"float32": gguf.LlamaFileType.ALL_F32, "float16": gguf.LlamaFileType.MOSTLY_F16}
    writer.add_type("model")
    writer.add_name(folder.name)
    writer.add_file_type(kinds.get(config.dtype, gguf.LlamaFileType.MOSTLY_BF16))
    writer.add_block_count(len(config.layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    if config.intermediate_size:
        writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    attention, moe = config.attention, config.moe
    writer.add_head_count(attention.num_attention_heads)
    writer.add_head_count_kv(attention.num_key_value_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    rotated = int(attention.head_dim * config.rope.partial_rotary_factor)
    writer.add_rope_dimension_count(rotated)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_rope(writer, config, rotated)
    if moe is not None:
        writer.add_expert_count(moe.num_experts)
        writer.add_expert_used_count(moe.num_experts_per_tok)
        writer.add_expert_feed_forward_length(moe.moe_intermediate_size)
        if moe.shared_expert_intermediate_size:
            writer.add_expert_shared_feed_forward_length(moe.shared_expert_intermediate_size)
    if config.linear_attention is not None:
        _add_linear(writer, config.linear_attention)
        writer.add_full_attention_interval(_interval(config))


def _add_rope(writer: "gguf.GGUFWriter", config: ModelConfig, rotated: int) -> None:
    import gguf

    rope = config.rope
    writer.add_rope_freq_base(rope.rope_theta)
    if config.model_type.startswith("qwen3_5"):
        # Of a multimodal rope; in a text the positions of all sections are the same.
        third = -(-(rotated // 2) // 3)
        writer.add_rope_dimension_sections([third, third, third, 0])
    if rope.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    if rope.rope_type == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
        # llama.cpp multiplies its own factor of attention by this one.
        writer.add_rope_scaling_attn_factors(yarn_attention_factor(rope) / (1 + 0.1 * math.log(rope.factor)))


def _add_linear(writer: "gguf.GGUFWriter", linear: LinearAttentionConfig) -> None:
    writer.add_ssm_conv_kernel(linear.conv_kernel_dim)
    writer.add_ssm_state_size(linear.key_head_dim)
    writer.add_ssm_group_count(linear.num_key_heads)
    writer.add_ssm_time_step_rank(linear.num_value_heads)
    writer.add_ssm_inner_size(linear.value_head_dim * linear.num_value_heads)
