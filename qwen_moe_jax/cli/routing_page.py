"""A prompt's routing as one HTML page: per layer, a map of tokens × experts beneath the experts' loads.

The page needs nothing besides itself (`web_page`): the layers are radio buttons. Every text passes `html.escape`.
"""

import math
from collections.abc import Iterator
from html import escape

from rich.cells import cell_len, set_cell_size

from qwen_moe_jax.cli.routing import Choice, LayerRouting, PromptRouting
from qwen_moe_jax.web_page import facts, html_page

# All lengths are CSS pixels.
MAP_WIDTH = 1000  # what the experts share
NARROWEST_CELL, WIDEST_CELL = 8, 40
WRITTEN_IN = 30  # cells at least so wide show their weight as a number
ROW = 18
BARS = 72  # the height that the load bars stand in
MAP_TOP = BARS + 22  # below the numbers of the experts
CHOOSER = 44  # the tallest bar of the layer chooser
CHARACTER = 7.3  # a monospace character
LONGEST_TOKEN = 22  # characters of a row's label; tooltips have the whole token


def routing_page(routing: PromptRouting, *, mark: str) -> str:
    """The page's HTML.

    Args:
        routing: what to draw.
        mark: who wrote the page, put near its start.
    """
    layers = "".join(_Drawing(routing).layers())
    body = f"""{_header(routing)}
<main>
<p class="caption">Choose a layer; arrow keys step. Its bar is the busiest expert’s load over the mean.</p>
{layers}</main>"""
    return html_page(title=f"Routing in {routing.model}", style=_STYLE, body=body, mark=mark)


def _header(routing: PromptRouting) -> str:
    factor = "" if routing.capacity_factor is None else f", factor {routing.capacity_factor:g}"
    values = {
        "tokens": len(routing.tokens),
        "layers shown": f"{len(routing.layers)} of {routing.num_layers}",
        "experts": routing.num_experts,
        "experts per token": routing.layers[0].experts.shape[1],
        "dispatch": routing.dispatch + factor,
    }
    # A line break follows the sign for it, so that the text keeps its shape.
    prompt = "".join(f"<span>{escape(token)}</span>" for token in routing.tokens).replace("↵", "↵\n")
    return (
        f"<header><p>Which experts the tokens of a prompt chose</p>\n<h1>{escape(routing.model)}</h1>\n"
        f"{facts(values)}\n<pre>{prompt}</pre></header>"
    )


