"""The whole train step beside transformers and PyTorch: `python benchmarks/train_step.py`.

A mixture of 115M parameters (Qwen3-MoE), one batch of 4 rows of 512 tokens, forward, backward, clipping at 1 and AdamW.
Ours is the step that `python -m train` compiles. Theirs is a plain loop: the model's own loss with
`output_router_logits`, `clip_grad_norm_`, the fused AdamW; each of its implementations of experts is measured, and the
fastest counts. Both keep float32 weights and moments. In bfloat16 ours computes in it, as `execution.dtype` has it, and
theirs in `torch.autocast`; pure bfloat16, weights and moments too, is shown for both beside that.

Every engine lives in a process of its own, so that its peak memory is its own, and they take turns: one is asked for
some steps while the others wait. torch's threads spin for some milliseconds after a call: a pause precedes each turn.
The first step of a turn is not counted: what an engine gives back to the system after a step it has to ask for again,
and on a virtual machine that takes far longer once the machine has given it back too, as no run does between its steps.
The table shows medians of all counted steps. Dispatch is dropless on both sides: the same rows are multiplied.

Both have glibc ask for pages of 2 MB (`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`), unless the environment says otherwise.

Needs torch and transformers (`pip install -e '.[test]'` on Python 3.11).
"""

import argparse
import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from mixture import HUB_CONFIG

sys.path.insert(0, str(Path(__file__).parents[1]))  # `train` is not installed

ROWS, LENGTH, PAUSE, TURN = 4, 512, 0.05, 3
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-4, 0.1, 1.0
#: How weights are kept and how products are computed.
PRECISIONS = {
    "float32": ("float32", "float32"),
    "bfloat16": ("float32", "bfloat16"),
    "pure bfloat16": ("bfloat16", "bfloat16"),
}
THEIRS = ("grouped_mm", "eager")

Step = Callable[[], float]
"""One step on the batch; its loss."""


def our_step(
    param_dtype: str, dtype: str, dispatch: str, hub_config: dict = HUB_CONFIG, rows: int = ROWS, length: int = LENGTH
) -> Step:
    """The step of a run on one device."""
    import jax
    import numpy as np
    from flax import nnx

    import qwen_moe_jax as qmj
    from train.config import build_config
    from train.data.batches import batch_at
    from train.data.documents import as_documents
    from train.data.rows import pack
    from train.program import assemble

    config = build_config(
        {
            "model": hub_config,
            "data": {"vocab_size": hub_config["vocab_size"], "batch_size": rows, "seq_len": length},
            "execution": {"dtype": dtype, "param_dtype": param_dtype, "dispatch": dispatch},
            "optimizer": {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "max_grad_norm": CLIP},
        },
        [],
        source="benchmarks/train_step.py",
    )
    mesh, model_config = qmj.make_mesh(), qmj.ModelConfig.from_pretrained(hub_config)
    program = assemble(config, model_config, mesh)
    execution = program.model.execution
    model = qmj.CausalLM(model_config, rngs=nnx.Rngs(0), mesh=mesh, execution=execution)
    state = program.begin(nnx.to_pure_dict(nnx.split(model)[1]))
    packed = pack(as_documents([np.array(ids) for ids in token_rows(hub_config, rows, length)]), length)
    batch = batch_at(packed, 0, rows, seed=0)
    del model

    def step() -> float:
        nonlocal state
        state, metrics = program.train_step(state, program.fixed, batch)
        return float(jax.block_until_ready((state, metrics))[1].terms["cross_entropy"])

    return step


