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
from qwen_moe_jax.huggingface.families import Family, family_of
from qwen_moe_jax.huggingface.fields import REQUIRED, Fields, freeze, read_json, shown
from qwen_moe_jax.huggingface.known_fields import CONFIG_NEUTRAL, CONFIG_READ, CONFIG_WITHOUT_EFFECT
from qwen_moe_jax.huggingface.quantisation import fp8_block
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

LAYER_TYPES: dict[str, MixerKind] = {"full_attention": "full", "sliding_attention": "sliding"}


def read_config(source: str | PathLike[str] | Mapping[str, Any]) -> ModelConfig:
    """Reads a checkpoint folder's config.json, a config.json, or its content.

    Raises:
        ConfigError: unknown model type, unsupported rope type or quantisation, inconsistent sizes; the message names
            the field, the value and what is supported. In content that is given as a mapping, which somebody wrote by
            hand, also a key that is nearly one that is read.
    """
    if isinstance(source, Mapping):
        _refuse_near_misses(source)
        return config_from_hub(source, "config")
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    return config_from_hub(read_json(path), str(path))


def keys_read(hub: Mapping[str, Any]) -> set[str]:
    """The keys of a config.json that are read for its model type, by whatever rule, present or not."""
    family = family_of(hub.get("model_type"), "config")
    fields = Fields(hub, "config", family.defaults, family.renames)
    with contextlib.suppress(ConfigError):  # the keys that were read before the refusal
        _config(family, fields)
    return (CONFIG_READ - family.renames.keys()) | fields.asked


def _refuse_near_misses(hub: Mapping[str, Any]) -> None:
    read = keys_read(hub)
    known = read | ONLY_VALUES.keys() | CONFIG_WITHOUT_EFFECT | CONFIG_NEUTRAL.keys()
    for key in [key for key, value in hub.items() if key not in known and value is not None]:
        if near := similar(str(key), sorted(read), count=1, cutoff=_NEAR_MISS):
            raise ConfigError(
                f"config: {key}={shown(hub[key])}: no field of model_type={hub['model_type']!r} is called so: expected "
                f"{near[0]}. Correct the key, or remove it."
            )


def config_from_hub(hub: Mapping[str, Any], where: str = "config") -> ModelConfig:
    """Translates the content of a config.json. `where` names it in messages."""
    family = family_of(hub.get("model_type"), where)
    fp8_block(hub, where)  # refuses what cannot be dequantised
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
    sliding = any(kind.mixer == "sliding" for kind in layers)
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
        bos_token_id=None if fields.is_null("bos_token_id") else _token_id(fields, "bos_token_id", REQUIRED),
        eos_token_id=()
        if fields.is_null("eos_token_id")
        else tuple(token for token in fields.integers("eos_token_id") if token != -1),
        pad_token_id=_token_id(fields, "pad_token_id"),
        num_labels=len(fields.mapping("id2label")) or fields.integer("num_labels", 2),
        hub_fields=freeze(fields.values),
    )


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
        known = isinstance(names, list | tuple) and all(name in list(LAYER_TYPES) for name in names)
        if not known or len(names) != count:
            raise fields.error("layer_types", f"{count} entries (num_hidden_layers), each one of {list(LAYER_TYPES)}")
        mixers = [LAYER_TYPES[name] for name in names]
        if "sliding" in mixers and not fields.boolean("use_sliding_window", False):
            raise fields.error("use_sliding_window", "true, since layer_types has sliding layers")
    else:
        mixers = ["sliding" if family.sliding(fields, layer) else "full" for layer in range(count)]
    return tuple(
        LayerKind(mixer=mixers[layer], mlp="sparse" if family.sparse(fields, layer) else "dense")
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
    if original < 1:
        raise rope.error("original_max_position_embeddings", "a positive integer")
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
