"""`qwen-moe-jax inspect`: a checkpoint's tensors and sizes, and whether it loads."""

import argparse
import dataclasses
import json
import re
from collections import Counter
from typing import TYPE_CHECKING

from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.units import format_bytes, format_count

if TYPE_CHECKING:
    from qwen_moe_jax.huggingface.summary import Summary

#: The names of a layer's tensors are long and begin alike.
_LAYERS = re.compile(r"(model\.layers\.(?:\{[^}]*\}|\d+)\.)?(.+)")
#: Parts of a checkpoint that are named as a whole where they are not read.
_PARTS = re.compile(r"(model\.)?(visual|mtp)\.")

SUMMARY = "show a checkpoint's tensors, sizes and parameters, and whether it loads, without reading its weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a checkpoint folder, a config.json alone, or a name on the Hub, of which headers are fetched "
        "(owner/model, owner/model@revision)",
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor by name and shape, one a line")
    parser.add_argument("--json", action="store_true", help="write everything as JSON")
    parser.add_argument("--check-finite", action="store_true", help="read all weights, and look for infinities and NaN")


def run(arguments: argparse.Namespace) -> None:
    """Prints the summary; a checkpoint that does not load is an error after it.

    Raises:
        ConfigError, CheckpointError: as `summarize`; the checkpoint does not load.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")  # shapes only: no accelerator is needed

    from qwen_moe_jax.huggingface.summary import summarize

    summary = summarize(arguments.source, check_finite=arguments.check_finite)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(summary) | {"nbytes": summary.nbytes}, ensure_ascii=False))
    elif arguments.tensors:
        for name, shape in summary.tensors:
            print(name, list(shape))
    else:
        print_summary(summary)
    if summary.problems:
        lines = "\n  ".join(summary.problems)
        raise CheckpointError(f"{summary.where} does not load:\n  {lines}")


def print_summary(summary: "Summary") -> None:
    """Prints a headline and a table; plain text in a pipe."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(summary.where, style="bold", soft_wrap=True, markup=False)
    console.print(f"{summary.form} · {summary.model_type}, {summary.head}")
    dtypes = {row.dtype for row in summary.rows}
    is_sparse = summary.active_parameters < summary.parameters
    active = f", {format_count(summary.active_parameters)} active" if is_sparse else ""
    dtype = f" in {min(dtypes)}" if len(dtypes) == 1 else ""
    mtp = f", {format_count(summary.mtp_parameters)} more in its next-token head" if summary.mtp_parameters else ""
    size = f"{format_bytes(summary.nbytes)}{dtype}"
    console.print(f"{format_count(summary.parameters)} parameters{active}{mtp} · {size}")
    if summary.fetched is not None:
        console.print(f"{format_bytes(summary.fetched)} of its files were fetched from the Hub, for their headers.")
    console.print(summary.layers)
    console.print()
    # A column with the same value in every row takes width from the names.
    headings = ["shape", "×", "bytes", *(["dtype"] if len(dtypes) > 1 else [])]
    table = Table(box=None, pad_edge=False)
    table.add_column("tensors", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in ("×", "bytes") else "left", no_wrap=True)
    layers = ""
    for row in summary.rows:
        parts = _LAYERS.fullmatch(row.names)
        prefix, name = parts.groups("") if parts else ("", row.names)
        if prefix != layers and prefix:
            table.add_row(prefix, style="dim")
        layers = prefix
        shape, times = " × ".join(map(str, row.shape)), f"{row.count:,}" if row.count > 1 else ""
        cells = (f"  {name}" if prefix else name, shape, times, format_bytes(row.nbytes), row.dtype or "absent")
        table.add_row(*cells[: 1 + len(headings)])
    console.print(table)
    if summary.ignored:
        console.print(f"\nNot read by any forward pass: {', '.join(_grouped(summary.ignored))}")
    if not summary.problems and summary.form != "config alone":
        console.print("\nIt loads.")


def _grouped(names: tuple[str, ...]) -> list[str]:
    """Names of tensors; of a vision tower or a next-token head, how many there are."""
    parts = Counter(part[0] for name in names if (part := _PARTS.match(name)))
    others = [name for name in names if not _PARTS.match(name)]
    return others + [f"{count} of {part}*" for part, count in parts.items()]
