"""generation_config.json ↔ GenerationConfig.

Fields that are not implemented (beams, `guidance_scale`, …) are kept and written again.
"""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qwen_moe_jax.config import GenerationConfig, ModelConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.fields import Fields, freeze, one_or_list, read_json, thaw
from qwen_moe_jax.huggingface.hub import adapter_folder


def read_generation_config(
    folder: Path, config: ModelConfig, overrides: Mapping[str, Any] = MappingProxyType({})
) -> GenerationConfig:
    """Reads generation_config.json; without one, the stop tokens of config.json.

    Args:
        folder: of the checkpoint.
        config: its config.json.
        overrides: fields of `GenerationConfig` that replace the file's, which may then hold any value.

    Raises:
        ConfigError: a field outside its range or of another type; the message names the file and the field.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return GenerationConfig(**{"eos_token_id": config.eos_token_id, **overrides})
    return generation_config_from_hub(read_json(path), str(path), overrides)


def generation_folder(folder: Path, adapter: str | PathLike[str] | None) -> Path:
    """The folder whose generation_config.json is read: the adapter's, if there is one with such a file."""
    if adapter is None:
        return folder
    found = adapter_folder(adapter)
    return found if (found / "generation_config.json").is_file() else folder


def generation_config_from_hub(
    hub: Mapping[str, Any], where: str = "generation_config", overrides: Mapping[str, Any] = MappingProxyType({})
) -> GenerationConfig:
    """Translates the content of a generation_config.json. Null is the default.

    Args:
        hub: the content.
        where: its name in messages.
        overrides: as of `read_generation_config`.
    """
    hub = {name: value for name, value in hub.items() if OWN_NAMES.get(name, name) not in overrides}
    fields = Fields(hub, where)
    found = {OWN_NAMES.get(name, name): read(fields, name) for name, read in READERS.items() if name in fields}
    if "min_new_tokens" in fields:  # transformers, too, lets it replace min_length
        found.pop("min_length", None)
    try:
        return GenerationConfig(**found, **overrides, hub_fields=freeze(hub))
    except ConfigError as error:
        GenerationConfig(**overrides)  # what is wrong with these alone is not the file's
        raise ConfigError(f"{where}: {error}") from None


def generation_config_to_hub(generation: GenerationConfig, config: ModelConfig) -> dict[str, Any]:
    """The content of a generation_config.json: its original fields, updated by those that were changed since."""
    hub = thaw(generation.hub_fields)
    came_with = generation_config_from_hub(hub)
    hub = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id} | hub
    for name in READERS:
        value = getattr(generation, OWN_NAMES.get(name, name))
        if value != getattr(came_with, OWN_NAMES.get(name, name)):
            hub[name] = WRITERS[name](value) if name in WRITERS else value
    return hub


def _stop_tokens(fields: Fields, name: str) -> tuple[int, ...]:
    # -1, which no token has, is how some tools write that there is none.
    return tuple(token for token in fields.integers(name) if token != -1)


def _strings(fields: Fields, name: str) -> tuple[str, ...]:
    found = fields.values[name]
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise fields.error(name, "a string or a list of strings")
    return tuple(found)


def _words(fields: Fields, name: str) -> tuple[tuple[int, ...], ...]:
    found = fields.values[name]
    if not isinstance(found, list) or not all(_are_ids(word) for word in found):
        raise fields.error(name, "a list of lists of token ids")
    return tuple(map(tuple, found))


def _biases(fields: Fields, name: str) -> tuple[tuple[tuple[int, ...], float], ...]:
    found = fields.values[name]
    pairs = isinstance(found, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in found)
    if not pairs or not all(_are_ids(ids) and isinstance(bias, int | float) for ids, bias in found):
        raise fields.error(name, "a list of [token ids, number]")
    return tuple((tuple(ids), bias) for ids, bias in found)


def _decay(fields: Fields, name: str) -> tuple[int, float]:
    found = fields.values[name]
    if not isinstance(found, list) or len(found) != 2 or not all(type(x) in (int, float) for x in found):
        raise fields.error(name, "[start, factor]")
    return int(found[0]), float(found[1])


def _are_ids(found: Any) -> bool:
    return isinstance(found, list) and all(type(token) is int for token in found)


#: Readers of the implemented fields.
READERS: dict[str, Callable[[Fields, str], Any]] = {
    "eos_token_id": _stop_tokens,
    "stop_strings": _strings,
    "max_new_tokens": Fields.integer,
    "max_length": Fields.integer,
    "min_new_tokens": Fields.integer,
    "min_length": Fields.integer,
    "do_sample": Fields.boolean,
    "temperature": Fields.number,
    "top_k": Fields.integer,
    "top_p": Fields.number,
    "min_p": Fields.number,
    "typical_p": Fields.number,
    "epsilon_cutoff": Fields.number,
    "eta_cutoff": Fields.number,
    "repetition_penalty": Fields.number,
    "presence_penalty": Fields.number,
    "frequency_penalty": Fields.number,
    "sequence_bias": _biases,
    "bad_words_ids": _words,
    "no_repeat_ngram_size": Fields.integer,
    "suppress_tokens": Fields.integers,
    "begin_suppress_tokens": Fields.integers,
    "forced_bos_token_id": Fields.integer,
    "forced_eos_token_id": Fields.integers,
    "exponential_decay_length_penalty": _decay,
    "num_speculative_tokens": Fields.integer,
    "seed": Fields.integer,
}
#: Fields with another name in `GenerationConfig`.
OWN_NAMES = {"sequence_bias": "logit_bias"}


def _biases_to_hub(biases: tuple[tuple[int | tuple[int, ...], float], ...]) -> list[list[Any]] | None:
    return [[list(ids) if isinstance(ids, tuple) else [ids], bias] for ids, bias in biases] or None


#: Writers of fields whose JSON differs from the value. transformers refuses empty lists, so empty is null.
WRITERS: dict[str, Callable[[Any], Any]] = {
    "eos_token_id": one_or_list,
    "stop_strings": lambda strings: list(strings) or None,
    "sequence_bias": _biases_to_hub,
    "bad_words_ids": lambda words: [list(word) for word in words] or None,
    "suppress_tokens": lambda ids: list(ids) or None,
    "begin_suppress_tokens": lambda ids: list(ids) or None,
    "forced_eos_token_id": one_or_list,
    "exponential_decay_length_penalty": lambda decay: None if decay is None else list(decay),
}
