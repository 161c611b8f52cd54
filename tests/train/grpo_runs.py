"""Small GRPO runs: their config, prompts, tokenizer, and a reward that can kill the trainer in the middle of a rollout.

`python -m tests.train.grpo_runs [KILLS]` kills a run again and again and compares it with one that is not killed.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

TEMPLATE = "{% for message in messages %}{{ message.content }}.{% endfor %}A:"
STEPS = 12
CONFIG = """
[model]
model_type = "qwen3_moe"
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
moe_intermediate_size = 16
num_experts = 8
num_experts_per_tok = 2
norm_topk_prob = true
router_aux_loss_coef = 0.01
max_position_embeddings = 64
initializer_range = 0.3

[execution]
dispatch = "dropless"

[data]
path = "{place}/prompts.jsonl"
format = "jsonl"
tokenizer = "{place}/tokenizer"
seq_len = 24
batch_size = 8
heldout_fraction = 0.2
heldout_rows = 4

[grpo]
reward = "tests.train.grpo_runs:reward"
num_generations = 4
max_completion_length = 8
num_iterations = 2
reward_timeout = 5.0
reward_workers = 1

[optimizer]
warmup_steps = 2

[run]
max_steps = {steps}
eval_steps = 6
save_steps = 3
sample_steps = 0
sample_prompt = "a"
sample_tokens = 2
"""


def reward(prompt, completion, row):
    """The even characters of the completion. It raises now and then, and kills its trainer where a file asks for it."""
    kill = Path(row["place"]) / "kill"
    if kill.exists():
        left = int(kill.read_text()) - 1
        if left > 0:
            kill.write_text(str(left))
        else:
            kill.unlink()
            os.kill(os.getppid(), signal.SIGKILL)
    if sum(map(ord, completion)) % 5 == 4:
        raise ValueError("now and then")
    return sum(ord(character) % 2 == 0 for character in completion)


def write_place(place: Path, steps: int = STEPS) -> Path:
    """Writes prompts, tokenizer and config to a folder; returns the config's file."""
    from train.data.tokenizer import save_tokenizer, train_tokenizer

    tokenizer = place / "tokenizer"
    save_tokenizer(train_tokenizer(["one two three"], 259), tokenizer)
    (tokenizer / "chat_template.jinja").write_text(TEMPLATE)
    texts = ["the sum of" + " x" * (number % 4) for number in range(10)]
    records = [{"prompt": f"{text} {number}", "place": str(place)} for number, text in enumerate(texts)]
    records += [{"messages": [{"role": "user", "content": f"say this {n}"}], "place": str(place)} for n in range(5)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = place / "run.toml"
    config.write_text(CONFIG.format(place=place, steps=steps))
    return config


def command(config: Path, folder: Path, *words: str) -> list[str]:
    """The words of a run."""
    return ["train", str(config), "--run.output_dir", str(folder), *words]


def bit_equal(place: Path, kills: int) -> bool:
    """Whether a run that is killed so often comes to the weights of one that is not."""
    from tests.train.commands import finish, said, start, steps_of

    config, folder, moments = write_place(place, steps=30), place / "killed", random.Random()
    began = time.monotonic()
    finish(start(place, {"whole": command(config, place / "whole")}))
    first, whole_seconds = said(place, "whole"), time.monotonic() - began
    print(f"whole run: {whole_seconds:.0f} s, code {first.code}", flush=True)
    for number in range(kills):
        process = start(place, {f"kill {number}": command(config, folder)})
        before = steps_of(folder)
        while process.poll() is None and steps_of(folder) < before + 1 + moments.randint(0, 2):
            time.sleep(0.002)
        time.sleep(moments.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        finish(process)
        print(f"kill {number + 1}: {steps_of(folder)} steps in metrics.jsonl", flush=True)
    finish(start(place, {"last": command(config, folder)}))
    assert said(place, "last").code == 0, said(place, "last")
    whole, killed = [path / "hub" / "model.safetensors" for path in (place / "whole", folder)]
    return whole.read_bytes() == killed.read_bytes()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        equal = bit_equal(Path(temporary), int(sys.argv[1]) if sys.argv[1:] else 10)
        print("bit-equal" if equal else "DIFFERENT")
        sys.exit(not equal)
