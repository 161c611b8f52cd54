"""The sparse block, forward and backward, beside transformers and the hardware: `python benchmarks/moe_block.py`.

One process measures every method once a round, in an order shuffled anew each round, so that noise hits all alike; the
table shows medians. A method is the whole block (router, dispatch, experts, combination, and our counts), from hidden
states to hidden states; "forward+backward" adds the gradients of the input and of all weights. Its *limit* is what its
own framework needs for the useful FLOPs alone: three plain matmuls of all rows with a single expert.

Every method sees the same input and weights and runs its own router. What comes out of the routers is decided
beforehand ("balanced", or "zipf": an expert's popularity is one over its rank): the first coordinates of every token
are the wanted logits, and the router's matrix selects them. Before anything is timed, all methods that drop nothing
must agree in float32, in result and gradients. Capacity drops the same in training and evaluation here (factor 1.25);
what it drops it does not compute, so the share stands beside its times.

torch's threads spin for some milliseconds after a call, on the cores that the next method needs: a pause precedes each
measurement. How they wait is left to torch, or to OMP_WAIT_POLICY where it is set. Both frameworks use all cores, one
at a time, and are otherwise as the environment sets them, which is printed.

On a GPU, with the shapes of Qwen3-30B-A3B:

    python benchmarks/moe_block.py --dtype bfloat16 --tokens 16384 --hidden 2048 --ffn 768 --experts 128 --active 8
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import itertools
import os
import pathlib
import platform
import random
import re
import statistics
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from moe_block_jax import jax_limits, our_builders
from moe_block_subject import EAGER, GROUPED_MM, PASSES, Builders, Method, Row, Subject
from moe_block_torch import torch_builders, why_no_torch

DTYPES = ("float32", "bfloat16")
ROUTINGS = ("balanced", "zipf")
FAMILIES = ("limit", "dropless", "capacity", "dense", "torch", "scaling")
SIZES = ("tokens", "hidden", "ffn", "experts", "active")
SCALED_EXPERTS = (16, 32, 64, 128)

#: Relative L2 distance that methods without drops may have from each other in float32.
TOLERANCE = 1e-4
#: Beginnings of environment variables that change times: compilers, threads, memory.
TELLING = ("XLA_", "JAX_", "OMP_", "KMP_", "MKL_", "MALLOC_", "GLIBC_", "LD_PRELOAD")
#: Longer than the threads of either framework spin.
PAUSE_SECONDS = 0.03


def all_builders(subject: Subject, families: Collection[str], torch_too: bool) -> Builders:
    """All rows of a subject, as far as their families are wanted."""
    builders = jax_limits(subject.any_routing) if "limit" in families else {}
    builders |= {row: build for row, build in our_builders(subject).items() if row[1].split()[0] in families}
    return builders | (torch_builders(subject) if torch_too and "torch" in families else {})


def scaled_builders(subject: Subject) -> Builders:
    """Dropless with few and with many experts; what a token costs stays the same."""
    builders: Builders = {}
    for experts in SCALED_EXPERTS:
        if subject.active <= experts <= subject.hidden:
            row = dataclasses.replace(subject, experts=experts), "dropless"
            builders[row] = our_builders(row[0])[row]
    return builders


# Measuring


def check_agreement(subject: Subject, torch_too: bool) -> str:
    """Raises unless all methods without drops compute the same in float32, on 2048 tokens at most."""
    subject = dataclasses.replace(subject, dtype="float32", tokens=min(subject.tokens, 2048))
    builders = all_builders(subject, ("dropless", "dense", "torch"), torch_too)
    methods = {name: build() for (_, name), build in builders.items()}
    answers = {name: dataclasses.asdict(method.answer()) for name, method in methods.items() if method.answer}
    reference = EAGER if torch_too else "dense"
    wanted = answers.pop(reference)
    distances = {
        (name, part): float(np.linalg.norm(found - wanted[part]) / np.linalg.norm(wanted[part]))
        for name, answer in answers.items()
        for part, found in answer.items()
    }
    (name, part), worst = max(distances.items(), key=lambda item: item[1])
    if not worst <= TOLERANCE:
        raise AssertionError(f"{subject.routing}: {part} of {name} is {worst:.1e} from that of {reference}.")
    others = "; ".join(answers)
    return f"{subject.routing}: in float32, {others}: as {reference}, to {worst:.0e}, gradients included"


def build_warm(builders: Builders) -> tuple[dict[Row, Method], list[str]]:
    """The methods, compiled and warm, and which are missing and why: too little memory for one ends no others."""
    methods, missing = {}, []
    for (subject, name), build in builders.items():
        try:
            method = build()
            for run in method.run.values():
                run()
            methods[subject, name] = method
        except RuntimeError as error:  # as the errors of both frameworks are
            missing.append(f"{subject.dtype}, {subject.routing}: without {name}: {str(error).strip().splitlines()[0]}")
    return methods, missing


def measure(methods: Mapping[Row, Method], rounds: int) -> dict[Row, dict[str, list[float]]]:
    """Milliseconds of both passes of every method, once a round."""
    found = {row: {kind: [] for kind in PASSES} for row in methods}
    order, rng = list(itertools.product(methods, PASSES)), random.Random(0)
    for _ in range(rounds):
        rng.shuffle(order)
        for row, kind in order:
            time.sleep(PAUSE_SECONDS)
            start = time.perf_counter()
            methods[row].run[kind]()
            found[row][kind].append(1e3 * (time.perf_counter() - start))
    return found


# Telling


def methods_table(methods: Mapping[Row, Method], medians: Mapping[Row, Mapping[str, float]]) -> str:
    """Milliseconds of every method, their ratio to the limit and to transformers' default, and useful TFLOP/s."""
    header = ["dtype", "routing", "method", "dropped"]
    for kind in PASSES:
        header += [f"{kind}, ms", "/ limit", "/ grouped_mm", "TFLOP/s"]

    def ratio(took: float, to: Row, kind: str) -> str:
        return f"{took / medians[to][kind]:.2f}" if to in medians else ""

    def cells(subject: Subject, name: str) -> Iterator[str]:
        method = methods[subject, name]
        yield from (subject.dtype, subject.routing, name, f"{method.dropped:.1%}" if method.dropped else "")
        for kind, forwards in zip(PASSES, (1, 3), strict=True):
            took = medians[subject, name][kind]
            yield f"{took:.1f}"
            yield ratio(took, (subject.any_routing, method.limit), kind)
            yield ratio(took, (subject, GROUPED_MM), kind)
            yield f"{forwards * method.flops / took / 1e9:.3g}"

    return markdown_table(header, (cells(*row) for row in methods))


