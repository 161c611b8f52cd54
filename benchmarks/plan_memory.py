"""A plan's memory beside a run's, on eight simulated devices: `python benchmarks/plan_memory.py`.

The CPU's allocator keeps no statistics, so the operating system is asked: how much the process grew, from just before
the state was placed to the fullest moment of a few steps. All eight devices live in this process and run at once, so it
is held against eight times what the plan says of one. Linux only.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `train` is not installed

import jax
import numpy as np
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.plan.compile import plan_step, target_mesh
from qwen_moe_jax.plan.targets import parse_target
from train.config import build_config
from train.data.batches import Batch
from train.plan import training_step
from train.program import assemble

MODEL = dict(
    model_type="qwen3_moe",
    vocab_size=4096,
    hidden_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    moe_intermediate_size=512,
    num_experts=16,
    num_experts_per_tok=4,
    norm_topk_prob=True,
)
STEPS, ROWS, LENGTH = 2, 8, 256
WAYS = {
    "data=2 expert=4, capacity, remat dots": ["--mesh.data=2", "--mesh.expert=4", "--execution.remat=dots"],
    "fsdp=2 expert=4, capacity, no remat": ["--mesh.fsdp=2", "--mesh.expert=4", "--execution.remat=none"],
    "fsdp=8, dropless, remat full": ["--mesh.fsdp=8", "--execution.dispatch=dropless", "--execution.remat=full"],
}


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure(overrides: list[str]) -> tuple[int, int]:
    """Bytes of all devices together: as planned, and as the process grew."""
    data = {"vocab_size": MODEL["vocab_size"], "seq_len": LENGTH, "batch_size": ROWS}
    config = build_config({"model": MODEL, "data": data}, overrides, "here")
    request = parse_target("cpu:8")
    mesh = target_mesh(request, {axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "expert", "tensor")})
    program = assemble(config, qmj.ModelConfig.from_pretrained(MODEL), mesh)
    plan = plan_step(training_step(config, program, "here"), request, mesh)
    step = program.train_step.lower(program.state, program.fixed, program.batch).compile()

    tokens_BT = np.random.default_rng(0).integers(1, 4096, (ROWS, LENGTH), np.int32)
    places_BT = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    rows = dict(tokens_BT=tokens_BT, targets_BT=tokens_BT, positions_BT=places_BT)
    rows |= dict(segment_ids_BT=np.ones_like(tokens_BT), target_mask_BT=np.ones(tokens_BT.shape, bool))
    before = resident("VmRSS")
    model = qmj.CausalLM(program.model.config, rngs=nnx.Rngs(0), mesh=mesh, execution=program.model.execution)
    state = program.begin(nnx.to_pure_dict(nnx.state(model)))
    del model
    batch = jax.device_put(Batch(**rows), program.batch.tokens_BT.sharding)
    state, _ = jax.block_until_ready(step(state, program.fixed, batch))
    Path("/proc/self/clear_refs").write_text("5")  # the fullest moment counts from here
    for _ in range(STEPS):
        state, _ = jax.block_until_ready(step(state, program.fixed, batch))
    return 8 * (plan.memory.total - plan.memory.code), resident("VmHWM") - before


def main() -> None:
    """A line for the way that is named on the command line by its number, or for each in a process of its own."""
    import subprocess
    import sys

    if len(sys.argv) == 2:
        name = list(WAYS)[int(sys.argv[1])]
        planned, grown = measure(WAYS[name])
        print(f"| {name} | {planned / 1e9:.2f} GB | {grown / 1e9:.2f} GB | {planned / grown:.2f} |", flush=True)
        return
    print("| run | planned, 8 devices | the process grew by | planned / grown |\n|---|---|---|---|", flush=True)
    for number in range(len(WAYS)):
        subprocess.run([sys.executable, __file__, str(number)], check=True)


if __name__ == "__main__":
    main()
