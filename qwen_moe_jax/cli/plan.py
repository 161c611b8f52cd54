"""`qwen-moe-jax plan`: whether a model fits hardware that is not here, what it sends, and what bounds it."""

import argparse
from pathlib import Path
from typing import get_args

from qwen_moe_jax.cli.arguments import mesh_sizes
from qwen_moe_jax.config import Dispatch, Dtype
from qwen_moe_jax.errors import ConfigError

SUMMARY = "compile a model for hardware that need not be here: whether it fits, what it sends, what bounds it"

#: Tokens, where they are not given.
PROMPT, CONTEXT = 512, 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a folder, a config.json, or a name on the Hub, of which only that is fetched"
    )
    parser.add_argument(
        "--target",
        required=True,
        help="cpu:8 (simulated), tpu:v5p:4x4x4 (v4, v5e, v5p, v6e, tpu7x) or gpu:h200:8 (a100, h100, h200, b200)",
    )
    parser.add_argument(
        "--for",
        dest="purpose",
        choices=("prefill", "decode", "forward"),
        default="decode",
        help="the program: a stretch of the prompts into the cache, one token for every row (if not given), or logits "
        "of whole sequences",
    )
    parser.add_argument("--batch", type=_positive, default=1, metavar="N", help="sequences at once; 1 if not given")
    parser.add_argument(
        "--prompt",
        type=_positive,
        metavar="N",
        help=f"prefill and forward: tokens of each sequence; {PROMPT} if not given",
    )
    parser.add_argument(
        "--context",
        type=_positive,
        metavar="N",
        help=f"prefill and decode: tokens a row of the cache has room for; {CONTEXT} if not given",
    )
    parser.add_argument(
        "--mesh",
        type=mesh_sizes,
        default={},
        metavar="AXIS=SIZE,…",
        help="how the target's devices stand, for example expert=8; their product is the number of devices",
    )
    parser.add_argument(
        "--dtype", choices=get_args(Dtype), help="of weights and activations; the config's if not given"
    )
    parser.add_argument("--dispatch", choices=get_args(Dispatch), help="how tokens reach their experts")
    parser.add_argument("--json", metavar="FILE", help="write all of it there; - for standard output")


def run(arguments: argparse.Namespace) -> None:
    """Prints the plan, or writes it.

    Raises:
        ConfigError: no such target or model, or arguments that have no meaning together.
        ShardingError: the mesh is not as large as the target, or does not divide the model.
    """
    if arguments.prompt and arguments.purpose == "decode":
        raise ConfigError("--prompt has a meaning with --for prefill and --for forward only.")
    if arguments.context and arguments.purpose == "forward":
        raise ConfigError("--context has a meaning with --for prefill and --for decode only.")

    from qwen_moe_jax.plan.targets import parse_target

    request = parse_target(arguments.target)

    from qwen_moe_jax.config import ExecutionConfig, ModelConfig
    from qwen_moe_jax.huggingface.hub import config_file
    from qwen_moe_jax.plan.compile import plan_step, target_mesh
    from qwen_moe_jax.plan.inference import decode_step, forward_step, prefill_step
    from qwen_moe_jax.plan.table import show_plan

    config = ModelConfig.from_pretrained(config_file(arguments.model))
    mesh = target_mesh(request, arguments.mesh)
    execution = ExecutionConfig(dtype=arguments.dtype, dispatch=arguments.dispatch)
    common = (
        config,
        Path(arguments.model).stem if Path(arguments.model).exists() else arguments.model,
        mesh,
        execution,
    )
    prompt, context = arguments.prompt or PROMPT, arguments.context or CONTEXT
    if arguments.purpose == "forward":
        step = forward_step(*common, rows=arguments.batch, length=prompt)
    elif arguments.purpose == "prefill":
        step = prefill_step(*common, rows=arguments.batch, prompt=prompt, max_length=max(prompt, context))
    else:
        step = decode_step(*common, rows=arguments.batch, max_length=context)
    show_plan(lambda: plan_step(step, request, mesh), arguments.target, arguments.json)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a positive number")
    return int(text)
