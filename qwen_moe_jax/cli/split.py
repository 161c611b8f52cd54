"""`qwen-moe-jax split`: a mixture of finer-grained experts."""

import argparse

from qwen_moe_jax.cli.surgery import add_folders, add_seed, on_cpu, print_grown

SUMMARY = "split each expert of a mixture into parts with its router row; with as many times the top-k, logits are kept"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folders(parser, "a mixture of experts")
    parser.add_argument("--parts", type=int, required=True, metavar="N", help="parts of each expert")
    parser.add_argument(
        "--top-k", type=int, metavar="N", help="experts that a token chooses; parts times the old number if not given"
    )
    parser.add_argument("--shuffle", action="store_true", help="draw which hidden units are together")
    add_seed(parser, "--shuffle")


def run(arguments: argparse.Namespace) -> None:
    """Writes the mixture, and prints whether its logits are those of the old one.

    Raises:
        ConfigError, CheckpointError: as `split`; the target is untouched then.
    """
    on_cpu()
    from qwen_moe_jax.surgery.upcycle import split

    grown = split(
        arguments.source,
        arguments.target,
        parts=arguments.parts,
        num_experts_per_tok=arguments.top_k,
        shuffle=arguments.shuffle,
        seed=arguments.seed,
        max_shard_size=arguments.max_shard_size,
    )
    print_grown(arguments.target, grown)
