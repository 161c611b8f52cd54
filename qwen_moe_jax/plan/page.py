"""A plan as one HTML page: whether it fits, a device's memory, the mesh and its traffic, every array's sharding.

This module computes what the page shows (`PlanPage`); `templates/plan.html.j2` lays it out.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from qwen_moe_jax.plan.mesh_drawing import mesh_svg
from qwen_moe_jax.plan.result import AxisTraffic, Collective, Group, PlacedArray, Plan, Purpose, Roofline
from qwen_moe_jax.plan.roofline import traffic_of
from qwen_moe_jax.text import format_mesh, join_words
from qwen_moe_jax.units import format_bytes, format_count, format_flops, format_rate, format_seconds
from qwen_moe_jax.web_page import render
from qwen_moe_jax.whole_file import write_whole

TEMPLATES = Path(__file__).parent / "templates"

#: Near the start of every page, so that a command can recognise its own files.
MARK = "qwen-moe-jax plan"

PURPOSES: Mapping[Purpose, str] = {
    "train": "training step",
    "prefill": "prefill",
    "decode": "decoding step",
    "forward": "forward pass",
}

#: Collectives that are shown at once; the smaller ones are folded away.
SHOWN_COLLECTIVES = 16

#: Colours of the memory bar's parts; with more parts than colours they begin again.
PART_COLORS = 8


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the plan fits, in a sign, a CSS class, a title and a sentence."""

    sign: str
    kind: str
    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a device's memory. `width` is its share of the bar, `share` that of the memory in words."""

    name: str
    bytes: int
    note: str
    color: str
    number: int
    width: float
    share: str


@dataclass(frozen=True, kw_only=True)
class MemoryBar:
    """A device's memory as a bar with a table.

    Attributes:
        parts: in the order of how long they live.
        limit: what is available, in words.
        limit_at: the limit's position on the bar, 0 to 1; None where it is not known.
        exceeded: whether the parts come to more than the limit.
        total, share: bytes of all parts, and their share of what is available.
        is_complete: whether the parts are all there is, or only what is known.
    """

    parts: tuple[Part, ...]
    limit: str
    limit_at: float | None
    exceeded: bool
    total: int
    share: str
    is_complete: bool


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A mesh axis with the CSS class of its colour."""

    name: str
    color: str


@dataclass(frozen=True, kw_only=True)
class TrafficRow:
    """What a device sends over some axes. `width` is its share of the largest row's bytes."""

    axes: tuple[Axis, ...]
    color: str
    sizes: str
    traffic: AxisTraffic
    kinds: str
    width: float
    is_lower_bound: bool


@dataclass(frozen=True, kw_only=True)
class CollectiveRow:
    """A collective with the colours of its axes, and its array in words: "bf16 [16, 1536, 4096]"."""

    item: Collective
    axes: tuple[Axis, ...]
    array: str


@dataclass(frozen=True, kw_only=True)
class TimeBar:
    """Seconds of one bound of the step. `width` is their share of the whole step's; names of axes are coloured."""

    name: str
    axes: tuple[Axis, ...]
    note: str
    color: str
    seconds: float
    width: float
    is_bound: bool


@dataclass(frozen=True, kw_only=True)
class ArrayRow:
    """An array, the axes that each of its dimensions is sharded over, and whether every device holds all of it."""

    array: PlacedArray
    dimensions: tuple[tuple[int, tuple[Axis, ...]], ...]
    is_replicated: bool


@dataclass(frozen=True, kw_only=True)
class GroupTable:
    """A group of arrays, such as the parameters, as a table."""

    group: Group
    rows: tuple[ArrayRow, ...]


@dataclass(frozen=True, kw_only=True)
class PlanPage:
    """What `plan.html.j2` shows."""

    mark: str
    plan: Plan
    purpose: str
    verdict: Verdict
    bound: str
    request: dict[str, str]
    memory: MemoryBar
    mesh_svg: Markup
    traffic: tuple[TrafficRow, ...]
    mesh_notes: str
    collectives: tuple[CollectiveRow, ...]
    smaller_collectives: tuple[CollectiveRow, ...]
    flops: dict[str, str]
    times: tuple[TimeBar, ...]
    groups: tuple[GroupTable, ...]
    planning: dict[str, str]


