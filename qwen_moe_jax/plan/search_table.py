"""A search over meshes in a terminal: the ranking, and how to set the winner."""

import sys
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwen_moe_jax.plan.search import Candidate, Progress, Search
from qwen_moe_jax.units import in_bytes, in_seconds

#: Of those that were not compiled, how many are listed.
SHOWN_DRAFTS = 12


def print_search(search: Search, console: Console, set_mesh: Callable[[Mapping[str, int]], str]) -> None:
    """Prints the ranking and the words that set the best mesh.

    Args:
        search: what to print.
        console: where.
        set_mesh: a mesh as the command line at hand takes it: "--mesh.fsdp 32 --mesh.expert 8".
    """
    console.print(search_table(search))
    drafts = len(search.candidates) - len(search.compiled)
    left = f", {drafts - SHOWN_DRAFTS} more are not listed" if drafts > SHOWN_DRAFTS else ""
    told = f"{len(search.compiled)} compiled, {drafts} drafted by arithmetic only (~){left}"
    console.print(f"{told}; {len(search.refused)} meshes do not divide the model or the batch.", highlight=False)
    console.print("Seconds are estimates where nothing overlaps, from the chip's published numbers.", highlight=False)
    best = search.best
    if best is not None:
        console.print(f"Best: [bold]{escape(set_mesh(best.mesh))}[/]", highlight=False)
        return
    nearest = search.candidates[0]
    missing = nearest.plan.memory.spare
    lacks = "" if missing is None or missing >= 0 else f"; {in_bytes(-missing)} a device are missing"
    console.print(
        f"None that was compiled fits. The nearest is {escape(mesh_words(nearest.mesh))}{lacks}. More devices, fewer "
        "rows, or remat make room.",
        highlight=False,
    )


def search_table(search: Search) -> Table:
    """The ranking: compiled plans, then drafts, whose numbers carry a ~."""
    target = search.target
    axes = list(search.candidates[0].mesh)
    table = Table(title=f"Meshes of {target.devices} × {escape(target.chip)}", title_justify="left", box=None)
    table.padding = (0, 1, 0, 0)
    for name in (*axes, "fits", "a device", "spare", "a step", "tokens/s"):
        table.add_column(name, justify="left" if name == "fits" else "right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    for candidate in search.candidates[: len(search.compiled) + SHOWN_DRAFTS]:
        if candidate.plan is None:
            cells, style = _cells_of_draft(candidate), "dim"
        else:
            cells, style = _cells_of_plan(candidate), "bold" if candidate is search.best else ""
        sizes = (str(size) if size > 1 else "·" for size in candidate.mesh.values())
        table.add_row(*sizes, *cells, style=style)
    return table


def progress_line(progress: Progress) -> str:
    """`compiling 2 of 6: fsdp 32 × expert 8, about 5 min 10 s left`."""
    left = "" if progress.seconds_left is None else f", about {in_seconds(progress.seconds_left)} left"
    return f"compiling {progress.number} of {progress.of}: {mesh_words(progress.mesh)}{left}"


def print_progress(progress: Progress) -> None:
    """Says it on standard error, a line each: a compilation takes seconds to minutes."""
    print(progress_line(progress), file=sys.stderr, flush=True)


def mesh_words(mesh: Mapping[str, int]) -> str:
    """{"data": 1, "fsdp": 32, "expert": 8} as `fsdp 32 × expert 8`."""
    return " × ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def _cells_of_plan(candidate: Candidate) -> tuple[str, ...]:
    memory, roofline = candidate.plan.memory, candidate.plan.roofline
    fits = {True: "yes", False: "no", None: "?"}[memory.fits]
    total = "not told" if memory.total is None else in_bytes(memory.total)
    if roofline is None:
        return fits, total, _spare(memory.spare), "", "", ""
    seconds = roofline.seconds_without_overlap
    tokens = candidate.plan.work.tokens / seconds if seconds else 0
    return fits, total, _spare(memory.spare), in_seconds(seconds), f"{tokens:,.0f}", roofline.bound


def _cells_of_draft(candidate: Candidate) -> tuple[str, ...]:
    draft = candidate.draft
    fits = {True: "~yes", False: "~no", None: "?"}[draft.fits]
    spare = "" if draft.available is None else f"~{_spare(draft.available - draft.total)}"
    total = f"~{in_bytes(draft.total)}"
    if draft.seconds is None:
        return fits, total, spare, "", "", ""
    tokens = draft.tokens / draft.seconds
    return fits, total, spare, f"~{in_seconds(draft.seconds)}", f"~{tokens:,.0f}", ""


def _spare(spare: int | None) -> str:
    if spare is None:
        return ""
    return f"-{in_bytes(-spare)}" if spare < 0 else in_bytes(spare)
