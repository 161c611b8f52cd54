"""An engine against transformers: requests of random lengths at random times get transformers' greedy tokens.

By hand: `python -m tests.inference.engine_referee 100 qwen2_moe-sliding qwen3-plain qwen3_5_text-plain`. Names of
`tests.cases` with weights of `tests.referee`; half of the prompts begin alike. Printed are the requests with the same
tokens, and those in which a choice of transformers' hangs on rounding, which may differ.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np

import qwen_moe_jax as qmj
from qwen_moe_jax.inference import memory, programs
from tests.cases import CASES, HYBRID_CASES
from tests.inference.test_engine import serve

VOCABULARY = 98
SMALLEST_MARGIN = 1e-4


def make_requests(count: int) -> list[qmj.Request]:
    """Prompts of 1 to 52 tokens, answers of 1 to 24."""
    numbers = np.random.default_rng(0)
    common = numbers.integers(1, VOCABULARY, 28).tolist()
    requests = []
    for number in range(count):
        own = numbers.integers(1, VOCABULARY, numbers.integers(1, 24)).tolist()
        prompt = [*(common[: numbers.integers(1, 28)] if number % 2 else []), *own]
        config = qmj.GenerationConfig(max_new_tokens=int(numbers.integers(1, 25)))
        requests.append(qmj.Request(token_ids=prompt, config=config))
    return requests


def of_transformers(hub, request: qmj.Request) -> tuple[list[int], float]:
    """The tokens, and how close the closest choice was."""
    from tests.referee import torch

    settings = dict(
        do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_scores=True
    )
    tokens = torch.tensor([request.token_ids])
    new = request.config.max_new_tokens
    out = hub.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, use_cache=True, **settings)
    best = torch.stack(out.scores).topk(2).values
    return out.sequences[0, tokens.shape[1] :].tolist(), float((best[..., 0] - best[..., 1]).min())


def check(name: str, count: int, folder: Path) -> str:
    """Answers of one case."""
    from tests.referee import Reference

    case = {**CASES, **HYBRID_CASES}[name]
    case = dataclasses.replace(case, settings={**case.settings, "vocab_size": VOCABULARY})
    reference = Reference(case, folder)
    model = qmj.from_pretrained(reference.folder, dtype="float32")
    engine = qmj.Engine(model, slots=5, max_length=96, cache_tokens=240, prefill_chunk=32, decode_steps=4)
    engine.compile()
    requests, before = make_requests(count), programs.compilations()
    answers = serve(engine, requests, seed=1)
    compiled = programs.compilations() - before
    same = close = 0
    for request, answer in zip(requests, answers, strict=True):
        expected, margin = of_transformers(reference.model, request)
        same += answer.token_ids == expected
        close += margin < SMALLEST_MARGIN
        assert answer.token_ids == expected or margin < SMALLEST_MARGIN, (request, answer.token_ids, expected, margin)
    load = engine.load
    return (
        f"{name}: {same} of {count} the same, {close} hang on rounding; {load.prefix_hit_tokens} tokens of prompts "
        f"shared, {load.preempted} requests put back, {compiled} programs compiled while serving"
    )


if __name__ == "__main__":
    memory.BLOCK_SIZE = 8
    for case in sys.argv[2:]:
        with tempfile.TemporaryDirectory() as directory:
            print(check(case, int(sys.argv[1]), Path(directory)), flush=True)
