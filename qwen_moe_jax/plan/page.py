"""A plan on one HTML page: the verdict, what a device holds, the mesh and what travels over it, every sharding.

The page needs nothing besides itself (`web_page`), and every text passes `html.escape`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from qwen_moe_jax.plan.mesh_drawing import mesh_svg
from qwen_moe_jax.plan.result import AxisTraffic, Collective, Group, PlacedArray, Plan, Roofline
from qwen_moe_jax.plan.roofline import traffic_of
from qwen_moe_jax.text import format_mesh, join_words
from qwen_moe_jax.units import format_bytes, format_count, format_flops, format_seconds, three_digits
from qwen_moe_jax.web_page import facts, html_page, write_whole

#: Stands near the start of every page, so that a command can tell its own files.
MARK = "qwen-moe-jax plan"

PURPOSES = {"train": "training step", "prefill": "prefill", "decode": "decoding step", "forward": "forward pass"}

#: Collectives that are shown at once; the others, which are smaller, unfold.
SHOWN_COLLECTIVES = 16


def write_plan_page(plan: Plan, file: Path) -> None:
    """Writes the page beside, then renames it: a file of this name is always whole.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(file, plan_page(plan))


def plan_page(plan: Plan) -> str:
    """The page's HTML, of any plan: one that fits, one that does not, one that the compiler refused."""
    sections = [
        _section("One device’s memory", _memory(plan)),
        _section("The mesh", _mesh(plan)),
        _section("What bounds the step", _bounds(plan)),
        _section("What is sent", _collectives(plan)) if plan.collectives else "",
        _section("Where everything lies", "".join(_placed(group, plan) for group in plan.memory.groups)),
        _section("How it was planned", f'<div class="card">{facts(_planning(plan))}</div>'),
    ]
    body = f"{_header(plan)}\n<main>\n{''.join(sections)}</main>"
    return html_page(title=f"Plan: {plan.model.name} on {plan.target.name}", style=_STYLE, body=body, mark=MARK)


@dataclass(frozen=True)
class _Part:
    """A piece of the memory bar."""

    name: str
    bytes: int
    note: str = ""


def _header(plan: Plan) -> str:
    sign, kind, title, text = _verdict(plan)
    refusal = "" if plan.refusal is None else f"<pre>{escape(plan.refusal)}</pre>"
    remarks = "".join(f"<li><b>{escape(remark.about)}</b> {escape(remark.text)}</li>" for remark in plan.remarks)
    listed = f'<h2>Remarks</h2><ul class="card remarks">{remarks}</ul>' if remarks else ""
    where = f"{plan.target.devices:,} × {plan.target.chip}"
    return f"""<header><p>Plan of a {escape(PURPOSES[plan.work.purpose])} on {escape(where)}</p>
<h1>{escape(plan.model.name)}</h1>
<div class="card verdict {kind}"><p class="sign" aria-hidden="true">{sign}</p><div><h2>{escape(title)}</h2>
<p>{escape(text)}</p>{_speed(plan)}{refusal}</div></div>
{facts(_asked(plan))}{listed}</header>"""


def _verdict(plan: Plan) -> tuple[str, str, str, str]:
    """Its sign, class, title and text."""
    memory, chip = plan.memory, plan.target.chip
    if memory.fits is None:
        text = f"How much a {chip} may hold is not known, so neither is whether it fits."
        return "?", "open", f"Takes {format_bytes(memory.total)} a device", text
    if memory.fits:
        text = f"{format_bytes(memory.total)} of the {format_bytes(memory.available)} that a {chip} has for programs"
        return "✓", "fits", "Fits", f"{text}; {format_bytes(memory.spare)} are left."
    if memory.total is None:
        return "✗", "over", "The compiler refused it", "It did not say how much memory it would take."
    if memory.spare is None or memory.spare >= 0:
        return "✗", "over", "The compiler refused it", f"It counted {format_bytes(memory.total)} a device."
    text = f"It takes {format_bytes(memory.total)} a device: {format_bytes(-memory.spare)} more than the "
    text += f"{format_bytes(memory.available)} that a {chip} has for programs."
    return "✗", "over", "Does not fit", text