def write_plan_page(plan: Plan, file: Path) -> None:
    """Writes the page; a file of this name is always complete.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(file, plan_page(plan))


def plan_page(plan: Plan) -> str:
    """The page's HTML, of any plan: one that fits, one that does not, one that the compiler refused."""
    axes = {axis: Axis(name=axis, color=f"axis{number}") for number, axis in enumerate(plan.mesh)}
    traffic = _traffic(plan)
    rows = tuple(_collective_row(item, axes) for item in plan.collectives)
    page = PlanPage(
        mark=MARK,
        plan=plan,
        purpose=PURPOSES[plan.work.purpose],
        verdict=_verdict(plan),
        bound="" if plan.roofline is None else _bound(plan.roofline),
        request=_request(plan),
        memory=_memory_bar(plan),
        mesh_svg=mesh_svg(plan.mesh),
        traffic=tuple(_traffic_row(row, traffic, plan, axes) for row in traffic),
        mesh_notes=_mesh_notes(plan, traffic),
        collectives=rows[:SHOWN_COLLECTIVES],
        smaller_collectives=rows[SHOWN_COLLECTIVES:],
        flops=_flops(plan),
        times=() if plan.roofline is None else tuple(_times(plan, plan.roofline, axes)),
        groups=tuple(_group_table(group, plan, axes) for group in plan.memory.groups),
        planning=_planning(plan),
    )
    return render("plan.html.j2", TEMPLATES, page)


def _verdict(plan: Plan) -> Verdict:
    memory, chip = plan.memory, plan.target.chip
    if memory.fits is None:
        text = f"How much a {chip} may hold is not known, so neither is whether it fits."
        return Verdict(sign="?", kind="open", title=f"Takes {format_bytes(memory.total)} a device", text=text)
    if memory.fits:
        text = (
            f"{format_bytes(memory.total)} of the {format_bytes(memory.available)} that a {chip} has for programs; "
            f"{format_bytes(memory.free)} are left."
        )
        return Verdict(sign="✓", kind="fits", title="Fits", text=text)
    if memory.total is None or memory.free is None or memory.free >= 0:
        text = "It did not say how much memory it would take."
        if memory.total is not None:
            text = f"It counted {format_bytes(memory.total)} a device."
        return Verdict(sign="✗", kind="over", title="The compiler refused it", text=text)
    text = (
        f"It takes {format_bytes(memory.total)} a device: {format_bytes(-memory.free)} more than the "
        f"{format_bytes(memory.available)} that a {chip} has for programs."
    )
    return Verdict(sign="✗", kind="over", title="Does not fit", text=text)


def _bound(roofline: Roofline) -> str:
    if roofline.bound != "network" or not roofline.traffic:
        return {"compute": "arithmetic", "memory": "memory bandwidth", "network": "the network"}[roofline.bound]
    most = max(roofline.traffic, key=lambda traffic: traffic.seconds or 0)
    return f"the network, most of it over {join_words(most.axes) or 'no axis of the mesh'}"


def _request(plan: Plan) -> dict[str, str]:
    model, work = plan.model, plan.work
    request = {"target": plan.target.name, "mesh": format_mesh(plan.mesh)}
    if work.sharding and plan.target.devices > 1:
        request["sharding"] = work.sharding
    active = f", {format_count(model.active_parameters)} active" if model.active_parameters != model.parameters else ""
    request["parameters"] = format_count(model.parameters) + active
    sparse = "all" if model.sparse_layers == model.layers else f"{model.sparse_layers} of them"
    request["layers"] = f"{model.layers}, {sparse} sparse" if model.sparse_layers else str(model.layers)
    if model.experts:
        request["experts"] = f"{model.experts}, {model.experts_per_token} a token"
    request["a step"] = f"{work.rows:,} × {work.tokens_per_row:,} = {work.tokens:,} tokens"
    if work.context:
        request["cache length"] = f"{work.context:,} tokens a row"
    if work.accumulation_steps > 1:
        request["micro-batches"] = str(work.accumulation_steps)
    request["dtypes"] = f"weights {work.weights}, activations {work.dtype}"
    return request


