"""ModelConfig → config.json that transformers 4 and 5 both read.

The keys of both are written. A config that its family cannot express is refused, and never written as another one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwen_moe_jax.config import LinearAttentionConfig, ModelConfig, MoEConfig, RopeConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.config import LAYER_TYPES, config_from_hub, layer_kinds
from qwen_moe_jax.huggingface.families import Family, family_of
from qwen_moe_jax.huggingface.fields import Fields, one_or_list, thaw


def config_to_hub(config: ModelConfig, head: str = "ForCausalLM") -> dict[str, Any]:
    """The content of a config.json that transformers 4 and 5 both read as this model.

    Args:
        config: the model.
        head: the last part of the transformers class, for `architectures`.

    Raises:
        ConfigError: the family cannot express the config (for example sliding layers in a pattern of its own); the
            message names the field.
    """
    family = family_of(config.model_type, "config")
    hub = _renamed(thaw(config.hub_fields), {key: name for name, key in family.renames.items()})
    hub |= {
        "architectures": [family.class_prefix + head],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.attention.num_attention_heads,
        "num_key_value_heads": config.attention.num_key_value_heads,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": config.attention.attention_dropout,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": one_or_list(config.eos_token_id),
        "pad_token_id": config.pad_token_id,
        "dtype": config.dtype,
        "torch_dtype": config.dtype,
    }
    hub.setdefault("use_cache", True)
    implied = "head_dim" not in family.defaults and "head_dim" not in hub
    if not (implied and config.attention.head_dim * config.attention.num_attention_heads == config.hidden_size):
        hub["head_dim"] = config.attention.head_dim
    hub |= _rope_to_hub(config.rope, family, hub)
    hub |= _biases_to_hub(config, family)
    if config.moe is not None:
        hub |= _moe_to_hub(config, config.moe, family)
    if config.linear_attention is not None:
        hub |= _linear_attention_to_hub(config.linear_attention)
    if family.mtp and (config.num_mtp_layers or "mtp_num_hidden_layers" in hub):
        hub["mtp_num_hidden_layers"] = config.num_mtp_layers
    if "num_experts" in family.renames:
        hub.pop("num_local_experts", None)
    if config.num_labels != (len(hub.get("id2label") or ()) or hub.get("num_labels", 2)):
        hub["id2label"] = {str(label): f"LABEL_{label}" for label in range(config.num_labels)}
        hub["label2id"] = {f"LABEL_{label}": label for label in range(config.num_labels)}
        hub.pop("num_labels", None)
    hub |= _layers_to_hub(config, family, hub)
    if not _is_interval_of(config, family, hub):
        hub.pop("full_attention_interval", None)
    hub = _renamed({name: value for name, value in hub.items() if name not in family.without}, family.renames)
    _assert_reads_back(config, hub)
    return hub


def _renamed(hub: dict[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """The object with other keys, old → new; a value that had a new key already is left out."""
    kept = {key: value for key, value in hub.items() if key in keys or key not in keys.values()}
    return {keys.get(key, key): value for key, value in kept.items()}


def _rope_to_hub(rope: RopeConfig, family: Family, hub: Mapping[str, Any]) -> dict[str, Any]:
    default = RopeConfig(rope_theta=rope.rope_theta, partial_rotary_factor=rope.partial_rotary_factor)
    given = {
        field.name: getattr(rope, field.name)
        for field in dataclasses.fields(rope)
        if getattr(rope, field.name) != getattr(default, field.name)
    }
    if rope.rope_type == "default":
        scaling = None
    else:
        scaling = {"rope_type": rope.rope_type, "factor": rope.factor} | given
        if rope.rope_type == "llama3":
            scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    kept: dict[str, Any] = {}
    if family.partial_rotary_factor is not None:
        kept = {"partial_rotary_factor": rope.partial_rotary_factor}
    parameters = kept | (_mrope(hub) if kept else {})
    return {
        **kept,
        "rope_theta": rope.rope_theta,
        "rope_scaling": None if scaling is None else scaling | parameters,
        "rope_parameters": {"rope_type": rope.rope_type, "rope_theta": rope.rope_theta} | (scaling or {}) | parameters,
    }


def _mrope(hub: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a multimodal rope, which are kept for its readers."""
    rope = hub.get("rope_scaling") or hub.get("rope_parameters") or {}
    return {name: value for name, value in rope.items() if name.startswith("mrope_")}


