"""Fields of a folder's JSON files that are set and not acted on: named once on stderr.

The tables say what is known to be right: fields that are read, fields without effect on the output, and the neutral
values of the others. Everything else is named, so that a setting is never lost in silence. (Fields that are known to
change the model are refused where they are read.)
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.config import ONLY_VALUES, keys_read, text_part
from qwen_moe_jax.huggingface.fields import read_json, shown
from qwen_moe_jax.huggingface.generation_config import READERS
from qwen_moe_jax.huggingface.known_fields import CONFIG_NEUTRAL, CONFIG_WITHOUT_EFFECT
from qwen_moe_jax.sharding.distributed import is_process_zero

_GENERATION_WITHOUT_EFFECT = set(
    "bos_token_id pad_token_id transformers_version _from_model_config use_cache cache_implementation cache_config "
    "max_cache_len output_attentions output_hidden_states output_scores output_logits return_dict_in_generate "
    "is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold "
    "max_matching_ngram_size assistant_early_exit assistant_lookbehind target_lookbehind assistant_ensemble_weight "
    "compile_config disable_compile continuous_batching_config low_memory prefill_chunk_size use_mtp "
    "speculation_type prompt_lookup_num_tokens decoder_start_token_id chat_format max_window_size".split()
)
#: generation_config.json: values with which transformers' processors do nothing.
_GENERATION_NEUTRAL = {
    "max_length": 20,
    "min_length": 0,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "penalty_alpha": 0.0,
    "typical_p": 1.0,
    "top_h": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "num_return_sequences": 1,
}

#: tokenizer_config.json: tokenizer.json says how text becomes tokens; these name special tokens, templates and limits.
_TOKENIZER_KNOWN = set(
    "tokenizer_class auto_map added_tokens_decoder additional_special_tokens extra_special_tokens chat_template "
    "bos_token eos_token pad_token unk_token sep_token cls_token mask_token model_max_length padding_side "
    "truncation_side errors legacy use_default_system_prompt processor_class name_or_path special_tokens_map_file "
    "tokenizer_file model_input_names sp_model_kwargs use_fast backend is_local max_length stride "
    "truncation_strategy pad_to_multiple_of pad_token_type_id padding".split()
)
#: tokenizer_config.json: steps that transformers would add to those of tokenizer.json.
_TOKENIZER_NEUTRAL = {"spaces_between_special_tokens": True}
#: Of these, those that a tokenizer.json with a template of special tokens already has.
_BY_TEMPLATE = {"add_bos_token", "add_eos_token"}

_said: set[str] = set()


def unused(hub: Mapping[str, Any], known: set[str], neutral: Mapping[str, Any]) -> list[str]:
    """The fields of a JSON object that are neither known nor neutral, as "name=value"."""
    return [
        f"{name}={shown(value)}"
        for name, value in hub.items()
        if name not in known and value not in (None, False, "", [], {}) and value != neutral.get(name)
    ]


def _known(name: str, values: Mapping[str, Any]) -> tuple[set[str], Mapping[str, Any]]:
    """The fields of one of the files that are read or without effect, and the neutral values of others."""
    if name == "config.json":
        return keys_read(values) | ONLY_VALUES.keys() | CONFIG_WITHOUT_EFFECT, CONFIG_NEUTRAL
    if name == "generation_config.json":
        return READERS.keys() | _GENERATION_WITHOUT_EFFECT, _GENERATION_NEUTRAL
    return _TOKENIZER_KNOWN, _TOKENIZER_NEUTRAL


def say_unused_fields(folder: Path) -> None:
    """Names the fields of a folder's config files that are not acted on, a line a file on stderr, once per process."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            try:
                values = text_part(read_json(path)) if name == "config.json" else read_json(path)
                found = unused(values, *_known(name, values))
            except ConfigError:  # refused by its reader, if there is one
                continue
            if found and name == "tokenizer_config.json" and _adds_special_tokens(folder / "tokenizer.json"):
                found = [field for field in found if field.partition("=")[0] not in _BY_TEMPLATE]
            if found:
                say_once(f"{path}: not acted on: {', '.join(found)}.")


def _adds_special_tokens(path: Path) -> bool:
    """Whether a tokenizer.json puts special tokens around a text."""
    return path.is_file() and "TemplateProcessing" in json.dumps(read_json(path).get("post_processor"))


def say_once(text: str) -> None:
    """Writes a line to stderr, by process 0 and once per process."""
    if text not in _said and is_process_zero():
        _said.add(text)
        print(f"note: {text}", file=sys.stderr)
