"""Plans of training steps on pods, as one table: `python benchmarks/plan_table.py FOLDER [NAME …]`.

The steps of `pod_steps` that are named, or match a pattern with `*`, are compiled for their targets, without a device,
one after the other, each by `python -m train CONFIG --plan TARGET` in a process of its own that writes
FOLDER/NAME.json. Their remat is the first of dots, experts and full under which the step may fit by arithmetic, and the
next where the compiled program does not. Then the table of all plans in the folder is printed, of one device: memory,
bytes sent in a step, FLOPs over the model's, the times of compute, memory and network by published peaks, what bounds
the step, and the share of peak FLOPs at best.

A compilation takes a minute or more and some GB of memory. The extras `plan` and `plan-gpu` bring the compilers.
"""

import fnmatch
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pod_steps

ROOT = Path(__file__).parents[1]

COLUMNS = (
    "step",
    "mesh",
    "remat",
    "memory of a device",
    "sent",
    "of it asynchronous",
    "FLOPs, program / model",
    "compute",
    "memory",
    "network",
    "bound",
    "of peak",
)


def compile_step(step: pod_steps.Step, folder: Path) -> None:
    """Writes the step's plan: that of the first remat under which it fits, or of the last one."""
    first, _ = pod_steps.first_that_fits(step)
    start = pod_steps.REMATS.index(first) if first else len(pod_steps.REMATS) - 1
    written = folder / f"{step.name}.json"
    for remat in pod_steps.REMATS[start:]:
        words = [str(step.config), *step.changes, f"--execution.remat={remat}", "--plan", step.target]
        command = [sys.executable, "-m", "train", *words, "--json", str(written)]
        print(*command[1:], file=sys.stderr, flush=True)
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        if json.loads(written.read_text())["memory"]["fits"]:
            return


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
    asynchronous = sum(one["bytes_per_step"] for one in plan["collectives"] if one["asynchronous"])
    ratio = "not known" if flops["program"] is None else f"{flops['program'] / flops['model']:.2f}"
    times = [f"{roofline[each]:.2f} s" for each in ("compute", "memory", "network")]
    gigabytes = [f"{each / 1e9:.0f} GB" for each in (sent, asynchronous)]
    return [*found, *gigabytes, ratio, *times, roofline["bound"], f"{roofline['utilisation']:.0%}"]


def main(folder: str, *names: str) -> None:
    """Compiles the steps that are named, and prints the table of all that were."""
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    steps = pod_steps.steps()
    for step in steps:
        if any(fnmatch.fnmatch(step.name, pattern) for pattern in names):
            compile_step(step, where)
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for step in steps:
        if (plan := where / f"{step.name}.json").exists():
            found = cells(step.name, json.loads(plan.read_text()))
            lines.append(found + [""] * (len(COLUMNS) - len(found)))
    for line in lines:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
