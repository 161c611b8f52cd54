"""`qwen-moe-jax plan`: whether a model fits hardware that is not present, what it sends, and what bounds it."""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_moe_jax.cli.arguments import (
    add_calibration_arguments,
    add_dispatch_argument,
    add_dtype_argument,
    add_mesh_argument,
    add_sharding_argument,
    add_weights_argument,
)
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.text import format_mesh

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from qwen_moe_jax.plan.compile import Step
    from qwen_moe_jax.plan.search import Search
    from qwen_moe_jax.plan.settings import Settings

SUMMARY = "compile a model for hardware that is not present: whether it fits, what it sends, what bounds it"

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
        help="the program: prefill of a chunk of the prompts, decode of one token a row (the default), or "
        "forward: logits of whole sequences",
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
        help=f"prefill and decode: capacity of the cache in tokens a row; {CONTEXT} if not given",
    )
    add_mesh_argument(parser, "a mesh over the target's devices: the product is their number")
    add_sharding_argument(parser)
    add_dtype_argument(parser, "of weights and activations; the config's if not given")
    add_weights_argument(parser)
    add_dispatch_argument(parser)
    parser.add_argument(
        "--search",
        action="store_true",
        help="instead of --mesh: estimate every mesh of the devices, compile the most promising, show the best",
    )
    add_calibration_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write it as JSON; - for standard output")
    parser.add_argument("--html", metavar="FILE", help="write it as a self-contained HTML page")


def run(arguments: argparse.Namespace) -> None:
    """Compiles, and prints or writes the plan.

    Raises:
        ConfigError: no such target or model, or arguments that have no meaning together.
        ShardingError: the mesh is not as large as the target, or does not divide the model.
    """
    if arguments.prompt and arguments.purpose == "decode":
        raise ConfigError("--prompt has a meaning with --for prefill and --for forward only.")
    if arguments.context and arguments.purpose == "forward":
        raise ConfigError("--context has a meaning with --for prefill and --for decode only.")
    if arguments.search and arguments.mesh:
        raise ConfigError("--mesh and --search: found both, expected one. --search chooses the mesh.")

    from qwen_moe_jax.plan.targets import parse_target

    request = parse_target(arguments.target)

    from qwen_moe_jax.plan.calibration import calibration_for

    calibration = calibration_for(request, measure_to=arguments.calibrate, read_from=arguments.calibration)

    from qwen_moe_jax.config import ExecutionConfig, ModelConfig
    from qwen_moe_jax.huggingface.hub import config_file
    from qwen_moe_jax.huggingface.unused_fields import say_once
    from qwen_moe_jax.plan.compile import plan_step, target_mesh
    from qwen_moe_jax.plan.inference import decode_step, forward_step, prefill_step
    from qwen_moe_jax.plan.output import show_plan, show_search

    config = ModelConfig.from_pretrained(config_file(arguments.model))
    settings = {name: getattr(arguments, name) for name in ("dtype", "weights", "dispatch", "sharding")}
    execution = ExecutionConfig(**settings)
    name = Path(arguments.model).stem if Path(arguments.model).exists() else arguments.model
    prompt, context = arguments.prompt or PROMPT, arguments.context or CONTEXT
    tokens, positions = context if arguments.purpose == "decode" else prompt, config.max_position_embeddings
    if tokens > positions:
        say_once(
            f"{tokens:,} tokens a row are more than the {positions:,} positions that the model was trained for "
            "(max_position_embeddings)."
        )

    def step_on(mesh: "Mesh", settings: "Settings") -> "Step":
        common = (config, name, mesh, execution)
        if arguments.purpose == "forward":
            return forward_step(*common, rows=arguments.batch, length=prompt)
        if arguments.purpose == "prefill":
            return prefill_step(*common, rows=arguments.batch, prompt=prompt, max_length=max(prompt, context))
        return decode_step(*common, rows=arguments.batch, max_length=context)

    files = {"json_to": arguments.json, "html_to": arguments.html}
    if arguments.search:
        from qwen_moe_jax.plan.mesh_search import find_mesh
        from qwen_moe_jax.plan.search_table import print_progress

        def search() -> "Search":
            return find_mesh(
                step_on,
                request,
                dtype=str(execution.dtype or config.dtype or "float32"),
                calibration=calibration,
                progress=print_progress,
            )

        show_search(search, arguments.target, _paste, **files)
        return
    mesh = target_mesh(request, arguments.mesh)
    show_plan(lambda: plan_step(step_on(mesh, {}), request, mesh, calibration), arguments.target, **files)


def _paste(sizes: Mapping[str, int], settings: "Settings") -> tuple[str, str]:
    """A mesh as an argument that `mesh_sizes` parses."""
    words = format_mesh(sizes, separator=",") if math.prod(sizes.values()) > 1 else "data=1"
    return f"--mesh {words}", ""


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a positive number")
    return int(text)
