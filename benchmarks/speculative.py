"""Speculative decoding compared with plain decoding: `python benchmarks/speculative.py FOLDER`.

FOLDER is a checkpoint with a trained next-token head and a tokenizer: the hub/ of a run with `[loss] mtp_coef`, such as
that in `benchmarks/results/speculative-cpu.md`.

Prompts are pieces of Python's standard library; each is continued greedily and sampled, by plain decoding and with 1, 2
and 3 proposals. The texts have to be the same. The table shows medians of some rounds in turn, without compilation:
tokens per forward pass of a row (its first token not counted), tokens per second, and the speed-up over plain decoding.
"""

import argparse
import statistics
import sysconfig
import time
from collections import defaultdict
from pathlib import Path

import qwen_moe_jax as qmj
from qwen_moe_jax.inference.session import Session
from qwen_moe_jax.inference.tokenizer import encode, load_tokenizer

FILES = ("textwrap.py", "argparse.py", "heapq.py", "shutil.py", "json/decoder.py", "csv.py", "string.py", "queue.py")
PROMPT, NEW = 64, 64


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model, tokenizer = qmj.from_pretrained(arguments.folder), load_tokenizer(arguments.folder)
    library = Path(sysconfig.get_path("stdlib"))
    prompts = [encode(tokenizer, (library / name).read_text()[2000:])[:PROMPT] for name in FILES]
    print("| batch | text | proposals | tokens per pass | tokens/s | ÷ plain |\n|---|---|---|---|---|---|")
    for batch in (1, len(prompts)):
        for name, sampling in {"greedy": {}, "sampled": {"do_sample": True, "top_k": 0, "seed": 1}}.items():
            report(model, prompts[:batch], name, sampling, arguments.rounds)


def report(model: qmj.CausalLM, prompts: list[list[int]], name: str, sampling: dict, rounds: int) -> None:
    """Prints the rows of one batch and way of choosing."""
    seconds, passes, texts = defaultdict(list), {}, {}
    for number in range(rounds + 1):  # the first compiles
        for proposals in range(4):
            config = qmj.GenerationConfig(max_new_tokens=NEW, num_speculative_tokens=proposals, **sampling)
            session = Session(model, PROMPT + NEW, rows=len(prompts))
            found: list[list[int]] = [[] for _ in prompts]
            start = time.perf_counter()
            for chunk in session.run(prompts, [config] * len(prompts), lambda chunk: False):
                found[chunk.index] += chunk.token_ids
            if number:
                seconds[proposals].append(time.perf_counter() - start)
            passes[proposals] = session.decoded / session.passes
            assert texts.setdefault(number, found) == found, f"{proposals} proposals changed a text"
    plain = statistics.median(seconds[0])
    for proposals, found in seconds.items():
        took = statistics.median(found)
        speed = len(prompts) * NEW / took
        print(
            f"| {len(prompts)} | {name} | {proposals} | {passes[proposals]:.2f} | {speed:,.0f} | {plain / took:.2f} |"
        )


if __name__ == "__main__":
    main()
