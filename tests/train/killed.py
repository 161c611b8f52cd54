"""A run that is killed again and again, beside one that is not: `python -m tests.train.killed [KILLS]`.

Each start is killed (SIGKILL: nothing can be saved) at a random number of steps after its beginning, at a random moment
of that step. What comes out in the end has to be, bit for bit, what an uninterrupted run gives.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = 40
CONFIG = f"""
[model]
model_type = "qwen3_moe"
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
moe_intermediate_size = 16
num_experts = 4
num_experts_per_tok = 2
router_aux_loss_coef = 0.01
max_position_embeddings = 64

[mesh]
data = 2
expert = 2
simulated = true

[execution]
dispatch = "dropless"
buffer_factor = inf

[data]
megabytes = 0.03
vocab_size = 300
seq_len = 32
batch_size = 8
heldout_fraction = 0.2
heldout_rows = 4

[optimizer]
warmup_steps = 2

[run]
steps = {STEPS}
eval_every = 20
checkpoint_every = 3
sample_tokens = 2
"""


def begin(config: Path, folder: Path, *words: str) -> subprocess.Popen:
    """Starts `python -m train`. What was compiled once is kept beside the config, so that starting takes seconds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(config.parent / "compiled")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
    command = [sys.executable, "-m", "train", str(config), "--run.folder", str(folder), *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Its exit code and what it printed."""
    try:
        told, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, told


def steps_of(folder: Path) -> int:
    """How far a run has reported."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b'"gradient_norm"') if metrics.exists() else 0


def after_steps(process: subprocess.Popen, folder: Path, count: int) -> None:
    """Waits until a run has made this many steps since now, or has ended."""
    begin_at = steps_of(folder)
    while process.poll() is None and not begin_at + count <= steps_of(folder):
        time.sleep(0.002)


def killed_and_whole(folder: Path, kills: int, seed: int = 0) -> tuple[Path, Path]:
    """The folders of a run that was killed so often, and of one that was not, both finished."""
    config = folder / "run.toml"
    config.write_text(CONFIG)
    code, told = finish(begin(config, folder / "whole"))
    assert code == 0, told
    moments = random.Random(seed)
    for number in range(kills):
        process = begin(config, folder / "killed")
        after_steps(process, folder / "killed", moments.randint(0, 2 * STEPS // (kills + 1)))
        time.sleep(moments.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        code, _ = finish(process)
        print(f"kill {number + 1}: exit code {code}, {steps_of(folder / 'killed')} steps in metrics.jsonl", flush=True)
    code, told = finish(begin(config, folder / "killed"))
    assert code == 0, told
    return folder / "killed", folder / "whole"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        killed, whole = killed_and_whole(Path(temporary), int(sys.argv[1]) if sys.argv[1:] else 20)
        name = "hub/model.safetensors"
        equal = (killed / name).read_bytes() == (whole / name).read_bytes()
        print("bit-equal" if equal else "DIFFERENT")
        sys.exit(not equal)
