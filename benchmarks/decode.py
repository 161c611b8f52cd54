"""Decoding beside transformers and the memory bus: `python benchmarks/decode.py`.

A mixture of 115M parameters with random weights, saved once and opened by both sides. One process measures every engine
once a round, in turn; the table shows medians. Each greedily continues the same prompts of 128 tokens by 1 and by 65
tokens: the first is the time to the first token, the difference is 64 steps of decoding. In float32 all must write the
same tokens before anything is timed.

The floor of a step is what has to be read for it (dense weights, the experts that the batch is expected to choose, the
cache) over the bandwidth measured in the same process: the faster of summing and of multiplying a large matrix.

torch's threads spin for some milliseconds after a call, on the cores that the next engine needs: a pause precedes each
measurement. Needs torch and transformers (`pip install -e '.[test]'` on Python 3.11).
"""

import argparse
import datetime
import functools
import importlib.metadata
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import mixture
import numpy as np
import torch
import transformers
from flax import nnx

import qwen_moe_jax as qmj

#: Routing is decided, and the most probable token is not a near tie.
HUB_CONFIG = {**mixture.HUB_CONFIG, "initializer_range": 0.05}
PROMPT, STEPS, PAUSE = 128, 64, 0.05
EXPERTS, CACHES = ("grouped_mm", "eager", "batched_mm"), ("dynamic", "static")

Engine = Callable[[list[list[int]], int], list[list[int]]]
"""Continues all prompts by so many tokens; the new tokens of each."""


def our_engine(folder: Path, dtype: str) -> Engine:
    """This package on one device."""
    model = qmj.from_pretrained(folder, dtype=dtype)
    return lambda prompts, count: qmj.generate(model, prompts, max_new_tokens=count, eos_token_id=())


def their_engines(folder: Path, dtype: str, implementations: Sequence[str]) -> dict[str, Engine]:
    """transformers with each of its implementations of experts and of caches."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))

    def run(prompts: list[list[int]], count: int, experts: str, cache: str) -> list[list[int]]:
        model.set_experts_implementation(experts)
        tokens = torch.tensor(prompts)
        settings = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        settings |= {"cache_implementation": "static"} if cache == "static" else {}
        with torch.no_grad():
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
        return out[:, tokens.shape[1] :].tolist()

    return {
        f"{experts}, {cache} cache": functools.partial(run, experts=experts, cache=cache)
        for experts in implementations
        for cache in CACHES
    }


def measured(
    engines: dict[str, Engine],
    prompts: list[list[int]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple[float, float]]:
    """Median seconds to the first token, and of a step after it."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            taken = []
            for count in (1, 1 + STEPS):
                time.sleep(PAUSE)
                began = clock()
                engine(prompts, count)
                taken.append(clock() - began)
            times[name].append((taken[0], (taken[1] - taken[0]) / STEPS))
    return {
        name: (statistics.median(first for first, _ in pairs), statistics.median(step for _, step in pairs))
        for name, pairs in times.items()
    }


def bytes_of_step(batch: int, dtype: str) -> float:
    """What one step reads: dense weights and head, the experts expected to be chosen, half of the new cache."""
    config = qmj.ModelConfig.from_pretrained(HUB_CONFIG)
    moe, attention = config.moe, config.attention
    expert = 3 * config.hidden_size * moe.moe_intermediate_size
    routed = config.num_hidden_layers * moe.num_experts * expert
    dense = config.num_parameters(exclude_embeddings=True) - routed
    chosen = 1 - (1 - moe.num_experts_per_tok / moe.num_experts) ** batch
    per_token = 2 * config.num_hidden_layers * attention.num_key_value_heads * attention.head_dim
    return jnp.dtype(dtype).itemsize * (dense + chosen * routed + batch * (PROMPT + STEPS / 2) * per_token)


def bandwidth() -> float:
    """Bytes a second that all cores together read from memory."""
    matrix = jnp.ones((8192, 16384), jnp.float32)  # 512 MB: larger than any cache
    vector = jnp.ones(16384, jnp.float32)
    best = 0.0
    for program in (jax.jit(jnp.sum), jax.jit(functools.partial(jnp.matmul, b=vector))):
        jax.block_until_ready(program(matrix))
        for _ in range(5):
            began = time.perf_counter()
            jax.block_until_ready(program(matrix))
            best = max(best, matrix.nbytes / (time.perf_counter() - began))
    return best


def lines(batches: Sequence[int], dtypes: Sequence[str], implementations: Sequence[str], rounds: int) -> list[str]:
    """The report, line by line."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", "transformers"))
    speed = bandwidth()
    columns = "dtype|batch|ours, tokens/s|transformers' best||ratio|of the floor|first token, ms|theirs".split("|")
    report = [
        f"- {datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} cores, "
        f"Python {platform.python_version()}, {versions}",
        f"- prompts of {PROMPT} tokens, {STEPS} steps, medians of {rounds} rounds; bandwidth {speed / 1e9:.1f} GB/s",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        config = qmj.ModelConfig.from_pretrained(HUB_CONFIG)
        execution = qmj.ExecutionConfig(dtype="float32")
        qmj.save_pretrained(qmj.CausalLM(config, rngs=nnx.Rngs(0), execution=execution), folder)
        for dtype in dtypes:
            engines = {"ours": our_engine(folder, dtype)} | their_engines(folder, dtype, implementations)
            for batch in batches:
                numbers = np.random.default_rng(batch)
                prompts = numbers.integers(0, HUB_CONFIG["vocab_size"], (batch, PROMPT)).tolist()
                written = {name: engine(prompts, 1 + STEPS) for name, engine in engines.items()}
                engines["ours"](prompts, 1)  # compiles the shorter request's shapes
                for name, texts in written.items():
                    if dtype == "float32" and texts != written["ours"]:
                        raise SystemExit(f"batch {batch}: {name} writes other tokens than ours; nothing was timed")
                times = measured(engines, prompts, rounds)
                first, step = times.pop("ours")
                best = min(times, key=lambda name, times=times: times[name][1])
                floor = bytes_of_step(batch, dtype) / speed
                report.append(
                    f"| {dtype} | {batch} | {batch / step:.0f} | {batch / times[best][1]:.0f} | {best} "
                    f"| {times[best][1] / step:.2f} | {floor / step:.0%} | {1e3 * first:.0f} "
                    f"| {1e3 * min(first for first, _ in times.values()):.0f} |"
                )
                print(report[-1], flush=True)
    return report


def main() -> None:
    """Prints the table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--experts",
        nargs="+",
        choices=EXPERTS,
        default=EXPERTS,
        help="of transformers; batched_mm copies the experts' weights for every token of a prompt: minutes at batch 8",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    arguments = parser.parse_args()
    report = lines(arguments.batch, arguments.dtype, arguments.experts, arguments.rounds)
    print("\n".join(report))
    if arguments.markdown:
        arguments.markdown.write_text("# Decoding\n\n" + "\n".join(report) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
