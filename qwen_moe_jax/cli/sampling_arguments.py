"""How `generate` and `chat` ask for text: arguments that override generation_config.json."""

import argparse
import dataclasses

from qwen_moe_jax.config import GenerationConfig
from qwen_moe_jax.errors import ConfigError

#: Arguments of sampling, without a meaning in greedy decoding.
_SHAPING = ("top_k", "top_p", "min_p")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sampled`."""
    group = parser.add_argument_group("sampling", "Defaults are those of generation_config.json; greedy without one.")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="at most so many new tokens")
    group.add_argument("--temperature", type=float, metavar="X", help="sampling temperature; 0 is greedy")
    group.add_argument("--top-k", type=int, metavar="N", help="sample among the N most probable tokens; 0 among all")
    group.add_argument("--top-p", type=float, metavar="X", help="sample among the most probable tokens that sum to X")
    group.add_argument("--min-p", type=float, metavar="X", help="sample among tokens X times as probable as the best")
    group.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="above 1, earlier tokens become less probable",
    )
    group.add_argument("--seed", type=int, metavar="N", help="of the random numbers: the same seed gives the same text")
    group.add_argument(
        "--stop", action="append", dest="stop_strings", metavar="TEXT", help="ends the text before it; may be repeated"
    )


def sampled(arguments: argparse.Namespace, defaults: GenerationConfig) -> GenerationConfig:
    """The checkpoint's generation config, overridden by the arguments.

    Raises:
        ConfigError: a value outside its range, or one that has no meaning with `--temperature 0`.
    """
    names = ("max_new_tokens", "temperature", *_SHAPING, "repetition_penalty", "seed", "stop_strings")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    shaping = [f"--{name.replace('_', '-')}" for name in _SHAPING if name in given]
    if given.get("temperature") == 0:
        if shaping:
            raise ConfigError(f"--temperature 0 draws nothing: leave out {', '.join(shaping)}, or give another one.")
        given["do_sample"] = False
    elif shaping or "temperature" in given:
        given["do_sample"] = True
    return dataclasses.replace(defaults, **given)
