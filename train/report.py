"""What a run says while it goes: a progress bar on a terminal, plain lines in a file, and metrics.jsonl for both."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import jax
import optax

from train.step import StepMetrics


class Report:
    """Counts steps, measures their speed, writes every step to metrics.jsonl and shows some of them.

    Numbers of a step are read when the next one has been started, so that the devices never wait for this report.
    """

    def __init__(
        self, metrics_file: Path, *, first_step: int, last_step: int, log_every: int, schedule: optax.Schedule
    ) -> None:
        """Expects steps `first_step + 1 … last_step`. Lines that an earlier start wrote after `first_step` go away."""
        self._file = _reopen(metrics_file, first_step)
        self._display = _BarDisplay(last_step) if sys.stdout.isatty() else _LineDisplay(log_every, last_step)
        self._schedule = schedule
        self._last_step = last_step
        self._pending: tuple[int, StepMetrics] | None = None
        self._clock = time.perf_counter()  # when the step that is reported next was begun
        self._timed_steps = -1  # the first step compiles: it is not counted
        self._timed_seconds = 0.0
        self._timed_tokens = 0
        self._aside_seconds = 0.0

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._display.close()
        self._file.close()

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of training steps alone, over the whole run so far; None before the second step."""
        return self._timed_tokens / self._timed_seconds if self._timed_seconds else None

    def say(self, text: str) -> None:
        """Shows a line."""
        self._display.line(text)

    def step(self, step: int, metrics: StepMetrics) -> None:
        """Takes the metrics of a step that has been started, and shows those of the step before it."""
        self._flush()
        self._pending = (step, metrics)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around work between two steps (held-out loss, checkpoint): its time is none of the steps'."""
        self._flush()
        start = time.perf_counter()
        yield
        self._clock = time.perf_counter()
        if self._timed_steps > 0:
            self._aside_seconds += self._clock - start

    def heldout(self, step: int, loss: float) -> None:
        """Takes a held-out loss, in nats per token."""
        self._write({"step": step, "heldout_loss": loss})
        self.say(f"step {step}  held-out loss {loss:.3f}")

    def _flush(self) -> None:
        if self._pending is None:
            return
        step, on_device = self._pending
        self._pending = None
        metrics: StepMetrics = jax.device_get(on_device)  # waits for the step to end
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._timed_steps += 1
        if self._timed_steps > 0:
            self._timed_seconds += seconds
            self._timed_tokens += int(metrics.tokens)

        record = {
            "step": step,
            "finite": bool(metrics.finite),
            "loss": float(metrics.loss),
            "z_loss": float(metrics.z_loss),
            "balance_loss": float(metrics.balance_loss),
            "router_z": float(metrics.router_z),
            "gradient_norm": float(metrics.gradient_norm),
            "learning_rate": float(self._schedule(step - 1)),
            "dropped": int(metrics.dropped) / max(int(metrics.assignments), 1),
            "load_imbalance": float(metrics.load_imbalance),
            "tokens_per_second": int(metrics.tokens) / seconds,
        }
        self._write(record)
        left = None
        if self._timed_steps > 0:
            # Asides come at even intervals, so what is left costs as much per step as what is done.
            left = (self._timed_seconds + self._aside_seconds) / self._timed_steps * (self._last_step - step)
        self._display.step(step, {**record, "tokens_per_second": self.tokens_per_second}, left)

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


class _LineDisplay:
    """Whole lines, for pipes, files and CI."""

    def __init__(self, log_every: int, last_step: int) -> None:
        self._log_every = log_every
        self._last_step = last_step
        self._losses: list[float] = []

    def line(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)

    def step(self, step: int, record: dict[str, Any], seconds_left: float | None) -> None:
        self._losses.append(record["loss"])
        if step % self._log_every == 0 or step == self._last_step:
            mean = sum(self._losses) / len(self._losses)  # one step's loss is noisy
            self._losses.clear()
            done = f"step {step}/{self._last_step} {step / self._last_step:4.0%}"
            self.line(f"{done}  {_status({**record, 'loss': mean}, seconds_left)}")

    def close(self) -> None:
        pass


class _BarDisplay:
    """A bar that is redrawn in place, for people."""

    def __init__(self, last_step: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn

        columns = (BarColumn(24), TaskProgressColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
        self._progress = Progress(*columns)
        self._task = self._progress.add_task("", total=last_step, status="compiling the first step")
        self._mean_loss: float | None = None
        self._progress.start()

    def line(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def step(self, step: int, record: dict[str, Any], seconds_left: float | None) -> None:
        mean = record["loss"] if self._mean_loss is None else 0.9 * self._mean_loss + 0.1 * record["loss"]
        self._mean_loss = mean
        self._progress.update(self._task, completed=step, status=_status({**record, "loss": mean}, seconds_left))

    def close(self) -> None:
        self._progress.stop()


def _status(record: dict[str, Any], seconds_left: float | None) -> str:
    speed = record["tokens_per_second"]
    parts = [
        f"loss {record['loss']:.3f}",
        f"{speed:,.0f} tokens/s" if speed else "- tokens/s",
        f"dropped {record['dropped']:.1%}",
        f"ETA {_clock_time(seconds_left)}",
    ]
    if record["load_imbalance"]:  # 0 is a dense model
        parts[3:3] = [f"max load {record['load_imbalance']:.1f}x", f"z-loss {record['router_z']:.1f}"]
    return "  ".join(parts)


def _clock_time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _reopen(metrics_file: Path, first_step: int) -> TextIO:
    """Opens the file to go on after `first_step`; what an earlier start wrote beyond its checkpoint will come again."""
    kept = []
    if metrics_file.exists():
        for line in metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= first_step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                break  # the line that was being written when the run was stopped
    file = metrics_file.open("w", encoding="utf-8")
    file.writelines(kept)
    return file
