"""A search in a terminal: the ranking, why the others were not compiled, and the words that set the best."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwen_moe_jax.plan.result import PUBLISHED
from qwen_moe_jax.plan.search import Candidate, Progress, Search
from qwen_moe_jax.plan.settings import Settings, format_settings
from qwen_moe_jax.text import format_mesh
from qwen_moe_jax.units import format_bytes, format_seconds

#: Of those that were not compiled, how many are listed.
SHOWN_DRAFTS = 12

#: A mesh and settings as (words for the command line at hand, lines for the file that it reads, or "").
Paste = Callable[[Mapping[str, int], Settings], tuple[str, str]]


def print_search(search: Search, console: Console, paste: Paste) -> None:
    """Prints the ranking, what was not compiled and why, and what sets the best mesh and settings.

    Args:
        search: what to print.
        console: where.
        paste: a mesh and settings as the command at hand takes them: "--mesh.fsdp 32 --mesh.expert 8".
    """
    console.print(search_table(search))
    for line in _why_not(search):
        console.print(escape(line), highlight=False)
    drafts = len(search.candidates) - len(search.compiled)
    left = f", {drafts - SHOWN_DRAFTS} of them not listed" if drafts > SHOWN_DRAFTS else ""
    order = f"seconds are estimates where nothing overlaps, by {_speeds(search)}"
    if not _timed(search):
        order = "in the order of the bytes that a device sends in a step: there is no chip to estimate seconds for"
    console.print(
        f"{len(search.compiled)} compiled, {drafts} drafted by arithmetic only (~){left}; {len(search.refused)} meshes "
        f"refused; {order}.",
        highlight=False,
        soft_wrap=True,
    )
    _print_outcome(search, console, paste)


def _speeds(search: Search) -> str:
    lines = (candidate.compiled_plan.roofline for candidate in search.compiled)
    return next((line.speeds for line in lines if line is not None), PUBLISHED)


def _why_not(search: Search) -> list[str]:
    """A line for each reason for which candidates were not compiled, or meshes refused, with the first of them."""
    left = [candidate for candidate in search.candidates if candidate.plan is None and candidate.reason]
    named = ((_name(candidate), candidate.reason) for candidate in left)
    refused = ((format_mesh(mesh), reason) for mesh, reason in search.refused)
    return [*_grouped("not compiled", named), *_grouped("refused", refused)]


def _grouped(what: str, reasons: Iterable[tuple[str, str]]) -> list[str]:
    """Reasons that differ in their numbers, and in what comes after a colon, are one line."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, reason in reasons:
        groups.setdefault(re.sub(r"\d[\d,.]*", "#", reason.partition(": ")[0]), []).append((name, reason))
    return [f"  {len(alike)} {what}, as {alike[0][0]}: {alike[0][1]}" for alike in groups.values()]


def _name(candidate: Candidate) -> str:
    return ", ".join(filter(None, (format_mesh(candidate.mesh), format_settings(candidate.settings))))


def _print_outcome(search: Search, console: Console, paste: Paste) -> None:
    if search.best is not None:
        words, lines = paste(search.best.mesh, search.best.settings)
        if lines:
            console.print(f"The best as lines of the file:\n\n{escape(lines)}", highlight=False, soft_wrap=True)
        console.print(f"Best: [bold]{escape(words)}[/]", highlight=False, soft_wrap=True)
        return
    nearest = search.candidates[0]
    missing = nearest.compiled_plan.memory.free
    lacks = "" if missing is None or missing >= 0 else f"; {format_bytes(-missing)} a device are missing"
    console.print(
        f"None of the compiled ones fits. The nearest is {escape(_name(nearest))}{lacks}. More devices, fewer rows, or "
        "remat save memory.",
        highlight=False,
        soft_wrap=True,
    )


def search_table(search: Search) -> Table:
    """The ranking: compiled plans, then drafts, whose numbers are marked by ~. Settings are named where they vary."""
    target = search.target
    varied = any(candidate.settings for candidate in search.candidates)
    table = Table(title=f"Meshes of {target.devices} × {escape(target.chip)}", title_justify="left", box=None)
    table.padding = (0, 1, 0, 0)
    for axis in ["mesh and settings"] if varied else search.candidates[0].mesh:
        table.add_column(axis, justify="left" if varied else "right", no_wrap=not varied)
    table.add_column("fits", no_wrap=True)
    timed = _timed(search)
    for name in ("a device", "free", *(("a step", "tokens/s") if timed else ("sends",))):
        table.add_column(name, justify="right", no_wrap=True)
    if timed:
        table.add_column("bound", no_wrap=True)
    for candidate in search.candidates[: len(search.compiled) + SHOWN_DRAFTS]:
        style = "dim" if candidate.plan is None else "bold" if candidate is search.best else ""
        sizes = [str(size) if size > 1 else "·" for size in candidate.mesh.values()]
        cells = (_cells_of_draft if candidate.plan is None else _cells_of_plan)(candidate, timed)
        table.add_row(*([_name(candidate)] if varied else sizes), *cells, style=style)
    return table


def _timed(search: Search) -> bool:
    """Whether the chip's numbers are known."""
    return search.target.peak_flops is not None and search.target.memory_bandwidth is not None


def progress_line(progress: Progress) -> str:
    """`compiling 2 of 6: fsdp=32, expert=8, remat dots, about 5 min 10 s left`."""
    left = "" if progress.seconds_left is None else f", about {format_seconds(progress.seconds_left)} left"
    settings = format_settings(progress.settings)
    words = f"{format_mesh(progress.mesh)}{settings and f', {settings}'}"
    return f"compiling {progress.number} of {progress.of}: {words}{left}"


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
    seconds = roofline.likely
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
