"""What a run says and writes while it goes: speed in units that are known, few records of layers, events."""

import dataclasses
import struct
import sys
import types

import numpy as np
import pytest

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.moe.stats import RouterStats
from tests.train.recorded import START
from train.config import RunConfig, build_config
from train.folder import RunFolder
from train.loop import train
from train.reporting.metrics import read_metrics
from train.reporting.profile import Profiler
from train.reporting.progress import Report, layers_every
from train.reporting.tensorboard import scalars
from train.reporting.trackers import require_trackers
from train.step import StepMetrics

LAYERS, EXPERTS = 2, 4


def step_metrics() -> StepMetrics:
    """As of two layers of four experts, one of which drops a tenth."""
    zeros_LE = np.zeros((LAYERS, EXPERTS), np.int32)
    loads_LE = np.array([[10, 10, 10, 10], [40, 0, 0, 0]], np.int32)
    blank = dict.fromkeys([field.name for field in dataclasses.fields(RouterStats)], np.zeros(LAYERS, np.float32))
    stats = {**blank, "tokens_per_expert": loads_LE, "rounds": np.ones(2, np.int32)}
    stats |= {"dropped_per_expert": zeros_LE + np.array([[0], [1]], np.int32), "entropy": np.array([1.3, 0.1])}
    terms = {"cross_entropy": 3.25, "balance_loss": 1.0, "router_z": 2.0, "z_loss": 30.0}
    numbers = {"loss": 3.5, "terms": terms, "gradient_norm": 1.0, "finite": True}
    counts = {"tokens": 20, "learned_tokens": 16, "assignments": 80, "dropped": 4, "load_imbalance": 4.0}
    return StepMetrics(**numbers, **counts, router=RouterStats(**stats))


def report_of(folder: RunFolder, *, steps: int, first_step: int = 0, **changes) -> None:
    """Reports steps that take no time, on a chip whose peak is known."""
    folder.path.mkdir(exist_ok=True)
    config = RunConfig(**{"max_steps": steps, "logging_steps": 2, **changes})
    with Report(folder, config, START, first_step=first_step, schedule=lambda step: 0.1 * step) as report:
        for step in range(first_step + 1, steps + 1):
            with report.fetching():
                pass
            report.step(step, step_metrics())


def test_a_line_and_a_record_have_mfu_where_the_peak_is_known(tmp_path, capsys):
    report_of(RunFolder(tmp_path / "run"), steps=4)
    [_, last] = [line for line in capsys.readouterr().out.splitlines() if "step " in line]
    for part in ("step 4/4", "loss 3.250", "tokens/s", "MFU ", "dropped 5.0%", "max load 4.0x"):
        assert part in last
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl").steps:
        per_device = record["tokens"] / record["step_seconds"] / 8
        assert record["tokens_per_second_per_device"] == pytest.approx(per_device)
        assert record["mfu"] == pytest.approx(per_device * 6e6 / 275e12)


def test_layers_are_written_with_progress_lines_and_in_long_runs_rarely():
    assert layers_every(logging_steps=10, steps=60) == 10
    assert layers_every(logging_steps=10, steps=2000) == 10
    assert layers_every(logging_steps=10, steps=2001) == 20
    assert layers_every(logging_steps=7, steps=1_000_000) == 5005  # a multiple of 7


def test_going_on_keeps_what_was_and_writes_another_start(tmp_path):
    folder = RunFolder(tmp_path / "run")
    report_of(folder, steps=5)
    with folder.metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    report_of(folder, steps=6, first_step=3)
    metrics = read_metrics(folder.metrics)
    assert [record["step"] for record in metrics.starts] == [0, 3]
    assert [record["step"] for record in metrics.steps] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in metrics.layers] == [1, 2, 4, 6]


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_its_metrics_anew(tmp_path):
    folder = RunFolder(tmp_path / "run")
    report_of(folder, steps=5)
    report_of(folder, steps=3)
    metrics = read_metrics(folder.metrics)
    assert [record["step"] for record in metrics.starts] == [0]
    assert [record["step"] for record in metrics.steps] == [1, 2, 3]


