"""A prompt's routing as one HTML page: per layer, a map of tokens × experts beneath the experts' loads.

This module computes positions and words (`RoutingPage`); `templates/routing.html.j2` lays them out. Layers are chosen
by radio buttons, so the page needs no script.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len, set_cell_size

from qwen_moe_jax.cli.routing import Choice, LayerRouting, PromptRouting
from qwen_moe_jax.web_page import render

TEMPLATES = Path(__file__).parent / "templates"

# All lengths are CSS pixels.
MAP_WIDTH = 1000  # of all experts together
NARROWEST_CELL, WIDEST_CELL = 8, 40
NUMBERED = 30  # cells at least so wide show their weight as a number
ROW = 18
BARS = 72  # height of the load bars
MAP_TOP = BARS + 22  # below the numbers of the experts
CHOOSER = 44  # the tallest bar of the layer chooser
CHARACTER = 7.3  # a monospace character
LONGEST_TOKEN = 22  # characters of a row's label; tooltips have the whole token


@dataclass(frozen=True, kw_only=True)
class Label:
    """A text, and where it is."""

    text: str
    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What the maps of all layers share: labels, grid and the line of the mean load. Paths are SVG path data."""

    row_numbers: tuple[Label, ...]
    tokens: tuple[Label, ...]
    experts: tuple[Label, ...]
    captions: tuple[Label, ...]
    grid: str
    mean: str


@dataclass(frozen=True, kw_only=True)
class Bar:
    """An expert's load. `dropped` is the part of it, on top, that the expert did not receive; empty without one."""

    path: str
    dropped: str
    title: str


@dataclass(frozen=True, kw_only=True)
class MapCell:
    """A token's choice of an expert. `number` is its weight where the cell is wide enough for it."""

    path: str
    is_dropped: bool
    opacity: float
    title: str
    number: str
    middle: float


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """The cells of a token, at the height of its row."""

    top: int
    cells: tuple[MapCell, ...]


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """A layer's section, and its radio button with a bar of `chooser` pixels."""

    number: int
    is_first: bool
    chooser: float
    chooser_title: str
    has_dropped: bool
    facts: dict[str, str]
    bars: tuple[Bar, ...]
    rows: tuple[TokenRow, ...]


@dataclass(frozen=True, kw_only=True)
class RoutingPage:
    """What `routing.html.j2` shows. `scale` is the legend's weights with their opacities."""

    mark: str
    model: str
    facts: dict[str, object]
    tokens: tuple[str, ...]
    width: int
    height: int
    row_path: str
    frame: Frame
    scale: tuple[tuple[float, float], ...]
    layers: tuple[LayerMap, ...]


def routing_page(routing: PromptRouting, *, mark: str) -> str:
    """The page's HTML.

    Args:
        routing: what to draw.
        mark: who wrote the page, near its start.
    """
    return render("routing.html.j2", TEMPLATES, _Layout(routing).page(mark))


