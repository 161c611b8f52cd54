"""Weights in 8 and 4 bits on this processor: decoding, and what rounding costs a trained model.

    python benchmarks/low_bit.py
    python benchmarks/low_bit.py --run runs/tiny    # a finished run of `make train`: its held-out loss

The mixture of 115M parameters of `mixture.py` with random weights, saved once and opened in every format; each
continues the same prompts of 128 tokens by 1 and by 33, in turn, a round after the other: the difference is 32 steps of
decoding, of which the table has medians. The floor of a step is what has to be read for it (head, dense matrices, the
experts that the batch is expected to choose; not the cache) over the bandwidth measured in the same process.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mixture
import numpy as np
import prune

import qwen_moe_jax as qmj
from qwen_moe_jax.nn.parameters import parameters_with_paths

PROMPT, STEPS = 128, 32
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8, float32": {"dtype": "float32", "weights": "int8"},
    "int4, float32": {"dtype": "float32", "weights": "int4"},
    "int8, bfloat16": {"dtype": "bfloat16", "weights": "int8"},
    "int4, bfloat16": {"dtype": "bfloat16", "weights": "int4"},
}


def bandwidth() -> float:
    """Bytes a second that all cores together read from memory."""
    matrix = jnp.ones((8192, 16384), jnp.float32)  # 512 MB: larger than any cache
    total, best = jax.jit(jnp.sum), 0.0
    for _ in range(6):
        began = time.perf_counter()
        jax.block_until_ready(total(matrix))
        best = max(best, matrix.nbytes / (time.perf_counter() - began))
    return best


def bytes_of_step(model: qmj.CausalLM, batch: int) -> tuple[int, float]:
    """Bytes of all parameters, and of those that one step reads."""
    moe, whole, read = model.config.moe, 0, 0.0
    chosen = 1 - (1 - moe.num_experts_per_tok / moe.num_experts) ** batch
    for path, param in parameters_with_paths(model):
        size = param.get_value().nbytes
        whole += size
        read += 0 if "embed_tokens" in path else size * chosen if ".experts." in path else size
    return whole, read


def step_seconds(models: dict[str, qmj.CausalLM], batch: int, rounds: int) -> dict[str, float]:
    """Median seconds of a step of each model."""
    prompts = np.random.default_rng(batch).integers(0, mixture.HUB_CONFIG["vocab_size"], (batch, PROMPT)).tolist()
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):  # the first compiles
        for name, model in models.items():
            taken = []
            for count in (1, 1 + STEPS):
                began = time.perf_counter()
                qmj.generate(model, prompts, max_new_tokens=count, eos_token_id=())
                taken.append(time.perf_counter() - began)
            if number:
                times[name].append((taken[1] - taken[0]) / STEPS)
    return {name: statistics.median(found) for name, found in times.items()}


def decoding(batches: list[int], rounds: int, formats: list[str]) -> None:
    """Prints a row for each batch and format."""
    speed = bandwidth()
    print(f"bandwidth {speed / 1e9:.1f} GB/s, load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    print("| batch | weights | MB | MB a step | ms a step | tokens/s | of the floor |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        config = qmj.ModelConfig.from_pretrained(mixture.HUB_CONFIG)
        qmj.save_pretrained(qmj.CausalLM(config, rngs=0), folder)
        models = {name: qmj.from_pretrained(folder, **FORMATS[name]) for name in formats}
    for batch in batches:
        for name, seconds in step_seconds(models, batch, rounds).items():
            whole, read = bytes_of_step(models[name], batch)
            cells = f"{whole / 1e6:.0f} | {read / 1e6:.1f} | {1e3 * seconds:.2f} | {batch / seconds:.0f}"
            print(f"| {batch} | {name} | {cells} | {read / speed / seconds:.0%} |", flush=True)
    print(f"load {os.getloadavg()[0]:.1f}")


def losses(run: Path) -> None:
    """Prints the held-out loss of a run's model in every format."""
    heldout = list(prune.rows(run, heldout=True)[: prune.HELDOUT])
    print("| weights | MB | loss, nats a token | perplexity |\n|---|---|---|---|")
    for name, settings in FORMATS.items():
        for group in (32, 64, 128) if "int4" in name else (64,):
            execution = qmj.ExecutionConfig(weights_group_size=group)
            model = qmj.from_pretrained(run / "hub", execution=execution, **settings)
            scores = qmj.score(model, heldout)
            loss = -sum(one.log_likelihood for one in scores) / sum(one.num_tokens for one in scores)
            size = bytes_of_step(model, 1)[0] / 1e6
            words = f"{name}, groups of {group}" if "int4" in name else name
            print(f"| {words} | {size:.2f} | {loss:.4f} | {np.exp(loss):.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run, in place of decoding")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[*FORMATS], help="of decoding")
    arguments = parser.parse_args()
    if arguments.run is not None:
        losses(arguments.run)
    else:
        decoding(arguments.batch, arguments.rounds, arguments.formats)


if __name__ == "__main__":
    main()