class _Drawing:
    """The maps of a page: one geometry, one scale of colours and one of loads, so that layers can be compared."""

    def __init__(self, routing: PromptRouting) -> None:
        self.routing = routing
        self.cell = max(NARROWEST_CELL, min(WIDEST_CELL, MAP_WIDTH // routing.num_experts))
        label = min(max(map(cell_len, routing.tokens)), LONGEST_TOKEN)
        number = len(str(len(routing.tokens) - 1))
        self.left = round((max(label, len("mean 000")) + number + 3) * CHARACTER)  # where the map begins
        self.right = self.left + self.cell * routing.num_experts
        self.bottom = MAP_TOP + ROW * len(routing.tokens)
        self.largest_weight = max(float(layer.weights.max()) for layer in routing.layers)
        self.largest_load = max(int(layer.load.max()) for layer in routing.layers)
        self.largest_imbalance = max(layer.imbalance for layer in routing.layers)

    def layers(self) -> Iterator[str]:
        """What all maps share, then per layer its radio button, label and section. CSS shows the checked one's."""
        yield f'<svg class="shared" aria-hidden="true"><defs><g id="frame">{"".join(self._frame())}</g></defs></svg>\n'
        for layer in self.routing.layers:
            yield from self._chooser(layer)
            yield self._section(layer)

    def _frame(self) -> Iterator[str]:
        """Labels and grid."""
        tokens, experts = self.routing.tokens, self.routing.num_experts
        every = next(step for step in (1, 2, 4) if step * self.cell >= 26)  # room for the numbers of experts
        for number, token in enumerate(tokens):
            y = MAP_TOP + ROW * number + 13
            yield f'<text class="dim" y="{y}">{number}</text>'
            yield f'<text class="end" x="{self.left - 8}" y="{y}">{escape(_shortened(token))}</text>'
        for expert in range(0, experts, every):
            middle = self._x(expert) + self.cell / 2
            yield f'<text class="mid dim" x="{middle:g}" y="{BARS + 15}">{expert}</text>'
        rows = "".join(f"M{self.left} {MAP_TOP + ROW * n}H{self.right}" for n in range(len(tokens) + 1))
        columns = "".join(f"M{self._x(n)} {MAP_TOP}V{self.bottom}" for n in [*range(0, experts, every), experts])
        mean = float(self.routing.layers[0].load.mean())  # the same in every layer
        y = BARS - self._tall(mean)
        yield f'<path class="grid" d="{rows}{columns}M{self.left} {BARS}H{self.right}"/>'
        yield f'<path class="mean" d="M{self.left} {y:g}H{self.right}"/>'
        yield f'<text class="end dim" x="{self.left - 8}" y="{min(y + 4, BARS):g}">mean {round(mean, 2):g}</text>'
        yield f'<text class="end dim" x="{self.left - 8}" y="{BARS + 15}">expert</text>'

    def _chooser(self, layer: LayerRouting) -> Iterator[str]:
        number, dropped = layer.layer, int(layer.dropped.sum())
        checked = " checked" if layer is self.routing.layers[0] else ""
        tall = CHOOSER * layer.imbalance / self.largest_imbalance
        told = f"layer {number}: entropy {layer.entropy:.2f}, {layer.imbalance:.1f} × the mean, {dropped} dropped"
        bar = f'<i class="{"lost" if dropped else ""}" style="height:{tall:.0f}px"></i>'
        yield f'<input type="radio" name="layer" id="layer{number}"{checked}>'
        yield f'<label for="layer{number}" title="{told}">{bar}{number}</label>'

    def _section(self, layer: LayerRouting) -> str:
        values = {
            "entropy": f"{layer.entropy:.2f} of {layer.uniform_entropy:.2f} nats",
            "busiest": f"expert {layer.busiest}: {layer.load.max()} tokens, {layer.imbalance:.1f} × the mean",
            "without tokens": f"{(layer.load == 0).sum()} of {len(layer.load)} experts",
            "dropped": f"{layer.dropped.sum()} of {layer.dropped.size} choices",
            "largest logit": f"{layer.max_logit:.2f}",
        }
        drawn = "\n".join([*self._bars(layer), *self._rows(layer)])
        size = f'width="{self.right + 1}" height="{self.bottom + 1}"'
        return (
            f"<section><h2>Layer {layer.layer}</h2>{facts(values)}{self._legend(layer)}\n"
            f'<div class="scroll"><svg {size} role="img" aria-label="Layer {layer.layer}: tokens and their experts">'
            f'<use href="#frame"/>\n{drawn}</svg></div></section>\n'
        )

    def _bars(self, layer: LayerRouting) -> Iterator[str]:
        """A bar per expert that tokens chose, those it did not get on top; its tooltip names them all."""
        gap = 2 if self.cell > 12 else 1
        for expert, choices in layer.choices_by_expert().items():
            lost = sum(choice.dropped for choice in choices)
            x, wide = self._x(expert) + gap, self.cell - 2 * gap + 1
            tall, tall_lost = self._tall(len(choices)), self._tall(lost)
            over = f'<path class="lost" d="{_box(x, BARS - tall, wide, tall_lost)}"/>' if lost else ""
            tokens = " · ".join(self._token(choice) for choice in choices)
            told = f"expert {expert}: {len(choices)} of {len(self.routing.tokens)} tokens, {lost} dropped\n{tokens}"
            bar = _box(x, BARS - tall + tall_lost, wide, tall - tall_lost)
            yield f'<g><path class="bar" d="{bar}"/>{over}<title>{escape(told)}</title></g>'

    def _rows(self, layer: LayerRouting) -> Iterator[str]:
        """A group per token, lit up as a whole under the pointer, with a cell per expert it chose."""
        rows: list[list[str]] = [[] for _ in self.routing.tokens]
        for choice in layer.choices():
            rows[choice.token].append(self._cell(choice))
        for number, cells in enumerate(rows):
            line = f'<path class="row" d="{_box(0, 0, self.right, ROW)}"/>'
            yield f'<g transform="translate(0 {MAP_TOP + ROW * number})">{line}{"".join(cells)}</g>'

    def _cell(self, choice: Choice) -> str:
        x, lost = self._x(choice.expert), " lost" if choice.dropped else ""
        box, strength = _box(x + 1, 1, self.cell - 1, ROW - 1), self._strength(choice.weight)
        told = escape(f"{self._token(choice)} → expert {choice.expert}: {choice.weight:.3f}")
        cell = f'<path class="cell{lost}" fill-opacity="{strength:.2f}" d="{box}"><title>{told}</title></path>'
        if self.cell >= WRITTEN_IN:
            number = f"{choice.weight:.2f}".removeprefix("0")
            cell += f'<text class="mid" x="{x + self.cell / 2:g}" y="13">{number}</text>'
        return cell

    def _legend(self, layer: LayerRouting) -> str:
        scale = ""
        for weight in (self.largest_weight * step / 4 for step in range(5)):
            scale += f'<span><i class="cell" style="opacity:{self._strength(weight):.2f}"></i>{weight:.2f}</span>'
        lost = '<span><i class="lost"></i>dropped: did not reach the expert</span>' if layer.dropped.any() else ""
        return f'<p class="legend">weight {scale}{lost}<span>bars: tokens that chose the expert</span></p>'

    def _strength(self, weight: float) -> float:
        """Of a cell's colour, up to 1; the root keeps the weak ones apart, most of them are."""
        return 0.15 + 0.85 * math.sqrt(weight / self.largest_weight)

    def _token(self, choice: Choice) -> str:
        return f"{choice.token} {self.routing.tokens[choice.token]}" + (" (dropped)" if choice.dropped else "")

    def _x(self, expert: int) -> int:
        return self.left + self.cell * expert

    def _tall(self, load: float) -> float:
        return round((BARS - 6) * load / self.largest_load, 1)


def _box(x: float, y: float, width: float, height: float) -> str:
    """A rectangle as path data: a page may hold tens of thousands."""
    return f"M{x:g} {y:g}h{width:g}v{height:g}h-{width:g}z"


def _shortened(token: str) -> str:
    return token if cell_len(token) <= LONGEST_TOKEN else set_cell_size(token, LONGEST_TOKEN - 1) + "…"


_STYLE = """
:root { --cell: #4a8df8; --bar: #a9b4c4; --lost: #d6342c; --lit: #4a8df81c; --word: #f0f1ed; }
@media (prefers-color-scheme: dark) { :root { --cell: #3d7be8; --bar: #5a6475; --lost: #ff6a5e; --lit: #6ea8ff22;
  --word: #23272e; } }
body { padding: 28px 32px; width: fit-content; min-width: min(100%, 760px); max-width: 100%; }
.caption, .legend { color: var(--dim); font-size: 12px; margin: 0; }
h2 { margin: 0 0 8px; }
dl { gap: 6px 28px; }
pre, text { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 12px; }
pre { margin: 16px 0 24px; padding: 12px 14px; max-height: 240px; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; line-height: 1.7; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
pre span { padding: 2px 0; border-radius: 3px; }
pre span:nth-child(odd) { background: var(--word); }
main { display: flex; flex-wrap: wrap; align-items: flex-end; gap: 0 2px; }
.caption { width: 100%; margin-bottom: 4px; }
.shared { position: absolute; width: 0; height: 0; }
input { position: absolute; opacity: 0; pointer-events: none; }
label { display: flex; flex-direction: column; align-items: center; min-width: 24px; padding: 4px 3px 2px;
  cursor: pointer; font-size: 11px; color: var(--dim); border-bottom: 2px solid transparent;
  border-radius: 4px 4px 0 0; }
label i { width: 14px; background: var(--bar); border-radius: 2px 2px 0 0; }
label i.lost { border-top: 3px solid var(--lost); }
label:hover { background: var(--lit); }
input:checked + label { color: var(--ink); font-weight: 600; border-color: var(--cell); }
input:checked + label i { background-color: var(--cell); }
input:focus-visible + label { outline: 2px solid var(--cell); }
section { display: none; order: 1; width: 100%; margin-top: 14px; padding: 18px 20px; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; }
input:checked + label + section { display: block; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 12px; margin: 10px 0 16px; }
.legend span { display: flex; align-items: center; gap: 6px; }
.legend i { display: inline-block; height: 12px; width: 18px; }
.legend .cell { background: var(--cell); }
.legend .lost { border: 2px solid var(--lost); }
section svg { display: block; }
text { fill: var(--ink); pointer-events: none; }
.dim { fill: var(--dim); font-size: 11px; }
.end { text-anchor: end; }
.mid { text-anchor: middle; font-size: 11px; }
.grid { stroke: var(--line); fill: none; shape-rendering: crispEdges; }
.mean { stroke: var(--dim); stroke-dasharray: 3 3; }
.row { fill: transparent; }
g:hover > .row { fill: var(--lit); }
.cell { fill: var(--cell); }
.cell.lost { stroke: var(--lost); stroke-width: 2; }
.bar { fill: var(--bar); }
path.lost:not(.cell) { fill: var(--lost); }
g:hover > .bar { fill: var(--cell); }
"""
