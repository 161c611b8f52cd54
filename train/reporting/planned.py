"""A run held against the plan that was made of it: the memory of its compiled step, and the time of its first steps."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.plan.compile import group_of
from qwen_moe_jax.plan.result import Work
from qwen_moe_jax.text import format_mesh
from qwen_moe_jax.units import format_bytes, format_seconds
from train.program import Program

#: A run leaves its plan where it needs this many times more than was planned, or less.
TOLERANCE = 1.05
#: Steps whose median is compared, after the first two: one compiles, and the next still waits for it.
TIMED_STEPS, SKIPPED_STEPS = 5, 2


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a plan says of a training step.

    Attributes:
        file: it is from.
        mesh: sizes of the axes.
        work: the fields of `plan.result.Work`.
        memory: bytes of a device that the compiled step lists, without the program itself; None where the compiler
            refused the program.
        seconds: of a step, at least and at most: where everything overlaps, and where nothing does or, instead of this,
            what is expected by steps that were measured; None without speeds.
        speeds: where these are from.
    """

    file: str
    mesh: Mapping[str, int]
    work: Mapping[str, Any]
    memory: int | None
    seconds: tuple[float, float] | None
    speeds: str

    @classmethod
    def read(cls, file: str) -> "Planned":
        """Reads what `--plan TARGET --json FILE` wrote.

        Raises:
            ConfigError: it is missing, or no plan of a training step.
        """
        try:
            plan = json.loads(Path(file).read_text(encoding="utf-8"))
            memory, line, work = plan["memory"], plan["roofline"], plan["work"]
            found = cls(
                file=file,
                mesh=plan["mesh"],
                work=work,
                memory=memory["compiled"],
                seconds=None if line is None else _interval(line["seconds"], line["likely"]),
                speeds="" if line is None else line["speeds"],
            )
        except OSError as error:
            raise ConfigError(f"run.plan: {file} cannot be read ({error.strerror}).") from None
        except (ValueError, KeyError, TypeError):
            expected = "a JSON file that `python -m train CONFIG --plan TARGET --json FILE` wrote with this version"
            raise ConfigError(f"run.plan: found no plan in {file}, expected {expected}.") from None
        if work.get("purpose") != "train":
            raise ConfigError(
                f"run.plan: found a plan for {work.get('purpose')} in {file}, expected a training step's."
            )
        return found

    def notes(self, work: Work, mesh: Mapping[str, int]) -> list[str]:
        """A line for each setting that the run has otherwise than the plan."""
        found = []
        ours = {axis: size for axis, size in mesh.items() if size > 1}
        if ours != {axis: size for axis, size in self.mesh.items() if size > 1}:
            found.append(f"the mesh is {format_mesh(mesh)}, planned {format_mesh(self.mesh)}")
        for name in ("rows", "tokens_per_row", "accumulation_steps", "dtype", "param_dtype", "sharding"):
            if getattr(work, name) != self.work.get(name):
                found.append(f"{name} is {getattr(work, name)}, planned {self.work.get(name)}")
        planned = self.work.get("execution", {})
        for name in ("dispatch", "exchange", "buffer_factor", "remat", "weights"):
            if work.execution.get(name) != planned.get(name):
                found.append(f"{name} is {work.execution.get(name)}, planned {planned.get(name)}")
        return [f"warning: not as planned in {self.file}: {one}" for one in found]


class PlanCheck:
    """Compares a run with its plan, and says once whether it keeps it."""

    def __init__(self, planned: Planned, program: Program, say: Callable[[str], None]):
        """`say` prints a line."""
        self._planned = planned
        self._program = program
        self._say = say
        self._times: list[float] = []

    def step(self, *arguments: Any) -> None:
        """After a step was dispatched, with the arguments of the next: compares memory once, and time once."""
        if len(self._times) > SKIPPED_STEPS + TIMED_STEPS:
            return
        if not self._times:
            self._compare_memory(step_memory(self._program, arguments))
        self._times.append(time.perf_counter())
        if len(self._times) == SKIPPED_STEPS + TIMED_STEPS + 1:
            spent = [after - before for before, after in zip(self._times, self._times[1:], strict=False)]
            self._compare_time(statistics.median(spent[SKIPPED_STEPS:]))

    def _compare_memory(self, found: int | None) -> None:
        planned = self._planned.memory
        if found is None or planned is None:
            return
        words = f"a device needs {format_bytes(found)} in the compiled step, planned {format_bytes(planned)}"
        self._verdict(words, found, (planned, planned))

    def _compare_time(self, found: float) -> None:
        if self._planned.seconds is None:
            return
        shortest, longest = self._planned.seconds
        words = (
            f"a step takes {format_seconds(found)} (the median of {TIMED_STEPS}), planned {format_seconds(shortest)} "
            f"to {format_seconds(longest)} by {self._planned.speeds}"
        )
        self._verdict(words, found, (shortest, longest))

    def _verdict(self, words: str, found: float, planned: tuple[float, float]) -> None:
        least, most = planned
        verdict = "as planned"
        if found > TOLERANCE * most:
            verdict = f"warning: {100 * (found / most - 1):.0f} % over the plan"
        elif TOLERANCE * found < least:
            verdict = f"warning: {100 * (1 - found / least):.0f} % under the plan"
        self._say(f"{verdict}: {words} ({self._planned.file})")


def _interval(one: float, other: float) -> tuple[float, float]:
    return min(one, other), max(one, other)


def step_memory(program: Program, arguments: tuple[Any, ...]) -> int | None:
    """Bytes of one device at the peak of the compiled train step, without the program itself; None where unknown."""
    step: Any = program.train_step  # jitted
    analysis = step.lower(*arguments).compile().memory_analysis()
    if analysis is None:
        return None
    kept = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    on_host = sum(group_of("", argument).host_bytes for argument in arguments)
    arguments_size = analysis.argument_size_in_bytes + analysis.host_argument_size_in_bytes - on_host
    return arguments_size + kept + analysis.temp_size_in_bytes
