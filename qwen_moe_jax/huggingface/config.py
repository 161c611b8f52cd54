"""config.json ↔ ModelConfig, one translation per model type.

The rules are those of transformers 5.23, observed by running it: which layers slide differs by family, and so do
biases, head size and the defaults of absent fields. Both the old keys (`rope_theta`, `rope_scaling`, `torch_dtype`,
`num_experts`) and those of transformers 5 (`rope_parameters`, `dtype`, `num_local_experts`) are read, and both are
written.
"""

import dataclasses
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from qwen_moe_jax.config import AttentionConfig, GenerationConfig, LayerKind, ModelConfig, MoEConfig, RopeConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.fields import Fields, freeze, read_json, thaw

LAYER_TYPES = {"full_attention": "full", "sliding_attention": "sliding"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How one model type of the Hub is read.

    Attributes:
        class_prefix: of the transformers classes, as `architectures` names them.
        defaults: the values of fields that a config.json leaves out.
        qkv_bias, o_bias: read the biases of the attention projections.
        sliding: (fields, layer index) → does this layer slide, where no `layer_types` is given.
        writes_layer_types: the family knows the `layer_types` field.
        moe: reads the sparse block, None for a dense family.
        sparse: (fields, layer index) → does this layer have a sparse block.
    """

    class_prefix: str
    defaults: Mapping[str, Any]
    qkv_bias: Callable[[Fields], bool]
    o_bias: Callable[[Fields], bool]
    qk_norm: bool
    sliding: Callable[[Fields, int], bool]
    writes_layer_types: bool
    moe: Callable[[Fields], MoEConfig] | None = None
    sparse: Callable[[Fields, int], bool] = lambda fields, layer: False


def _never(fields: Fields) -> bool:
    return False


def _attention_bias(fields: Fields) -> bool:
    return fields.boolean("attention_bias", False)


def _slides_from_max_window_layers(fields: Fields, layer: int) -> bool:
    return _slides_if_used(fields, layer) and layer >= fields.integer("max_window_layers", 28)


def _slides_every_other_below_max_window_layers(fields: Fields, layer: int) -> bool:
    below = layer < fields.integer("max_window_layers", 28)
    return fields.boolean("use_sliding_window", False) and layer % 2 == 0 and below


def _slides_if_used(fields: Fields, layer: int) -> bool:
    return fields.boolean("use_sliding_window", False) and not fields.is_null("sliding_window")


def _slides_if_given(fields: Fields, layer: int) -> bool:
    return "sliding_window" in fields


def _always(fields: Fields, layer: int) -> bool:
    return True


def _sparse_by_step(fields: Fields, layer: int) -> bool:
    step = fields.integer("decoder_sparse_step", 1)
    if step < 1:
        raise fields.error("decoder_sparse_step", "a positive integer")
    chosen = layer not in fields.integers("mlp_only_layers") and (layer + 1) % step == 0
    return chosen and _expert_count(fields) > 0


def _expert_count(fields: Fields) -> int:
    """Transformers 5 stores `num_local_experts`, and it wins where both are given and differ."""
    return fields.integer("num_local_experts" if "num_local_experts" in fields else "num_experts")


def _qwen_moe(fields: Fields, *, shared_expert: int) -> MoEConfig:
    return MoEConfig(
        num_experts=_expert_count(fields),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        norm_topk_prob=fields.boolean("norm_topk_prob", False),
        shared_expert_intermediate_size=shared_expert,
        router_aux_loss_coef=fields.number("router_aux_loss_coef", 0.001),
    )


def _qwen2_moe(fields: Fields) -> MoEConfig:
    shared = fields.integer("shared_expert_intermediate_size")
    return _qwen_moe(fields, shared_expert=shared)


def _qwen3_moe(fields: Fields) -> MoEConfig:
    # Coder configs carry shared_expert_intermediate_size; transformers ignores it, and so must we.
    return _qwen_moe(fields, shared_expert=0)


def _mixtral(fields: Fields) -> MoEConfig:
    return MoEConfig(
        num_experts=_expert_count(fields),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        moe_intermediate_size=fields.integer("intermediate_size"),
        norm_topk_prob=True,
        float32_weights=True,
        router_aux_loss_coef=fields.number("router_aux_loss_coef", 0.001),
        router_jitter_noise=fields.number("router_jitter_noise", 0.0),
    )


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

FAMILIES = {
    "qwen2": Family(
        class_prefix="Qwen2",
        defaults=_DENSE_DEFAULTS,
        qkv_bias=lambda fields: True,
        o_bias=_never,
        qk_norm=False,
        sliding=_slides_from_max_window_layers,
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
        o_bias=_never,
        qk_norm=False,
        sliding=_slides_every_other_below_max_window_layers,
        writes_layer_types=True,
        moe=_qwen2_moe,
        sparse=_sparse_by_step,
    ),
    "qwen3": Family(
        class_prefix="Qwen3",
        defaults={**_DENSE_DEFAULTS, "head_dim": 128},
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        qk_norm=True,
        sliding=_slides_from_max_window_layers,
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
        qkv_bias=_attention_bias,
        o_bias=_attention_bias,
        qk_norm=True,
        sliding=_slides_if_used,
        writes_layer_types=False,
        moe=_qwen3_moe,
        sparse=_sparse_by_step,
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
        qkv_bias=_never,
        o_bias=_never,
        qk_norm=False,
        sliding=_slides_if_given,
        writes_layer_types=False,
        moe=_mixtral,
        sparse=_always,
    ),
}


# ---- config.json → ModelConfig -------------------------------------------------------------------------------------


def read_config(source: str | PathLike[str] | Mapping[str, Any]) -> ModelConfig:
    """Reads a checkpoint folder's config.json, a config.json, or its content.

    Raises:
        ConfigError: unknown model type, unsupported rope type or quantisation, inconsistent sizes; the message names
            the field, the value and what is supported.
    """
    if isinstance(source, Mapping):
        return config_from_hub(source, "config")
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    return config_from_hub(read_json(path), str(path))


def config_from_hub(hub: Mapping[str, Any], where: str = "config") -> ModelConfig:
    """Translates the content of a config.json. `where` names it in messages."""
    family = _family(hub.get("model_type"), where)
    if hub.get("quantization_config") is not None:
        method = hub["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, Mapping) else method
        raise ConfigError(
            f"{where}: quantization_config (quant_method={method!r}) is not supported: expected unquantised weights "
            "(float32, bfloat16 or float16). Use the unquantised checkpoint of the same model."
        )
    fields = Fields(hub, where, family.defaults)
    try:
        return _config(family, fields)
    except ConfigError as error:
        text = str(error)
        raise error if text.startswith(where) else ConfigError(f"{where}: {text}") from None


def _family(model_type: Any, where: str) -> Family:
    if model_type not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise ConfigError(f"{where}: model_type={model_type!r} is not supported: expected one of {supported}.")
    return FAMILIES[model_type]


def _config(family: Family, fields: Fields) -> ModelConfig:
    width = fields.integer("hidden_size")
    layers = _layer_kinds(family, fields)
    sparse = any(kind.mlp == "sparse" for kind in layers)
    sliding = any(kind.attention == "sliding" for kind in layers)
    dtype = fields.string("dtype", None) or fields.string("torch_dtype", None)
    return ModelConfig(
        model_type=fields.string("model_type"),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=width,
        intermediate_size=fields.integer("intermediate_size"),
        layers=layers,
        attention=_attention(family, fields, width, sliding),
        rope=_rope(fields),
        moe=family.moe(fields) if family.moe and sparse else None,
        rms_norm_eps=fields.number("rms_norm_eps"),
        hidden_act=fields.string("hidden_act", "silu"),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        initializer_range=fields.number("initializer_range", 0.02),
        dtype=dtype.removeprefix("torch.") if dtype else None,
        bos_token_id=None if fields.is_null("bos_token_id") else fields.integer("bos_token_id"),
        eos_token_id=() if fields.is_null("eos_token_id") else fields.integers("eos_token_id"),
        pad_token_id=fields.integer("pad_token_id", None),
        num_labels=len(fields.mapping("id2label")) or fields.integer("num_labels", 2),
        hub_fields=freeze(fields.values),
    )


def _attention(family: Family, fields: Fields, width: int, sliding: bool) -> AttentionConfig:
    heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", family.defaults.get("head_dim"))
    if head_dim is None:
        if heads < 1 or width % heads:
            raise fields.error(
                "num_attention_heads", f"a divisor of hidden_size={width}, or an explicit head_dim beside it"
            )
        head_dim = width // heads
    if sliding and fields.is_null("sliding_window"):
        raise fields.error("sliding_window", "an integer, since some layers slide")
    multi_head = fields.values.get("num_key_value_heads", 0) is None  # an explicit null means one per query head
    return AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=heads if multi_head else fields.integer("num_key_value_heads"),
        head_dim=head_dim,
        qkv_bias=family.qkv_bias(fields),
        o_bias=family.o_bias(fields),
        qk_norm=family.qk_norm,
        sliding_window=fields.integer("sliding_window") if sliding else None,
        attention_dropout=fields.number("attention_dropout", 0.0),
    )


def _layer_kinds(family: Family, fields: Fields) -> tuple[LayerKind, ...]:
    count = fields.integer("num_hidden_layers")
    if count < 1:
        raise fields.error("num_hidden_layers", "a positive integer")
    if family.writes_layer_types and "layer_types" in fields:
        names = fields.values["layer_types"]
        if not isinstance(names, list | tuple) or len(names) != count or not set(names) <= set(LAYER_TYPES):
            raise fields.error("layer_types", f"{count} entries (num_hidden_layers), each one of {list(LAYER_TYPES)}")
        attention = [LAYER_TYPES[name] for name in names]
        if "sliding" in attention and not fields.boolean("use_sliding_window", False):
            raise fields.error("use_sliding_window", "true, since layer_types has sliding layers")
    else:
        attention = ["sliding" if family.sliding(fields, layer) else "full" for layer in range(count)]
    return tuple(
        LayerKind(attention=attention[layer], mlp="sparse" if family.sparse(fields, layer) else "dense")
        for layer in range(count)
    )


def _rope(fields: Fields) -> RopeConfig:
    """Merges `rope_scaling` (which wins where given), `rope_parameters` and `rope_theta`, as transformers does."""
    name = "rope_scaling" if fields.mapping("rope_scaling") else "rope_parameters"
    values = dict(fields.mapping(name))
    rope = Fields(values, f"{fields.where}: {name}")
    if any(isinstance(value, Mapping) for value in values.values()):
        raise ConfigError(f"{rope.where} differs by layer type, which is not supported: expected one rope for all.")
    rope_type = rope.string("rope_type", None) or rope.string("type", None) or "default"
    supported = ("default", "linear", "dynamic", "yarn", "llama3")
    if rope_type not in supported:
        raise ConfigError(f"{rope.where}: rope_type={rope_type!r} is not supported: expected one of {supported}.")
    for holder in (rope, fields):
        if holder.number("partial_rotary_factor", 1.0) != 1.0:
            raise holder.error("partial_rotary_factor", "1.0 (the whole head is rotated)")
    theta = rope.number("rope_theta", None) or fields.number("rope_theta")
    if rope_type == "default":
        return RopeConfig(rope_theta=theta)
    longest = fields.integer("max_position_embeddings")
    original = fields.integer("original_max_position_embeddings", None) or rope.integer(
        "original_max_position_embeddings", longest
    )
    scaled = rope_type in ("yarn", "llama3")
    factor = rope.number("factor", longest / original if rope_type == "yarn" else None)
    if factor is None:
        raise rope.error("factor", "a number")
    known = dict(
        rope_type=rope_type,
        rope_theta=theta,
        factor=factor,
        original_max_position_embeddings=original if scaled else None,
    )
    if rope_type == "yarn":
        known |= {name: rope.number(name, None) for name in ("attention_factor", "mscale", "mscale_all_dim")}
        known |= dict(beta_fast=rope.number("beta_fast", None) or 32.0, beta_slow=rope.number("beta_slow", None) or 1.0)
        known |= dict(truncate=rope.boolean("truncate", True))
    if rope_type == "llama3":
        known |= {name: rope.number(name) for name in ("low_freq_factor", "high_freq_factor")}
    return RopeConfig(**known)


# ---- ModelConfig → config.json -------------------------------------------------------------------------------------


def config_to_hub(config: ModelConfig, head: str = "ForCausalLM") -> dict[str, Any]:
    """The content of a config.json that transformers 4 and 5 both read as this model.

    Args:
        config: the model.
        head: the last part of the transformers class, for `architectures`.

    Raises:
        ConfigError: the family cannot express the config (for example sliding layers in a pattern of its own); the
            message names the field.
    """
    family = _family(config.model_type, "config")
    hub = thaw(config.hub_fields)
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
        "eos_token_id": _one_or_list(config.eos_token_id),
        "pad_token_id": config.pad_token_id,
        "dtype": config.dtype,
        "torch_dtype": config.dtype,
    }
    hub.setdefault("use_cache", True)
    implied = "head_dim" not in family.defaults and "head_dim" not in hub
    if not (implied and config.attention.head_dim * config.attention.num_attention_heads == config.hidden_size):
        hub["head_dim"] = config.attention.head_dim
    hub |= _rope_to_hub(config.rope)
    hub |= _biases_to_hub(config)
    if config.moe is not None:
        hub |= _moe_to_hub(config, config.moe)
    if config.num_labels != (len(hub.get("id2label") or ()) or hub.get("num_labels", 2)):
        hub["id2label"] = {str(label): f"LABEL_{label}" for label in range(config.num_labels)}
        hub["label2id"] = {f"LABEL_{label}": label for label in range(config.num_labels)}
        hub.pop("num_labels", None)
    hub |= _layers_to_hub(config, family, hub)
    _assert_reads_back(config, hub)
    return hub


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else (ids[0] if ids else None)


def _rope_to_hub(rope: RopeConfig) -> dict[str, Any]:
    default = RopeConfig(rope_theta=rope.rope_theta)
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
    return {
        "rope_theta": rope.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": rope.rope_type, "rope_theta": rope.rope_theta} | (scaling or {}),
    }


def _biases_to_hub(config: ModelConfig) -> dict[str, Any]:
    if config.model_type == "qwen2_moe":
        return {"qkv_bias": config.attention.qkv_bias}
    if config.model_type in ("qwen3", "qwen3_moe"):
        return {"attention_bias": config.attention.qkv_bias}
    return {}


def _moe_to_hub(config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    hub = {"num_experts_per_tok": moe.num_experts_per_tok, "router_aux_loss_coef": moe.router_aux_loss_coef}
    if config.model_type == "mixtral":
        return hub | {"num_local_experts": moe.num_experts, "router_jitter_noise": moe.router_jitter_noise}
    hub |= {
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
    }
    if config.model_type == "qwen2_moe":
        return hub | {"shared_expert_intermediate_size": moe.shared_expert_intermediate_size}
    # transformers 5 reads num_local_experts, transformers 4 num_experts; each ignores the other.
    return hub | {"num_local_experts": moe.num_experts}


def _layers_to_hub(config: ModelConfig, family: Family, hub: dict[str, Any]) -> dict[str, Any]:
    """The fields that say which layer is of which kind: those the config came with where they still say it."""
    written: dict[str, Any] = {}
    if config.attention.sliding_window is not None:
        written = {"sliding_window": config.attention.sliding_window, "use_sliding_window": True}
    elif config.model_type == "mixtral":
        written = {"sliding_window": None}
    else:
        written = {"use_sliding_window": False}
    if family.writes_layer_types:
        names = {kind: name for name, kind in LAYER_TYPES.items()}
        written["layer_types"] = [names[kind.attention] for kind in config.layers]
    if family.moe is not None and config.model_type != "mixtral":
        mlps = [kind.mlp for kind in config.layers]
        as_given = Fields({**hub, **written}, "config", family.defaults)
        if [kind.mlp for kind in _layer_kinds(family, as_given)] != mlps:
            written["decoder_sparse_step"] = 1
            written["mlp_only_layers"] = [layer for layer, mlp in enumerate(mlps) if mlp == "dense"]
    return written


def _assert_reads_back(config: ModelConfig, hub: dict[str, Any]) -> None:
    """A family has rules of its own (qwen2's biases, mixtral's sliding): what it cannot say must not be written."""
    read = config_from_hub(hub, "config")
    for field in dataclasses.fields(ModelConfig):
        wanted, found = getattr(config, field.name), getattr(read, field.name)
        if field.name != "hub_fields" and wanted != found:
            raise ConfigError(
                f"{field.name}={wanted!r} cannot be written as model_type={config.model_type!r}: its config.json would "
                f"be read back as {found!r}. Choose another model_type."
            )


# ---- generation_config.json ----------------------------------------------------------------------------------------


def read_generation_config(folder: Path, config: ModelConfig) -> GenerationConfig:
    """Reads generation_config.json where there is one; otherwise the stop tokens of config.json."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationConfig(eos_token_id=config.eos_token_id)
    hub = read_json(path)
    ids = Fields(hub, str(path)).integers("eos_token_id")
    return GenerationConfig(eos_token_id=ids, hub_fields=freeze(hub))


def generation_config_to_hub(generation: GenerationConfig, config: ModelConfig) -> dict[str, Any]:
    """The content of a generation_config.json."""
    hub = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id} | thaw(generation.hub_fields)
    return hub | {"eos_token_id": _one_or_list(generation.eos_token_id)}