# One device's memory.


def _memory_bar(plan: Plan) -> MemoryBar:
    memory = plan.memory
    parts = [part for part in _parts(plan) if part[1]]
    total = sum(size for _, size, _ in parts)
    # The padding is negative where the program does not read all of its arguments. It is listed and not drawn.
    width = max(sum(max(size, 0) for _, size, _ in parts), memory.available or 0, 1)
    of = memory.available or total
    return MemoryBar(
        parts=tuple(
            Part(
                name=name,
                bytes=size,
                note=note,
                color=f"part{number % PART_COLORS}",
                number=number + 1,
                width=max(size, 0) / width,
                share=_share(size, of),
            )
            for number, (name, size, note) in enumerate(parts)
        ),
        limit=_limit(plan),
        limit_at=None if memory.available is None else memory.available / width,
        exceeded=memory.available is not None and total > memory.available,
        total=total,
        share=_share(total, of),
        is_complete=memory.total is not None,
    )


def _parts(plan: Plan) -> Iterator[tuple[str, int, str]]:
    """Name, bytes and note of what is in a device's memory, in the order of how long it lives."""
    memory = plan.memory
    for group in memory.groups:
        host = group.host_bytes
        yield group.name, group.device_bytes, f"{format_bytes(host)} more in the host’s memory" if host else ""
    if memory.temporaries is None:
        if memory.needed is not None:
            rest = max(memory.needed - memory.arguments, 0)
            yield "everything else", rest, "the compiler’s own total, less the above"
        return
    yield "padding", memory.padding or 0, "of the arguments, by their layouts"
    gradients = min(memory.gradients, memory.temporaries)
    yield "gradients", gradients, ""
    yield "temporaries", memory.temporaries - gradients, "activations, buffers of collectives"
    yield "results", memory.outputs or 0, "that do not reuse an argument’s memory"
    yield "code", memory.code or 0, "the program itself"
    yield "run time", memory.run_time, "XLA’s own, at most: queued tasks, and what products pack"


def _limit(plan: Plan) -> str:
    memory = plan.memory
    if memory.available is None:
        return "no limit is known"
    words = f"{plan.target.chip}: {format_bytes(memory.available)}"
    if memory.free is None:
        return words
    return words + (
        f", exceeded by {format_bytes(-memory.free)}" if memory.free < 0 else f", {format_bytes(memory.free)} free"
    )


# The mesh and its traffic.


def _traffic(plan: Plan) -> list[AxisTraffic]:
    """Traffic by axes, most bytes first: the roofline's, or summed here where there is none."""
    traffic = traffic_of(plan.collectives, (), plan.mesh) if plan.roofline is None else plan.roofline.traffic
    return sorted(traffic, key=lambda row: -row.bytes)


def _traffic_row(row: AxisTraffic, traffic: list[AxisTraffic], plan: Plan, axes: Mapping[str, Axis]) -> TrafficRow:
    items = [item for item in plan.collectives if item.axes == row.axes]
    return TrafficRow(
        axes=_colored(row.axes, axes),
        color=_color(row, axes),
        sizes=" × ".join(str(plan.mesh[axis]) for axis in row.axes),
        traffic=row,
        kinds=", ".join(dict.fromkeys(item.kind for item in items)),
        width=row.bytes / (max(other.bytes for other in traffic) or 1),
        is_lower_bound=any(item.count is None for item in items),
    )


def _mesh_notes(plan: Plan, traffic: list[AxisTraffic]) -> str:
    sent_over = {axis for row in traffic for axis in row.axes}
    idle = [axis for axis, size in plan.mesh.items() if size > 1 and axis not in sent_over]
    single = [axis for axis, size in plan.mesh.items() if size == 1]
    notes = []
    if idle and plan.refusal is None:
        notes.append(f"Nothing is sent over {join_words(idle)}.")
    elif idle:
        notes.append("What is sent is not known: the program was refused.")
    if single and len(single) < len(plan.mesh):
        notes.append(f"Of size 1: {join_words(single)}.")
    return " ".join(notes)