def _speed(plan: Plan) -> str:
    roofline = plan.roofline
    if roofline is None:
        return ""
    return (
        f"<p>Bound by {escape(_bound(roofline))}. <b>Estimate</b>, at best: {format_seconds(roofline.seconds)} a step "
        f"where all overlaps, {format_seconds(roofline.seconds_without_overlap)} where nothing does; up to "
        f"{roofline.tokens_per_second:,.0f} tokens/s. Nothing was run.</p>"
    )


def _bound(roofline: Roofline) -> str:
    if roofline.bound != "network" or not roofline.traffic:
        return {"compute": "arithmetic", "memory": "memory bandwidth", "network": "the network"}[roofline.bound]
    most = max(roofline.traffic, key=lambda traffic: traffic.seconds or 0)
    return f"the network, most of it over {join_words(most.axes) or 'no axis of the mesh'}"


def _asked(plan: Plan) -> dict[str, str]:
    model, work = plan.model, plan.work
    mesh = format_mesh(plan.mesh)
    asked = {"target": plan.target.name, "mesh": mesh}
    active = f", {format_count(model.active_parameters)} active" if model.active_parameters != model.parameters else ""
    asked["parameters"] = format_count(model.parameters) + active
    sparse = "all" if model.sparse_layers == model.layers else f"{model.sparse_layers} of them"
    asked["layers"] = f"{model.layers}, {sparse} sparse" if model.sparse_layers else str(model.layers)
    if model.experts:
        asked["experts"] = f"{model.experts}, {model.experts_per_token} a token"
    asked["a step"] = f"{work.rows:,} × {work.tokens_per_row:,} = {work.tokens:,} tokens"
    if work.context:
        asked["room for"] = f"{work.context:,} tokens a row"
    if work.accumulation_steps > 1:
        asked["micro-batches"] = str(work.accumulation_steps)
    asked["dtypes"] = f"weights {work.param_dtype}, activations {work.dtype}"
    return asked


# One device's memory.


def _memory(plan: Plan) -> str:
    memory = plan.memory
    parts = _parts(plan)
    held = sum(part.bytes for part in parts)
    # A part may be less than nothing: of arguments that the program does not read. It is listed and not drawn.
    whole = max(sum(max(part.bytes, 0) for part in parts), memory.available or 0, 1)
    told = ", ".join(f"{part.name} {_bytes(part.bytes)}" for part in parts)
    bar = f'<div class="bar" role="img" aria-label="{escape(told)}; {escape(_limit(plan))}">'
    for number, part in enumerate(parts):
        share = max(part.bytes, 0) / whole
        inside = str(number + 1) if share > 0.022 else ""
        bar += (
            f'<i class="part{number % 8}" style="width:{share:.4%}" title="{escape(part.name)} {_bytes(part.bytes)}">'
            f"{inside}</i>"
        )
    if memory.available is not None:
        line = memory.available / whole
        if held > memory.available:
            bar += f'<b class="excess" style="left:{line:.4%}"></b>'
        bar += f'<b class="limit" style="left:{line:.4%}"></b>'
    bar += "</div>"
    # The words stand beneath the line that they are about, on the side where there is more room.
    at = 1.0 if memory.available is None else memory.available / whole
    side = f"right:{1 - at:.4%}" if at > 0.5 else f"left:{at:.4%}"
    scale = f'<p class="scale"><span style="{side}">{escape(_limit(plan))}</span></p>'
    of = memory.available or held
    title = "of the device" if memory.available else "of all"
    rows = "".join(
        f'<tr><td><i class="key part{number % 8}">{number + 1}</i></td><th scope="row">{escape(part.name)}'
        f'<small>{escape(part.note)}</small></th><td class="n">{_bytes(part.bytes)}</td>'
        f'<td class="n">{_share(part.bytes, of)}</td></tr>\n'
        for number, part in enumerate(parts)
    )
    total = "at the fullest moment" if memory.total is not None else "known of it"
    rows += (
        f'<tr class="sum"><td></td><th scope="row">{total}</th><td class="n">{format_bytes(held)}</td>'
        f'<td class="n">{_share(held, of)}</td></tr>'
    )
    table = (
        f'<table class="legend"><thead><tr><td></td><th scope="col">what</th><th scope="col" class="n">a device</th>'
        f'<th scope="col" class="n">{title}</th></tr></thead><tbody>{rows}</tbody></table>'
    )
    return f'<div class="card">{bar}{scale}<div class="scroll">{table}</div></div>\n'


