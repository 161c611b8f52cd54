"""The figures of a run's page, drawn by matplotlib (extra `plot`) and written as SVG in the page's colours."""

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize
from matplotlib.figure import Figure  # a figure without a window: nothing to close, no display needed
from matplotlib.ticker import MaxNLocator

from train.reporting.metrics import Metrics

# Placeholders that no figure draws in: `to_svg` replaces them by the page's colours, light or dark.
_INK, _DIM, _LINE = "#010203", "#040506", "#070809"
_CSS = {_INK: "var(--ink)", _DIM: "var(--dim)", _LINE: "var(--line)"}
_BLUE, _ORANGE, _GREY = "#3d7be8", "#e8833a", "#a9b4c4"
# The ends of either are too near to black or white for one of the pages, and are left out.
_DEPTHS = matplotlib.colormaps["plasma"](np.linspace(0.18, 0.82, 256))
_LOADS = ListedColormap(matplotlib.colormaps["RdBu_r"](np.linspace(0.08, 0.92, 256)))
_MAPS = 6  # of the load, over the run
_POINTS = 1000  # of a curve

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _DIM,
    "axes.titlecolor": _INK,
    "axes.titlesize": 9,
    "text.color": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _DIM,
    "ytick.labelcolor": _DIM,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure with the title and caption above it."""

    title: str
    caption: str
    figure: Figure


def curves(metrics: Metrics) -> list[Drawing]:
    """Curves of every run: losses, gradient, learning rate, speed, time."""
    return [_loss(metrics), _speed(metrics), _gradient(metrics), _learning_rate(metrics), _time(metrics)]


def term_curves(metrics: Metrics) -> list[Drawing]:
    """A curve of each term of the objective besides the loss, and of each held-out metric."""
    return [_term(metrics, name) for name in metrics.terms]


def router_curves(metrics: Metrics) -> list[Drawing]:
    """Curves of the routers; none for a dense model."""
    if not metrics.layers:
        return []
    return [_balance(metrics), _imbalance(metrics), _drops(metrics), _entropy(metrics)]


def load_map(metrics: Metrics) -> Drawing:
    """The load of every expert in every sparse layer, at a few steps spread over the run."""
    chosen = np.unique(np.linspace(0, len(metrics.layers) - 1, _MAPS).round().astype(int))
    records = [metrics.layers[index] for index in chosen]
    layers, experts = np.shape(records[0]["layers"]["load"])
    columns = min(len(records), 3 if experts <= 64 else 2)
    rows = math.ceil(len(records) / columns)
    tall = min(max(0.16 * layers, 0.8), 3.2)
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(11.2, rows * (tall + 0.45) + 0.3), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for panel in panels.flat[len(records) :]:
            panel.set_visible(False)
        for index, (panel, record) in enumerate(zip(panels.flat, records, strict=False)):
            load_LE = np.array(record["layers"]["load"], float)
            relative_LE = load_LE / np.maximum(load_LE.mean(axis=1, keepdims=True), 1e-9)
            octaves_LE = np.log2(np.maximum(relative_LE, 1e-9))
            norm = Normalize(-2, 2)
            image = panel.imshow(octaves_LE, aspect="auto", cmap=_LOADS, norm=norm, interpolation="none")
            panel.set_title(f"step {record['step']:,}", loc="left", color=_INK)
            panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            numbers = _layer_numbers(metrics)
            shown = range(0, layers, math.ceil(layers / (tall / 0.16)))
            panel.set_yticks(list(shown), [str(numbers[row]) for row in shown])
            if index % columns == 0:
                panel.set_ylabel("layer")
            if index + columns >= len(records):
                panel.set_xlabel("expert")
                panel.tick_params(labelbottom=True)
        bar = figure.colorbar(image, ax=panels, extend="both", shrink=0.9, pad=0.015, aspect=14 * rows * tall)
        bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])
        bar.set_label("load / mean")
        bar.outline.set_visible(False)
    caption = "tokens that chose the expert, over its layer's mean; 1 is balanced, red is overloaded, blue underloaded"
    return Drawing(title="Load of the experts", caption=caption, figure=figure)


def to_svg(drawing: Drawing) -> str:
    """The figure as an element for a page with `--ink`, `--dim` and `--line`; deterministic, and of no fixed size."""
    file = io.StringIO()
    nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": drawing.title}):  # ids are a page's, and differ by title
        drawing.figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg[svg.index("<svg") :])
    for colour, variable in _CSS.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{drawing.title}" ', 1)


def _loss(metrics: Metrics) -> Drawing:
    def draw(axes: Axes) -> None:
        _plot_smoothed(axes, *_series(metrics.steps, metrics.loss_term), label="training, ")
        if not metrics.completions:  # what is held out then is minus the reward, another number than what is minimised
            heldout = _series(metrics.heldout, "heldout_loss")
            axes.plot(*heldout, color=_ORANGE, marker="o", markersize=4, label="held out")
        _legend(axes)

    caption = metrics.captions.get(metrics.loss_term, "cross entropy, nats per token")
    return _drawing(metrics, "Loss", caption, draw)


def _term(metrics: Metrics, name: str) -> Drawing:
    """A term of the objective over the steps, with the held-out metric of that name, or that metric alone."""

    def draw(axes: Axes) -> None:
        steps = [record for record in metrics.steps if name in record]
        if steps:
            _plot_smoothed(axes, *_series(steps, name), label="training, ")
        heldout = [record for record in metrics.heldout if f"heldout_{name}" in record]
        if heldout:
            axes.plot(*_series(heldout, f"heldout_{name}"), color=_ORANGE, marker="o", markersize=4, label="held out")
        _legend(axes)

    return _drawing(metrics, name, metrics.captions.get(name, ""), draw)


def _speed(metrics: Metrics) -> Drawing:
    steps = metrics.timed_steps
    known = bool(steps) and "mfu" in steps[-1]

    def draw(axes: Axes) -> None:
        _plot_smoothed(axes, *_series(steps, "tokens_per_second"))
        axes.set_ylim(bottom=0)
        _legend(axes)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        if known:
            share = 100 * steps[-1]["mfu"] / steps[-1]["tokens_per_second"]  # one is a multiple of the other
            right = axes.secondary_yaxis("right", functions=(lambda y: y * share, lambda y: y / share))
            right.set_ylabel("MFU (%)")

    caption = "tokens per second, without compilation, evaluation and checkpoints"
    return _drawing(metrics, "Speed and MFU" if known else "Speed", caption, draw)


def _gradient(metrics: Metrics) -> Drawing:
    def draw(axes: Axes) -> None:
        _plot_smoothed(axes, *_series(metrics.steps, "gradient_norm"))
        axes.set_ylim(bottom=0)
        _legend(axes)

    return _drawing(metrics, "Gradient norm", "over all parameters, before clipping", draw)


def _learning_rate(metrics: Metrics) -> Drawing:
    def draw(axes: Axes) -> None:
        axes.plot(*_thinned(*_series(metrics.steps, "learning_rate")), color=_BLUE)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)

    return _drawing(metrics, "Learning rate", "as the schedule has it", draw)


def _time(metrics: Metrics) -> Drawing:
    def draw(axes: Axes) -> None:
        for key, colour, label in (("step_seconds", _BLUE, "whole step"), ("data_seconds", _ORANGE, "getting a batch")):
            steps, seconds = _series(metrics.timed_steps, key)
            axes.plot(*_thinned(steps, 1e3 * seconds), color=colour, label=label)
        axes.set_ylim(bottom=0)
        _legend(axes)

    caption = (
        "milliseconds; the host gets a batch while the devices compute, so it costs nothing until it is the longer"
    )
    return _drawing(metrics, "Time of a step", caption, draw)


def _balance(metrics: Metrics) -> Drawing:
    def draw(axes: Axes) -> None:
        _plot_smoothed(axes, *_series(metrics.steps, "balance_loss"))
        _legend(axes)

    return _drawing(
        metrics, "Load-balancing loss", "of the kind that loss.load_balancing_type names, without its coefficient", draw
    )


def _imbalance(metrics: Metrics) -> Drawing:
    def draw(axes: Axes) -> None:
        axes.plot(*_thinned(*_series(metrics.steps, "load_imbalance")), color=_BLUE)
        axes.set_ylim(bottom=1)

    return _drawing(metrics, "Largest load", "of an expert over the mean, in the layer where it is largest", draw)


def _drops(metrics: Metrics) -> Drawing:
    def share(layers: dict[str, Any]) -> np.ndarray:
        return 100 * np.array(layers["dropped"]) / np.maximum(np.sum(layers["load"], axis=1), 1)

    drawing = _by_layer(metrics, "Dropped", "per cent of a layer's assignments that exceeded the capacity", share)
    drawing.figure.axes[0].set_ylim(bottom=0)
    return drawing


def _entropy(metrics: Metrics) -> Drawing:
    uniform = math.log(np.shape(metrics.layers[0]["layers"]["load"])[1])
    caption = f"mean entropy of the router's distribution, in nats; {uniform:.2f} is uniform"
    return _by_layer(metrics, "Entropy of the routers", caption, lambda layers: np.array(layers["entropy"]))


def _by_layer(metrics: Metrics, title: str, caption: str, of: Callable[[dict[str, Any]], np.ndarray]) -> Drawing:
    """One curve per sparse layer, coloured by depth."""

    def draw(axes: Axes) -> None:
        steps = [record["step"] for record in metrics.layers]
        values_L = np.array([of(record["layers"]) for record in metrics.layers]).T
        numbers = _layer_numbers(metrics)
        colours = ListedColormap(_DEPTHS[np.linspace(0, 255, len(numbers)).astype(int)])
        for layer, values in enumerate(values_L):
            axes.plot(steps, values, color=colours(layer), linewidth=1.1, marker="." if len(steps) < 3 else None)
        norm = BoundaryNorm(np.arange(len(numbers) + 1) - 0.5, len(numbers))
        bar = axes.figure.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.02, aspect=22)
        shown = range(0, len(numbers), math.ceil(len(numbers) / 8))
        bar.set_ticks(list(shown), labels=[str(numbers[row]) for row in shown])
        bar.ax.tick_params(which="both", length=0)
        bar.set_label("layer")
        bar.outline.set_visible(False)

    return _drawing(metrics, title, caption, draw)


def _drawing(metrics: Metrics, title: str, caption: str, draw: Callable[[Axes], None]) -> Drawing:
    """A figure over steps. Dotted lines are where the run was resumed."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.0, 2.5), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("step")
        for start in metrics.starts:
            if start["step"] > 0:
                axes.axvline(start["step"], color=_DIM, linewidth=0.8, linestyle=":")
    return Drawing(title=title, caption=caption, figure=figure)


