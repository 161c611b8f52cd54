"""`qwen-moe-jax convert`: a checkpoint in another form."""

import argparse
from pathlib import Path

from qwen_moe_jax.cli.arguments import add_dtype_argument
from qwen_moe_jax.cli.interrupts import raise_interrupts
from qwen_moe_jax.units import format_bytes

SUMMARY = "write a checkpoint in another form: the Hub's safetensors, or an Orbax folder; memory holds a few blocks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="a Hub folder (safetensors or .bin), a native one, or a name on the Hub"
    )
    parser.add_argument("target", type=Path, metavar="DST", help="folder to write; it is complete or not there")
    parser.add_argument(
        "--to",
        choices=("hub", "orbax"),
        default="hub",
        help="hub: safetensors that transformers and vLLM load (the default); orbax: for many hosts",
    )
    add_dtype_argument(parser, "of the weights; the checkpoint's own if not given")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="with --to hub, of one file (5GB if not given)"
    )
    parser.add_argument(
        "--adapter",
        metavar="FOLDER",
        help="LoRA adapters in PEFT's layout, merged into the weights",
    )
    parser.add_argument(
        "--drop-mtp", action="store_true", help="leave out the next-token head (mtp.*) that the checkpoint may have"
    )
    parser.add_argument(
        "--check-finite", action="store_true", help="first read all weights and refuse infinities and NaN"
    )


def run(arguments: argparse.Namespace) -> None:
    """Converts, and prints the size of the result.

    Raises:
        ConfigError, CheckpointError: as `convert`; the target is untouched then.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed: no accelerator is needed

    from qwen_moe_jax.huggingface.convert import convert

    raise_interrupts()  # a partial target is removed
    convert(
        arguments.source,
        arguments.target,
        to=arguments.to,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        check_finite=arguments.check_finite,
        adapter=arguments.adapter,
        drop_mtp=arguments.drop_mtp,
    )
    size = sum(path.stat().st_size for path in arguments.target.rglob("*") if path.is_file())
    print(f"Wrote {arguments.target}, {format_bytes(size)}.")