def _parts(plan: Plan) -> list[_Part]:
    """What lies in a device's memory, in order of how long it stays."""
    memory = plan.memory
    parts = [_Part(group.name, group.bytes) for group in memory.groups]
    if memory.temporaries is None:
        if memory.needed is not None:
            rest = max(memory.needed - memory.arguments, 0)
            parts.append(_Part("all else", rest, "the compiler’s own total, less the above"))
        return parts
    parts.append(_Part("padding", memory.padding, "of the arguments, by their layouts"))
    gradients = min(memory.gradients, memory.temporaries)
    parts.append(_Part("gradients", gradients))
    parts.append(_Part("temporaries", memory.temporaries - gradients, "activations, buffers of collectives"))
    parts.append(_Part("results", memory.outputs, "that do not lie in an argument’s place"))
    parts.append(_Part("code", memory.code, "the program itself"))
    return [part for part in parts if part.bytes]


def _limit(plan: Plan) -> str:
    memory = plan.memory
    if memory.available is None:
        return "no limit is known"
    told = f"{plan.target.chip}: {format_bytes(memory.available)}"
    if memory.spare is not None and memory.spare < 0:
        told += f", exceeded by {format_bytes(-memory.spare)}"
    elif memory.spare is not None:
        told += f", {format_bytes(memory.spare)} free"
    return told


# The mesh, and what it carries.


def _mesh(plan: Plan) -> str:
    places = {axis: number for number, axis in enumerate(plan.mesh)}
    traffic = _traffic(plan)
    carried = {axes for way in traffic for axes in way.axes}
    idle = [axis for axis, size in plan.mesh.items() if size > 1 and axis not in carried]
    whole = [axis for axis, size in plan.mesh.items() if size == 1]
    rows = "".join(_way(way, traffic, plan, places) for way in traffic)
    if rows:
        rows = (
            '<table><thead><tr><th scope="col">over</th><th scope="col" class="n">a device sends, a step</th>'
            f'<th scope="col" class="n">{"estimate" if plan.roofline else ""}</th><th scope="col">by</th></tr></thead>'
            f"<tbody>{rows}</tbody></table>"
        )
    notes = []
    if idle and plan.refusal is None:
        notes.append(f"Nothing is sent over {join_words(idle)}.")
    if idle and plan.refusal is not None:
        notes.append("What is sent is not known: the program was refused.")
    if whole and len(whole) < len(plan.mesh):
        notes.append(f"Of size 1: {join_words(whole)}.")
    said = f'<p class="note">{escape(" ".join(notes))}</p>' if notes else ""
    peers = (
        "One device; there is nothing to split."
        if len(whole) == len(plan.mesh)
        else "Coloured: the devices that share an axis with device 0. The mesh is drawn as it is asked for, which need "
        "not be how the chips are wired."
    )
    return (
        f'<div class="card side"><figure><div class="scroll">{mesh_svg(plan.mesh)}</div>'
        f'<figcaption><p class="note">{peers}</p></figcaption></figure>'
        f'<div class="scroll middle">{rows}{said}</div></div>\n'
    )


