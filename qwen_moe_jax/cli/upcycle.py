"""`qwen-moe-jax upcycle`: a dense checkpoint made into a mixture of experts."""

import argparse

from qwen_moe_jax.cli.surgery import add_folders, add_seed, on_cpu, print_grown

SUMMARY = (
    "make a mixture of experts from a dense checkpoint: Qwen2 to Qwen2-MoE, Qwen3 to Qwen3-MoE, Mistral and Llama to "
    "Mixtral; copies, or slices of them; memory holds a few blocks"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_folders(parser, "a dense checkpoint")
    parser.add_argument("--experts", type=int, required=True, metavar="N", help="experts of each layer")
    parser.add_argument("--top-k", type=int, required=True, metavar="N", help="experts that a token chooses")
    parser.add_argument(
        "--expert-size", type=int, metavar="N", help="hidden units of an expert; those of the dense layer if not given"
    )
    parser.add_argument(
        "--redraw",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the experts' values that are drawn anew (0 if not given; Qwen1.5-MoE: 0.5, with small experts)",
    )
    parser.add_argument(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="give the hidden units of each copy an order of their own before it is sliced; done with --redraw",
    )
    add_seed(parser, "routers, orders and drawn values")


def run(arguments: argparse.Namespace) -> None:
    """Writes the mixture, and prints whether its logits are those of the dense model.

    Raises:
        ConfigError, CheckpointError: as `upcycle`; the target is untouched then.
    """
    on_cpu()
    from qwen_moe_jax.surgery.upcycle import upcycle

    grown = upcycle(
        arguments.source,
        arguments.target,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
        moe_intermediate_size=arguments.expert_size,
        shuffle=arguments.shuffle,
        redraw=arguments.redraw,
        seed=arguments.seed,
        max_shard_size=arguments.max_shard_size,
    )
    print_grown(arguments.target, grown)
