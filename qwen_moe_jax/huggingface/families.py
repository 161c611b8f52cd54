"""How each model type of the Hub is read: one entry per family, of defaults and rules (`family_rules`).

They are those of transformers 5.23, observed by running it: which layers slide differs by family, and so do biases,
head size and the defaults of absent fields.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from qwen_moe_jax.config import LinearAttentionConfig, MoEConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface import family_rules as rules
from qwen_moe_jax.huggingface.fields import Fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How one model type of the Hub is read.

    Attributes:
        class_prefix: of the transformers classes, as `architectures` names them.
        defaults: the values of fields that a config.json leaves out.
        qkv_bias, o_bias: read the biases of the attention projections.
        sliding: (fields, layer index) → does this layer slide, where no `layer_types` is given.
        writes_layer_types: the family knows the `layer_types` field.
        layer_types: the values of `layer_types` that the family has.
        moe: reads the sparse block, None for a dense family.
        sparse: (fields, layer index) → does this layer have a sparse block.
        linear: reads the gated delta rule of linear layers; None for a family without.
        linear_layer: (fields, layer index) → is this layer linear, where no `layer_types` is given.
        partial_rotary_factor: the default of that field; None for a family whose heads are always rotated whole.
        output_gate: the heads' outputs have a gate, with rows in q_proj.
        zero_centered_norm: norms multiply by 1 + weight.
        mtp: checkpoints may have a next-token head, under `mtp.`.
        without: keys of config.json that other families have and this one does not act on; they are not written.
        renames: field name here → key of the family's config.json, where they differ: {"num_experts":
            "n_routed_experts"}. Rules and defaults use the name here; the key is read, exported and named in errors.
    """

    class_prefix: str
    defaults: Mapping[str, Any]
    qkv_bias: Callable[[Fields], bool]
    o_bias: Callable[[Fields], bool]
    qk_norm: bool
    sliding: Callable[[Fields, int], bool]
    writes_layer_types: bool
    layer_types: tuple[str, ...] = ("full_attention", "sliding_attention")
    moe: Callable[[Fields], MoEConfig] | None = None
    sparse: Callable[[Fields, int], bool] = lambda fields, layer: False
    linear: Callable[[Fields], LinearAttentionConfig] | None = None
    linear_layer: Callable[[Fields, int], bool] = lambda fields, layer: False
    partial_rotary_factor: float | None = None
    output_gate: bool = False
    zero_centered_norm: bool = False
    mtp: bool = False
    without: frozenset[str] = frozenset()
    renames: Mapping[str, str] = dataclasses.field(default_factory=dict)


_QWEN_DEFAULTS = {
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "sliding_window": 4096,
    "bos_token_id": None,
    "eos_token_id": (),
}
_DENSE_DEFAULTS = {
    **_QWEN_DEFAULTS,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}

_HYBRID_DEFAULTS = {
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "bos_token_id": None,
    "eos_token_id": (),
}


def _hybrid(**of_family: Any) -> Family:
    """A family of gated delta rules between layers of gated attention."""
    return Family(
        qkv_bias=rules.attention_bias,
        o_bias=rules.attention_bias,
        qk_norm=True,
        sliding=rules.slides_nowhere,
        writes_layer_types=True,
        layer_types=("full_attention", "linear_attention"),
        linear=rules.linear_attention,
        linear_layer=rules.linear_but_every_fourth,
        partial_rotary_factor=0.25,
        output_gate=True,
        zero_centered_norm=True,
        mtp=True,
        **of_family,
    )


FAMILIES = {
    "qwen2": Family(
        class_prefix="Qwen2",
        defaults=_DENSE_DEFAULTS,
        qkv_bias=lambda fields: True,
        o_bias=rules.never,
        qk_norm=False,
        sliding=rules.slides_from_max_window_layers,
        writes_layer_types=True,
    ),
    "qwen2_moe": Family(
        class_prefix="Qwen2Moe",
        defaults={
            **_QWEN_DEFAULTS,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        qkv_bias=lambda fields: fields.boolean("qkv_bias", True),
        o_bias=rules.never,
        qk_norm=False,
        sliding=rules.slides_every_other_below_max_window_layers,
        writes_layer_types=True,
        moe=rules.qwen2_moe,
        sparse=rules.sparse_by_step,
    ),
    "qwen3": Family(
        class_prefix="Qwen3",
        defaults={**_DENSE_DEFAULTS, "head_dim": 128},
        qkv_bias=rules.attention_bias,
        o_bias=rules.attention_bias,
        qk_norm=True,
        sliding=rules.slides_from_max_window_layers,
        writes_layer_types=True,
    ),
    "qwen3_moe": Family(
        class_prefix="Qwen3Moe",
        defaults={
            **_QWEN_DEFAULTS,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        qkv_bias=rules.attention_bias,
        o_bias=rules.attention_bias,
        qk_norm=True,
        sliding=rules.slides_if_used,
        writes_layer_types=False,
        moe=rules.qwen3_moe,
        sparse=rules.sparse_by_step,
    ),
    "mixtral": Family(
        class_prefix="Mixtral",
        defaults={
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "bos_token_id": 1,
            "eos_token_id": (2,),
        },
        qkv_bias=rules.never,
        o_bias=rules.never,
        qk_norm=False,
        sliding=rules.slides_if_given,
        writes_layer_types=False,
        moe=rules.mixtral,
        sparse=rules.always,
    ),
    "qwen3_next": _hybrid(
        class_prefix="Qwen3Next",
        defaults={
            **_HYBRID_DEFAULTS,
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 48,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
        },
        moe=rules.qwen3_next_moe,
        sparse=rules.sparse_by_step_without_alias,
        without=frozenset({"num_local_experts"}),
    ),
    "qwen3_5_text": _hybrid(
        class_prefix="Qwen3_5",
        defaults={
            **_HYBRID_DEFAULTS,
            "vocab_size": 248_320,
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 32,
            "num_key_value_heads": 4,
        },
    ),
    "qwen3_5_moe_text": _hybrid(
        class_prefix="Qwen3_5Moe",
        defaults={
            **_HYBRID_DEFAULTS,
            "vocab_size": 248_320,
            "hidden_size": 2048,
            "num_hidden_layers": 40,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
        },
        moe=rules.qwen3_5_moe,
        sparse=rules.always,
        without=frozenset(
            {"num_local_experts", "intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}
        ),
    ),
}
#: Model types of multimodal folders whose text part is read: the model type of that part.
TEXT_PARTS = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}

#: (regular expression of a model type, why it is not supported).
_REFUSED = (
    (
        "qwen4_exp(_text)?",
        "it has hyper-connections, n-gram embeddings and a sparse attention index, which are not implemented",
    ),
    (
        r"qwen\w*_(vl|omni)(_.+)?|qwen\w*audio\w*|qwen\w*_vision",
        "it reads images or sound; of multimodal folders, the text part of qwen3_5 and qwen3_5_moe is read",
    ),
)


def family_of(model_type: Any, where: str) -> Family:
    """The entry of a model type; `where` names the config in the refusal of an unknown one."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        supported = ", ".join([*FAMILIES, *TEXT_PARTS])
        text = str(model_type)
        reason = next((f" ({reason})" for pattern, reason in _REFUSED if re.fullmatch(pattern, text)), "")
        raise ConfigError(f"{where}: model_type={model_type!r} is not supported{reason}: expected one of {supported}.")
    return FAMILIES[model_type]