def _way(way: AxisTraffic, traffic: Sequence[AxisTraffic], plan: Plan, places: dict[str, int]) -> str:
    most = max(other.bytes for other in traffic) or 1
    seconds = "" if way.seconds is None else format_seconds(way.seconds)
    over = _tags(way.axes, places) or "no axis of the mesh"
    sizes = " × ".join(str(plan.mesh[axis]) for axis in way.axes)
    color = f"axis{places[way.axes[0]]}" if len(way.axes) == 1 else "several"
    speed = "" if way.bandwidth is None else f", {_rate(way.bandwidth)}"
    # The network's name, and the kinds of what travels there.
    kinds = dict.fromkeys(item.kind for item in plan.collectives if item.axes == way.axes)
    by = escape(f"{way.network}{speed}") + (f"<small>{escape(', '.join(kinds))}</small>" if kinds else "")
    unknown = any(item.count is None for item in plan.collectives if item.axes == way.axes)
    least = "at least " if unknown else ""
    return (
        f'<tr><th scope="row">{over}<small>{sizes}</small></th><td class="n">{least}{format_bytes(way.bytes)}'
        f'<i class="meter {color}" style="width:{way.bytes / most:.2%}"></i></td>'
        f'<td class="n">{seconds}</td><td>{by}</td></tr>\n'
    )


def _traffic(plan: Plan) -> list[AxisTraffic]:
    """By axes, most bytes first: the roofline's, or summed here where there is none."""
    ways = traffic_of(plan.collectives, (), plan.mesh) if plan.roofline is None else plan.roofline.traffic
    return sorted(ways, key=lambda way: -way.bytes)


def _collectives(plan: Plan) -> str:
    places = {axis: number for number, axis in enumerate(plan.mesh)}
    first, rest = plan.collectives[:SHOWN_COLLECTIVES], plan.collectives[SHOWN_COLLECTIVES:]
    table = _collective_table(first, places)
    note = (
        "Bytes are what one device sends, by an algorithm that sends none twice. Shapes are those of "
        "the largest array that goes in or comes out on one device."
    )
    if any(item.widened_from for item in plan.collectives):
        note += " The CPU’s compiler computes some in a wider type; their bytes are those of the type in brackets."
    if rest:
        table += f"<details><summary>{len(rest)} smaller ones</summary>{_collective_table(rest, places)}</details>"
    return f'<div class="card">{table}<p class="note">{note}</p></div>\n'


