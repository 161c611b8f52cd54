"""`qwen-moe-jax verify`: whether two checkpoints are the same model, or what has happened to one."""

import argparse
import dataclasses
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qwen_moe_jax.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from qwen_moe_jax.surgery.result import Comparison, Finding, Inspection

SUMMARY = (
    "compare two checkpoints of any form, and say whether they are the same model or what has happened; or look at one "
    "for itself (exit code 0: the same, or nothing found; 1: they differ, or something was found; 2: refused)"
)
#: Names of tensors that are printed for a finding, and findings.
_NAMES, _FINDINGS = 4, 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "first",
        metavar="A",
        help="a checkpoint: Hub folder (safetensors, .bin, FP8), native folder, or name on the Hub",
    )
    parser.add_argument(
        "second",
        metavar="B",
        nargs="?",
        help="the checkpoint to compare with A; without it, A alone is searched for dead, equal and non-finite experts",
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="LoRA adapters in PEFT's layout that B should have merged into A's weights"
    )
    parser.add_argument("--json", action="store_true", help="write the result as JSON, with every name")


def run(arguments: argparse.Namespace) -> int:
    """Prints the result.

    Returns:
        The exit code: 0 for the same model (up to rounding or the order of experts), or nothing found in one; else 1.

    Raises:
        ConfigError, CheckpointError: as `compare_checkpoints` and `check_checkpoint`.
        RequestError: an adapter without B.
    """
    from qwen_moe_jax.errors import RequestError

    if arguments.adapter is not None and arguments.second is None:
        raise RequestError("--adapter is compared between two checkpoints: found A alone. Give B, or drop --adapter.")
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed by JAX: no accelerator is needed

    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False)
    if arguments.second is None:
        from qwen_moe_jax.surgery.self_check import check_checkpoint

        inspection = check_checkpoint(arguments.first)
        if arguments.json:
            print(json.dumps(dataclasses.asdict(inspection) | {"sound": inspection.sound}, ensure_ascii=False))
        else:
            print_inspection(inspection, console)
        return 0 if inspection.sound else 1
    from qwen_moe_jax.surgery.verify import compare_checkpoints

    comparison = compare_checkpoints(arguments.first, arguments.second, adapter=arguments.adapter)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(comparison) | {"same": comparison.same}, ensure_ascii=False))
    else:
        print_comparison(comparison, console)
    return 0 if comparison.same else 1


def print_comparison(comparison: "Comparison", console: "Console") -> None:
    """Prints the verdict, what is the same, and what has happened to the rest."""
    a = "A with the adapter" if comparison.adapter else "A"
    verdicts = {
        "same": f"The same model: {a} and B are equal in every bit.",
        "rounding": f"The same model up to rounding: {a} and B.",
        "reordered": f"The same function: {a} and B have their experts in another order.",
        "differs": f"Not the same model: {a} and B differ.",
    }
    console.print(f"A  {comparison.first}")
    console.print(f"B  {comparison.second}")
    if comparison.adapter:
        console.print(f"adapter  {comparison.adapter}")
    console.print(verdicts[comparison.verdict], style="bold")
    console.print(f"{comparison.equal:,} of {comparison.tensors:,} tensors are equal in every bit.")
    for rounded in comparison.rounded:
        if rounded.bound == "0":
            console.print(f"{rounded.count:,} have equal values in another dtype ({rounded.dtypes}).")
            continue
        console.print(
            f"{rounded.count:,} are equal up to rounding ({rounded.dtypes}): within {rounded.bound}; the largest "
            f"difference is {rounded.largest:.3g} in {rounded.name}, the largest share of a value "
            f"{rounded.relative:.2g}."
        )
    _print_findings(comparison.findings, console)


def print_inspection(inspection: "Inspection", console: "Console") -> None:
    """Prints what was found in one checkpoint."""
    console.print(f"A  {inspection.folder}")
    state = "Nothing is wrong with it" if inspection.sound else "Something is wrong with it"
    remarks = " but remarks are below" if inspection.sound and inspection.findings else ""
    console.print(f"{state}{remarks}.", style="bold")
    console.print(f"{inspection.tensors:,} tensors, {format_bytes(inspection.nbytes)}, were read.")
    _print_findings(inspection.findings, console)


def _print_findings(findings: Iterable["Finding"], console: "Console") -> None:
    """One paragraph for all findings with the same words."""
    from qwen_moe_jax.surgery.names import patterns

    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.kind, finding.words), []).append(finding)
    for (kind, words), group in list(groups.items())[:_FINDINGS]:
        console.print(f"\n{kind}: {words}")
        names = patterns(name for finding in group for name in finding.names)
        for name in names[:_NAMES]:
            console.print(f"  {name}")
        if len(names) > _NAMES:
            console.print(f"  … and {len(names) - _NAMES} more kinds of tensors")
    if len(groups) > _FINDINGS:
        console.print(f"\n… and {len(groups) - _FINDINGS} more; --json lists all of them")
