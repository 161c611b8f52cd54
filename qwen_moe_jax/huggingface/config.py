"""config.json → ModelConfig.

Both the old keys (`rope_theta`, `rope_scaling`, `torch_dtype`, `num_experts`) and those of transformers 5
(`rope_parameters`, `dtype`, `num_local_experts`) are read.
"""

import contextlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from qwen_moe_jax.config import AttentionConfig, LayerKind, ModelConfig, RopeConfig
from qwen_moe_jax.config.model import MixerKind
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.families import TEXT_PARTS, Family, family_of
from qwen_moe_jax.huggingface.fields import REQUIRED, Fields, freeze, read_json, shown
from qwen_moe_jax.huggingface.known_fields import (
    CONFIG_NEUTRAL,
    CONFIG_OF_OTHER_FAMILIES,
    CONFIG_READ,
    CONFIG_WITHOUT_EFFECT,
    activation_name,
)
from qwen_moe_jax.huggingface.quantised.method import opener_of
from qwen_moe_jax.suggest import similar

#: More means a damaged config, which is refused before anything is allocated per layer.
MOST_LAYERS = 1000

#: Fields that transformers acts on in every family, and their one value that is implemented.
ONLY_VALUES: dict[str, bool | None] = {
    "is_causal": True,  # false makes all attention bidirectional
    "attention_chunk_size": None,
    "per_layer_config": None,
    "token_classification_bias": True,
    "logits_mup_width_multiplier": None,
    "unpadded_vocab_size": None,
}

#: The similarity from which an unknown key is a misspelt one: `num_expert` has 0.95 of `num_experts`.
_NEAR_MISS = 0.86

LAYER_TYPES: dict[str, MixerKind] = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "linear_attention": "linear",
}

#: Keys of a multimodal config.json, outside its text_config, that are those of its text model, too.
_SHARED = ("architectures", "dtype", "torch_dtype", "quantization_config", "transformers_version")


def read_config(source: str | PathLike[str] | Mapping[str, Any]) -> ModelConfig:
    """Reads a checkpoint folder's config.json, a config.json, or its content.

    Raises:
        ConfigError: unknown model type, unsupported rope type or quantisation, inconsistent sizes; the message names
            the field, the value and what is supported. In content that is given as a mapping, which somebody wrote by
            hand, also a key that is nearly one that is read and no field of another family.
    """
    if isinstance(source, Mapping):
        _refuse_near_misses(source)
        return config_from_hub(source, "config")
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    return config_from_hub(read_json(path), str(path))


def keys_read(hub: Mapping[str, Any]) -> set[str]:
    """The keys of a text model's config that are read for its model type, by whatever rule, present or not."""
    family = family_of(hub.get("model_type"), "config")
    fields = Fields(hub, "config", family.defaults, family.renames)
    with contextlib.suppress(ConfigError):  # the keys that were read before the refusal
        _config(family, fields)
    return (CONFIG_READ - family.renames.keys() - family.without) | fields.asked


def text_part(hub: Mapping[str, Any], where: str = "config") -> Mapping[str, Any]:
    """The config of the text model alone: the `text_config` of a multimodal config.json, else the config itself.

    As AutoModelForCausalLM of transformers takes it: a multimodal folder's own tie_word_embeddings and token ids are
    not those of its text model.

    Raises:
        ConfigError: the text_config is missing, or is of another model type.
    """
    named = hub.get("model_type")
    model_type = TEXT_PARTS.get(named) if isinstance(named, str) else None
    if model_type is None:
        return hub
    text = hub.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError(
            f"{where}: text_config={shown(text)} is not supported: expected an object, the config of the text model, "
            f"in a config.json of model_type={named!r} (of the text model alone: model_type={model_type!r})."
        )
    if text.get("model_type", model_type) not in (model_type, named):
        raise ConfigError(
            f"{where}: text_config: model_type={shown(text['model_type'])} is not supported: expected {model_type!r}."
        )
    has_dtype = any(text.get(name) is not None for name in ("dtype", "torch_dtype"))
    shared = {
        name: hub[name]
        for name in _SHARED
        if hub.get(name) is not None and not (has_dtype and name in ("dtype", "torch_dtype"))
    }
    return {**shared, **text, "model_type": model_type}


