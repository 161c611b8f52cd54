"""A hybrid compared with transformers, and with a model of attention alone: `python benchmarks/hybrid.py`.

The hybrid has 114.5M parameters and is a Qwen3-Next: 8 layers, each fourth of gated attention and the others of the
gated delta rule, 28 experts and a shared one. transformers runs it by its own PyTorch code, in chunks over rows and by
tokens in decoding, as it does without kernels for GPUs; each of its implementations of experts is measured, and the
fastest counts. The model of attention alone is the mixture of `train_step.py`, 115M, on this package too. All float32.

- forward and train step: 4 rows of 512 tokens, logits of all; the step is the one of `train_step.py`.
- decode: as in `decode.py`, at batch 1; both must write the same tokens before anything is timed.
- length: forward and train step of both of our models, one row of more and more tokens.

Engines take turns as in `train_step.py`, each in a process of its own. On a machine that is not idle the clock says
nothing, since torch's threads wait for each other: `--processor-time` counts the seconds of one core that each uses.

Needs torch and transformers (`pip install -e '.[test]'` on Python 3.11).
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mixture import HUB_CONFIG as ATTENTION
from train_step import LENGTH, ROWS, Step, measured, our_step, processor, their_step, token_rows

HYBRID = {
    **ATTENTION,
    "model_type": "qwen3_next",
    "num_experts": 28,
    "shared_expert_intermediate_size": 256,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
PARTS = ("forward", "train", "decode", "length")
LENGTHS = (512, 2048, 8192)
EXPERTS = ("grouped_mm", "eager")
PROMPT, STEPS, TURN = 128, 64, 2

Clock = Callable[[], float]


def our_forward(hub_config: dict, rows: int, length: int) -> Step:
    """The logits of a batch."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import qwen_moe_jax as qmj

    config = qmj.ModelConfig.from_pretrained(hub_config)
    model = qmj.CausalLM(config, rngs=nnx.Rngs(0), execution=qmj.ExecutionConfig(dtype="float32"))
    tokens_BT = jnp.array(token_rows(hub_config, rows, length))
    forward = jax.jit(lambda model, tokens_BT: model(tokens_BT).logits)
    return lambda: float(jax.block_until_ready(forward(model, tokens_BT))[0, 0, 0])


def their_forward(hub_config: dict, rows: int, length: int, experts: str) -> Step:
    """The same of transformers, without gradients and without a cache."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hub_config)).eval()
    model.set_experts_implementation(experts)
    tokens = torch.tensor(token_rows(hub_config, rows, length))

    def step() -> float:
        with torch.no_grad():
            return model(tokens, use_cache=False).logits[0, 0, 0].item()

    return step


def forward_lines(rounds: int, clock: Clock) -> list[str]:
    """Forward pass of the hybrid and of transformers' model."""
    engines: dict[str, tuple] = {"ours": (our_forward, (HYBRID, ROWS, LENGTH))}
    engines |= {f"transformers, {kind}": (their_forward, (HYBRID, ROWS, LENGTH, kind)) for kind in EXPERTS}
    return beside_transformers("forward", measured(engines, rounds, TURN, clock))


def train_lines(rounds: int, clock: Clock) -> list[str]:
    """Train step of the hybrid and of transformers' model."""
    precision = ("float32", "float32")
    engines: dict[str, tuple] = {"ours": (our_step, (*precision, "dropless", HYBRID))}
    engines |= {f"transformers, {kind}": (their_step, (*precision, kind, HYBRID)) for kind in EXPERTS}
    return beside_transformers("train step", measured(engines, rounds, TURN, clock))


def beside_transformers(what: str, found: dict[str, tuple]) -> list[str]:
    """Rows of the first table."""
    theirs = min(seconds for name, (seconds, _) in found.items() if name != "ours")
    return [
        f"| {what} | {name} | {ROWS * LENGTH / seconds:.0f} | {peak / 1e9:.2f} "
        f"| {f'{theirs / seconds:.2f}' if name == 'ours' else ''} |"
        for name, (seconds, peak) in found.items()
    ]


