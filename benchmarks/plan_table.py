"""Plans of training steps on pods, as one table: `python benchmarks/plan_table.py FOLDER [NAME …]`.

Each case below is a training step that `python -m train CONFIG --plan` compiles for its target, without a device. The
named ones are compiled, one after the other, each in a process of its own that writes FOLDER/NAME.json; a name may end
with `*`. Then the table of all plans in the folder is printed, of one device: memory, bytes sent in a step, FLOPs over
the model's, the times of compute, memory and network by published peaks, what bounds the step, and the share of peak
FLOPs at best. A compilation takes minutes and some GB of memory. The extras `plan` and `plan-gpu` bring the compilers.
"""

import dataclasses
import fnmatch
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LONG = "configs/train/qwen3-coder-30b-a3b-128k.toml"
SHORT = "configs/train/qwen3-30b-a3b-sft.toml"
BIG = "configs/train/qwen3-235b-a22b.toml"
HYBRID = "configs/train/qwen3.5-35b-a3b-sft.toml"


@dataclasses.dataclass(frozen=True)
class Case:
    """A step.

    Attributes:
        config: the recipe.
        target: of the plan.
        changes: of the recipe, as on the command line.
    """

    config: str
    target: str
    changes: str = ""


def _model(name: str, changes: str) -> str:
    return f"--run.model_name_or_path={name} {changes}"


def _rows(length: int) -> str:
    """32 rows of so many tokens on 256 devices."""
    mesh = "--mesh.fsdp=1 --mesh.context=8 --mesh.expert=32 --sharding.rules=expert+fsdp+context"
    return f"--data.seq_len={length} --data.batch_size=32 {mesh}"


#: By model, length of a row and chip.
CASES = {
    "30b-4k-v5p": Case(SHORT, "tpu:v5p:4x4x4"),
    "30b-32k-v5p": Case(LONG, "tpu:v5p:4x4x4", "--data.seq_len=32768"),
    "30b-128k-v5p": Case(LONG, "tpu:v5p:4x4x4"),
    "30b-4k-v6e": Case(SHORT, "tpu:v6e:8x8", "--execution.remat=experts"),
    "30b-4k-h200": Case(SHORT, "gpu:h200:64"),
    "235b-4k-v5p": Case(BIG, "tpu:v5p:4x8x8"),
    "235b-32k-v5p": Case(BIG, "tpu:v5p:4x8x8", _rows(32768)),
    "235b-128k-v5p": Case(BIG, "tpu:v5p:4x8x8", _rows(131072)),
    "57b-4k-v5p": Case(SHORT, "tpu:v5p:4x4x8", _model("Qwen/Qwen2-57B-A14B", "--mesh.fsdp=16 --data.batch_size=128")),
    "8x22b-4k-v5p": Case(
        SHORT,
        "tpu:v5p:4x4x8",
        _model(
            "mistralai/Mixtral-8x22B-Instruct-v0.1",
            "--mesh.fsdp=16 --data.batch_size=128 --execution.remat=experts",
        ),
    ),
    "35b-4k-v5p": Case(HYBRID, "tpu:v5p:4x4x4"),
    "397b-4k-v5p": Case(
        HYBRID,
        "tpu:v5p:4x8x8",
        _model(
            "Qwen/Qwen3.5-397B-A17B",
            "--mesh.fsdp=16 --mesh.expert=16 --data.batch_size=256 --execution.remat=full",
        ),
    ),
}

COLUMNS = (
    "step",
    "mesh",
    "remat",
    "memory of a device",
    "sent",
    "FLOPs, program / model",
    "compute",
    "memory",
    "network",
    "bound",
    "of peak",
)


def compile_case(name: str, folder: Path) -> None:
    """Writes the plan of one case."""
    case = CASES[name]
    words = [str(ROOT / case.config), *case.changes.split(), "--plan", case.target]
    command = [sys.executable, "-m", "train", *words, "--json", str(folder / f"{name}.json")]
    print(*command[1:], file=sys.stderr, flush=True)
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


def cells(name: str, plan: dict[str, Any]) -> list[str]:
    """A line of the table; without times where the program does not fit."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    memory, roofline, flops = plan["memory"], plan["roofline"], plan["flops"]
    if memory["total"] is None:
        used = "it does not fit"
    else:
        used = f"{memory['total'] / 1e9:.1f} of {memory['available'] / 1e9:.1f} GB"
    found = [name, mesh, str(plan["work"]["execution"]["remat"]), used]
    if roofline is None:
        return found
    sent = sum(one["bytes"] for one in roofline["traffic"])
    ratio = "not known" if flops["program"] is None else f"{flops['program'] / flops['model']:.2f}"
    times = [f"{roofline[each]:.2f} s" for each in ("compute", "memory", "network")]
    return [*found, f"{sent / 1e9:.0f} GB", ratio, *times, roofline["bound"], f"{roofline['utilisation']:.0%}"]


def main(folder: str, *names: str) -> None:
    """Compiles the cases that are named, and prints the table of all that were."""
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        if any(fnmatch.fnmatch(name, pattern) for pattern in names):
            compile_case(name, where)
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for name in CASES:
        if (plan := where / f"{name}.json").exists():
            found = cells(name, json.loads(plan.read_text()))
            lines.append(found + [""] * (len(COLUMNS) - len(found)))
    for line in lines:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