def _refuse_near_misses(hub: Mapping[str, Any]) -> None:
    hub = text_part(hub)
    read = keys_read(hub)
    known = read | CONFIG_READ | ONLY_VALUES.keys() | CONFIG_WITHOUT_EFFECT | CONFIG_NEUTRAL.keys()
    known |= CONFIG_OF_OTHER_FAMILIES
    for key in [key for key, value in hub.items() if key not in known and value is not None]:
        if near := similar(str(key), sorted(read), count=1, cutoff=_NEAR_MISS):
            raise ConfigError(
                f"config: {key}={shown(hub[key])}: no field of model_type={hub['model_type']!r} is called so: expected "
                f"{near[0]}. Correct the key, or remove it."
            )


def config_from_hub(hub: Mapping[str, Any], where: str = "config") -> ModelConfig:
    """Translates the content of a config.json. `where` names it in messages."""
    hub = text_part(hub, where)
    family = family_of(hub.get("model_type"), where)
    opener_of(hub, where)  # refuses what cannot be dequantised
    # The model's weights are not quantised, also where the files' are.
    hub = {name: value for name, value in hub.items() if name != "quantization_config"}
    fields = Fields(hub, where, family.defaults, family.renames)
    try:
        return _config(family, fields)
    except ConfigError as error:
        text = str(error)
        raise error if text.startswith(where) else ConfigError(f"{where}: {text}") from None


def _config(family: Family, fields: Fields) -> ModelConfig:
    for name, value in ONLY_VALUES.items():
        if name in fields and fields.given(name) not in (value, {}):
            raise fields.error(name, "it to be absent" if value is None else f"{str(value).lower()}, or absent")
    width = fields.integer("hidden_size")
    layers = layer_kinds(family, fields)
    sparse = any(kind.mlp == "sparse" for kind in layers)
    mixers = {kind.mixer for kind in layers}
    dtype = fields.string("dtype", None) or fields.string("torch_dtype", None)
    return ModelConfig(
        model_type=fields.string("model_type"),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=width,
        intermediate_size=_dense_width(family, fields),
        layers=layers,
        attention=_attention(family, fields, width, "sliding" in mixers),
        rope=_rope(family, fields),
        moe=family.moe(fields) if family.moe and sparse else None,
        linear_attention=family.linear(fields) if family.linear and "linear" in mixers else None,
        zero_centered_norm=family.zero_centered_norm,
        num_mtp_layers=_mtp_layers(fields) if family.mtp else 0,
        rms_norm_eps=fields.number("rms_norm_eps"),
        hidden_act=activation_name(fields.string("hidden_act", "silu")),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        initializer_range=fields.number("initializer_range", 0.02),
        dtype=dtype.removeprefix("torch.") if dtype else None,
        bos_token_id=None if fields.is_null("bos_token_id") else _token_id(fields, "bos_token_id", REQUIRED),
        eos_token_id=()
        if fields.is_null("eos_token_id")
        else tuple(token for token in fields.integers("eos_token_id") if token != -1),
        pad_token_id=_token_id(fields, "pad_token_id"),
        num_labels=len(fields.mapping("id2label")) or fields.integer("num_labels", 2),
        hub_fields=freeze(fields.values),
    )


def _dense_width(family: Family, fields: Fields) -> int:
    """The width of dense layers; of a family that has none and no field for it, that of an expert."""
    return fields.integer("moe_intermediate_size" if "intermediate_size" in family.without else "intermediate_size")


def _mtp_layers(fields: Fields) -> int:
    count = fields.integer("mtp_num_hidden_layers", 0)
    if count not in (0, 1):
        raise fields.error("mtp_num_hidden_layers", "1, or 0 for the model without its next-token head")
    return count


def _token_id(fields: Fields, name: str, default: Any = None) -> int | None:
    """A token id; -1, which no token has, is how some tools write that there is none."""
    found = fields.integer(name, default)
    return None if found == -1 else found


