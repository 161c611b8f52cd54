"""The table of tiny models that the suite holds to transformers: every family plain, then the odd corners of each.

Pure data in the form of the Hub's config.json, so that tests without torch can use it too. `tests/referee.py` builds
the reference models from it.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 97

ABSENT = object()  # as a setting's value: the key is left out of config.json

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}

# An aux coefficient of 0.1 makes the balance loss a visible share of the router's gradient; the Hub's 0.001 is not.
PLAIN = {
    "qwen2": {},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "router_aux_loss_coef": 0.1,
    },
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.1,
    },
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1},
}
FAMILIES = tuple(PLAIN)
SPARSE_FAMILIES = ("qwen2_moe", "qwen3_moe", "mixtral")

# Gated delta rules between layers of gated attention: three linear layers to a full one, two value heads to a key head.
_LINEAR = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}
_LINEAR_SPARSE = {
    **_LINEAR,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "router_aux_loss_coef": 0.1,
}
_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 100.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
}
HYBRID_PLAIN = {
    "qwen3_next": {**_LINEAR_SPARSE, "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    "qwen3_5_text": {**_LINEAR, **_MROPE},
    "qwen3_5": {**_LINEAR, **_MROPE},
    "qwen3_5_moe_text": {**_LINEAR_SPARSE, **_MROPE, "intermediate_size": ABSENT},
    "qwen3_5_moe": {**_LINEAR_SPARSE, **_MROPE, "intermediate_size": ABSENT},
}
HYBRID_FAMILIES = tuple(HYBRID_PLAIN)
SPARSE_HYBRIDS = ("qwen3_next", "qwen3_5_moe_text", "qwen3_5_moe")
#: Model types of multimodal folders, and those of their text part.
NESTED = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One tiny model: `settings` on top of its family's plain form."""

    name: str
    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    inert: Mapping[str, Any] | None = None
    """Settings that switch the odd thing off without changing a shape: the reference must give other logits then."""
    outer: Mapping[str, Any] = field(default_factory=dict)
    """Settings of a multimodal config.json outside its text_config, which has all others."""

    @property
    def text_config(self) -> dict[str, Any]:
        """The config of the text model."""
        plain = {**PLAIN, **HYBRID_PLAIN}[self.model_type]
        merged = {"model_type": NESTED.get(self.model_type, self.model_type), **COMMON, **plain, **self.settings}
        # A copy, since transformers fills in the dictionaries that it is given.
        return copy.deepcopy({key: value for key, value in merged.items() if value is not ABSENT})

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json, in the form the Hub publishes (old keys: torch_dtype, rope_theta, rope_scaling)."""
        if self.model_type not in NESTED:
            return self.text_config
        return {"model_type": self.model_type, **_MULTIMODAL, "text_config": self.text_config, **self.outer}


#: What a multimodal config.json has outside its text_config; the vision tower is as small as transformers allows.
_MULTIMODAL = {
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
    "vision_config": {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 32},
    "tie_word_embeddings": False,
}


def _case(
    model_type: str,
    name: str,
    inert: Mapping[str, Any] | None = None,
    outer: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Case:
    return Case(name=f"{model_type}-{name}", model_type=model_type, settings=settings, inert=inert, outer=outer or {})


# A small theta makes every rotary frequency turn visibly within a dozen positions, so that scaling rules show.
_YARN = {"factor": 4.0, "rope_type": "yarn"}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_UNSCALED = {"rope_scaling": None}

_ALL = [
    *(Case(name=f"{family}-plain", model_type=family) for family in FAMILIES),
    # embeddings and head
    _case("qwen2", "tied", tie_word_embeddings=True),
    _case("qwen3_moe", "tied", tie_word_embeddings=True),
    _case("qwen2_moe", "pad_token", pad_token_id=5),
    _case("qwen3", "pad_token_tied", pad_token_id=5, tie_word_embeddings=True),
    # biases
    _case("qwen2_moe", "no_qkv_bias", qkv_bias=False),
    _case("qwen3", "attention_bias", attention_bias=True),
    _case("qwen3_moe", "attention_bias", attention_bias=True),
    # heads
    _case("qwen2", "head_dim_given", head_dim=16),
    _case("qwen2_moe", "head_dim_given", head_dim=12),
    _case("mixtral", "head_dim_given", head_dim=16),
    _case("mixtral", "head_dim_null", head_dim=None),
    _case("qwen3", "head_dim_absent_is_128", head_dim=ABSENT, num_hidden_layers=2),
    _case("qwen3_moe", "head_dim_absent_is_quotient", head_dim=ABSENT),
    _case("qwen2", "one_kv_head", num_key_value_heads=1),
    _case("qwen3_moe", "one_kv_head", num_key_value_heads=1),
    _case("qwen2_moe", "multi_head", num_key_value_heads=4),
    _case("mixtral", "multi_head", num_key_value_heads=4),
    _case("qwen2", "kv_heads_null", num_key_value_heads=None),
    # sliding windows: each family chooses its layers by a rule of its own
    _case(
        "qwen2", "sliding", {"max_window_layers": 0},
        use_sliding_window=True, sliding_window=5, max_window_layers=1,
    ),
    _case(
        "qwen2", "sliding_layer_types", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        use_sliding_window=True, sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    _case(
        "qwen2_moe", "sliding", {"max_window_layers": 2},
        use_sliding_window=True, sliding_window=5, max_window_layers=3, num_hidden_layers=4,
    ),
    _case(
        "qwen2_moe", "sliding_layer_types", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        use_sliding_window=True, sliding_window=4,
        layer_types=["full_attention", "full_attention", "sliding_attention"],
    ),
    _case(
        "qwen3", "sliding", {"sliding_window": 6}, use_sliding_window=True, sliding_window=5, max_window_layers=2,
    ),
    _case(
        "qwen3_moe", "sliding_everywhere", {"use_sliding_window": False},
        use_sliding_window=True, sliding_window=5, max_window_layers=1,
    ),
    _case("mixtral", "sliding_without_gate", {"sliding_window": None}, use_sliding_window=False, sliding_window=5),
    _case("qwen2", "sliding_switched_off", use_sliding_window=False, sliding_window=5, max_window_layers=0),
    # which layers are sparse
    _case("qwen2_moe", "mlp_only_layers", mlp_only_layers=[0, 2], num_hidden_layers=4),
    _case("qwen3_moe", "sparse_step_2", decoder_sparse_step=2, num_hidden_layers=4),
    _case("qwen3_moe", "mlp_only_and_sparse_step", decoder_sparse_step=2, mlp_only_layers=[1], num_hidden_layers=4),
    _case("qwen3_moe", "no_sparse_layer", mlp_only_layers=[0, 1, 2]),
    # routing
    _case("qwen2_moe", "norm_topk_prob", {"norm_topk_prob": False}, norm_topk_prob=True),
    _case("qwen3_moe", "norm_topk_prob_absent", {"norm_topk_prob": True}, norm_topk_prob=ABSENT),
    _case("qwen2_moe", "top_1", num_experts_per_tok=1),
    _case("mixtral", "top_1", num_experts_per_tok=1),
    _case("qwen3_moe", "every_expert", num_experts_per_tok=8),
    _case("mixtral", "jitter_off_in_eval", router_jitter_noise=0.3),
    _case("qwen3_moe", "coder_keys", qkv_bias=True, use_qk_norm=False, shared_expert_intermediate_size=16),
    _case("qwen2_moe", "odd_sizes", num_experts=5, moe_intermediate_size=19, shared_expert_intermediate_size=7),
    # rotary scaling, by old and new keys
    _case("qwen3", "yarn_max_default", _UNSCALED, rope_theta=100.0, rope_scaling={"type": "yarn", "factor": 4.0}),
    _case(
        "qwen2", "yarn_original_max", {"rope_scaling": {**_YARN, "original_max_position_embeddings": 64}},
        rope_theta=100.0, head_dim=16, max_position_embeddings=2048,
        rope_scaling={**_YARN, "original_max_position_embeddings": 512},
    ),
    _case(
        "qwen3_moe", "yarn_mscale", {"rope_parameters": {**_YARN, "rope_theta": 100.0}},
        rope_parameters={**_YARN, "rope_theta": 100.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    ),
    _case(
        "qwen2_moe", "yarn_attention_factor", {"rope_scaling": {**_YARN, "beta_fast": 8.0, "beta_slow": 2.0}},
        rope_theta=100.0, head_dim=16,
        rope_scaling={**_YARN, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.7, "truncate": False},
    ),
    _case("qwen2", "llama3", _UNSCALED, rope_theta=100.0, rope_scaling=_LLAMA3),
    _case("mixtral", "linear", _UNSCALED, rope_theta=100.0, rope_scaling={"type": "linear", "factor": 2.5}),
    _case(
        "qwen3", "linear_new_keys", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
    ),
    _case(
        "qwen3_moe", "dynamic_past_maximum", _UNSCALED,
        rope_theta=100.0, max_position_embeddings=8, rope_scaling={"rope_type": "dynamic", "factor": 2.0},
    ),
    _case(
        "qwen2", "dynamic_within_maximum", rope_theta=100.0, rope_scaling={"rope_type": "dynamic", "factor": 2.0},
    ),
    _case("mixtral", "theta_given", {"rope_theta": 1e6}, rope_theta=500),
    # activations and norms
    _case("qwen2", "gelu", {"hidden_act": "silu"}, hidden_act="gelu"),
    _case("qwen3_moe", "gelu_pytorch_tanh", {"hidden_act": "silu"}, hidden_act="gelu_pytorch_tanh"),
    _case("mixtral", "gelu_new", {"hidden_act": "silu"}, hidden_act="gelu_new"),
    _case("qwen2_moe", "relu", {"hidden_act": "silu"}, hidden_act="relu"),
    _case("qwen3", "large_eps", {"rms_norm_eps": 1e-6}, rms_norm_eps=0.3),
    _case("mixtral", "large_eps", {"rms_norm_eps": 1e-5}, rms_norm_eps=0.3),
]  # fmt: skip

CASES = {case.name: case for case in _ALL}
assert len(CASES) == len(_ALL), "two cases share a name"

_L, _F = "linear_attention", "full_attention"
_SHORT = {"num_hidden_layers": 2, "full_attention_interval": 2}
_ALL_HYBRIDS = [
    *(Case(name=f"{family}-plain", model_type=family) for family in HYBRID_FAMILIES),
    # which layers are linear
    _case("qwen3_next", "full_first", layer_types=[_F, _L, _L], num_hidden_layers=3),
    _case("qwen3_next", "all_full", layer_types=[_F, _F], num_hidden_layers=2),
    _case("qwen3_5_text", "all_linear", layer_types=[_L, _L], num_hidden_layers=2),
    _case("qwen3_5_text", "interval_2", full_attention_interval=2),
    _case("qwen3_5_moe_text", "layer_types_over_interval", full_attention_interval=4, layer_types=[_L, _F, _F, _L]),
    _case("qwen3_5", "two_periods", num_hidden_layers=8),
    # value heads for each key head, sizes of heads and of the convolution
    _case("qwen3_next", "one_value_head", linear_num_value_heads=2, **_SHORT),
    _case("qwen3_5_text", "three_value_heads", linear_num_value_heads=6, linear_conv_kernel_dim=5, **_SHORT),
    _case("qwen3_5_moe_text", "four_value_heads", linear_num_value_heads=8, linear_conv_kernel_dim=3, **_SHORT),
    _case("qwen3_next", "eight_value_heads", linear_num_key_heads=1, linear_num_value_heads=8, **_SHORT),
    _case(
        "qwen3_next", "three_key_heads",
        linear_num_key_heads=3, linear_num_value_heads=6, linear_value_head_dim=5, **_SHORT,
    ),
    _case(
        "qwen3_5", "kernel_2",
        linear_conv_kernel_dim=2, linear_key_head_dim=12, linear_value_head_dim=8, **_SHORT,
    ),
    _case("qwen3_5_text", "one_kv_head", num_key_value_heads=1, **_SHORT),
    # which layers are sparse, and routing
    _case("qwen3_next", "dense_layers", mlp_only_layers=[0, 3]),
    _case("qwen3_next", "sparse_step_2", decoder_sparse_step=2, **_SHORT),
    _case("qwen3_next", "no_expert", num_experts=0, **_SHORT),
    _case("qwen3_next", "norm_topk_prob_off", {"norm_topk_prob": True}, norm_topk_prob=False, **_SHORT),
    _case(
        "qwen3_5_moe_text", "keys_of_others", mlp_only_layers=[0], norm_topk_prob=False, intermediate_size=7,
        decoder_sparse_step=2, num_local_experts=3, **_SHORT,
    ),
    _case("qwen3_5_moe", "top_1", num_experts_per_tok=1, **_SHORT),
    # embeddings and heads
    _case("qwen3_next", "tied", tie_word_embeddings=True, **_SHORT),
    _case("qwen3_5", "tied", outer={"tie_word_embeddings": True}, tie_word_embeddings=True, **_SHORT),
    _case("qwen3_5", "tied_outside_alone", outer={"tie_word_embeddings": True}, **_SHORT),
    _case("qwen3_5_moe", "tied_inside_alone", tie_word_embeddings=True, **_SHORT),
    _case("qwen3_5_text", "pad_token_tied", pad_token_id=5, tie_word_embeddings=True, **_SHORT),
    # attention
    _case("qwen3_next", "attention_bias", attention_bias=True, **_SHORT),
    _case("qwen3_5_moe", "attention_bias", attention_bias=True, **_SHORT),
    _case("qwen3_5_text", "large_eps", {"rms_norm_eps": 1e-6}, rms_norm_eps=0.01, **_SHORT),
    # rope
    _case("qwen3_next", "quarter_by_default", partial_rotary_factor=ABSENT, rope_theta=ABSENT, **_SHORT),
    _case(
        "qwen3_5_text", "rope_factor_outside_its_parameters", {"partial_rotary_factor": 0.5},
        rope_parameters={"rope_type": "default"}, rope_theta=50.0, partial_rotary_factor=0.75, **_SHORT,
    ),
    _case(
        "qwen3_next", "yarn", _UNSCALED,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, **_SHORT,
    ),
    _case(
        "qwen3_5_moe", "yarn",
        rope_parameters={**_MROPE["rope_parameters"], "rope_type": "yarn", "factor": 4.0}, **_SHORT,
    ),
]  # fmt: skip

HYBRID_CASES = {case.name: case for case in _ALL_HYBRIDS}
assert len(HYBRID_CASES) == len(_ALL_HYBRIDS), "two cases share a name"
