"""Two processes of four simulated devices each, as two hosts of a pod: one run, one voice, one end."""

import json
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.storage.safetensors_file import open_safetensors
from tests.train.commands import Said, after_steps, finish, said, start, steps_of
from tests.train.killed import CONFIG
from train.checkpoint import Checkpoints
from train.config import load_config
from train.main import main
from train.program import assemble

STEPS = 20
SMALLER = {
    "num_hidden_layers = 2": "num_hidden_layers = 1",
    'layer_types = ["linear_attention", "full_attention"]': 'layer_types = ["linear_attention"]',
    "num_experts = 4": "num_experts = 8",
    "data = 2": "data = 1",
    "expert = 2": "expert = 8",  # tokens travel between the processes
    "steps = 40": f"steps = {STEPS}",
    "eval_steps = 20": "eval_steps = 10\nsave_total_limit = 99",
    "save_steps = 3": "save_steps = 4",
    "sample_steps = 0": "sample_steps = 10",
}
PROMPT = "def read(self"


class Pair:
    """Two processes that give the same commands: each pair that has to start, meet and compile costs seconds."""

    def __init__(self, place: Path, commands: dict[str, list[str]], of_the_second: tuple[str, ...] = ()) -> None:
        """Starts them; the last command of the second may have more words."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
        self._place = place
        self.processes = []
        for number, more in enumerate(((), of_the_second)):
            hosts = [f"--coordinator={coordinator}", "--num-processes=2", f"--process-id={number}"]
            mine = {f"{name}-{number}": [*words, *hosts] for name, words in commands.items()}
            mine[list(mine)[-1]].extend(more)
            self.processes.append(start(place, mine))

    def finish(self) -> tuple[int, int]:
        """Both exit codes."""
        first, second = self.processes
        try:
            return finish(first), finish(second)
        finally:
            second.kill()

    def said(self, name: str) -> tuple[Said, Said]:
        """What came of a command in the first and in the second process."""
        return said(self._place, f"{name}-0"), said(self._place, f"{name}-1")


def spoken(out: str) -> list[str]:
    """Lines of an output, without those of gloo's threads, which tear each other apart."""
    return [line for line in out.splitlines() if line.startswith("{") or re.search("loss|step|Hub|tokens", line)]


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, float]]:
    """Those of training and those of held-out text, in their order."""
    found = [(record["step"], record.get("loss", record.get("heldout_loss"))) for record in records(folder)]
    return [(step, loss) for step, loss in found if loss is not None]