def test_events_hold_the_scalars_of_every_record(tmp_path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="the extra `tensorboard` is not installed")
    folder = RunFolder(tmp_path / "run")
    report_of(folder, steps=2, tensorboard=True)
    [file] = folder.tensorboard.iterdir()
    found, rest = {}, file.read_bytes()
    while rest:  # length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", rest[:8])
        event = event_pb2.Event.FromString(rest[12 : 12 + length])
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        rest = rest[16 + length :]
    assert found[2, "cross_entropy"] == 3.25 and found[2, "learning_rate"] == pytest.approx(0.1)
    assert found[2, "load_imbalance/1"] == 4 and found[2, "dropped/1"] == pytest.approx(0.1)
    assert found[1, "entropy/0"] == pytest.approx(1.3)


def test_events_without_their_library_are_refused_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    config = build_config({"model": {"model_type": "qwen3"}}, ["--run.tensorboard=true"], source="test")
    with pytest.raises(ConfigError, match=r"run\.tensorboard.*qwen-moe-jax\[tensorboard\]"):
        train(config, RunFolder(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_record_s_numbers_are_scalars_and_its_place_is_none():
    assert scalars({"step": 3, "heldout_loss": 2.5}) == {"heldout_loss": 2.5}
    assert scalars({"step": 0, "start": {"parameters": 3}}) == {}


@pytest.mark.parametrize("text", ["10", "10:", ":3", "13:10", "5:5", "0:2", "-1:3", "1.5:3", "a:b", "1:2:3"])
def test_a_range_of_no_steps_is_refused(text):
    with pytest.raises(ConfigError, match="profile=.*expected first:end .*as 10:13"):
        RunConfig(profile=text)


def test_a_trace_begins_with_its_first_step_that_is_run_and_ends_with_its_last(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))

    def trace(profile: str, steps: range) -> list:
        calls.clear()
        with Profiler(tmp_path, RunConfig(profile=profile).profile_steps) as profiler:
            for step in steps:
                profiler.before(step)
                calls.append(step)
                if profiler.ends_with(step):
                    profiler.stop()
        return list(calls)

    assert trace("2:4", range(1, 6)) == [1, "start", 2, 3, "stop", 4, 5]
    assert trace("2:4", range(3, 6)) == ["start", 3, "stop", 4, 5]
    assert trace("2:9", range(1, 4)) == [1, "start", 2, 3, "stop"]  # the run is over before
    assert trace("2:4", range(4, 6)) == trace("", range(4, 6)) == [4, 5]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_number_at_its_step_and_a_resumed_run_goes_on_in_it(tmp_path, monkeypatch, name):
    calls = []
    library = types.SimpleNamespace(
        init=lambda **settings: calls.append(("init", settings)),
        log=lambda numbers, step: calls.append(("log", step, numbers)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, name, library)
    folder = RunFolder(tmp_path / "run")
    report_of(folder, steps=2, report_to=(name,))
    report_of(folder, steps=4, first_step=2, report_to=(name,))
    inits = [settings for kind, *rest in calls for settings in rest[:1] if kind == "init"]
    assert len(inits) == 2 and inits[0] == inits[1] and calls[-1] == ("finish",)
    assert (inits[0]["project"], inits[0]["name"], inits[0]["resume"]) == ("qwen-moe-jax", "run", "allow")
    assert inits[0]["config"]["parameters"] == START.parameters
    logged = {call[1]: call[2] for call in calls if call[0] == "log" and "loss" in call[2]}
    assert sorted(logged) == [1, 2, 3, 4] and logged[4]["cross_entropy"] == 3.25


def test_a_tracker_that_is_unknown_or_not_installed_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="report_to=mlflow is not supported: expected some of tensorboard, wandb"):
        RunConfig(report_to=("mlflow",))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"run\.report_to: found wandb.*qwen-moe-jax\[wandb\]"):
        require_trackers(RunConfig(report_to=("wandb",)))