def _collective_table(items: Iterable[Collective], places: dict[str, int]) -> str:
    rows = "".join(_collective(item, places) for item in items)
    return (
        '<div class="scroll wide"><table><thead><tr><th scope="col">kind</th><th scope="col">over</th>'
        '<th scope="col">array</th><th scope="col">where</th><th scope="col" class="n">times</th>'
        '<th scope="col" class="n">bytes each</th><th scope="col" class="n">a step</th>'
        f'<th scope="col">asked for by</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _collective(item: Collective, places: dict[str, int]) -> str:
    times = "not told" if item.count is None else f"{item.count:,}"
    in_all = "not told" if item.bytes_per_step is None else format_bytes(item.bytes_per_step)
    widened = f" ({item.widened_from})" if item.widened_from else ""
    array = f"{item.dtype}{widened} [{', '.join(map(str, item.shape))}]"
    over = (_tags(item.axes, places) or "no axis of the mesh") + f"<small>{item.devices} devices</small>"
    return (
        f'<tr><th scope="row" class="line">{escape(item.kind)}</th><td class="line">{over}</td>'
        f'<td class="code line">{escape(array)}</td>'
        f'<td class="line">{"in the layers" if item.in_layers else "outside"}</td><td class="n">{times}</td>'
        f'<td class="n">{format_bytes(item.bytes)}</td><td class="n">{in_all}</td>'
        f'<td class="code source">{escape(item.source)}</td></tr>\n'
    )


# What bounds it.


def _bounds(plan: Plan) -> str:
    flops, roofline = plan.flops, plan.roofline
    told = {
        "the model asks for": format_flops(flops.model),
        "a token": format_flops(flops.model / max(plan.work.tokens, 1)),
    }
    if flops.program is not None:
        told["the program computes"] = format_flops(flops.program)
        told["ratio"] = f"{flops.ratio:.2f}"
    beyond = "recomputation, one-hot einsums, masked-out scores, padding and second copies"
    note = (
        "What the compiled program computes is not told."
        if flops.program is None
        else f"What the program computes beyond the model: {beyond}."
    )
    counted = f'<h3>Arithmetic of a step, over all devices</h3>{facts(told)}<p class="note">{note}</p>'
    if roofline is None:
        why = (
            "the program was refused"
            if plan.refusal is not None
            else f"the numbers of a {plan.target.chip} are not known"
        )
        return f'<div class="card">{counted}<p class="note">No estimate of the time: {escape(why)}.</p></div>\n'
    bars = "".join(_time_bar(*bar, roofline) for bar in _times(plan, roofline))
    summary = {
        "where all overlaps": format_seconds(roofline.seconds),
        "where nothing does": format_seconds(roofline.seconds_without_overlap),
        "tokens/s, at best": f"{roofline.tokens_per_second:,.0f}",
        "model FLOPs utilisation, at best": f"{roofline.utilisation:.0%}",
    }
    return (
        f'<div class="card"><h3>Time of a step: an estimate, from the chip’s published numbers</h3>'
        f'<div class="times">{bars}</div>{facts(summary)}<p class="note">Nothing is taken off for latency, for matmuls '
        f"that do not fill the chip, or for a network that others use.</p></div>\n"
        f'<div class="card next">{counted}</div>\n'
    )


def _times(plan: Plan, roofline: Roofline) -> Iterator[tuple[str, str, float, bool]]:
    """Name, class, seconds, and whether it bounds the step."""
    places = {axis: number for number, axis in enumerate(plan.mesh)}
    peak, bandwidth = plan.target.peak_flops, plan.target.memory_bandwidth
    of_peak = "" if peak is None else f"<small>{peak / 1e12:,.0f} TFLOP/s</small>"
    of_memory = f"<small>{format_bytes(roofline.memory_bytes)}" + ("" if bandwidth is None else f", {_rate(bandwidth)}")
    yield f"arithmetic{of_peak}", "plain", roofline.compute, roofline.bound == "compute"
    yield f"memory{of_memory}</small>", "plain", roofline.memory, roofline.bound == "memory"
    ways = [way for way in _traffic(plan) if way.seconds is not None]
    if len(ways) > 1:
        yield "network<small>one axis after the other</small>", "several", roofline.network, roofline.bound == "network"
    for way in ways:
        color = f"axis{places[way.axes[0]]}" if len(way.axes) == 1 else "several"
        over = _tags(way.axes, places) or "no axis of the mesh"
        lone = len(ways) == 1 and roofline.bound == "network"
        yield f"{over}<small>{escape(way.network)}, {format_bytes(way.bytes)}</small>", color, way.seconds, lone


def _time_bar(name: str, color: str, seconds: float, bounds: bool, roofline: Roofline) -> str:
    share = seconds / (roofline.seconds or 1)
    mark = " <em>bounds the step</em>" if bounds else ""
    return (
        f'<div class="time"><div class="name">{name}</div>'
        f'<div class="lane"><i class="{color}" style="width:{share:.2%}"></i></div>'
        f'<div class="n">{format_seconds(seconds)}{mark}</div></div>\n'
    )


# Where everything lies.


def _placed(group: Group, plan: Plan) -> str:
    # An axis of size 1 cuts nothing, though the spec may name it.
    places = {axis: number for number, axis in enumerate(plan.mesh) if plan.mesh[axis] > 1}
    rows = "".join(_array(array, places) for array in group.arrays)
    arrays = "1 array" if len(group.arrays) == 1 else f"{len(group.arrays)} arrays"
    opened = " open" if group.name == "parameters" else ""
    return (
        f'<details class="card next"{opened}><summary>{escape(group.name)}<small>{arrays}, '
        f"{format_bytes(group.bytes)} a device</small></summary>"
        '<div class="scroll"><table><thead><tr><th scope="col">name</th><th scope="col">shape, and what cuts it</th>'
        f'<th scope="col">dtype</th><th scope="col" class="n">a device</th></tr></thead><tbody>{rows}</tbody></table>'
        "</div></details>\n"
    )


def _array(array: PlacedArray, places: dict[str, int]) -> str:
    cuts = [tuple(axis for axis in axes if axis in places) for axes in array.spec]
    sizes = [f"<span>{size}{_tags(axes, places)}</span>" for size, axes in zip(array.shape, cuts, strict=True)]
    whole = "" if any(cuts) or not places else '<em class="whole">on every device</em>'
    return (
        f'<tr><th scope="row" class="code">{escape(array.name)}</th><td class="shape">{" × ".join(sizes) or "scalar"}'
        f'{whole}</td><td>{escape(array.dtype)}</td><td class="n">{format_bytes(array.bytes)}</td></tr>\n'
    )


def _tags(axes: Iterable[str], places: dict[str, int]) -> str:
    """Each axis' name in its colour."""
    return "".join(f'<b class="tag axis{places[axis]}">{escape(axis)}</b>' for axis in axes)


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
    return "< 0.1%" if 0 < part < whole / 1000 else f"{part / whole:.1%}"


def _bytes(size: int) -> str:
    return format_bytes(size) if size >= 0 else f"−{format_bytes(-size)}"


def _rate(bandwidth: float) -> str:
    return f"{three_digits(bandwidth / 1e9)} GB/s"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}</section>\n"


