"""Runs that are stopped from outside, at any moment and in any way, and what comes of them."""

import json
import random
import shutil
import signal

import pytest

from tests.train.commands import after_steps, finish, said, start, steps_of
from tests.train.killed import CONFIG, STEPS, kill_somewhere, training

ASKED = [signal.SIGINT, signal.SIGTERM]
#: A run that saves nothing before it is asked to stop.
SELDOM = ("--run.save_steps", "1000")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where all of these runs are, and of each that was asked to stop, how far it came and what it saved.

    Of three processes the first makes `whole`, is asked to stop in the middle of `SIGINT` and of `SIGTERM`, and killed
    in that of `killed`; the second is killed there, too; the third ends it, and `SIGTERM`, and a copy of that on half
    the devices. A run that is killed twenty times takes some minutes: python -m tests.train.killed 20.
    """
    place = tmp_path_factory.mktemp("killed")
    config = place / "run.toml"
    config.write_text(CONFIG)
    killed, moments = training(config, place / "killed"), random.Random(0)
    to_be_asked = {asked.name: training(config, place / asked.name, *SELDOM) for asked in ASKED}
    process = start(place, {"whole": training(config, place / "whole"), **to_be_asked, "killed once": killed})
    for asked in ASKED:
        after_steps(process, place / asked.name, 5)
        process.send_signal(asked)
    kill_somewhere(process, place / "killed", moments, 2 * STEPS // 3)
    reached = {asked.name: steps_of(place / asked.name) for asked in ASKED}
    saved = {name: [path.name for path in (place / name / "checkpoints").iterdir()] for name in reached}

    process = start(place, {"killed twice": killed})
    kill_somewhere(process, place / "killed", moments, 2 * STEPS // 3)

    shutil.copytree(place / "SIGTERM", place / "half")
    half = training(config, place / "half", *SELDOM, "--mesh.expert", "1")
    assert finish(start(place, {"killed": killed, "going on": to_be_asked["SIGTERM"], "half": half})) == 0
    return place, reached, saved


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_that_is_killed_at_any_moment_ends_bit_equal(runs):
    place, _, _ = runs
    assert (said(place, "whole").code, said(place, "killed").code) == (0, 0)
    assert said(place, "killed once").code is said(place, "killed twice").code is None
    for name in ("hub/model.safetensors", "hub/config.json"):
        assert (place / "killed" / name).read_bytes() == (place / "whole" / name).read_bytes()
    assert losses(place / "killed") == losses(place / "whole")


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked.name)
def test_a_signal_saves_the_last_step_and_says_how_to_go_on(runs, asked):
    place, reached, saved = runs
    last = reached[asked.name]
    stopped = said(place, asked.name)
    assert stopped.code == 128 + asked, stopped
    assert stopped.err == f"Stopped after step {last}, saved. The same command goes on from there.\n"
    assert saved[asked.name] == [str(last)] and 5 <= last < STEPS
    if asked == signal.SIGTERM:
        going_on = said(place, "going on")
        assert going_on.code == 0 and f"going on from the checkpoint of step {last}" in going_on.out, going_on
        assert losses(place / "SIGTERM") == losses(place / "whole")


def test_a_run_goes_on_on_half_the_devices(runs):
    """Sums in another order: the losses differ by rounding, which the first steps of training do not make larger."""
    place, reached, _ = runs
    last, half = reached["SIGTERM"], said(place, "half")
    assert half.code == 0 and f"going on from the checkpoint of step {last}" in half.out, half
    assert "2 simulated device(s): data=2" in half.out
    expected, found = losses(place / "whole"), losses(place / "half")
    for step in range(1, last + 6):
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step
