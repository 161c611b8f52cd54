"""Two processes of four simulated devices each, as two hosts of a pod: one run, one voice, one end."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.storage.safetensors_file import open_safetensors
from tests.train.killed import CONFIG, ROOT, after_steps, steps_of
from train.__main__ import main
from train.checkpoint import Checkpoints
from train.config import load_config
from train.program import assemble

STEPS = 30
SMALLER = {
    "num_hidden_layers = 2": "num_hidden_layers = 1",
    "num_experts = 4": "num_experts = 8",
    "data = 2": "data = 1",
    "expert = 2": "expert = 8",  # tokens travel between the processes
    "steps = 40": f"steps = {STEPS}",
    "eval_every = 20": "eval_every = 15\nkeep_checkpoints = 99",
    "checkpoint_every = 3": "checkpoint_every = 5",
}
PROMPT = "def read(self"

#: `python -m train`, and where that went well, `qwen-moe-jax generate` by the same processes.
PROCESS = """
import sys
folder, prompt, *words = sys.argv[1:]  # without a prompt, training is all
hosts = [word for word in words if word.startswith(("--coordinator", "--num-processes", "--process-id"))]
from train.__main__ import main as train
code = train(words)
if code == 0 and prompt:
    from qwen_moe_jax.cli.main import main as qwen_moe_jax
    asked = ["--prompt", prompt, "--max-new-tokens", "6", "--json", "--mesh", "expert=8"]
    code = qwen_moe_jax(["generate", folder + "/hub", *asked, *hosts])
sys.exit(code)
"""


def start(
    config: Path, folder: Path, *, prompt: str = "", of_the_second: tuple[str, ...] = ()
) -> list[subprocess.Popen]:
    """The two processes of a run; the second may have words of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(config.parent / "compiled")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
    environment.pop("JAX_NUM_CPU_DEVICES")  # of the tests' own process
    processes = []
    for number, words in enumerate(((), of_the_second)):
        command = [sys.executable, "-c", PROCESS, str(folder), prompt, str(config), "--run.folder", str(folder), *words]
        command += [f"--coordinator={coordinator}", "--num-processes=2", f"--process-id={number}"]
        # Into files: a pipe that nobody reads yet may fill.
        with _output_of(folder, number, "out").open("w") as out, _output_of(folder, number, "err").open("w") as err:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err))
    return processes


def finish(processes: list[subprocess.Popen], folder: Path) -> list[tuple[int, str, str]]:
    """The exit code of each process of a run, what it printed, and what it complained of."""
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    outputs = [[_output_of(folder, number, kind).read_text() for kind in ("out", "err")] for number in range(2)]
    return [(code, *texts) for code, texts in zip(codes, outputs, strict=True)]


def _output_of(folder: Path, number: int, kind: str) -> Path:
    return folder.with_name(f"{folder.name}-{number}.{kind}")


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
    assert main([str(config), "--run.folder", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def by_two(config):
    """The same run by two processes, and what they said."""
    folder = config.parent / "two"
    return folder, finish(start(config, folder, prompt=PROMPT), folder)


def test_two_processes_train_as_one_does_and_write_once(by_one, by_two):
    folder, [(code, out, err), (other_code, other_out, other_err)] = by_two
    assert (code, other_code) == (0, 0), err + other_err
    for (step, expected), (same_step, found) in zip(losses(by_one), losses(folder), strict=True):
        assert step == same_step and found == pytest.approx(expected, rel=1e-6), step
    found = weights(folder)
    for name, expected in weights(by_one).items():
        np.testing.assert_allclose(found[name], expected, atol=1e-5, err_msg=name)

    assert [record["step"] for record in records(folder) if "loss" in record] == list(range(1, STEPS + 1))
    assert sum("start" in record for record in records(folder)) == 1
    assert out.count(f"step {STEPS}/{STEPS}") == 1 and "Hub folder in" in out
    assert (spoken(other_out), other_err) == ([], "")
    assert not list(folder.glob(".*"))


def test_two_processes_generate_what_one_does_and_one_of_them_says_it(by_two):
    folder, [(_, out, err), _] = by_two
    answer = json.loads(spoken(out)[-1])
    [expected] = qmj.complete(qmj.from_pretrained(folder / "hub"), [PROMPT], max_new_tokens=6, tokenizer=folder / "hub")
    assert (answer["token_ids"], answer["text"]) == (list(expected.token_ids), expected.text)
    assert "6 tokens in" in err


def test_a_killed_process_ends_the_other_at_once_and_a_new_start_ends_bit_equal(config, by_two, tmp_path):
    whole, folder = by_two[0], tmp_path / "killed"
    processes = start(config, folder)
    after_steps(processes[0], folder, 12)
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    code, out, err = finish(processes, folder)[0]
    assert time.monotonic() - killed < 30  # measured: 0.3 s
    assert code == 75, err
    assert err.startswith("process 0 on ") and "because process 1 on " in err and "has died" in err
    assert "Start all processes again" in err and len(err.splitlines()) == 1

    (code, out, err), (other_code, _, other_err) = finish(start(config, folder), folder)
    assert (code, other_code) == (0, 0), err + other_err
    assert "going on from the checkpoint of step " in out
    assert losses(folder) == losses(whole)
    assert (folder / "hub" / "model.safetensors").read_bytes() == (whole / "hub" / "model.safetensors").read_bytes()


def test_a_signal_to_one_stops_both_who_went_on_from_the_checkpoint_of_one(config, by_one, tmp_path):
    folder = tmp_path / "stopped"
    shutil.copytree(by_one, folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "hub")
    for step in range(15, STEPS + 1, 5):
        shutil.rmtree(folder / "checkpoints" / str(step))
    processes = start(config, folder)
    while processes[0].poll() is None and steps_of(folder) == STEPS:  # those after 10 go away, to come again
        time.sleep(0.01)
    after_steps(processes[0], folder, 3)
    processes[1].send_signal(signal.SIGTERM)
    (code, out, err), (other_code, other_out, other_err) = finish(processes, folder)
    assert (code, other_code) == (143, 143), err + other_err
    assert "going on from the checkpoint of step 10" in out
    reached = [step for step, _ in losses(folder)][-1]
    assert err == f"Stopped after step {reached}, saved. The same command goes on from there.\n"
    assert (spoken(other_out), other_err) == ([], "")
    assert (folder / "checkpoints" / str(reached)).exists() and 13 <= reached < STEPS
    for (step, expected), (same_step, found) in zip(losses(by_one), losses(folder), strict=False):
        assert step == same_step and found == pytest.approx(expected, rel=1e-6), step


def test_one_process_reads_the_checkpoint_of_two(config, by_one, by_two):
    mesh = qmj.make_mesh(expert=8)
    program = assemble(load_config(config), qmj.ModelConfig.from_pretrained(by_one / "hub"), mesh)
    states = []
    for folder in (by_one, by_two[0]):
        with Checkpoints(folder / "checkpoints", keep=99) as checkpoints:
            assert checkpoints.latest_step == STEPS
            states.append(checkpoints.restore_latest(like=program.state))
    for expected, found in zip(*map(jax.tree.leaves, states), strict=True):
        assert found.sharding == expected.sharding
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-5)


def test_processes_with_different_settings_refuse_each_other(config, tmp_path):
    folder = tmp_path / "run"
    processes = start(config, folder, of_the_second=("--run.steps=29",))
    for code, out, err in finish(processes, folder):
        assert code == 2 and spoken(out) == []
        assert "ShardingError: the settings of the run: found another one in process 1 than in process 0" in err
    assert not folder.exists()
