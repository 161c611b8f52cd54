"""Sampling arguments of `generate` and `chat`, which override generation_config.json."""

import argparse
from typing import Any

from qwen_moe_jax.config import GenerationConfig
from qwen_moe_jax.config.docs import first_sentence
from qwen_moe_jax.errors import ConfigError

#: Arguments that are fields of `GenerationConfig`, with their types; its docstring is their help.
_NUMBERS = {
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "num_speculative_tokens": int,
}
#: The argument is more than the field: it chooses between sampling and greedy decoding as well.
_TEMPERATURE = "sampling temperature; 0 is greedy"
#: Arguments of sampling, without a meaning in greedy decoding.
_SHAPING = ("top_k", "top_p", "min_p")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sampling_overrides`."""
    group = parser.add_argument_group("sampling", "Defaults are those of generation_config.json; greedy without one.")
    for name, kind in _NUMBERS.items():
        text = _TEMPERATURE if name == "temperature" else first_sentence(GenerationConfig, name)
        metavar = "N" if kind is int else "X"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--stop", action="append", dest="stop_strings", metavar="TEXT", help="ends the text before it; may be repeated"
    )


def sampling_overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `GenerationConfig` that the arguments set; they replace those of generation_config.json.

    Raises:
        ConfigError: one that has no meaning with `--temperature 0`.
    """
    given = {name: value for name in (*_NUMBERS, "stop_strings") if (value := getattr(arguments, name)) is not None}
    shaping = [f"--{name.replace('_', '-')}" for name in _SHAPING if name in given]
    if given.get("temperature") == 0:
        if shaping:
            raise ConfigError(f"--temperature 0 draws nothing: leave out {', '.join(shaping)}, or give another one.")
        given["do_sample"] = False
    elif shaping or "temperature" in given:
        given["do_sample"] = True
    return given