class _Layout:
    """One geometry, one scale of colours and one of loads for all maps of a page, so that layers can be compared."""

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

    def page(self, mark: str) -> RoutingPage:
        routing = self.routing
        factor = "" if routing.capacity_factor is None else f", factor {routing.capacity_factor:g}"
        weights = [self.largest_weight * step / 4 for step in range(5)]
        return RoutingPage(
            mark=mark,
            model=routing.model,
            facts={
                "tokens": len(routing.tokens),
                "layers shown": f"{len(routing.layers)} of {routing.num_layers}",
                "experts": routing.num_experts,
                "experts per token": routing.layers[0].experts.shape[1],
                "dispatch": routing.dispatch + factor,
            },
            # A line break follows the sign for it, so that the text keeps its shape.
            tokens=tuple(token.replace("↵", "↵\n") for token in routing.tokens),
            width=self.right + 1,
            height=self.bottom + 1,
            row_path=_box(0, 0, self.right, ROW),
            frame=self._frame(),
            scale=tuple((weight, self._opacity(weight)) for weight in weights),
            layers=tuple(map(self._layer, routing.layers)),
        )

    def _frame(self) -> Frame:
        tokens, experts = self.routing.tokens, self.routing.num_experts
        step = next(step for step in (1, 2, 4) if step * self.cell >= 26)  # so that the numbers of experts fit
        row_ys = [MAP_TOP + ROW * number + 13 for number in range(len(tokens))]
        lines = "".join(f"M{self.left} {MAP_TOP + ROW * n}H{self.right}" for n in range(len(tokens) + 1))
        lines += "".join(f"M{self._x(n)} {MAP_TOP}V{self.bottom}" for n in [*range(0, experts, step), experts])
        mean = float(self.routing.layers[0].load.mean())  # the same in every layer
        mean_y = BARS - self._bar_height(mean)
        return Frame(
            row_numbers=tuple(Label(text=str(number), x=0, y=y) for number, y in enumerate(row_ys)),
            tokens=tuple(
                Label(text=_shortened(token), x=self.left - 8, y=y) for token, y in zip(tokens, row_ys, strict=True)
            ),
            experts=tuple(
                Label(text=str(expert), x=self._x(expert) + self.cell / 2, y=BARS + 15)
                for expert in range(0, experts, step)
            ),
            captions=(
                Label(text=f"mean {round(mean, 2):g}", x=self.left - 8, y=min(mean_y + 4, BARS)),
                Label(text="expert", x=self.left - 8, y=BARS + 15),
            ),
            grid=f"{lines}M{self.left} {BARS}H{self.right}",
            mean=f"M{self.left} {mean_y:g}H{self.right}",
        )

    def _layer(self, layer: LayerRouting) -> LayerMap:
        number, dropped = layer.layer, int(layer.dropped.sum())
        return LayerMap(
            number=number,
            is_first=layer is self.routing.layers[0],
            chooser=CHOOSER * layer.imbalance / self.largest_imbalance,
            chooser_title=(
                f"layer {number}: entropy {layer.entropy:.2f}, {layer.imbalance:.1f} × the mean, {dropped} dropped"
            ),
            has_dropped=dropped > 0,
            facts={
                "entropy": f"{layer.entropy:.2f} of {layer.uniform_entropy:.2f} nats",
                "busiest": f"expert {layer.busiest}: {layer.load.max()} tokens, {layer.imbalance:.1f} × the mean",
                "without tokens": f"{(layer.load == 0).sum()} of {len(layer.load)} experts",
                "dropped": f"{dropped} of {layer.dropped.size} choices",
                "largest logit": f"{layer.max_logit:.2f}",
                **({"rounds": str(layer.rounds)} if layer.rounds > 1 else {}),
            },
            bars=tuple(self._bars(layer)),
            rows=tuple(self._rows(layer)),
        )

    def _bars(self, layer: LayerRouting) -> Iterator[Bar]:
        """A bar per expert that tokens chose; its tooltip names them all."""
        gap = 2 if self.cell > 12 else 1
        for expert, choices in layer.choices_by_expert().items():
            dropped = sum(choice.dropped for choice in choices)
            x, width = self._x(expert) + gap, self.cell - 2 * gap + 1
            height, dropped_height = self._bar_height(len(choices)), self._bar_height(dropped)
            count = f"expert {expert}: {len(choices)} of {len(self.routing.tokens)} tokens"
            tokens = " · ".join(map(self._token, choices))
            yield Bar(
                path=_box(x, BARS - height + dropped_height, width, height - dropped_height),
                dropped=_box(x, BARS - height, width, dropped_height) if dropped else "",
                title=f"{count}, {dropped} dropped\n{tokens}",
            )

    def _rows(self, layer: LayerRouting) -> Iterator[TokenRow]:
        cells: list[list[MapCell]] = [[] for _ in self.routing.tokens]
        for choice in layer.choices():
            cells[choice.token].append(self._cell(choice))
        for number, row in enumerate(cells):
            yield TokenRow(top=MAP_TOP + ROW * number, cells=tuple(row))

    def _cell(self, choice: Choice) -> MapCell:
        x = self._x(choice.expert)
        return MapCell(
            path=_box(x + 1, 1, self.cell - 1, ROW - 1),
            is_dropped=choice.dropped,
            opacity=self._opacity(choice.weight),
            title=f"{self._token(choice)} → expert {choice.expert}: {choice.weight:.3f}",
            number=f"{choice.weight:.2f}".removeprefix("0") if self.cell >= NUMBERED else "",
            middle=x + self.cell / 2,
        )

    def _opacity(self, weight: float) -> float:
        """Of a cell's colour, up to 1; by the root, which tells small weights apart: most of them are small."""
        return 0.15 + 0.85 * math.sqrt(weight / self.largest_weight)

    def _token(self, choice: Choice) -> str:
        return f"{choice.token} {self.routing.tokens[choice.token]}" + (" (dropped)" if choice.dropped else "")

    def _x(self, expert: int) -> int:
        return self.left + self.cell * expert

    def _bar_height(self, load: float) -> float:
        return round((BARS - 6) * load / self.largest_load, 1)


def _box(x: float, y: float, width: float, height: float) -> str:
    """A rectangle as path data, which is short: a page may hold tens of thousands."""
    return f"M{x:g} {y:g}h{width:g}v{height:g}h-{width:g}z"


def _shortened(token: str) -> str:
    return token if cell_len(token) <= LONGEST_TOKEN else set_cell_size(token, LONGEST_TOKEN - 1) + "…"
