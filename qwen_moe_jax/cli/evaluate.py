"""`qwen-moe-jax eval`: EleutherAI's lm-eval on a checkpoint folder."""

import argparse
import importlib.util
import json
import sys

from qwen_moe_jax.errors import RequestError

SUMMARY = "run EleutherAI's lm-eval on a checkpoint: qwen-moe-jax eval FOLDER --tasks arc_easy --limit 100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a checkpoint with its tokenizer.json, or its name on the Hub")
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="…",
        help="arguments of `lm-eval run`, --help included; execution and mesh are --model_args, for example "
        "--model_args dtype=float32 expert=8 max_length=2048",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs lm-eval's own command line.

    Raises:
        RequestError: lm-eval is not installed.
        ConfigError, CheckpointError, ShardingError, RequestError: of the model or of what a task asks of it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RequestError("lm-eval is not installed: pip install 'qwen-moe-jax[eval]'.")

    from lm_eval.__main__ import cli_evaluate

    from qwen_moe_jax.inference.lm_eval_model import NAME

    model = ["--model", NAME, "--model_args", json.dumps({"folder": arguments.folder})]
    sys.argv = ["lm-eval", "run", *model, *arguments.words]  # its parser reads nothing else
    cli_evaluate()
