"""Draws a run: `python -m train.plot RUN` writes RUN/curves.png from RUN/metrics.jsonl (extra `plot`)."""

import argparse
import json
import sys
from pathlib import Path

from qwen_moe_jax.errors import ConfigError


def read_metrics(file: Path) -> tuple[list[dict], list[dict]]:
    """The training records and the held-out records of a metrics.jsonl, in order.

    Raises:
          ConfigError: there is no such file, or it holds no training step yet.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file; the folder of a run holds one.")
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise ConfigError(f"{file}: it holds no training step yet.")
    return steps, [record for record in records if "heldout_loss" in record]


def draw(steps: list[dict], heldout: list[dict], file: Path) -> None:
    """Losses above, the share of dropped assignments below, both over steps."""
    from matplotlib.figure import Figure  # a figure without a window: nothing to close, no display needed

    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, drops = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    at = [record["step"] for record in steps]
    losses.plot(at, [record["loss"] for record in steps], linewidth=0.8, color="tab:gray", label="training, each step")
    losses.plot(
        [record["step"] for record in heldout],
        [record["heldout_loss"] for record in heldout],
        marker="o",
        color="tab:blue",
        label="held out",
    )
    losses.set_ylabel("cross-entropy (nats per token)")
    losses.legend()
    drops.plot(at, [100 * record["dropped"] for record in steps], linewidth=0.8, color="tab:red")
    drops.set_ylim(bottom=0)
    drops.set_ylabel("dropped (%)")
    drops.set_xlabel("step")
    figure.savefig(file, dpi=120)


def main(words: list[str]) -> int:
    """Draws the run that the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.plot", description="Draw the loss curves of a run.")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, for example runs/tiny")
    run = parser.parse_args(words).run
    try:
        steps, heldout = read_metrics(run / "metrics.jsonl")
        draw(steps, heldout, run / "curves.png")
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"{error}. Drawing needs matplotlib: pip install matplotlib (the extra `plot`).", file=sys.stderr)
        return 2
    print(f"wrote {run / 'curves.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