def _collective_row(item: Collective, axes: Mapping[str, Axis]) -> CollectiveRow:
    widened = f" ({item.widened_from})" if item.widened_from else ""
    array = f"{item.dtype}{widened} [{', '.join(map(str, item.shape))}]"
    return CollectiveRow(item=item, axes=_colored(item.axes, axes), array=array)


# What bounds the step.


def _flops(plan: Plan) -> dict[str, str]:
    flops = plan.flops
    rows = {
        "of the model": format_flops(flops.model),
        "a token": format_flops(flops.model / max(plan.work.tokens, 1)),
    }
    if flops.program is not None:
        rows |= {"of the program": format_flops(flops.program), "ratio": f"{flops.ratio:.2f}"}
    return rows


def _times(plan: Plan, roofline: Roofline, axes: Mapping[str, Axis]) -> Iterator[TimeBar]:
    def bar(name: str, note: str, seconds: float, is_bound: bool, color: str = "plain", over: tuple[Axis, ...] = ()):
        width = seconds / (roofline.seconds or 1)
        return TimeBar(name=name, axes=over, note=note, color=color, seconds=seconds, width=width, is_bound=is_bound)

    peak, bandwidth = plan.target.peak_flops, plan.target.memory_bandwidth
    of_peak = "" if peak is None else f"{peak / 1e12:,.0f} TFLOP/s"
    of_memory = format_bytes(roofline.memory_bytes) + ("" if bandwidth is None else f", {format_rate(bandwidth)}")
    yield bar("arithmetic", of_peak, roofline.compute, roofline.bound == "compute")
    yield bar("memory", of_memory, roofline.memory, roofline.bound == "memory")
    rows = [row for row in _traffic(plan) if row.seconds is not None]
    network_is_bound = roofline.bound == "network"
    if len(rows) > 1:
        yield bar("network", "one axis after the other", roofline.network, network_is_bound, "several")
    for row in rows:
        name = "" if row.axes else "no axis of the mesh"
        note = f"{row.network}, {format_bytes(row.bytes)}"
        alone = len(rows) == 1 and network_is_bound
        yield bar(name, note, row.seconds or 0.0, alone, _color(row, axes), _colored(row.axes, axes))


# Shardings.


def _group_table(group: Group, plan: Plan, axes: Mapping[str, Axis]) -> GroupTable:
    # An axis of size 1 shards nothing, though the spec may name it.
    splitting = {name: axis for name, axis in axes.items() if plan.mesh[name] > 1}
    rows = []
    for array in group.arrays:
        over = [_colored((axis for axis in names if axis in splitting), splitting) for names in array.spec]
        dimensions = tuple(zip(array.shape, over, strict=True))
        rows.append(ArrayRow(array=array, dimensions=dimensions, is_replicated=bool(splitting) and not any(over)))
    return GroupTable(group=group, rows=tuple(rows))


def _colored(names: Iterable[str], axes: Mapping[str, Axis]) -> tuple[Axis, ...]:
    return tuple(axes[name] for name in names)


def _color(row: AxisTraffic, axes: Mapping[str, Axis]) -> str:
    return axes[row.axes[0]].color if len(row.axes) == 1 else "several"


def _planning(plan: Plan) -> dict[str, str]:
    cost = plan.cost
    execution = ", ".join(f"{key} {value}" for key, value in plan.work.execution.items() if value is not None)
    return {
        "execution": execution,
        "traced in": format_seconds(cost.trace_seconds),
        "compiled in" if plan.refusal is None else "refused after": format_seconds(cost.compile_seconds),
        "memory of the planner": format_bytes(cost.peak_host_bytes),
        "versions": ", ".join(f"{name} {version}" for name, version in plan.versions.items()),
    }


def _share(part: int, whole: int) -> str:
    return "< 0.1%" if 0 < abs(part) < whole / 1000 else f"{part / whole:.1%}"