def scaling_table(medians: Mapping[Row, Mapping[str, float]]) -> str:
    """Dropless with more and more experts and the same FLOPs: milliseconds, and their ratio to the fewest experts."""

    def cells(dtype: str, kind: str) -> Iterator[str]:
        times = [passes[kind] for (subject, _), passes in medians.items() if subject.dtype == dtype]
        yield from (dtype, kind)
        yield from (f"{took:.1f} ({took / times[0]:.2f})" for took in times)

    dtypes = dict.fromkeys(subject.dtype for subject, _ in medians)
    experts = dict.fromkeys(f"{subject.experts} experts" for subject, _ in medians)
    rows = (cells(dtype, kind) for dtype, kind in itertools.product(dtypes, PASSES))
    return markdown_table(["dtype", "pass", *(f"{name}, ms" for name in experts)], rows)


def markdown_table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table that reads as plain text too."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def circumstances() -> list[str]:
    """When, where, with what, and whatever else may have touched the numbers."""
    packages = ("jax", "jaxlib", "flax", "torch", "transformers")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages if importlib.util.find_spec(name)]
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(TELLING)]
    return [
        f"{datetime.date.today()}, {device_name()}",
        f"Python {platform.python_version()}, {', '.join(versions)}",
        *(f"environment: {setting}" for setting in settings),
    ]


def device_name() -> str:
    """What computes."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    info = pathlib.Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{model[1] if model else platform.processor()}, {os.cpu_count()} cores"


def spread(milliseconds: Mapping[Row, Mapping[str, Sequence[float]]]) -> float:
    """How far from its median a measurement typically lies, relative to it."""
    series = [times for passes in milliseconds.values() for times in passes.values()]
    return statistics.median(abs(took / statistics.median(times) - 1) for times in series for took in times)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=ROUTINGS)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=FAMILIES)
    for name, size in zip(SIZES, (2048, 512, 256, 32, 4), strict=True):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--markdown", metavar="FILE", type=pathlib.Path, help="write what is printed there, too")
    arguments = parser.parse_args()
    if not arguments.active <= arguments.experts <= arguments.hidden:
        parser.error("active <= experts <= hidden must hold: a token has a coordinate for every expert's logit")
    return arguments


def main() -> None:
    """Checks, measures, prints."""
    arguments = parse_arguments()
    sizes = {name: getattr(arguments, name) for name in SIZES}
    no_torch = why_no_torch()
    kinds = itertools.product(arguments.dtype, arguments.routing)
    subjects = [Subject(dtype=dtype, routing=routing, **sizes) for dtype, routing in kinds]
    agreed = [check_agreement(subject, not no_torch) for subject in subjects[: len(arguments.routing)]]

    rows: Builders = {}
    scaled: Builders = {}
    for subject in subjects:
        rows |= all_builders(subject, arguments.only, not no_torch)
        if "scaling" in arguments.only and subject.routing == arguments.routing[0]:
            scaled |= scaled_builders(subject)
    methods, missing = build_warm(rows | scaled)
    milliseconds = measure(methods, arguments.rounds)
    medians = {row: {kind: statistics.median(milliseconds[row][kind]) for kind in PASSES} for row in methods}

    told = circumstances() + [", ".join(f"{name} {size}" for name, size in sizes.items())]
    told += [
        f"medians of {arguments.rounds} rounds; a measurement is typically {spread(milliseconds):.0%} off its median"
    ]
    told += agreed + missing + ([no_torch] if no_torch else [])
    text = "\n".join(f"- {line}" for line in told)
    if measured := {row: methods[row] for row in rows if row in methods}:
        text += "\n\n" + methods_table(measured, medians)
    if measured := {row: medians[row] for row in scaled if row in methods}:
        text += f"\n\nDropless, {arguments.routing[0]}, with more experts:\n\n" + scaling_table(measured)
    print(text)
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(f"# The sparse block\n\n{text}\n")


if __name__ == "__main__":
    main()
