"""A search over meshes in a terminal: the ranking, and the argument that sets the best mesh."""

import sys
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwen_moe_jax.plan.search import Candidate, Progress, Search
from qwen_moe_jax.text import format_mesh
from qwen_moe_jax.units import format_bytes, format_seconds

#: Of those that were not compiled, how many are listed.
SHOWN_DRAFTS = 12


def print_search(search: Search, console: Console, set_mesh: Callable[[Mapping[str, int]], str]) -> None:
    """Prints the ranking and the argument that sets the best mesh.

    Args:
        search: what to print.
        console: where.
        set_mesh: a mesh as the command line at hand takes it: "--mesh.fsdp 32 --mesh.expert 8".
    """
    console.print(search_table(search))
    drafts = len(search.candidates) - len(search.compiled)
    left = f", {drafts - SHOWN_DRAFTS} of them not listed" if drafts > SHOWN_DRAFTS else ""
    order = "seconds are estimates where nothing overlaps, from the chip's published numbers"
    if not _timed(search):
        order = "in the order of the bytes that a device sends in a step: there is no chip to estimate seconds for"
    console.print(
        f"{len(search.compiled)} compiled, {drafts} drafted by arithmetic only (~){left}; {len(search.refused)} do not "
        f"divide the model or the batch; {order}.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_outcome(search, set_mesh), highlight=False, soft_wrap=True)


def _outcome(search: Search, set_mesh: Callable[[Mapping[str, int]], str]) -> str:
    if search.best is not None:
        return f"Best: [bold]{escape(set_mesh(search.best.mesh))}[/]"
    nearest = search.candidates[0]
    missing = nearest.compiled_plan.memory.free
    lacks = "" if missing is None or missing >= 0 else f"; {format_bytes(-missing)} a device are missing"
    return (
        f"None of the compiled ones fits. The nearest is {escape(format_mesh(nearest.mesh))}{lacks}. More devices, "
        "fewer rows, or remat save memory."
    )


def search_table(search: Search) -> Table:
    """The ranking: compiled plans, then drafts, whose numbers are marked by ~."""
    target = search.target
    table = Table(title=f"Meshes of {target.devices} × {escape(target.chip)}", title_justify="left", box=None)
    table.padding = (0, 1, 0, 0)
    for axis in search.candidates[0].mesh:
        table.add_column(axis, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    timed = _timed(search)
    for name in ("a device", "free", *(("a step", "tokens/s") if timed else ("sends",))):
        table.add_column(name, justify="right", no_wrap=True)
    if timed:
        table.add_column("bound", no_wrap=True)
    for candidate in search.candidates[: len(search.compiled) + SHOWN_DRAFTS]:
        style = "dim" if candidate.plan is None else "bold" if candidate is search.best else ""
        sizes = (str(size) if size > 1 else "·" for size in candidate.mesh.values())
        table.add_row(
            *sizes, *(_cells_of_draft if candidate.plan is None else _cells_of_plan)(candidate, timed), style=style
        )
    return table


def _timed(search: Search) -> bool:
    """Whether the chip's numbers are known."""
    return search.target.peak_flops is not None and search.target.memory_bandwidth is not None


def progress_line(progress: Progress) -> str:
    """`compiling 2 of 6: fsdp=32, expert=8, about 5 min 10 s left`."""
    left = "" if progress.seconds_left is None else f", about {format_seconds(progress.seconds_left)} left"
    return f"compiling {progress.number} of {progress.of}: {format_mesh(progress.mesh)}{left}"


def print_progress(progress: Progress) -> None:
    """Prints a line to standard error: a compilation takes seconds to minutes."""
    print(progress_line(progress), file=sys.stderr, flush=True)


def _cells_of_plan(candidate: Candidate, timed: bool) -> tuple[str, ...]:
    plan = candidate.compiled_plan
    memory, roofline = plan.memory, plan.roofline
    held = (
        {True: "yes", False: "no", None: "?"}[memory.fits],
        format_bytes(memory.total),
        _free(memory.free),
    )
    if not timed:
        return *held, format_bytes(sum(item.bytes_per_step or 0 for item in plan.collectives))
    if roofline is None:  # refused
        return *held, "", "", ""
    seconds = roofline.seconds_without_overlap
    return *held, format_seconds(seconds), f"{plan.work.tokens / seconds:,.0f}", roofline.bound


def _cells_of_draft(candidate: Candidate, timed: bool) -> tuple[str, ...]:
    draft = candidate.draft
    held = (
        {True: "~yes", False: "~no", None: "?"}[draft.fits],
        f"~{format_bytes(draft.total)}",
        "" if draft.available is None else f"~{_free(draft.available - draft.total)}",
    )
    if not timed:
        return *held, f"~{format_bytes(draft.sent)}"
    if draft.seconds is None:
        return *held, "", "", ""
    return *held, f"~{format_seconds(draft.seconds)}", f"~{draft.tokens / draft.seconds:,.0f}", ""


def _free(free: int | None) -> str:
    if free is None:
        return ""
    return f"-{format_bytes(-free)}" if free < 0 else format_bytes(free)
