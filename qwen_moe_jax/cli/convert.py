"""`qwen-moe-jax convert`: a checkpoint in another form."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_moe_jax.cli.arguments import add_dtype_argument
from qwen_moe_jax.cli.interrupts import raise_interrupts
from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.units import format_bytes

if TYPE_CHECKING:
    from qwen_moe_jax.surgery.result import Comparison

SUMMARY = (
    "write a checkpoint in another form: the Hub's safetensors, an Orbax folder, or a GGUF file for llama.cpp; memory "
    "holds a few blocks"
)
#: Most findings in a message.
_LISTED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="a Hub folder (safetensors or .bin), a native one, or a name on the Hub"
    )
    parser.add_argument(
        "target", type=Path, metavar="DST", help="folder to write, or file (--to gguf); it is complete or not there"
    )
    parser.add_argument(
        "--to",
        choices=("hub", "orbax", "gguf"),
        default="hub",
        help="hub: safetensors that transformers and vLLM load (the default); orbax: for many hosts; gguf: one file "
        "for llama.cpp, by the gguf library (pip install gguf)",
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
    parser.add_argument("--replace", action="store_true", help="with --to gguf, replace the GGUF file that is there")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compare what was written with SRC, as `verify` does, before it replaces DST (exit code 1: they differ, "
        "and DST is unchanged); on if not given and SRC is a folder",
    )


def run(arguments: argparse.Namespace) -> int:
    """Converts, and prints the size of the result.

    Returns:
        The exit code: 0, or 1 if what was written is not the same model as the source.

    Raises:
        ConfigError, CheckpointError: as `convert`; the target is untouched then.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed: no accelerator is needed

    from qwen_moe_jax.huggingface.convert import convert

    raise_interrupts()  # a partial target is removed
    verify = Path(arguments.source).is_dir() if arguments.verify is None else arguments.verify
    if arguments.to == "gguf":
        return _export_gguf(arguments, verify=verify)
    verified = _Verified(arguments)
    try:
        convert(
            arguments.source,
            arguments.target,
            to=arguments.to,
            dtype=arguments.dtype,
            max_shard_size=arguments.max_shard_size,
            check_finite=arguments.check_finite,
            adapter=arguments.adapter,
            drop_mtp=arguments.drop_mtp,
            check=verified if verify else None,
        )
    except _DifferError as error:
        print(f"qwen-moe-jax convert: error: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in arguments.target.rglob("*") if path.is_file())
    print(f"Wrote {arguments.target}, {format_bytes(size)}{verified.words}.")
    return 0


def _export_gguf(arguments: argparse.Namespace, *, verify: bool) -> int:
    from qwen_moe_jax.huggingface.gguf.export import export_gguf

    export_gguf(
        arguments.source,
        arguments.target,
        dtype=arguments.dtype,
        adapter=arguments.adapter,
        verify=verify,
        replace=arguments.replace,
    )
    state = "; verified: read back bit for bit" if verify else ""
    print(f"Wrote {arguments.target}, {format_bytes(arguments.target.stat().st_size)}{state}.")
    return 0


class _DifferError(CheckpointError):
    """What was written is not the same model as the source."""


class _Verified:
    """The check of a conversion: its comparison with the source.

    Attributes:
        words: what it has found, for the last line.
    """

    def __init__(self, arguments: argparse.Namespace):
        self._arguments = arguments
        self.words = ""

    def __call__(self, folder: Path) -> None:
        from qwen_moe_jax.surgery.verify import compare_checkpoints

        arguments = self._arguments
        comparison = compare_checkpoints(
            arguments.source, folder, adapter=arguments.adapter, drop_mtp=arguments.drop_mtp
        )
        if not comparison.same:
            raise _DifferError(_difference(comparison, arguments))
        state = "equal to SRC in every bit" if comparison.verdict == "same" else "equal to SRC up to rounding"
        self.words = f"; verified: {comparison.tensors:,} tensors {state}"


def _difference(comparison: "Comparison", arguments: argparse.Namespace) -> str:
    lines = dict.fromkeys(f"{finding.kind}: {finding.words}" for finding in comparison.findings)
    listed = "\n  ".join([*lines][:_LISTED] + ["…"] * (len(lines) > _LISTED))
    return (
        f"{arguments.target} is unchanged: what would be written is not the same model as {arguments.source}:\n"
        f"  {listed}\nWith --no-verify it is written all the same."
    )
