"""A plan as tables in a terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwen_moe_jax.plan.result import Collective, Memory, Plan
from qwen_moe_jax.plan.worst_case import worst_case
from qwen_moe_jax.text import format_mesh
from qwen_moe_jax.units import format_bytes, format_count

#: Collectives that send less than this share of a step's bytes are summed up in a row.
SMALL = 0.005

_PURPOSES = {
    "train": "a training step",
    "prefill": "a chunk of the prompt",
    "decode": "one token a row",
    "forward": "a forward pass",
}


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Prints the request, whether it fits, a device's memory, what is computed and sent, and the remarks."""
    console = console or Console(highlight=False)
    work, model = plan.work, plan.model
    active = f", {format_count(model.active_parameters)} active" if model.experts else ""
    console.print(f"{model.name}: {format_count(model.parameters)} parameters{active}", style="bold", markup=False)
    mesh = format_mesh(plan.mesh)
    console.print(f"{plan.target.devices} × {plan.target.chip} ({plan.target.name}): {mesh}", markup=False)
    context = f" in a cache for {work.context:,}" if work.context else ""
    parts = f" in {work.accumulation_steps} micro-batches" if work.accumulation_steps > 1 else ""
    console.print(
        f"{_PURPOSES[work.purpose]}: {work.rows:,} rows × {work.tokens_per_row:,} tokens{context}{parts}; "
        f"{work.dtype}, weights {work.weights}; {_execution(plan)}",
        markup=False,
        soft_wrap=True,
    )
    console.print()
    console.print(_verdict(plan), style="bold")
    console.print(_memory_table(plan.memory))
    if plan.refusal is None and (words := worst_case(plan)):
        console.print(words, style="dim", markup=False, soft_wrap=True)
    if plan.refusal is None:
        console.print()
        _print_flops(plan, console)
        if plan.collectives:
            console.print(_collective_table(plan))
        _print_roofline(plan, console)
    else:
        console.print(f"The compiler: {plan.refusal}", style="dim", markup=False)
    for remark in plan.remarks:
        console.print(Text(f"! {remark.text}"), soft_wrap=True)
    console.print(
        f"Traced in {plan.cost.trace_seconds:.0f} s, compiled in {plan.cost.compile_seconds:.0f} s, "
        f"{format_bytes(plan.cost.peak_host_bytes)} of this machine's memory; "
        + ", ".join(f"{name} {number}" for name, number in plan.versions.items()),
        style="dim",
        markup=False,
        soft_wrap=True,
    )


def _execution(plan: Plan) -> str:
    execution, words = plan.work.execution, []
    if plan.model.experts:
        dispatch = str(execution["dispatch"])
        if dispatch == "dropless" and execution["exchange"] and plan.mesh["expert"] > 1:
            dispatch += f" by {execution['exchange']}"
        words.append(dispatch)
    if plan.work.purpose == "train":
        words.append(f"remat {execution['remat']}")
    if plan.target.devices > 1:
        words.append(f"weights sharded by {plan.work.sharding}")
    return ", ".join(words)


def _verdict(plan: Plan) -> Text:
    memory = plan.memory
    if memory.fits is None:
        return Text(f"A device holds {format_bytes(memory.total)}; a simulated one has no limit.")
    if memory.total is None:
        return Text("It does not fit.", style="red")
    of = f"{format_bytes(memory.total)} of {format_bytes(memory.available)} a device"
    if memory.fits:
        return Text(f"It fits: {of}, {format_bytes(memory.free)} free.", style="green")
    return Text(f"It does not fit: {of}, {format_bytes(-(memory.free or 0))} too much.", style="red")


def _memory_table(memory: Memory) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("memory of a device")
    table.add_column("bytes", justify="right", no_wrap=True)
    for group in memory.groups:
        table.add_row(group.name, format_bytes(group.device_bytes))
    if memory.temporaries is not None:
        if (memory.padding or 0) > 0:
            table.add_row("padding of the layouts", format_bytes(memory.padding))
        table.add_row("temporaries", format_bytes(memory.temporaries))
    if memory.gradients:
        table.add_row("  gradients among them", format_bytes(memory.gradients), style="dim")
    if memory.temporaries is not None:
        if (memory.outputs or 0) > 0:
            table.add_row("results", format_bytes(memory.outputs))
        if memory.code:
            table.add_row("the program", format_bytes(memory.code))
        if memory.run_time:
            table.add_row("XLA's run time, at most", format_bytes(memory.run_time))
    if memory.total is not None:
        table.add_row("total", format_bytes(memory.total), style="bold")
    for group in memory.groups:
        if group.host_bytes:
            table.add_row(f"in the host's memory: {group.name}", format_bytes(group.host_bytes))
    if memory.host_temporaries:
        table.add_row("in the host's memory: temporaries", format_bytes(memory.host_temporaries))
    return table


