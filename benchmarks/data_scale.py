"""Memory and time of a run on a large corpus: `python -m benchmarks.data_scale text|ids MEGABYTES FOLDER`.

Makes JSON lines of random words, or an array of random token ids, in FOLDER, and trains a small model on them: once
with an empty cache, and once more with the tokenized documents of the first run. Prints the peak of the trainer's
resident memory, the speed of tokenizing, and the seconds from the start of Python to the first step. Then a run is
killed in the middle and started again: its weights have to be bit-equal to those of a run that was not.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

CONFIG = """
[model]
model_type = "qwen3"
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
intermediate_size = 64
max_position_embeddings = 1024
tie_word_embeddings = true

[data]
path = "{folder}/{file}"
format = "{format}"
tokenizer = "{folder}/tokenizer"
cache_dir = "{folder}/cache"
megabytes = inf
seq_len = 1024
batch_size = 8
heldout_rows = 8

[run]
max_steps = 40
eval_steps = 1000
save_steps = 5
sample_steps = 0
export = true
"""


def make_text(file: Path, megabytes: float) -> None:
    """Lines of some 2 kB, of words with the frequencies of a language."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfwygpbvk", k=draw.randint(2, 10))) for _ in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    written = 0
    with file.open("w") as opened:
        while written < megabytes * 1e6:
            chosen = draw.choices(words, weights, k=draw.randint(50, 600))
            written += opened.write(json.dumps({"text": " ".join(chosen)}) + "\n")


def make_ids(file: Path, megabytes: float, vocab_size: int) -> None:
    """Uint32 ids of documents of some 2,000 tokens, each of which ends with id 0."""
    count, draw = int(megabytes * 1e6 / 4), np.random.default_rng(0)
    ids = np.lib.format.open_memmap(file, "w+", np.uint32, (count,))
    for start in range(0, count, 1 << 22):
        part = draw.integers(3, vocab_size, min(1 << 22, count - start), np.uint32)
        part[draw.random(len(part)) < 1 / 2000] = 0
        ids[start : start + len(part)] = part


def train(folder: Path, name: str, kill_after: int | None = None) -> dict[str, float]:
    """A run: its peak of resident memory in MB, by VmHWM, and the seconds to its first step."""
    output, began = folder / name, time.monotonic()
    command = [sys.executable, "-u", "-m", "train", str(folder / "run.toml"), "--run.output_dir", str(output)]
    process = subprocess.Popen(command, stdout=(folder / f"{name}.log").open("a"), stderr=subprocess.STDOUT)
    peak = anonymous = first = 0.0
    while process.poll() is None:
        peak, anonymous = max(peak, _status(process.pid, "VmHWM")), max(anonymous, _status(process.pid, "RssAnon"))
        steps = _steps(output)
        first = first or (time.monotonic() - began if steps else 0.0)
        if kill_after is not None and steps >= kill_after:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.02)
    return {
        "peak_rss_mb": peak,
        "peak_anonymous_mb": anonymous,
        "seconds_to_first_step": first,
        "code": process.returncode,
    }


def _status(pid: int, key: str) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith(f"{key}:")), 0.0)


def _steps(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    return metrics.read_bytes().count(b'"gradient_norm"') if metrics.exists() else 0


def main(kind: str, megabytes: float, folder: Path) -> None:
    """Measures, and removes what it made."""
    from train.data.tokenizer import save_tokenizer, train_tokenizer

    folder.mkdir(parents=True)
    try:
        make_text(folder / "text.jsonl", megabytes if kind == "text" else 10)
        with (folder / "text.jsonl").open() as lines:
            save_tokenizer(train_tokenizer((next(lines) for _ in range(2000)), 4096), folder / "tokenizer")
        file, form = ("text.jsonl", "jsonl") if kind == "text" else ("ids.npy", "tokens")
        if kind == "ids":
            make_ids(folder / file, megabytes, 4096)
        (folder / "run.toml").write_text(CONFIG.format(folder=folder, file=file, format=form))
        print(f"load {os.getloadavg()[0]:.1f}", flush=True)
        print("empty cache", train(folder, "cold"), flush=True)
        print("\n".join(line for line in (folder / "cold.log").read_text().splitlines() if "tokenizing" in line)[-400:])
        print("warm cache", train(folder, "warm"), flush=True)
        print("killed", train(folder, "killed", kill_after=12), flush=True)
        print("resumed", train(folder, "killed"), flush=True)
        weights = [(folder / name / "hub" / "model.safetensors").read_bytes() for name in ("cold", "warm", "killed")]
        print("bit-equal" if weights[0] == weights[1] == weights[2] else "DIFFERENT", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]))
