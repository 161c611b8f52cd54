"""Runs that are stopped from outside, at any moment and in any way, and what comes of them."""

import json
import signal

import pytest

from tests.train.killed import after_steps, begin, finish, killed_and_whole, steps_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(killed twice, never): twenty times takes some minutes: python -m tests.train.killed 20."""
    return killed_and_whole(tmp_path_factory.mktemp("killed"), kills=2)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_that_is_killed_at_any_moment_ends_bit_equal(runs):
    killed, whole = runs
    for name in ("hub/model.safetensors", "hub/config.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert losses(killed) == losses(whole)


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT], ids=lambda asked: asked.name)
def test_a_signal_saves_the_last_step_and_says_how_to_go_on(runs, tmp_path, asked):
    _, whole = runs
    config, folder = whole.parent / "run.toml", tmp_path / "asked"
    process = begin(config, folder, "--run.checkpoint_every", "1000")
    after_steps(process, folder, 5)
    process.send_signal(asked)
    code, told = finish(process)
    assert code == 128 + asked, told
    reached = steps_of(folder)
    assert f"Stopped after step {reached}, saved. The same command goes on from there." in told
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [str(reached)]
    if asked == signal.SIGTERM:
        code, told = finish(begin(config, folder, "--run.checkpoint_every", "1000"))
        assert code == 0 and f"going on from the checkpoint of step {reached}" in told
        assert losses(folder) == losses(whole)


def test_a_run_goes_on_on_half_the_devices(runs, tmp_path):
    """Sums in another order: the losses differ by rounding, which the first steps of training do not make larger."""
    _, whole = runs
    config, folder = whole.parent / "run.toml", tmp_path / "half"
    process = begin(config, folder, "--mesh.data", "4")
    after_steps(process, folder, 5)
    process.send_signal(signal.SIGTERM)
    code, told = finish(process)
    assert code == 143, told
    reached = steps_of(folder)
    process = begin(config, folder, "--mesh.data", "1", "--mesh.expert", "4")
    after_steps(process, folder, 6)
    process.send_signal(signal.SIGTERM)
    code, told = finish(process)
    assert code == 143 and f"going on from the checkpoint of step {reached}" in told, told
    expected, found = losses(whole), losses(folder)
    for step in range(1, reached + 6):
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step