def _print_flops(plan: Plan, console: Console) -> None:
    flops = plan.flops
    text = f"FLOPs a step: {flops.model:.3g} by the model's definition"
    if flops.program is not None:
        text += f", {flops.program:.3g} in the program ({flops.ratio:.2f} times)"
    console.print(text, markup=False)


def _collective_table(plan: Plan) -> Table:
    """Collectives of one size over the same axes are one row: layouts transpose shapes, and passes repeat them."""
    table = Table(box=None, pad_edge=False)
    for name in ("collective", "over", "dtype", "of"):
        table.add_column(name, no_wrap=name != "of")
    for name in ("sends", "times", "a step"):
        table.add_column(name, justify="right", no_wrap=True)
    rows: dict[tuple, list[Collective]] = {}
    for one in plan.collectives:
        sizes = tuple(sorted(size for size in one.shape if size > 1))
        rows.setdefault((one.kind, one.axes, one.dtype, sizes, one.bytes, one.in_layers), []).append(one)
    total = sum(one.bytes * (one.count or 1) for one in plan.collectives)
    small, kinds = 0, 0
    for alike in rows.values():
        one, size = alike[0], sum(each.bytes * (each.count or 1) for each in alike)
        if size < SMALL * total:
            small, kinds = small + size, kinds + 1
            continue
        counts = [each.count for each in alike if each.count is not None]
        times = f"{sum(counts)}" if len(counts) == len(alike) else "?"
        table.add_row(
            one.kind,
            "×".join(one.axes) or "other groups",
            f"{one.widened_from} as {one.dtype}" if one.widened_from else one.dtype,
            " × ".join(str(size) for size in one.shape if size > 1) or "1",
            format_bytes(one.bytes),
            times + (" in layers" if one.in_layers else ""),
            format_bytes(size),
        )
    if kinds:
        table.add_row("smaller ones", "", "", "", "", "", format_bytes(small), style="dim")
    table.add_row("total", "", "", "", "", "", format_bytes(total), style="bold")
    if early := sum(one.bytes * (one.count or 1) for one in plan.collectives if one.asynchronous):
        table.add_row("asynchronous", "", "", "", "", "", format_bytes(early))
    return table


def _print_roofline(plan: Plan, console: Console) -> None:
    line = plan.roofline
    if line is None:
        return
    sent = ", ".join(
        f"{'×'.join(one.axes) or 'other'} {_seconds(one.seconds)} ({one.network})"
        for one in line.traffic
        if one.seconds is not None and one.seconds >= SMALL * line.network
    )
    console.print(
        f"\nAt best, by {line.speeds} (an estimate): compute {_seconds(line.compute)}, memory "
        f"{_seconds(line.memory)}, network {_seconds(line.network)}"
        + (f" = {sent}" if sent else "")
        + (f", operations {_seconds(line.operations)}" if line.operations else "")
        + (f", pages of temporaries {_seconds(line.pages)}" if line.pages else ""),
        markup=False,
        soft_wrap=True,
    )
    console.print(
        f"The {line.bound} bounds it: {_seconds(line.seconds)} a step if all three overlap, "
        f"{_seconds(line.seconds_without_overlap)} if none do; {line.tokens_per_second:,.0f} tokens/s and "
        f"{line.utilisation:.0%} of peak at best.",
        style="bold",
        markup=False,
        soft_wrap=True,
    )
    if line.expected is not None:
        console.print(f"Expected: {_seconds(line.expected)} a step, by steps that were measured.", markup=False)
    if line.assumptions:
        console.print(f"Assumed: {'; '.join(line.assumptions)}.", style="dim", markup=False, soft_wrap=True)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
