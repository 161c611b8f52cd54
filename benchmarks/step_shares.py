"""What the parts of a planned training step cost: `python benchmarks/step_shares.py CONFIG TARGET [--KEY=VALUE …]`.

The step is compiled as `python -m train CONFIG --plan TARGET` compiles it. For each part of the model, by the named
scopes of its instructions: matrix products, bytes to and from memory and, on TPUs, the cycles that the compiler
estimates for its own fusions, at 1.75 GHz. Kernels and collectives have no such estimate.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `train` is not installed

from qwen_moe_jax.plan import compile as planner
from qwen_moe_jax.plan.hlo import Module, Run
from train.config import load_config
from train.plan import plan_training

PARTS = ("head", "attention", "dispatch", "combine", "experts", "router", "mtp", "embedding")
HERTZ = 1.75e9  # of a v5p
#: The compiler's estimate of what it cannot estimate.
UNKNOWN_CYCLES = 10**15


def part_of(run: Run) -> str:
    """The part of the model that an instruction belongs to; the delta rule and its convolution by themselves."""
    source = run.instruction.source
    if "linear_attention" in source:
        return "delta rule" if "shard_map" in source.split("linear_attention")[1] else "linear layers' projections"
    return next((part for part in PARTS if part in source), "other")


def main(config: str, target: str, *overrides: str) -> None:
    modules: list[Module] = []

    class Kept(Module):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            modules.append(self)

    planner.Module = Kept  # type: ignore[misc]
    plan_training(load_config(config, list(overrides)), target)
    [module] = modules
    flops, moved, cycles = (defaultdict(float) for _ in range(3))
    for run in module.runs:
        part, times = part_of(run), 1 if run.times is None else run.times
        flops[part] += (module.flops(run) or 0) * times
        moved[part] += module.moved(run) * times if run.moves else 0
        estimate = re.search(r'"estimated_cycles":"(\d+)"', run.instruction.attributes)
        if estimate and not run.fused and int(estimate[1]) < UNKNOWN_CYCLES:
            cycles[part] += int(estimate[1]) * times
    print("part                          FLOPs        bytes     fusions, estimated")
    for part in sorted(moved, key=lambda part: -moved[part]):
        shares = (f"{column[part] / max(sum(column.values()), 1):6.1%}" for column in (flops, moved, cycles))
        first, second, third = shares
        print(
            f"{part:26s} {flops[part] / 1e12:7.2f} T {first}  {moved[part] / 1e9:7.1f} GB {second}  "
            f"{cycles[part] / HERTZ * 1e3:7.1f} ms {third}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
