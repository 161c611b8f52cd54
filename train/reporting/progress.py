"""The output of a running training: a progress bar on a terminal or plain lines in a file, and metrics.jsonl."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import jax
import optax

from qwen_moe_jax.cli.terminal import visible
from qwen_moe_jax.moe.stats import RouterStats
from qwen_moe_jax.units import format_clock
from qwen_moe_jax.whole_file import write_whole
from train.config import RunConfig
from train.folder import RunFolder
from train.reporting.metrics import read_records
from train.reporting.start import Start
from train.reporting.trackers import trackers
from train.step import StepMetrics

_LAYER_RECORDS = 200  # at most so many: with 48 layers of 128 experts, one is 30 kB


class Report:
    """Counts steps, measures their speed, writes every step to metrics.jsonl and shows some of them.

    The metrics of a step are read after the next one has been dispatched, so that the devices never wait for them.

    Every line of metrics.jsonl has a `step`, and one of: the numbers of that step (`loss` among them; its
    `step_seconds`; its `data_seconds`, in which the host got the batch, mostly while the devices computed the step
    before); `layers`, now and then, the load [L, E], entropy [L], drops [L] and rounds [L] of that step;
    `heldout_loss` and the other held-out metrics; `sample`, the model's continuation of the `prompt` next to it;
    `evaluation_seconds`, `sample_seconds` and so on (`ASIDES`), which are in no step's; or `start`, the numbers of the
    run's start (`train/reporting/start.py`).
    """

    def __init__(
        self, folder: RunFolder, config: RunConfig, start: Start, *, first_step: int, schedule: optax.Schedule
    ) -> None:
        """For the steps `first_step + 1 … config.steps`. Older records of these steps are removed from the file."""
        self._trackers = trackers(config, folder, dataclasses.asdict(start), first_step=first_step)
        self._file = _reopen(folder.metrics, first_step)
        last_step, logging_steps = config.steps, config.logging_steps
        status = _Status(start.loss_term, start.shown)
        self._display = (
            _BarDisplay(last_step, status) if sys.stdout.isatty() else _LineDisplay(logging_steps, last_step, status)
        )
        self._schedule = schedule
        self._start = start
        self._last_step = last_step
        self._layers_every = layers_every(logging_steps, last_step)
        self._step = first_step
        self._pending: tuple[int, StepMetrics, dict[str, float]] | None = None
        self._added: dict[str, float] = {}  # to the record of the step that is dispatched next
        self._clock = time.perf_counter()  # the start of the step that is reported next
        self._timed_steps = -1  # the first step compiles and is not counted
        self._timed_seconds = 0.0
        self._timed_tokens = 0
        self._aside_seconds = 0.0
        self._aside_while_fetching = 0.0  # such as a rollout, which is no time of the data
        self._write({"step": first_step, "start": dataclasses.asdict(start)})

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._display.close()
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    @property
    def tokens_per_second(self) -> float | None:
        """The speed of the training steps since the start of the run; None before the second step."""
        return self._timed_tokens / self._timed_seconds if self._timed_seconds else None

    def say(self, text: str) -> None:
        """Prints one or several lines."""
        for line in text.splitlines():
            self._display.line(line)

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """A context for reading the next batch, while the devices compute the previous step."""
        start, self._aside_while_fetching = time.perf_counter(), 0.0
        yield
        self._added["data_seconds"] = time.perf_counter() - start - self._aside_while_fetching

    def add(self, numbers: Mapping[str, float]) -> None:
        """Adds numbers of the host to the record of the step that is dispatched next."""
        self._added.update(numbers)

    def step(self, step: int, metrics: StepMetrics) -> None:
        """Takes the metrics of a dispatched step, and shows those of the step before it."""
        self._flush()
        self._pending = (step, metrics, self._added)
        self._step, self._added = step, {}

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """A context for work between two steps, one of `ASIDES`; its time is not part of either."""
        self._flush()
        start = time.perf_counter()
        yield
        self._clock = time.perf_counter()
        self._aside_while_fetching += self._clock - start
        if self._timed_steps > 0:
            self._aside_seconds += self._clock - start
        self._write({"step": self._step, f"{what}_seconds": self._clock - start})

    def heldout(self, step: int, metrics: Mapping[str, float]) -> None:
        """Reports the held-out metrics; `loss` is one of them."""
        self._write({"step": step, **{f"heldout_{name}": value for name, value in metrics.items()}})
        others = "".join(f", {name} {value:.3f}" for name, value in metrics.items() if name != "loss")
        self.say(f"step {step}  held-out loss {metrics['loss']:.3f}{others}")

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Reports the model's continuation of `prompt`."""
        self._write({"step": step, "prompt": prompt, "sample": text})
        lines = visible(prompt + text).splitlines()
        self.say("\n".join([f"step {step}  sample", *(f"  | {line}" for line in lines)]))

    def completions(self, step: int, completions: Sequence[Mapping[str, Any]]) -> None:
        """Reports completions of held-out prompts, each with `prompt`, `completion` and `reward`."""
        self._write({"step": step, "completions": [*completions]})
        for one in completions:
            lines = visible(f"{one['prompt']}{one['completion']}").splitlines()
            self.say("\n".join([f"step {step}  reward {one['reward']:.3f}", *(f"  | {line}" for line in lines)]))

    def _flush(self) -> None:
        if self._pending is None:
            return
        step, on_device, added = self._pending
        self._pending = None
        metrics: StepMetrics = jax.device_get(dataclasses.replace(on_device, router=None))  # blocks until it has ended
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
            **{name: float(value) for name, value in metrics.terms.items()},
            "gradient_norm": float(metrics.gradient_norm),
            "learning_rate": float(self._schedule(step - 1)),
            "dropped": int(metrics.dropped) / max(int(metrics.assignments), 1),
            "load_imbalance": float(metrics.load_imbalance),
            "tokens": int(metrics.tokens),
            "learned_tokens": int(metrics.learned_tokens),
            "step_seconds": seconds,
            **added,
            **self._speed(int(metrics.tokens) / seconds),
        }
        self._write(record)
        if on_device.router is not None and (step % self._layers_every == 0 or step in (1, self._last_step)):
            self._write({"step": step, "layers": _layers(jax.device_get(on_device.router))})
        left = None
        if self._timed_steps > 0:
            # Work between steps comes at even intervals, so that its cost per step stays the same.
            left = (self._timed_seconds + self._aside_seconds) / self._timed_steps * (self._last_step - step)
        shown = {**record, "tokens_per_second": None, **self._speed(self.tokens_per_second)}
        self._display.step(step, shown, left)

    def _speed(self, tokens_per_second: float | None) -> dict[str, float]:
        """The speed in all units, and the model FLOPs utilization where the peak of the devices is known."""
        if tokens_per_second is None:
            return {}
        per_device = tokens_per_second / self._start.devices
        speed = {"tokens_per_second": tokens_per_second, "tokens_per_second_per_device": per_device}
        if self._start.peak_flops is not None:
            speed["mfu"] = per_device * self._start.flops_per_token / self._start.peak_flops
        return speed

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(record)