def their_step(
    param_dtype: str, dtype: str, experts: str, hub_config: dict = HUB_CONFIG, rows: int = ROWS, length: int = LENGTH
) -> Step:
    """A plain loop's."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**hub_config)
    config.output_router_logits = True  # its loss has the balance loss then, as ours
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, param_dtype))
    model.set_experts_implementation(experts)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
    )
    tokens = torch.tensor(token_rows(hub_config, rows, length))
    cast = torch.autocast("cpu", torch.bfloat16, enabled=dtype != param_dtype)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with cast:
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


def token_rows(hub_config: dict, rows: int, length: int) -> list[list[int]]:
    """The batch, the same for all."""
    import numpy as np

    return np.random.default_rng(0).integers(0, hub_config["vocab_size"], (rows, length)).tolist()


def serve(
    connection: Connection, make: Callable[..., Step], words: tuple, turn: int, clock: Callable[[], float]
) -> None:
    """Answers each request with the seconds of `turn` steps and the process's peak memory in bytes."""
    step = make(*words)
    step()  # compiles
    connection.send("ready")
    while connection.recv():
        time.sleep(PAUSE)
        step()
        seconds = []
        for _ in range(turn):
            began = clock()
            step()
            seconds.append(clock() - began)
        connection.send((seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def measured(
    engines: dict[str, tuple[Callable[..., Step], tuple]],
    rounds: int,
    turn: int = TURN,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple]:
    """Median seconds and peak bytes by engine; an engine that cannot run is left out, and said."""
    context = multiprocessing.get_context("spawn")
    running, seconds, peaks = {}, {}, {}
    for name, (make, words) in engines.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, make, words, turn, clock), daemon=True)
        process.start()
        theirs.close()
        try:
            ours.recv()  # one begins after the other: compilers and threads would be in each other's way
            running[name], seconds[name] = (ours, process), []
        except EOFError:
            print(f"{name}: cannot run here, see above")
    for _ in range(rounds):
        for name, (connection, _) in running.items():
            connection.send(True)
            taken, peaks[name] = connection.recv()
            seconds[name] += taken
    for connection, process in running.values():
        connection.send(False)
        process.join()
    return {name: (statistics.median(times), peaks[name]) for name, times in seconds.items()}


def processor() -> str:
    """Its name, and which of the instructions it has that matrix products are made of."""
    told = Path("/proc/cpuinfo")
    text = told.read_text(encoding="utf-8") if told.exists() else ""
    [name, *_] = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("model name")] or [""]
    kinds = [kind for kind in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if kind in text.split()]
    return " ".join([name or platform.machine(), *(["with", ", ".join(kinds)] if kinds else [])])


def lines(precisions: list[str], dispatches: list[str], experts: list[str], rounds: int) -> list[str]:
    """The report, line by line."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", "transformers"))
    report = [
        f"- {datetime.date.today()}, {processor()}, {len(os.sched_getaffinity(0))} cores, "
        f"Python {platform.python_version()}, {versions}",
        f"- {ROWS} rows of {LENGTH} tokens, medians of {rounds} rounds of {TURN} steps",
        "",
        "| precision | engine | tokens/s | peak memory, GB | ours / best of theirs |",
        "|---|---|---|---|---|",
    ]
    for precision in precisions:
        kinds = PRECISIONS[precision]
        engines = {f"ours, {dispatch}": (our_step, (*kinds, dispatch)) for dispatch in dispatches}
        engines |= {f"transformers, {kind}": (their_step, (*kinds, kind)) for kind in experts}
        found = measured(engines, rounds)
        theirs = [seconds for name, (seconds, _) in found.items() if name.startswith("transformers")]
        for name, (seconds, peak) in found.items():
            ratio = f"{min(theirs) / seconds:.2f}" if theirs and name.startswith("ours") else ""
            report.append(
                f"| {precision} | {name} | {ROWS * LENGTH / seconds:.0f} | {peak / 1e9:.2f} | {ratio} |",
            )
            print(report[-1], flush=True)
    return report


def main() -> None:
    """Prints the table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument(
        "--dispatch",
        nargs="+",
        choices=("dropless", "capacity"),
        default=["dropless"],
        help="of ours; capacity drops some rows where the load is uneven, and does not compute them",
    )
    parser.add_argument("--experts", nargs="+", choices=THEIRS, default=list(THEIRS), help="of transformers")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    arguments = parser.parse_args()
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # read where an engine's process starts
    report = lines(arguments.precision, arguments.dispatch, arguments.experts, arguments.rounds)
    print("\n".join(report))
    if arguments.markdown:
        arguments.markdown.write_text("# A train step\n\n" + "\n".join(report) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
