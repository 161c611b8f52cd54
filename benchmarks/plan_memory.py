"""Plans held against runs, on eight simulated devices: memory, and time by measured speeds.

    python benchmarks/plan_memory.py fit FILE       measure some steps, and write speeds and shares to FILE
    python benchmarks/plan_memory.py run FILE       the runs of the table, planned by them
    python benchmarks/plan_memory.py run FILE 3     the run of that number

Every run is a process of its own, which measures the speeds, plans, prints the prediction, and only then runs the step.

Memory: the CPU's allocator keeps no statistics, so the C library is asked (`mallinfo2`, Linux): the bytes that it had
handed out at the fullest moment of a step, more than between steps, and those of the arrays that live between steps.
All eight devices live in one process and run at once, so that is held against eight times what the plan says of one.

Time: the process's processor seconds over the number of cores, of the speeds and of the steps, which is what a step
takes on a machine that does nothing else. What is expected follows from the shares of compute, memory, network and
operations that the steps of `FITTED` took (`plan.calibration.fit_shares`); none of them is a run of the table.
"""

import ctypes
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `train` is not installed

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.plan.calibration import Calibration, fit_shares, measure
from qwen_moe_jax.plan.compile import plan_step, target_mesh
from qwen_moe_jax.plan.targets import parse_target
from train.config import build_config
from train.data.batches import Batch
from train.parameters import select
from train.plan import training_step
from train.program import assemble

MODEL = dict(
    model_type="qwen3_moe",
    vocab_size=2048,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    moe_intermediate_size=256,
    num_experts=16,
    num_experts_per_tok=4,
    norm_topk_prob=True,
)
DEVICES, WARM_UP, STEPS, ROWS, LENGTH = 8, 2, 5, 8, 128

#: Overrides of the steps that are measured for `fit`; fields of [execution] without its name.
FITTED = [
    "mesh.data=8 dispatch=capacity remat=dots",
    "mesh.data=2 mesh.expert=4 dispatch=capacity remat=dots",
    "mesh.fsdp=2 mesh.expert=4 dispatch=capacity remat=none",
    "mesh.fsdp=8 dispatch=dropless remat=full",
    "mesh.fsdp=4 mesh.tensor=2 dispatch=dropless remat=dots",
    "mesh.data=2 mesh.expert=4 dispatch=dropless exchange=all_to_all remat=dots",
    "mesh.data=8 dispatch=dense remat=full",
    "mesh.fsdp=8 dispatch=capacity remat=none",
    "mesh.data=4 mesh.expert=2 dispatch=dropless exchange=all_gather remat=none",
    "mesh.expert=8 dispatch=dropless exchange=all_to_all remat=dots",
]
#: The same of the runs of the table, and whether all tokens choose the experts of one device.
RUNS: list[tuple[str, bool]] = [
    ("mesh.data=4 mesh.tensor=2 dispatch=dense remat=none", False),
    ("mesh.expert=8 dispatch=capacity remat=dots", False),
    ("mesh.data=2 mesh.fsdp=4 dispatch=capacity remat=full", False),
    ("mesh.fsdp=8 dispatch=dropless remat=none", True),
    ("mesh.fsdp=2 mesh.expert=4 dispatch=dropless exchange=all_gather remat=full", False),
    ("mesh.fsdp=2 mesh.expert=4 dispatch=dropless exchange=all_gather remat=full", True),
    ("mesh.data=2 mesh.expert=4 dispatch=dropless exchange=all_gather remat=dots", True),
    ("mesh.fsdp=4 mesh.expert=2 dispatch=dropless exchange=all_gather remat=dots", False),
    ("mesh.expert=8 dispatch=dropless exchange=all_to_all buffer_factor=1.25 remat=exchange", True),
    ("mesh.fsdp=2 mesh.expert=2 mesh.tensor=2 dispatch=dropless exchange=all_to_all remat=none", False),
    ("mesh.data=2 mesh.fsdp=2 mesh.expert=2 dispatch=dropless exchange=all_to_all remat=dots", False),
]


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of glibc, 2.33 and later."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


class Allocated:
    """The most bytes that the C library had handed out at once, sampled every half millisecond."""

    def __init__(self) -> None:
        self._ask = ctypes.CDLL("libc.so.6").mallinfo2
        self._ask.restype = _Mallinfo
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def now(self) -> int:
        found = self._ask()
        return found.uordblks + found.hblkhd

    def __enter__(self) -> "Allocated":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.0005):
            self.peak = max(self.peak, self.now())


def clock() -> float:
    """Processor seconds of this process over the number of cores."""
    return time.process_time() / os.cpu_count()


def live() -> int:
    """Bytes of all arrays, on all devices."""
    return sum(shard.data.nbytes for array in jax.live_arrays() for shard in array.addressable_shards)