class NoReport:
    """The report of all processes but process 0: it does nothing."""

    tokens_per_second = 0.0

    def __enter__(self) -> "NoReport":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def fetching(self) -> AbstractContextManager[None]:
        return nullcontext()

    def add(self, numbers: Mapping[str, float]) -> None:
        pass

    def step(self, step: int, metrics: StepMetrics) -> None:
        pass

    def aside(self, what: str) -> AbstractContextManager[None]:
        return nullcontext()

    def heldout(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def sample(self, step: int, prompt: str, text: str) -> None:
        pass

    def completions(self, step: int, completions: Sequence[Mapping[str, Any]]) -> None:
        pass


def layers_every(logging_steps: int, steps: int) -> int:
    """Steps between two records of `layers`: every n-th progress line, so that a long run has few of them."""
    return logging_steps * math.ceil(steps / (_LAYER_RECORDS * logging_steps))


def _layers(stats: RouterStats) -> dict[str, list]:
    return {
        "load": stats.tokens_per_expert.tolist(),
        "entropy": [round(float(entropy), 4) for entropy in stats.entropy],
        "dropped": stats.dropped_per_expert.sum(axis=-1).tolist(),
        "rounds": stats.rounds.tolist(),
    }


class _LineDisplay:
    """Progress as whole lines, for pipes, files and CI."""

    def __init__(self, logging_steps: int, last_step: int, status: "_Status") -> None:
        self._logging_steps = logging_steps
        self._last_step = last_step
        self._status = status
        self._losses: list[float] = []

    def line(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)

    def step(self, step: int, record: dict[str, Any], seconds_left: float | None) -> None:
        if record["learned_tokens"]:
            self._losses.append(record[self._status.loss_term])
        if step % self._logging_steps == 0 or step == self._last_step:
            mean = sum(self._losses) / len(self._losses) if self._losses else None  # one step's loss is noisy
            self._losses.clear()
            done = f"step {step}/{self._last_step} {step / self._last_step:4.0%}"
            self.line(f"{done}  {self._status.text(mean, record, seconds_left)}")

    def close(self) -> None:
        pass


class _BarDisplay:
    """A progress bar, for terminals."""

    def __init__(self, last_step: int, status: "_Status") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn

        columns = (BarColumn(24), TaskProgressColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
        self._progress = Progress(*columns)
        self._task = self._progress.add_task("", total=last_step, status="compiling the first step")
        self._mean_loss: float | None = None
        self._status = status
        self._progress.start()

    def line(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def step(self, step: int, record: dict[str, Any], seconds_left: float | None) -> None:
        mean, loss = self._mean_loss, record[self._status.loss_term]
        if record["learned_tokens"]:
            mean = loss if mean is None else 0.9 * mean + 0.1 * loss
        self._mean_loss = mean
        self._progress.update(self._task, completed=step, status=self._status.text(mean, record, seconds_left))

    def close(self) -> None:
        self._progress.stop()


@dataclass(frozen=True)
class _Status:
    """The state of a run in one line: of its numbers, the loss and the further terms that the objective shows."""

    loss_term: str
    shown: Sequence[str]

    def text(self, loss: float | None, record: dict[str, Any], seconds_left: float | None) -> str:
        speed = record["tokens_per_second"]
        # None where no step had a token to learn
        parts = [f"loss {loss:.3f}" if loss is not None else "loss -"]
        parts += [f"{name} {record[name]:.3f}" for name in self.shown if name in record]
        parts.append(f"{speed:,.0f} tokens/s" if speed else "- tokens/s")
        if "mtp_loss" in record:
            parts.append(f"MTP {record['mtp_loss']:.3f}")
        if "mfu" in record:
            parts.append(f"MFU {record['mfu']:.1%}")
        parts.append(f"dropped {record['dropped']:.1%}")
        if record["load_imbalance"]:  # 0 is a dense model
            parts += [f"max load {record['load_imbalance']:.1f}x", f"z-loss {record['router_z']:.1f}"]
        parts.append(f"ETA {'-' if seconds_left is None else format_clock(seconds_left)}")
        return "  ".join(parts)


def _reopen(metrics_file: Path, first_step: int) -> TextIO:
    """Opens the file to continue after `first_step`; records after the checkpoint are removed."""
    # A start from step 0 has no checkpoint and writes everything again, the loss of step 0 too.
    records = read_records(metrics_file) if first_step > 0 and metrics_file.exists() else []
    kept = "".join(json.dumps(record) + "\n" for record in records if record["step"] <= first_step)
    write_whole(metrics_file, kept)
    return metrics_file.open("a", encoding="utf-8")