def _attention(family: Family, fields: Fields, width: int, sliding: bool) -> AttentionConfig:
    heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", family.defaults.get("head_dim"))
    if head_dim is None:
        if heads < 1 or width % heads:
            raise fields.error(
                "num_attention_heads", f"a divisor of hidden_size={width}, or an explicit head_dim in addition"
            )
        head_dim = width // heads
    if family.linear is not None and fields.is_null("head_dim"):
        raise fields.error("head_dim", "an integer")
    if sliding and fields.is_null("sliding_window"):
        raise fields.error("sliding_window", "an integer, since some layers slide")
    multi_head = fields.is_null("num_key_value_heads")  # an explicit null means one per query head
    return AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=heads if multi_head else fields.integer("num_key_value_heads"),
        head_dim=head_dim,
        qkv_bias=family.qkv_bias(fields),
        o_bias=family.o_bias(fields),
        qk_norm=family.qk_norm,
        output_gate=family.output_gate,
        sliding_window=fields.integer("sliding_window") if sliding else None,
        attention_dropout=fields.number("attention_dropout", 0.0),
    )


def layer_kinds(family: Family, fields: Fields) -> tuple[LayerKind, ...]:
    """The kind of every layer, by the family's own rules."""
    count = fields.integer("num_hidden_layers")
    if not 1 <= count <= MOST_LAYERS:
        raise fields.error("num_hidden_layers", f"between 1 and {MOST_LAYERS}")
    if family.writes_layer_types and "layer_types" in fields:
        names = fields.given("layer_types")
        known = isinstance(names, list | tuple) and all(name in family.layer_types for name in names)
        if not known or len(names) != count:
            supported = list(family.layer_types)
            raise fields.error("layer_types", f"{count} entries (num_hidden_layers), each one of {supported}")
        mixers = [LAYER_TYPES[name] for name in names]
        if "sliding" in mixers and not fields.boolean("use_sliding_window", False):
            raise fields.error("use_sliding_window", "true, since layer_types has sliding layers")
    else:
        mixers = [_mixer(family, fields, layer) for layer in range(count)]
    return tuple(
        LayerKind(mixer=mixers[layer], mlp="sparse" if family.sparse(fields, layer) else "dense")
        for layer in range(count)
    )


def _mixer(family: Family, fields: Fields, layer: int) -> MixerKind:
    if family.linear_layer(fields, layer):
        return "linear"
    return "sliding" if family.sliding(fields, layer) else "full"


def _rope(family: Family, fields: Fields) -> RopeConfig:
    """Merges `rope_scaling` (which wins where given), `rope_parameters` and `rope_theta`, as transformers does.

    The three rows of positions that multimodal models have (mrope_section, mrope_interleaved) are equal in a text, and
    with equal ones the rope is this one, whatever the sections.
    """
    name = "rope_scaling" if fields.mapping("rope_scaling") else "rope_parameters"
    values = dict(fields.mapping(name))
    rope = Fields(values, f"{fields.where}: {name}")
    if any(isinstance(value, Mapping) for value in values.values()):
        raise ConfigError(f"{rope.where} differs by layer type, which is not supported: expected one rope for all.")
    rope_type = rope.string("rope_type", None) or rope.string("type", None) or "default"
    supported = ("default", "linear", "dynamic", "yarn", "llama3")
    if rope_type not in supported:
        raise ConfigError(f"{rope.where}: rope_type={rope_type!r} is not supported: expected one of {supported}.")
    theta = rope.number("rope_theta", None) or fields.number("rope_theta")
    partial = _partial_rotary_factor(family, rope, fields)
    if rope_type == "default":
        return RopeConfig(rope_theta=theta, partial_rotary_factor=partial)
    longest = fields.integer("max_position_embeddings")
    original = fields.integer("original_max_position_embeddings", None) or rope.integer(
        "original_max_position_embeddings", longest
    )
    if original < 1:
        raise rope.error("original_max_position_embeddings", "a positive integer")
    scaled = rope_type in ("yarn", "llama3")
    factor = rope.number("factor", longest / original if rope_type == "yarn" else None)
    if factor is None:
        raise rope.error("factor", "a number")
    known = dict(
        rope_type=rope_type,
        rope_theta=theta,
        partial_rotary_factor=partial,
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


def _partial_rotary_factor(family: Family, rope: Fields, fields: Fields) -> float:
    if family.partial_rotary_factor is None:
        for holder in (rope, fields):
            if holder.number("partial_rotary_factor", 1.0) != 1.0:
                raise holder.error("partial_rotary_factor", "1.0 (the whole head is rotated)")
        return 1.0
    found = rope.number("partial_rotary_factor", None)
    return fields.number("partial_rotary_factor", family.partial_rotary_factor) if found is None else found