def _linear_attention_to_hub(linear: LinearAttentionConfig) -> dict[str, Any]:
    return {
        "linear_num_key_heads": linear.num_key_heads,
        "linear_num_value_heads": linear.num_value_heads,
        "linear_key_head_dim": linear.key_head_dim,
        "linear_value_head_dim": linear.value_head_dim,
        "linear_conv_kernel_dim": linear.conv_kernel_dim,
    }


def _biases_to_hub(config: ModelConfig, family: Family) -> dict[str, Any]:
    if config.model_type == "qwen2_moe":
        return {"qkv_bias": config.attention.qkv_bias}
    if config.model_type in ("qwen3", "qwen3_moe") or family.linear is not None:
        return {"attention_bias": config.attention.qkv_bias}
    return {}


def _moe_to_hub(config: ModelConfig, moe: MoEConfig, family: Family) -> dict[str, Any]:
    if moe.balancing_bias:
        raise ConfigError(
            "balancing_bias=True cannot be written: no family of transformers that is supported here has a balancing "
            "bias, and without it a checkpoint would route otherwise."
        )
    hub = {"num_experts_per_tok": moe.num_experts_per_tok, "router_aux_loss_coef": moe.router_aux_loss_coef}
    if config.model_type == "mixtral":
        return hub | {"num_local_experts": moe.num_experts, "router_jitter_noise": moe.router_jitter_noise}
    hub |= {
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
    }
    if config.model_type == "qwen2_moe" or family.linear is not None:
        return hub | {"shared_expert_intermediate_size": moe.shared_expert_intermediate_size}
    # transformers 5 reads num_local_experts, transformers 4 num_experts; each ignores the other.
    return hub | {"num_local_experts": moe.num_experts}


def _layers_to_hub(config: ModelConfig, family: Family, hub: dict[str, Any]) -> dict[str, Any]:
    """The fields that determine each layer's kind; the config's original ones if they still give the same kinds."""
    written: dict[str, Any] = {}
    if config.attention.sliding_window is not None:
        written = {"sliding_window": config.attention.sliding_window, "use_sliding_window": True}
    elif config.model_type == "mixtral":
        written = {"sliding_window": None}
    elif "sliding_attention" in family.layer_types:
        written = {"use_sliding_window": False}
    if family.writes_layer_types:
        names = {kind: name for name, kind in LAYER_TYPES.items()}
        written["layer_types"] = [names[kind.mixer] for kind in config.layers]
    if family.moe is not None and config.model_type != "mixtral":
        mlps = [kind.mlp for kind in config.layers]
        as_given = Fields({**hub, **written}, "config", family.defaults)
        if [kind.mlp for kind in layer_kinds(family, as_given)] != mlps:
            written["decoder_sparse_step"] = 1
            written["mlp_only_layers"] = [layer for layer, mlp in enumerate(mlps) if mlp == "dense"]
    return written


def _is_interval_of(config: ModelConfig, family: Family, hub: Mapping[str, Any]) -> bool:
    """Whether full_attention_interval, which layer_types overrules, gives the same linear layers."""
    fields = Fields(hub, "config", family.defaults)
    return all(family.linear_layer(fields, at) == (kind.mixer == "linear") for at, kind in enumerate(config.layers))


def _assert_reads_back(config: ModelConfig, hub: dict[str, Any]) -> None:
    """Refuses what the family's own rules (qwen2's biases, mixtral's sliding) would read back differently."""
    if config.linear_attention is not None:  # a config.json does not say what the files' dtypes are
        linear = dataclasses.replace(config.linear_attention, float32_parameters=False)
        config = dataclasses.replace(config, linear_attention=linear)
    read = config_from_hub(hub, "config")
    for field in dataclasses.fields(ModelConfig):
        wanted, found = getattr(config, field.name), getattr(read, field.name)
        if field.name != "hub_fields" and wanted != found:
            raise ConfigError(
                f"{field.name}={wanted!r} cannot be written as model_type={config.model_type!r}: its config.json would "
                f"be read back as {found!r}. Choose another model_type."
            )
