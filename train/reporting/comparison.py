"""Curves of several runs in one figure, for `python -m train.report A B C`."""

from collections.abc import Callable, Mapping

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.reporting.figures import _STYLE, Drawing, _legend, _series, _smooth, _thinned
from train.reporting.metrics import Metrics

_COLOURS = [matplotlib.colormaps["tab10"](number) for number in range(10)]


def compared_curves(runs: Mapping[str, Metrics]) -> list[Drawing]:
    """The held-out metrics, the loss and other terms of training, gradient norm and speed, where a run has them."""
    heldout = _names(runs, lambda metrics: [key for record in metrics.heldout[-1:] for key in record if key != "step"])
    terms = _names(runs, lambda metrics: [metrics.loss_term, *metrics.terms])
    drawings = [_overlay(runs, key, f"held-out {key.removeprefix('heldout_')}", heldout=True) for key in heldout]
    drawings += [_overlay(runs, key, f"training {key}") for key in [*terms, "gradient_norm", "tokens_per_second"]]
    return [drawing for drawing in drawings if drawing is not None]


def _names(runs: Mapping[str, Metrics], of: Callable[[Metrics], list[str]]) -> list[str]:
    return list(dict.fromkeys(name for metrics in runs.values() for name in of(metrics)))


def _overlay(runs: Mapping[str, Metrics], key: str, title: str, heldout: bool = False) -> Drawing | None:
    """One curve for each run that has the key; of the records of steps, smoothed."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.0, 2.5), layout="constrained")
        axes, drawn = figure.subplots(), 0
        for number, (name, metrics) in enumerate(runs.items()):
            records = metrics.heldout if heldout else metrics.timed_steps if "second" in key else metrics.steps
            records = [record for record in records if key in record]
            if not records:
                continue
            drawn += 1
            steps, values = _series(records, key)
            shown = (steps, values) if heldout else _thinned(steps, _smooth(values))
            axes.plot(*shown, color=_COLOURS[number % 10], label=name, marker="o" if heldout else None, markersize=3)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.set_xlabel("step")
        if drawn:
            _legend(axes)
    caption = "" if heldout else "an exponential mean over steps"
    return Drawing(title=title, caption=caption, figure=figure) if drawn else None
