"""How `generate` and `chat` ask for text: arguments that speak before generation_config.json."""

import argparse
import dataclasses

from qwen_moe_jax.config import GenerationConfig
from qwen_moe_jax.errors import ConfigError

#: Arguments that shape what is drawn, and mean nothing where nothing is.
_SHAPING = ("top_k", "top_p", "min_p")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """What `sampled` needs to know."""
    group = parser.add_argument_group(
        "how the text is made", "What is not given is as generation_config.json has it, and greedy without one."
    )
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="so many tokens at most")
    group.add_argument("--temperature", type=float, metavar="X", help="draw tokens at it; 0 takes the most probable")
    group.add_argument("--top-k", type=int, metavar="N", help="draw among the N most probable tokens; 0 among all")
    group.add_argument("--top-p", type=float, metavar="X", help="draw among the most probable that sum to X")
    group.add_argument("--min-p", type=float, metavar="X", help="draw among those X times as probable as the best")
    group.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="above 1, tokens that were there before count less"
    )
    group.add_argument("--seed", type=int, metavar="N", help="the same text every time")
    group.add_argument(
        "--stop", action="append", dest="stop_strings", metavar="TEXT", help="ends the text, and is no part of it"
    )


def sampled(arguments: argparse.Namespace, defaults: GenerationConfig) -> GenerationConfig:
    """The checkpoint's own way to make text, changed as the arguments say.

    Raises:
        ConfigError: a value outside its range, or one without a meaning beside `--temperature 0`.
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
