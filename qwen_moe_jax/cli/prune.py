"""`qwen-moe-jax prune`: a mixture of experts with its most salient experts alone."""

import argparse

from qwen_moe_jax.cli.surgery import add_folders, add_reduction, add_seed, calibration_rows, on_cpu, report_reduction

SUMMARY = (
    "leave out the least salient experts of each layer of a mixture, by what they do on a text or by their weights; "
    "memory holds a layer's attention and one expert"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folders(parser, "a mixture of experts")
    parser.add_argument(
        "--method",
        choices=("reap", "frequency", "magnitude", "random"),
        default="reap",
        help="reap: mean of the router's weight times the norm of the expert's output, over its tokens (the default); "
        "frequency: tokens that choose it; both need --calibrate. magnitude: norm of its weights; random: by chance",
    )
    add_reduction(parser)
    add_seed(parser, "--method random")


def run(arguments: argparse.Namespace) -> None:
    """Writes the smaller mixture, and prints which experts are left.

    Raises:
        RequestError: the text cannot be read, or the method needs one.
        ConfigError, CheckpointError: as `prune`; the target is untouched then.
    """
    on_cpu()
    from qwen_moe_jax.surgery.prune import prune

    reduced = prune(
        arguments.source,
        arguments.target,
        num_experts=arguments.experts,
        method=arguments.method,
        tokens=calibration_rows(arguments),
        num_experts_per_tok=arguments.top_k,
        seed=arguments.seed,
        max_shard_size=arguments.max_shard_size,
    )
    report_reduction(arguments, reduced)
