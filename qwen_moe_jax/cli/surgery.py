"""What the commands that write a changed checkpoint have in common."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_moe_jax.surgery.upcycle import Grown


def add_folders(parser: argparse.ArgumentParser, source: str) -> None:
    """The source, the target, and the size of files."""
    parser.add_argument("source", metavar="SRC", help=f"{source}: a folder, or a name on the Hub")
    parser.add_argument("target", type=Path, metavar="OUT", help="folder to write; it is complete or not there")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest size of one file (5GB if not given)"
    )


def add_seed(parser: argparse.ArgumentParser, of: str) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=f"of {of} (0 if not given)")


def on_cpu() -> None:
    """Keeps JAX on the CPU: nothing is computed on an accelerator. A partial target is removed on Ctrl-C."""
    import jax

    from qwen_moe_jax.cli.interrupts import raise_interrupts

    jax.config.update("jax_platforms", "cpu")
    raise_interrupts()


def print_grown(target: Path, grown: "Grown") -> None:
    """Prints what has been written, and whether it computes what the source did."""
    moe = grown.moe
    shared = ", and one shared expert" if moe.shared_expert_intermediate_size else ""
    print(
        f"Wrote {target}: model_type {grown.model_type}, {moe.num_experts} experts of {moe.moe_intermediate_size} "
        f"hidden units in each layer, {moe.num_experts_per_tok} a token{shared}."
    )
    if grown.preserved:
        print(
            "Logits are those of SRC up to rounding: layers differ by at most "
            f"{grown.difference:.1e} of their norm in float32."
        )
        return
    print("Logits are not those of SRC:")
    for reason in grown.reasons:
        print(f"  {reason}")
