"""`python -m train.report RUN` writes RUN/report.html: a run on one page, while it goes and after (extra `plot`).

The page needs nothing besides itself (`qwen_moe_jax.web_page`), and every text passes `html.escape`.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.text import format_mesh
from qwen_moe_jax.units import format_bytes, format_seconds
from qwen_moe_jax.web_page import facts, html_page, write_whole
from train.folder import RunFolder
from train.reporting.metrics import ASIDES, Metrics, read_metrics
from train.reporting.start import Start

if TYPE_CHECKING:
    from train.reporting.figures import Drawing


_SAMPLES = 12  # on a page, at most


def write_report(folder: RunFolder) -> Path:
    """Writes the page of the run so far, and returns where.

    Raises:
        ConfigError: there is no run, or it has made no step yet.
        ModuleNotFoundError: matplotlib is not installed.
    """
    metrics = read_metrics(folder.metrics)
    if folder.finished and "sample" in (result := folder.result()):  # that of the exported model
        metrics.samples.append({"step": result["steps"], "prompt": result["prompt"], "sample": result["sample"]})
    page = report_page(
        metrics, name=folder.path.resolve().name, config=folder.config.read_text(encoding="utf-8"), state=_state(folder)
    )
    file = folder.path / "report.html"
    write_whole(file, page)
    return file


def report_page(metrics: Metrics, *, name: str, config: str, state: str) -> str:
    """The page's HTML.

    Args:
        metrics: what to draw.
        name: of the run.
        config: the text of its config.toml.
        state: whether it is over.
    """
    from train.reporting.figures import curves, load_map, router_curves

    start = Start(**metrics.starts[-1]["start"])
    router = router_curves(metrics)
    sections = _section("Learning and speed", _cards(curves(metrics)))
    if router:
        sections += _section("Routers", _cards(router) + _wide_card(load_map(metrics)))
    if metrics.samples:
        sections += _section("Samples", _samples(metrics.samples))
    body = f"""<header><p>Training run, {escape(state)}</p>
<h1>{escape(name)}</h1>
{facts(_results(metrics))}</header>
<main>
{sections}{_section("What ran", f'<div class="card">{facts(_settings(start))}</div>')}
<details><summary>config.toml</summary><pre>{escape(config)}</pre></details>
</main>"""
    return html_page(title=f"{name}: training", style=_STYLE, body=body, images="data:")


def main(words: list[str]) -> int:
    """Writes the page of the run that the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.report", description="Show a run on one HTML page.")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, for example runs/tiny")
    run = parser.parse_args(words).run
    try:
        file = write_report(RunFolder(run))
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
    """What a run has come to, the last of each number; speed is the median of the last steps."""
    last = metrics.steps[-1]
    results = {"step": f"{last['step']:,}", "tokens": f"{sum(record['tokens'] for record in metrics.steps):,}"}
    results["training loss"] = f"{_mean(record['cross_entropy'] for record in metrics.steps[-20:]):.3f}"
    if metrics.heldout:
        results["held-out loss"] = f"{metrics.heldout[-1]['heldout_loss']:.3f}"
    timed = metrics.timed_steps[-50:]
    if timed:
        for key, title in (("tokens_per_second", "tokens/s"), ("tokens_per_second_per_device", "per device")):
            results[title] = f"{median(record[key] for record in timed):,.0f}"
        if "mfu" in timed[-1]:
            results["MFU"] = f"{median(record['mfu'] for record in timed):.1%}"
    if metrics.layers:
        results["dropped"] = f"{_mean(record['dropped'] for record in metrics.steps[-20:]):.1%}"
        results["largest load"] = f"{last['load_imbalance']:.1f} × the mean"
    results["time"] = _time_split(metrics)
    return results


def _time_split(metrics: Metrics) -> str:
    """Shares of the time that was spent: in steps, in compiling, which is the first steps', and between steps."""
    timed = sum(record["step_seconds"] for record in metrics.timed_steps)
    spent = {
        "steps": timed,
        "compiling": sum(record["step_seconds"] for record in metrics.steps) - timed,
        **{name: sum(record.get(f"{name}_seconds", 0.0) for record in metrics.asides) for name in ASIDES},
    }
    whole = sum(spent.values())
    parts = [f"{name} {seconds / whole:.0%}" for name, seconds in spent.items() if seconds]
    return f"{format_seconds(whole)}: {', '.join(parts)}"


def _settings(start: Start) -> dict[str, str]:
    mesh = format_mesh(start.mesh)
    execution = ", ".join(f"{key} {value}" for key, value in start.execution.items() if value is not None)
    settings = {
        "started": start.time,
        "parameters": start.parameters_in_words,
        "devices": f"{start.devices} × {start.device_kind}",
        "mesh": mesh,
        "each device holds": f"{format_bytes(start.weight_bytes)} of weights, "
        f"{format_bytes(start.moment_bytes)} of moments, "
        f"{format_bytes(start.gradient_bytes)} of gradients",
        "model FLOPs per token": f"{start.flops_per_token / 1e6:,.1f} M, forward and backward",
        "tokens per step": f"{start.tokens_per_step:,}",
        "tokens of text": f"{start.text_tokens:,}",
        "execution": execution,
        "versions": ", ".join(f"{name} {version}" for name, version in start.versions.items()),
    }
    if start.peak_flops is not None:
        settings["peak of a device"] = f"{start.peak_flops / 1e12:,.0f} TFLOP/s in bfloat16"
    return settings


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}</section>\n"


def _cards(drawings: list["Drawing"]) -> str:
    return f'<div class="grid">{"".join(_card(drawing) for drawing in drawings)}</div>\n'


def _card(drawing: "Drawing") -> str:
    from train.reporting.figures import to_svg

    return f'<figure class="card">{_heading(drawing)}{to_svg(drawing)}</figure>\n'


def _wide_card(drawing: "Drawing") -> str:
    """One that scrolls where the page is narrow, for its labels would become too small."""
    from train.reporting.figures import to_svg

    return f'<figure class="card wide">{_heading(drawing)}<div class="scroll">{to_svg(drawing)}</div></figure>\n'


def _heading(drawing: "Drawing") -> str:
    return f"<figcaption><h3>{escape(drawing.title)}</h3><p>{escape(drawing.caption)}</p></figcaption>\n"


def _samples(samples: list[dict[str, Any]]) -> str:
    """What the model wrote, over steps; of many samples some, the first and the last among them."""
    count = min(len(samples), _SAMPLES)
    chosen = [samples[place * (len(samples) - 1) // max(count - 1, 1)] for place in range(count)]
    rows = (
        f"<div><dt>step {sample['step']:,}</dt>"
        f"<dd><pre><span>{escape(sample['prompt'])}</span>{escape(sample['sample'])}</pre></dd></div>"
        for sample in chosen
    )
    about = "<p>how the model goes on from the pale text</p>"
    return f'<div class="card">{about}<dl class="samples">{"".join(rows)}</dl></div>\n'


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


_STYLE = """
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 14px; }
.wide { margin-top: 14px; }
figcaption { margin-bottom: 8px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.scroll svg { min-width: 760px; }
.card > p { color: var(--dim); font-size: 12px; margin: 0; }
.samples { display: grid; gap: 0; }
.samples div { display: grid; grid-template-columns: 88px 1fr; border-top: 1px solid var(--line); padding: 10px 0; }
.samples div:first-child { border-top: 0; }
.samples pre { margin: 0; padding: 0; border: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.samples span { color: var(--dim); }
summary { cursor: pointer; margin-top: 20px; }
pre { margin: 10px 0; padding: 12px 14px; overflow: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; font: 12px/1.6 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
"""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
