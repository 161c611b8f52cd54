"""`python -m train.report RUN` writes RUN/report.html: a training run on one page, running or finished (extra `plot`).

Of several runs, `python -m train.report A B C` writes comparison.html: their results, curves and differences.

This module computes what the page shows (`ReportPage`); `reporting/templates/report.html.j2` lays it out.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from qwen_moe_jax.cli.parser import Parser
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.text import format_mesh
from qwen_moe_jax.units import format_bytes, format_seconds
from qwen_moe_jax.web_page import render
from qwen_moe_jax.whole_file import write_whole
from train.config import SECTIONS, TrainConfig, load_config
from train.config.toml import as_table
from train.folder import RunFolder
from train.reporting.metrics import ASIDES, Metrics, read_metrics

if TYPE_CHECKING:
    from train.reporting.figures import Drawing
    from train.reporting.start import Start

TEMPLATES = Path(__file__).parent / "reporting" / "templates"

_SAMPLES = 12  # on a page, at most


@dataclass(frozen=True, kw_only=True)
class PageFigure:
    """A figure as SVG, with what is above it."""

    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The model's continuation of a prompt after a step; of a held-out prompt, with its reward."""

    step: int
    prompt: str
    text: str
    reward: float | None = None


@dataclass(frozen=True, kw_only=True)
class ReportPage:
    """What `report.html.j2` shows. Dense models have no router curves and no load map, language modelling no terms."""

    name: str
    state: str
    config: str
    results: dict[str, str]
    settings: dict[str, str]
    curves: tuple[PageFigure, ...]
    term_curves: tuple[PageFigure, ...]
    router_curves: tuple[PageFigure, ...]
    load_map: PageFigure | None
    samples: tuple[Sample, ...]
    completions: tuple[Sample, ...] = ()


def write_report(folder: RunFolder) -> Path:
    """Writes the page of the run so far, and returns where.

    Raises:
        ConfigError: there is no run, or it has made no step yet.
        ModuleNotFoundError: matplotlib is not installed.
    """
    metrics = read_metrics(folder.metrics)
    if folder.finished and (result := folder.result()).get("sample") is not None:  # that of the exported model
        metrics.samples.append({"step": result["steps"], "prompt": result["prompt"], "sample": result["sample"]})
    page = report_page(
        metrics, name=folder.path.resolve().name, config=folder.config.read_text(encoding="utf-8"), state=_state(folder)
    )
    file = folder.path / "report.html"
    write_whole(file, page)
    return file


@dataclass(frozen=True, kw_only=True)
class ComparisonPage:
    """What `comparison.html.j2` shows; rows of the tables have a value for each run."""

    names: tuple[str, ...]
    results: dict[str, list[str]]
    curves: tuple[PageFigure, ...]
    differences: dict[str, list[str]]


def write_comparison(folders: list[RunFolder], file: Path) -> Path:
    """Writes the page of several runs so far, and returns where.

    Raises:
        ConfigError: a folder has no run, or one that has made no step yet, or whose config cannot be read.
        ModuleNotFoundError: matplotlib is not installed.
    """
    from train.reporting.comparison import compared_curves

    runs: dict[str, Metrics] = {}
    for folder in folders:
        path = folder.path.resolve()
        runs[path.name if path.name not in runs else str(folder.path)] = read_metrics(folder.metrics)
    results = [
        {"state": _state(folder), **_results(metrics)} for folder, metrics in zip(folders, runs.values(), strict=True)
    ]
    page = ComparisonPage(
        names=tuple(runs),
        results=_rows(results),
        curves=tuple(map(_figure, compared_curves(runs))),
        differences=_rows(_differing([load_config(folder.config) for folder in folders])),
    )
    write_whole(file, render("comparison.html.j2", TEMPLATES, page))
    return file


