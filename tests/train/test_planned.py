"""A run held against its plan: what differs, and what needs over 5 % more or less, is said."""

import json

import pytest

from qwen_moe_jax.errors import ConfigError
from tests.plan import samples
from train.reporting import planned
from train.reporting.planned import PlanCheck, Planned


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(samples.plan().to_json(), encoding="utf-8")
    return str(path)


def test_a_plan_is_read_as_it_was_written(file):
    found = Planned.read(file)
    memory, line = samples.memory(), samples.roofline()
    assert found.memory == memory.total - memory.code
    assert found.seconds == (line.seconds, line.seconds_without_overlap) and found.speeds == "published peaks"
    assert found.notes(samples.plan().work, samples.plan().mesh) == []


def test_what_measured_steps_let_expect_may_be_less_than_the_speeds_of_large_operations(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(samples.plan(roofline=samples.roofline(expected=1.5)).to_json(), encoding="utf-8")
    assert Planned.read(str(path)).seconds == (1.5, samples.roofline().seconds)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"memory": 1}'])
def test_what_is_no_plan_is_refused_with_the_way_to_one(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="--plan TARGET --json FILE"):
        Planned.read(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        Planned.read(str(tmp_path / "none.json"))


def test_a_plan_of_decoding_is_refused(tmp_path):
    plan = json.loads(samples.plan().to_json())
    plan["work"]["purpose"] = "decode"
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(ConfigError, match="found a plan for decode"):
        Planned.read(str(path))


def test_settings_that_differ_are_named_with_both_values(file):
    import dataclasses

    base = samples.plan()
    work = dataclasses.replace(base.work, rows=128, execution={**base.work.execution, "remat": "dots"})
    notes = Planned.read(file).notes(work, {**base.mesh, "fsdp": 16, "data": 2, "context": 1})
    assert len(notes) == 3 and all(note.startswith("warning: not as planned") for note in notes)
    assert "the mesh is data=2, fsdp=16, expert=8, planned fsdp=32, expert=8" in notes[0]
    assert "rows is 128, planned 256" in notes[1] and "remat is dots, planned full" in notes[2]


@pytest.mark.parametrize(
    ("memory", "seconds", "verdicts"),
    [
        (1.0, 1.0, ["as planned", "as planned"]),
        (1.04, 1.04, ["as planned", "as planned"]),
        (1.1, 0.5, ["warning: 10 % over the plan", "as planned"]),  # a step is planned to take 0.52 to 1 of the longest
        (1.2, 1.3, ["warning: 20 % over the plan", "warning: 30 % over the plan"]),
        (0.8, 0.4, ["warning: 20 % under the plan", "warning: 23 % under the plan"]),
    ],
)
def test_memory_and_time_are_compared_once_and_warned_of_from_five_percent(
    file, monkeypatch, memory, seconds, verdicts
):
    found, said, clock = Planned.read(file), [], iter(range(100))
    monkeypatch.setattr(planned, "step_memory", lambda program, arguments: int(found.memory * memory))
    longest = found.seconds[1]
    monkeypatch.setattr(planned.time, "perf_counter", lambda: next(clock) * longest * seconds)
    check = PlanCheck(found, None, said.append)
    for _ in range(20):
        check.step("state", "fixed", "batch")
    assert [line.rpartition(": a ")[0] for line in said] == verdicts
    assert "compiled step" in said[0] and "median of 5" in said[1] and "published peaks" in said[1]