_STYLE = """
:root { --good: #1a7f4b; --bad: #c3271f; --soft: #f0f1ed; --neutral: #7c8798;
  --axis0: #0b66b0; --axis1: #b8510a; --axis2: #0f7f62; --axis3: #98438f; --on: #fff;
  --part0: #2b5fa4; --part1: #5c55a8; --part2: #5f6b7a; --part3: #a04f1b; --part4: #86680f; --part5: #14736f;
  --part6: #4b7335; --part7: #7a5a78; }
@media (prefers-color-scheme: dark) { :root { --good: #4cc38a; --bad: #ff7a6e; --soft: #23272e; --neutral: #77818f;
  --axis0: #62adf0; --axis1: #f0965a; --axis2: #4cc5a2; --axis3: #d78fce; --on: #131519;
  --part0: #7fb0ee; --part1: #aaa3f0; --part2: #a3afbe; --part3: #e99a63; --part4: #d5b750; --part5: #5fc4bf;
  --part6: #9cc683; --part7: #caa6c7; } }
section > h2, header > h2 { margin-top: 32px; }
small { display: block; color: var(--dim); font-size: 12px; font-weight: 400; }
.note { color: var(--dim); font-size: 12px; margin: 10px 0 0; max-width: 76ch; }
.card h3 { margin-bottom: 8px; }
.next { margin-top: 12px; }
.verdict { display: flex; gap: 16px; margin-bottom: 16px; border-left: 5px solid var(--dim); }
.verdict h2 { font-size: 20px; margin: 0; }
.verdict p { color: var(--ink); font-size: 14px; margin: 4px 0 0; }
.verdict .sign { font-size: 30px; line-height: 1; margin: 0; }
.verdict > div { min-width: 0; }
.fits { border-left-color: var(--good); } .fits .sign, .fits h2 { color: var(--good); }
.over { border-left-color: var(--bad); } .over .sign, .over h2 { color: var(--bad); }
pre { margin: 10px 0 0; padding: 10px 12px; max-height: 220px; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; background: var(--soft); border-radius: 6px; }
pre, .code { font: 12px/1.6 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.remarks { list-style: none; padding-left: 16px; } .remarks li + li { margin-top: 8px; }
.remarks b { display: inline-block; margin-right: 6px; padding: 0 7px; font-size: 12px; background: var(--soft);
  border-radius: 4px; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 5px 18px 5px 0; text-align: left; vertical-align: top; font-weight: 400; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--dim); font-size: 12px; white-space: nowrap; }
tbody tr { border-top: 1px solid var(--line); }
.n { text-align: right; white-space: nowrap; }
.bar { position: relative; display: flex; height: 46px; margin-top: 6px; background: var(--soft);
  border-radius: 5px; }
.bar i { display: grid; place-items: center; overflow: hidden; font-style: normal; font-size: 12px;
  border-right: 1px solid var(--card); color: var(--on); }
.bar i:first-child { border-radius: 5px 0 0 5px; }
.limit { position: absolute; top: -6px; bottom: -6px; width: 3px; margin-left: -3px; background: var(--ink); }
.excess { position: absolute; top: 0; bottom: 0; right: 0; border: 2px solid var(--bad);
  background: repeating-linear-gradient(45deg, var(--bad) 0 3px, transparent 3px 9px); }
.scale { position: relative; height: 18px; margin: 9px 0 12px; font-size: 12px; } .scale span { position: absolute; }
.legend { width: auto; min-width: min(100%, 520px); } .legend td:first-child { width: 30px; padding-right: 8px; }
.legend small { display: inline; margin-left: 8px; }
.key { display: grid; place-items: center; width: 20px; height: 20px; border-radius: 4px; color: var(--on);
  font-style: normal; font-size: 12px; }
.sum th, .sum td { font-weight: 600; }
.part0 { background: var(--part0); } .part1 { background: var(--part1); } .part2 { background: var(--part2); }
.part3 { background: var(--part3); } .part4 { background: var(--part4); } .part5 { background: var(--part5); }
.part6 { background: var(--part6); } .part7 { background: var(--part7); }
.axis0 { --axis: var(--axis0); } .axis1 { --axis: var(--axis1); } .axis2 { --axis: var(--axis2); }
.axis3 { --axis: var(--axis3); } .several, .plain { --axis: var(--neutral); }
.tag { display: inline-block; margin: 1px 3px 1px 5px; padding: 0 6px; font: 600 11px/17px system-ui, sans-serif;
  color: var(--on); background: var(--axis, var(--neutral)); border-radius: 4px; }
th > .tag:first-child, td > .tag:first-child, .name > .tag:first-child { margin-left: 0; }
.side { display: flex; flex-wrap: wrap; gap: 18px 40px; align-items: flex-start; }
.side figure { margin: 0; max-width: 100%; flex: 0 1 auto; } .side > .scroll { flex: 1 1 420px; min-width: 0; }
.side figcaption .note { max-width: 42ch; }
.mesh { display: block; } .mesh text { font-size: 12px; fill: var(--ink); }
.mesh g > text, .mesh .more { text-anchor: middle; } .mesh .name text { text-anchor: start; font-weight: 600;
  fill: var(--axis); }
.mesh .name path { fill: none; stroke: var(--axis); stroke-width: 1.5; }
.mesh .block { fill: none; stroke: var(--line); }
.mesh .first { fill: var(--ink); } .mesh .first + text { fill: var(--page); font-weight: 600; }
.mesh .peer { fill: var(--axis); } .mesh .peer + text { fill: var(--on); font-weight: 600; }
.mesh .other { fill: var(--soft); stroke: var(--line); } .mesh .more { fill: var(--dim); }
.meter { display: block; height: 5px; margin: 4px 0 0 auto; min-width: 2px; background: var(--axis);
  border-radius: 2px; }
.times { margin: 4px 0 16px; } .time { display: grid; grid-template-columns: 170px 1fr 110px; gap: 4px 14px;
  align-items: center; margin-bottom: 10px; }
.lane { background: var(--soft); border-radius: 3px; } .lane i { display: block; height: 18px; min-width: 2px;
  background: var(--axis); border-radius: 3px; }
em { color: var(--dim); font-style: normal; font-size: 12px; } .times em { display: block; color: var(--ink);
  font-weight: 600; }
.line, .shape { white-space: nowrap; } .whole { margin-left: 10px; }
.source { color: var(--dim); min-width: 30ch; overflow-wrap: anywhere; }
details > summary { cursor: pointer; } summary small { display: inline; margin-left: 10px; }
details[open] > summary { margin-bottom: 8px; }
.wide table { min-width: 980px; } .middle table { min-width: 480px; }
@media (max-width: 560px) { .time { grid-template-columns: 1fr max-content; } .lane { grid-area: 2 / 1 / 3 / 3; }
  .legend small { display: block; margin: 0; } }
"""