def decode_lines(rounds: int, clock: Clock) -> list[str]:
    """Decoding of one text by the hybrid and by transformers' model."""
    import decode
    import numpy as np
    from flax import nnx

    import qwen_moe_jax as qmj

    config = qmj.ModelConfig.from_pretrained({**HYBRID, "initializer_range": 0.05})
    model = qmj.CausalLM(config, rngs=nnx.Rngs(0), execution=qmj.ExecutionConfig(dtype="float32"))
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        qmj.save_pretrained(model, folder)
        theirs = decode.their_engines(folder, "float32", EXPERTS)
        engines = {"ours": decode.our_engine(folder, "float32")}
        engines |= {name: engine for name, engine in theirs.items() if "dynamic" in name}
        prompts = np.random.default_rng(1).integers(0, config.vocab_size, (1, PROMPT)).tolist()
        written = {name: engine(prompts, 1 + STEPS) for name, engine in engines.items()}
        if any(texts != written["ours"] for texts in written.values()):
            raise SystemExit("transformers writes other tokens than ours; nothing was timed")
        engines["ours"](prompts, 1)  # compiles the shorter request's shapes
        found = decode.measured(engines, prompts, rounds, clock)
    best = min(step for name, (_, step) in found.items() if name != "ours")
    return [
        f"| decode, batch 1 | {name} | {1 / step:.0f} | | {f'{best / step:.2f}' if name == 'ours' else ''} |"
        for name, (_, step) in found.items()
    ]


def length_lines(rounds: int, clock: Clock) -> list[str]:
    """Microseconds of a token in longer and longer rows, forward and in a train step, of both of our models."""
    report = []
    for length in LENGTHS:
        cells = []
        models = {"hybrid": HYBRID, "attention": ATTENTION}
        for make, words in ((our_forward, ()), (our_step, ("float32", "float32", "dropless"))):
            configs = {name: {**config, "max_position_embeddings": max(LENGTHS)} for name, config in models.items()}
            engines = {name: (make, (*words, config, 1, length)) for name, config in configs.items()}
            found = measured(engines, rounds, 1, clock)
            cells += [f"{1e6 * found[name][0] / length:.0f}" if name in found else "–" for name in models]
        report.append(f"| {length} | {' | '.join(cells)} |")
        print(report[-1], flush=True)
    return report


def lines(parts: list[str], rounds: int, clock: Clock) -> list[str]:
    """The report, line by line."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", "transformers"))
    report = [
        f"- {datetime.date.today()}, {processor()}, {len(os.sched_getaffinity(0))} cores, "
        f"Python {platform.python_version()}, {versions}",
        f"- float32, medians of {rounds} rounds, {'processor time' if clock is time.process_time else 'time'}; "
        f"load before {os.getloadavg()[0]:.1f}",
        "",
        "| what | engine | tokens/s | peak memory, GB | ours / best of theirs |",
        "|---|---|---|---|---|",
    ]
    for part, make in {"forward": forward_lines, "train": train_lines, "decode": decode_lines}.items():
        if part in parts:
            report += make(rounds, clock)
            print("\n".join(report), flush=True)
    if "length" in parts:
        columns = (
            "tokens",
            *(f"{what}, {name}" for what in ("forward", "train step") for name in ("hybrid", "attention")),
        )
        report += ["", "One row, µs a token:", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        report += length_lines(rounds, clock)
    return [*report, "", f"Load after: {os.getloadavg()[0]:.1f}."]


def main() -> None:
    """Prints the tables, and writes them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--processor-time", action="store_true", help="of one core, for machines that are not idle")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables there")
    arguments = parser.parse_args()
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # read where an engine's process starts
    if arguments.processor_time:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # also of the processes that it starts
    clock = time.process_time if arguments.processor_time else time.perf_counter
    report = lines(arguments.parts, arguments.rounds, clock)
    print("\n".join(report))
    if arguments.markdown:
        arguments.markdown.write_text("# A hybrid model\n\n" + "\n".join(report) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
