"""`qwen-moe-jax grow`: a mixture of experts with more experts, or a larger top-k."""

import argparse

from qwen_moe_jax.cli.surgery import add_folders, add_seed, on_cpu, print_grown

SUMMARY = (
    "give a mixture of experts more experts, copies of its own with their router rows, or a larger top-k; with both m "
    "times as large its logits are kept"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folders(parser, "a mixture of experts")
    parser.add_argument(
        "--experts", type=int, metavar="N", help="experts of each layer; as many as it has if not given"
    )
    parser.add_argument(
        "--top-k", type=int, metavar="N", help="experts that a token chooses; grown like the experts if not given"
    )
    parser.add_argument(
        "--redraw",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the copies' values that are drawn anew (0 if not given); equal copies stay equal in training",
    )
    add_seed(parser, "drawn values")


def run(arguments: argparse.Namespace) -> None:
    """Writes the mixture, and prints whether its logits are those of the old one.

    Raises:
        ConfigError, CheckpointError: as `grow`; the target is untouched then.
    """
    on_cpu()
    from qwen_moe_jax.surgery.upcycle import grow

    grown = grow(
        arguments.source,
        arguments.target,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
        redraw=arguments.redraw,
        seed=arguments.seed,
        max_shard_size=arguments.max_shard_size,
    )
    print_grown(arguments.target, grown)