def batch_of(sharding) -> Batch:
    """Random tokens in whole rows."""
    tokens_BT = np.random.default_rng(0).integers(1, MODEL["vocab_size"], (ROWS, LENGTH), np.int32)
    positions_BT = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    rows = dict(tokens_BT=tokens_BT, targets_BT=tokens_BT, positions_BT=positions_BT)
    rows |= dict(segment_ids_BT=np.ones_like(tokens_BT), target_mask_BT=np.ones(tokens_BT.shape, bool))
    return jax.device_put(Batch(**rows), sharding)


def initial(program, mesh, skewed: bool):
    """The state, and the routers; with those of zeros, all tokens choose the first experts, which are on one device."""
    model = qmj.CausalLM(program.model.config, rngs=nnx.Rngs(0), mesh=mesh, execution=program.model.execution)
    params = nnx.to_pure_dict(nnx.state(model))
    if skewed:
        params = jax.tree.map_with_path(
            lambda path, leaf: jnp.zeros_like(leaf) if "'gate'" in jax.tree_util.keystr(path) else leaf, params
        )
    return program.begin(params), select(params, like=program.fixed)


def run(words: str, skewed: bool, shares: dict[str, float]) -> dict:
    """Predicts, prints the prediction, and runs."""
    overrides = [f"--{key}" if "." in key.partition("=")[0] else f"--execution.{key}" for key in words.split()]
    data = {"vocab_size": MODEL["vocab_size"], "seq_len": LENGTH, "batch_size": ROWS}
    # Routers stay as they are, so that the step is the same each time.
    tables = {"model": MODEL, "data": data, "optimizer": {"frozen": [r"mlp\.gate\."]}}
    config = build_config(tables, overrides, "here")
    request = parse_target(f"cpu:{DEVICES}")
    mesh = target_mesh(request, config.mesh.sizes)
    program = assemble(config, qmj.ModelConfig.from_pretrained(MODEL), mesh)
    calibration = dataclasses.replace(measure(jax.devices(), clock), shares=shares)
    plan = plan_step(training_step(config, program, "here"), request, mesh, calibration)
    prediction = {
        "run": words + (" skewed" if skewed else ""),
        "planned": DEVICES * (plan.memory.total - plan.memory.code),
        "listed": DEVICES * plan.memory.compiled,
        "parts": plan.roofline.parts,
        "expected": plan.roofline.likely,
    }
    print(time.strftime("%H:%M:%S"), json.dumps(prediction), file=sys.stderr, flush=True)

    step = program.train_step.lower(program.state, program.fixed, program.batch).compile()
    (state, fixed), batch = initial(program, mesh, skewed), batch_of(program.batch.tokens_BT.sharding)
    for _ in range(WARM_UP):
        state, _ = jax.block_until_ready(step(state, fixed, batch))
    gc.collect()
    allocated = Allocated()
    others = allocated.now() - live()
    with allocated:
        state, metrics = jax.block_until_ready(step(state, fixed, batch))
    times = []
    for _ in range(STEPS):
        began = clock()
        state, metrics = jax.block_until_ready(step(state, fixed, batch))
        times.append(clock() - began)
    found = {"allocated": allocated.peak - others, "seconds": statistics.median(times)}
    rounds = int(np.max(metrics.router.rounds))
    return {**prediction, **found, "rounds": rounds, "load": os.getloadavg()[0]}


def row(found: dict) -> str:
    """A line of the table."""
    planned, memory, expected, seconds = (found[key] for key in ("planned", "allocated", "expected", "seconds"))
    return (
        f"| {found['run'].replace('mesh.', '')} | {found['rounds']} | {planned / 1e6:.0f} MB | {memory / 1e6:.0f} MB | "
        f"{memory / planned:.3f} | {(memory - planned) / DEVICES / 1e6:.1f} MB | {expected * 1e3:.0f} ms | "
        f"{seconds * 1e3:.0f} ms | {seconds / expected:.2f} | {found['load']:.0f} |"
    )


COLUMNS = "run, rounds, planned for 8 devices, measured, of planned, more a device, expected, a step, of expected, load"
HEAD = f"| {COLUMNS.replace(', ', ' | ')} |\n{'|---' * len(COLUMNS.split(', '))}|"


def in_a_process(words: str, skewed: bool, file: Path) -> dict:
    """`run`, by the shares of the file where it exists."""
    order = json.dumps([words, skewed, Calibration.load(file).shares if file.exists() else {}])
    done = subprocess.run([sys.executable, __file__, "one", order], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main(words: list[str]) -> None:
    """See the head of the file."""
    if words[0] == "one":
        print(json.dumps(run(*json.loads(words[1]))))
        return
    file = Path(words[1])
    if words[0] == "fit":
        file.unlink(missing_ok=True)
        found = [in_a_process(one, False, file) for one in FITTED]
        shares = fit_shares([one["parts"] for one in found], [one["seconds"] for one in found])
        dataclasses.replace(measure(parse_target(f"cpu:{DEVICES}").devices(), clock), shares=shares).save(file)
        print({name: round(share, 2) for name, share in shares.items()})
        return
    print(HEAD, flush=True)
    for one, skewed in [RUNS[int(number)] for number in words[2:]] or RUNS:
        print(row(in_a_process(one, skewed, file)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