def weights(folder: Path) -> dict[str, np.ndarray]:
    tensors, problems = open_safetensors(folder / "hub" / "model.safetensors")
    assert not problems
    return {name: tensor.read() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("several") / "run.toml"
    text = CONFIG
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def by_one(config):
    """The run's folder, by one process of eight devices: this one."""
    folder = config.parent / "one"
    assert main([str(config), "--run.output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def stopped_early(config, by_one):
    """The folder of `by_one` as it was at the checkpoint of step 8."""
    folder = config.parent / "stopped"
    shutil.copytree(by_one, folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "hub")
    for step in range(12, STEPS + 1, 4):
        shutil.rmtree(folder / "checkpoints" / str(step))
    return folder


@pytest.fixture(scope="module")
def pair(config, stopped_early):
    """Two processes that train, write text, go on from what one process left until a signal, and train until one dies.

    With them, how long the death of one took to end the other.
    """
    place = config.parent

    def training(folder: str) -> list[str]:
        return ["train", str(config), "--run.output_dir", str(place / folder)]

    asked = ["--prompt", PROMPT, "--max-new-tokens", "6", "--json", "--mesh", "context=8"]
    commands = {"two": training("two"), "generate": ["qwen-moe-jax", "generate", str(place / "two" / "hub"), *asked]}
    commands |= {"stopped": training("stopped"), "killed": training("killed")}
    pair = Pair(place, commands)
    first, second = pair.processes
    while first.poll() is None and not 11 <= steps_of(stopped_early) < STEPS:  # those after 8 go away, to come again
        time.sleep(0.002)
    second.send_signal(signal.SIGTERM)
    after_steps(first, place / "killed", 9)
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    pair.finish()
    return pair, time.monotonic() - killed


@pytest.fixture(scope="module")
def second_pair(config, pair):
    """Two processes that go on where one of the first pair died, and then are given unlike words."""
    place = config.parent
    going_on = ["train", str(config), "--run.output_dir", str(place / "killed")]
    unlike = ["train", str(config), "--run.output_dir", str(place / "unlike")]
    pair = Pair(place, {"going on": going_on, "unlike": unlike}, of_the_second=("--run.max_steps=19",))
    pair.finish()
    return pair


def test_two_processes_train_as_one_does_and_write_once(config, by_one, pair):
    folder = config.parent / "two"
    first, second = pair[0].said("two")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    for (step, expected), (same_step, found) in zip(losses(by_one), losses(folder), strict=True):
        assert step == same_step and found == pytest.approx(expected, rel=1e-6), step
    found = weights(folder)
    for name, expected in weights(by_one).items():
        np.testing.assert_allclose(found[name], expected, atol=1e-5, err_msg=name)

    assert [record["step"] for record in records(folder) if "loss" in record] == list(range(1, STEPS + 1))
    assert sum("start" in record for record in records(folder)) == 1
    samples, expected = (
        {record["step"]: record["sample"] for record in records(folder) if "sample" in record}
        for folder in (folder, by_one)
    )
    assert samples == expected and list(samples) == [0, 10]
    assert first.out.count(f"step {STEPS}/{STEPS}") == 1 and "Hub folder in" in first.out
    assert (spoken(second.out), second.err) == ([], "")
    assert not list(folder.glob(".*"))


def test_two_processes_generate_what_one_does_and_one_of_them_says_it(config, pair):
    hub = config.parent / "two" / "hub"
    first, second = pair[0].said("generate")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    answer = json.loads(spoken(first.out)[-1])
    [expected] = qmj.complete(qmj.from_pretrained(hub), [PROMPT], max_new_tokens=6, tokenizer=hub)
    assert (answer["token_ids"], answer["text"]) == (list(expected.token_ids), expected.text)
    assert "6 tokens in" in first.err
    assert spoken(second.out) == []


def test_a_signal_to_one_stops_both_who_went_on_from_the_checkpoint_of_one(by_one, stopped_early, pair):
    first, second = pair[0].said("stopped")
    assert (first.code, second.code) == (143, 143), first.err + second.err
    assert "going on from the checkpoint of step 8" in first.out
    reached = [step for step, _ in losses(stopped_early)][-1]
    assert first.err == f"Stopped after step {reached}, saved. The same command goes on from there.\n"
    assert (spoken(second.out), second.err) == ([], "")
    assert (stopped_early / "checkpoints" / str(reached)).exists() and 11 <= reached < STEPS
    for (step, expected), (same_step, found) in zip(losses(by_one), losses(stopped_early), strict=False):
        assert step == same_step and found == pytest.approx(expected, rel=1e-6), step


def test_a_killed_process_ends_the_other_at_once_and_a_new_start_ends_bit_equal(config, pair, second_pair):
    whole, folder = config.parent / "two", config.parent / "killed"
    pair, seconds = pair
    first, _ = pair.said("killed")
    assert seconds < 30  # measured: 0.3 s
    assert pair.finish() == (75, -signal.SIGKILL), first.err
    assert first.err.startswith("process 0 on ") and "because process 1 on " in first.err and "has died" in first.err
    assert "Start all processes again" in first.err and len(first.err.splitlines()) == 1

    first, second = second_pair.said("going on")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "going on from the checkpoint of step " in first.out
    assert losses(folder) == losses(whole)
    assert (folder / "hub" / "model.safetensors").read_bytes() == (whole / "hub" / "model.safetensors").read_bytes()


def test_one_process_reads_the_checkpoint_of_two(config, by_one, pair):
    mesh = qmj.make_mesh(expert=8)
    program = assemble(load_config(config), qmj.ModelConfig.from_pretrained(by_one / "hub"), mesh)
    states = []
    for folder in (by_one, config.parent / "two"):
        with Checkpoints(folder / "checkpoints", keep=99) as checkpoints:
            assert checkpoints.latest_step == STEPS
            states.append(checkpoints.restore(like=program.state, model=program.model))
    for expected, found in zip(*map(jax.tree.leaves, states), strict=True):
        assert found.sharding == expected.sharding
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-5)


def test_processes_with_different_settings_refuse_each_other(config, second_pair):
    assert second_pair.finish() == (2, 2)
    for each in second_pair.said("unlike"):
        assert spoken(each.out) == []
        assert "ShardingError: the settings of the run: found another one in process 1 than in process 0" in each.err
    assert not (config.parent / "unlike").exists()
