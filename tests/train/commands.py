"""Processes that give commands, each after the one before: starting JAX and compiling are worth more than one."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROCESS = """
import json, os, sys
from pathlib import Path
from types import SimpleNamespace
from jax._src import compiler  # which process writes the compilation cache has no public setting
from qwen_moe_jax.cli.main import main as qwen_moe_jax
from train.main import main as train
# JAX lets only process 0 write the compilation cache; here every process writes it, for its next command.
compiler.distributed = SimpleNamespace(global_state=SimpleNamespace(process_id=0, client=None))
for output, (program, *words) in json.loads(sys.argv[1]):
    for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        os.dup2(os.open(f"{output}.{kind}", os.O_WRONLY | os.O_CREAT), stream.fileno())  # of gloo's threads, too
    code = {"train": train, "qwen-moe-jax": qwen_moe_jax}[program](words)
    Path(f"{output}.code").write_text(str(code))
sys.exit(code)
"""


@dataclass(frozen=True)
class Said:
    """What came of a command: no code where it did not come to its end, and nothing at all where it did not begin."""

    code: int | None
    out: str
    err: str


def start(place: Path, commands: dict[str, list[str]]) -> subprocess.Popen:
    """A process that gives these commands, `train` or `qwen-moe-jax` and its words, by names of your choice.

    What one compiles is kept in `place`, for all processes that are started there.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(place / "compiled")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
    environment.pop("JAX_NUM_CPU_DEVICES", None)  # of the tests' own process
    asked = [(str(place / name), words) for name, words in commands.items()]
    # Into files: a pipe that nobody reads yet may fill.
    return subprocess.Popen([sys.executable, "-c", PROCESS, json.dumps(asked)], cwd=ROOT, env=environment)


def finish(process: subprocess.Popen) -> int:
    """The exit code of a process, once it has one."""
    try:
        return process.wait(timeout=300)
    finally:
        process.kill()


def said(place: Path, name: str) -> Said:
    """What came of a command that a process was started with there."""
    files = [place / f"{name}.{kind}" for kind in ("code", "out", "err")]
    code, out, err = [file.read_text() if file.exists() else "" for file in files]
    return Said(int(code) if code else None, out, err)


def steps_of(folder: Path) -> int:
    """How far a run has reported."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b'"gradient_norm"') if metrics.exists() else 0


def after_steps(process: subprocess.Popen, folder: Path, count: int) -> None:
    """Waits until a run has made this many steps since now, or its process has ended."""
    begin_at = steps_of(folder)
    while process.poll() is None and not begin_at + count <= steps_of(folder):
        time.sleep(0.002)