def _legend(axes: Axes) -> None:
    """The legend in a row above the curves, where it hides none."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1, handlelength=1.4)


def _plot_smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str = "") -> None:
    """Every step in grey, and their exponential mean."""
    axes.plot(*_thinned(steps, values), color=_GREY, linewidth=0.8, label=f"{label}each step")
    axes.plot(*_thinned(steps, _smooth(values)), color=_BLUE, label=f"{label}smoothed")


def _series(records: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    return np.array([record["step"] for record in records]), np.array([record[key] for record in records], float)


def _smooth(values: np.ndarray, memory: float = 0.9) -> np.ndarray:
    """An exponential mean, corrected for its bias towards zero at the beginning."""
    smooth, weight, total = [], 0.0, 0.0
    for value in values:
        weight, total = memory * weight + 1, memory * total + value
        smooth.append(total / weight)
    return np.array(smooth)


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbours, where a curve has more points than a page shows."""
    group = math.ceil(len(steps) / _POINTS)
    if group <= 1:
        return steps, values
    starts = np.arange(0, len(steps), group)
    sizes = np.diff([*starts, len(steps)])
    return np.add.reduceat(steps, starts) / sizes, np.add.reduceat(values, starts) / sizes


def _layer_numbers(metrics: Metrics) -> list[int]:
    return metrics.starts[-1]["start"]["sparse_layers"]
