"""The rules by which families read their config.json, a small function each: what a layer is, and what its parts are.

They are those of transformers 5.23, observed by running it.
"""

from qwen_moe_jax.config import LinearAttentionConfig, MoEConfig
from qwen_moe_jax.huggingface.fields import Fields

#: Ten times those of the largest models. More means a damaged config, refused before anything is allocated per expert.
MOST_EXPERTS = 100_000


def never(fields: Fields) -> bool:
    """No bias, whatever the config says."""
    return False


def attention_bias(fields: Fields) -> bool:
    """Biases as `attention_bias` says; none by default."""
    return fields.boolean("attention_bias", False)


def slides_from_max_window_layers(fields: Fields, layer: int) -> bool:
    """Qwen2, Qwen3: layers from `max_window_layers` on, where a window is used."""
    return slides_if_used(fields, layer) and layer >= fields.integer("max_window_layers", 28)


def slides_every_other_below_max_window_layers(fields: Fields, layer: int) -> bool:
    """Qwen2-MoE: every other layer below `max_window_layers`, where a window is used."""
    below = layer < fields.integer("max_window_layers", 28)
    return fields.boolean("use_sliding_window", False) and layer % 2 == 0 and below


def slides_if_used(fields: Fields, layer: int) -> bool:
    """Qwen3-MoE: every layer, where a window is used and not given as null."""
    return fields.boolean("use_sliding_window", False) and not fields.is_null("sliding_window")


def slides_if_given(fields: Fields, layer: int) -> bool:
    """Mixtral: every layer, where there is a window."""
    return "sliding_window" in fields


def slides_nowhere(fields: Fields, layer: int) -> bool:
    """Hybrids: no layer."""
    return False


def always(fields: Fields, layer: int) -> bool:
    """Every layer."""
    return True


def linear_but_every_fourth(fields: Fields, layer: int) -> bool:
    """Hybrids: all but every `full_attention_interval`-th layer."""
    interval = fields.integer("full_attention_interval", 4)
    if interval < 1:
        raise fields.error("full_attention_interval", "a positive integer")
    return (layer + 1) % interval != 0


def sparse_by_step(fields: Fields, layer: int, *, alias: bool = True) -> bool:
    """Qwen2-MoE, Qwen3-MoE: every `decoder_sparse_step`-th layer that is not in `mlp_only_layers`."""
    step = fields.integer("decoder_sparse_step", 1)
    if step < 1:
        raise fields.error("decoder_sparse_step", "a positive integer")
    chosen = layer not in fields.integers("mlp_only_layers") and (layer + 1) % step == 0
    return chosen and _expert_count(fields, alias=alias) > 0


def sparse_by_step_without_alias(fields: Fields, layer: int) -> bool:
    """Qwen3-Next: `sparse_by_step`, with one name for the number of experts."""
    return sparse_by_step(fields, layer, alias=False)


def _expert_count(fields: Fields, *, alias: bool = True) -> int:
    """Transformers 5 stores `num_local_experts`, and it wins where both are given and differ.

    A family with a key of its own for `num_experts` has that key alone, and so have those without the alias.
    """
    alias = alias and "num_experts" not in fields.renames
    name = "num_local_experts" if alias and "num_local_experts" in fields else "num_experts"
    count, layers = fields.integer(name), fields.integer("num_hidden_layers")
    if count * layers > MOST_EXPERTS:
        raise fields.error(name, f"at most {MOST_EXPERTS} experts in the {layers} layers together")
    return count


def _qwen_moe(fields: Fields, *, shared_expert: int) -> MoEConfig:
    return MoEConfig(
        num_experts=_expert_count(fields),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        norm_topk_prob=fields.boolean("norm_topk_prob", False),
        shared_expert_intermediate_size=shared_expert,
        router_aux_loss_coef=fields.number("router_aux_loss_coef", 0.001),
    )


def qwen2_moe(fields: Fields) -> MoEConfig:
    """Qwen2-MoE's block: a shared expert, top-k not renormalised by default."""
    shared = fields.integer("shared_expert_intermediate_size")
    return _qwen_moe(fields, shared_expert=shared)


def qwen3_moe(fields: Fields) -> MoEConfig:
    """Qwen3-MoE's block: no shared expert."""
    # Coder configs carry shared_expert_intermediate_size; transformers ignores it, and so must we.
    return _qwen_moe(fields, shared_expert=0)


def _hybrid_moe(fields: Fields, *, norm_topk_prob: bool) -> MoEConfig:
    return MoEConfig(
        num_experts=_expert_count(fields, alias=False),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        norm_topk_prob=norm_topk_prob,
        shared_expert_intermediate_size=fields.integer("shared_expert_intermediate_size"),
        router_aux_loss_coef=fields.number("router_aux_loss_coef", 0.001),
    )


def qwen3_next_moe(fields: Fields) -> MoEConfig:
    """Qwen3-Next's block: a shared expert, top-k renormalised by default."""
    return _hybrid_moe(fields, norm_topk_prob=fields.boolean("norm_topk_prob", True))


def qwen3_5_moe(fields: Fields) -> MoEConfig:
    """Qwen3.5-MoE's block: a shared expert, top-k always renormalised."""
    return _hybrid_moe(fields, norm_topk_prob=True)


def linear_attention(fields: Fields) -> LinearAttentionConfig:
    """The gated delta rule of Qwen3-Next and Qwen3.5."""
    return LinearAttentionConfig(
        num_key_heads=fields.integer("linear_num_key_heads"),
        num_value_heads=fields.integer("linear_num_value_heads"),
        key_head_dim=fields.integer("linear_key_head_dim"),
        value_head_dim=fields.integer("linear_value_head_dim"),
        conv_kernel_dim=fields.integer("linear_conv_kernel_dim"),
    )


def mixtral(fields: Fields) -> MoEConfig:
    """Mixtral's block: top-k always renormalised, in float32."""
    return MoEConfig(
        num_experts=_expert_count(fields),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        moe_intermediate_size=fields.integer("intermediate_size"),
        norm_topk_prob=True,
        float32_weights=True,
        router_aux_loss_coef=fields.number("router_aux_loss_coef", 0.001),
        router_jitter_noise=fields.number("router_jitter_noise", 0.0),
    )
