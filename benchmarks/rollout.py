"""The speed of a GRPO run's rollouts against `qmj.complete` on the same prompts, seeds and settings.

    python benchmarks/rollout.py configs/train/grpo-tiny.toml [--section.key=value …]

Completions do not end before their largest length, so that both sample the same number of tokens.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from flax import nnx

import qwen_moe_jax as qmj
from train.config import load_config
from train.initial import initial_model_config, initial_params
from train.program import assemble
from train.rollout.corpus import load_prompts
from train.rollout.generate import Sampling, seed_of

ROUNDS = 12


def main(file: str, overrides: list[str]) -> None:
    """Prints tokens, and the median of wall and processor seconds, of both in turns."""
    config = load_config(file, overrides)
    with tempfile.TemporaryDirectory() as folder:
        corpus = load_prompts(Path(folder) / "corpus", config)
        program = assemble(config, initial_model_config(config, corpus), qmj.make_mesh(**config.mesh.sizes))
        params = initial_params(config, program.model)
        sampling = Sampling.of(config, program, corpus)
        endless = dataclasses.replace(sampling.config, eos_token_id=())
        sampling = dataclasses.replace(sampling, config=endless)
        [part, *_] = corpus.prompts
        prompts = [part.training[number % len(part.training)] for number in range(config.data.batch_size)]
    requests = [(prompt, seed_of(number)) for number, prompt in enumerate(prompts)]
    configs = [dataclasses.replace(endless, seed=seed) for _, seed in requests]
    model = nnx.merge(program.eval_graph, params)
    ids = [list(prompt.token_ids) for prompt in prompts]
    ways = {
        "rollout": lambda: sampling.sample(params, requests),
        "complete": lambda: qmj.complete(model, ids, configs, return_routing=True),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [timed(way)] for name, way in ways.items()}  # compiles
    for name, way in list(ways.items()) * ROUNDS:
        seconds[name].append(timed(way))
    tokens = len(requests) * config.grpo.max_completion_length
    for name, measured in seconds.items():
        wall, processor = (statistics.median(column) for column in zip(*measured[1:], strict=True))
        print(f"{name}: {tokens:,} tokens, {wall:.3f} s by the clock, {processor:.3f} s of processors")


def timed(way: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    way()
    return time.perf_counter() - wall, time.process_time() - processor


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