def _rows(columns: list[dict[str, str]]) -> dict[str, list[str]]:
    """One dict for each run as rows, in the order in which the keys come; "" where a run has none."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return {key: [column.get(key, "") for column in columns] for key in keys}


def _differing(configs: list[TrainConfig]) -> list[dict[str, str]]:
    """The keys of each config on which not all agree, as `section.key`."""
    sections = ["model", *SECTIONS]
    tables = [
        {f"{section}.{key}": str(value) for section in sections for key, value in as_table(config, section).items()}
        for config in configs
    ]
    keys = dict.fromkeys(key for table in tables for key in table)
    differing = [key for key in keys if len({table.get(key) for table in tables}) > 1]
    return [{key: table[key] for key in differing if key in table} for table in tables]


def report_page(metrics: Metrics, *, name: str, config: str, state: str) -> str:
    """The page's HTML.

    Args:
        metrics: what to draw.
        name: of the run.
        config: the text of its config.toml.
        state: whether it is over.
    """
    from train.reporting.figures import curves, load_map, router_curves, term_curves
    from train.reporting.start import Start  # imports JAX, which --help need not wait for

    routers = tuple(map(_figure, router_curves(metrics)))
    page = ReportPage(
        name=name,
        state=state,
        config=config,
        results=_results(metrics),
        settings=_settings(Start(**metrics.starts[-1]["start"])),
        curves=tuple(map(_figure, curves(metrics))),
        term_curves=tuple(map(_figure, term_curves(metrics))),
        router_curves=routers,
        load_map=_figure(load_map(metrics)) if routers else None,
        samples=_samples(metrics.samples),
        completions=_completions(metrics.completions),
    )
    return render("report.html.j2", TEMPLATES, page)


def main(words: list[str]) -> int:
    """Writes the page of the run that the command line names; returns the exit code."""
    description = "Show a run, or several next to each other, on one HTML page."
    parser = Parser(prog="python -m train.report", description=description)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run folder, for example runs/tiny")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        default=Path("comparison.html"),
        help="of several runs, where the page is written; comparison.html by default",
    )
    arguments = parser.parse_args(words)
    folders = [RunFolder(run) for run in arguments.runs]
    try:
        file = write_report(folders[0]) if len(folders) == 1 else write_comparison(folders, arguments.output)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"{error}. The figures need matplotlib: pip install matplotlib (the extra `plot`).", file=sys.stderr)
        return 2
    print(f"wrote {file}")
    return 0


def _state(folder: RunFolder) -> str:
    return "finished" if folder.finished else "not finished"


def _results(metrics: Metrics) -> dict[str, str]:
    """The run's latest numbers; speed is the median of the last steps."""
    last = metrics.steps[-1]
    results = {"step": f"{last['step']:,}", "tokens": f"{sum(record['tokens'] for record in metrics.steps):,}"}
    results["training loss"] = f"{_mean(record[metrics.loss_term] for record in metrics.steps[-20:]):.3f}"
    if metrics.heldout:
        for key, value in metrics.heldout[-1].items():
            if key != "step":
                results[f"held-out {key.removeprefix('heldout_')}"] = f"{value:.3f}"
    timed = metrics.timed_steps[-50:]
    if timed:
        for key, title in (("tokens_per_second", "tokens/s"), ("tokens_per_second_per_device", "per device")):
            results[title] = f"{median(record[key] for record in timed):,.0f}"
        if "mfu" in timed[-1]:
            results["MFU"] = f"{median(record['mfu'] for record in timed):.1%}"
    if metrics.layers:
        results["dropped"] = f"{_mean(record['dropped'] for record in metrics.steps[-20:]):.1%}"
        if (rounds := max(metrics.layers[-1]["layers"]["rounds"])) > 1:
            results["rounds"] = f"{rounds} of dropless buffers, in the layer with most"
        results["largest load"] = f"{last['load_imbalance']:.1f} × the mean"
    results["time"] = _time_split(metrics)
    return results


def _time_split(metrics: Metrics) -> str:
    """Shares of the run's time: steps, compilation (the first step of each start) and work between steps."""
    timed = sum(record["step_seconds"] for record in metrics.timed_steps)
    spent = {
        "steps": timed,
        "compiling": sum(record["step_seconds"] for record in metrics.steps) - timed,
        **{name: sum(record.get(f"{name}_seconds", 0.0) for record in metrics.asides) for name in ASIDES},
    }
    whole = sum(spent.values())
    parts = [f"{name} {seconds / whole:.0%}" for name, seconds in spent.items() if seconds]
    return f"{format_seconds(whole)}: {', '.join(parts)}"


def _settings(start: "Start") -> dict[str, str]:
    mesh = format_mesh(start.mesh)
    execution = ", ".join(f"{key} {value}" for key, value in start.execution.items() if value is not None)
    settings = {
        "objective": start.objective,
        "started": start.time,
        "parameters": start.parameters_in_words,
        "devices": f"{start.devices} × {start.device_kind}",
        "mesh": mesh,
        "each device holds": ", ".join(f"{format_bytes(size)} of {name}" for name, size in start.memory.items()),
        "model FLOPs per token": f"{start.flops_per_token / 1e6:,.1f} M, forward and backward",
        "tokens per step": f"{start.tokens_per_step:,}",
        "tokens of text": f"{start.text_tokens:,}",
        "execution": execution,
        "versions": ", ".join(f"{name} {version}" for name, version in start.versions.items()),
    }
    if start.peak_flops is not None:
        settings["peak of a device"] = f"{start.peak_flops / 1e12:,.0f} TFLOP/s in bfloat16"
    return settings


def _completions(records: list[dict[str, Any]]) -> tuple[Sample, ...]:
    """Completions of held-out prompts, prompt by prompt: of the first evaluation, of one between, and of the last."""
    numbers = sorted({0, (len(records) - 1) // 2, len(records) - 1}) if records else []
    by_prompt = zip(*(records[number]["completions"] for number in numbers), strict=False)
    return tuple(
        Sample(step=records[number]["step"], prompt=one["prompt"], text=one["completion"], reward=one["reward"])
        for completions in by_prompt
        for number, one in zip(numbers, completions, strict=True)
    )


def _samples(samples: list[dict[str, Any]]) -> tuple[Sample, ...]:
    """Continuations over the run; of many, some at equal distances, the first and the last among them."""
    count = min(len(samples), _SAMPLES)
    chosen = [samples[number * (len(samples) - 1) // max(count - 1, 1)] for number in range(count)]
    return tuple(Sample(step=one["step"], prompt=one["prompt"], text=one["sample"]) for one in chosen)


def _figure(drawing: "Drawing") -> PageFigure:
    from train.reporting.figures import to_svg

    # matplotlib escapes the text in its figures.
    return PageFigure(title=drawing.title, caption=drawing.caption, svg=Markup(to_svg(drawing)))


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
