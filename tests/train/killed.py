"""A run that is killed again and again, compared with one that is not: `python -m tests.train.killed [KILLS]`.

Each start is killed (SIGKILL: nothing can be saved) at a random number of steps after its beginning, at a random moment
of that step. What comes out in the end has to be, bit for bit, what an uninterrupted run gives.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.train.commands import after_steps, finish, said, start, steps_of

STEPS = 40
CONFIG = f"""
[model]
model_type = "qwen3_5_moe_text"
hidden_size = 32
num_hidden_layers = 2
layer_types = ["linear_attention", "full_attention"]
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
linear_num_key_heads = 1
linear_num_value_heads = 2
linear_key_head_dim = 8
linear_value_head_dim = 8
moe_intermediate_size = 16
shared_expert_intermediate_size = 16
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
max_steps = {STEPS}
eval_steps = 20
save_steps = 3
sample_steps = 0
sample_tokens = 2
"""


def training(config: Path, folder: Path, *words: str) -> list[str]:
    """The command of a run."""
    return ["train", str(config), "--run.output_dir", str(folder), *words]


def kill_somewhere(process: subprocess.Popen, folder: Path, moments: random.Random, within: int) -> None:
    """Kills a process at a random moment of one of the next steps of its run."""
    after_steps(process, folder, moments.randint(0, within))
    time.sleep(moments.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    finish(process)


def bit_equal(place: Path, kills: int) -> bool:
    """Whether a run that is killed so often comes to the weights of one that is not, shown as it goes."""
    config, folder, moments = place / "run.toml", place / "killed", random.Random()
    config.write_text(CONFIG)
    finish(start(place, {"whole": training(config, place / "whole")}))
    for number in range(kills):
        process = start(place, {f"kill {number}": training(config, folder)})
        kill_somewhere(process, folder, moments, 2 * STEPS // (kills + 1))
        print(f"kill {number + 1}: {steps_of(folder)} steps in metrics.jsonl", flush=True)
    finish(start(place, {"last": training(config, folder)}))
    assert (said(place, "whole").code, said(place, "last").code) == (0, 0), said(place, "last")
    whole, killed = [path / "hub" / "model.safetensors" for path in (place / "whole", folder)]
    return whole.read_bytes() == killed.read_bytes()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        equal = bit_equal(Path(temporary), int(sys.argv[1]) if sys.argv[1:] else 20)
        print("bit-equal" if equal else "DIFFERENT")
        sys.exit(not equal)
