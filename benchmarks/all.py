"""Every row of our speed on CPUs in one run: `python benchmarks/all.py`.

Decoding and prefill, the train step, the sparse block and the hybrid against transformers, decoding against llama.cpp
where `llama-cpp-python` and `gguf` are installed: with the functions of `decode.py`, `train_step.py`, `moe_block.py`
and `hybrid.py`, which say what is compared. Parts run one after the other, the most important rows first, each in a
process of its own and with pauses, until the budget of seconds is spent; a part that does not end within
`LONGEST_PART` keeps the rows it has reported so far.

The table goes to `benchmarks/results/cpu-CLASS.md`, where CLASS is the widest instructions for matrix products that the
processor has. `python benchmarks/all.py --summary` puts the ratios of all such files into docs/measurements.md, and the
most important ones into README.md.

Needs torch and transformers (`pip install -e '.[test]'` on Python 3.11).
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import multiprocessing
import os
import re
import resource
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PAGE, README = (Path(__file__).parents[1] / name for name in ("docs/measurements.md", "README.md"))
#: Classes of processors by a flag of /proc/cpuinfo, the best first.
CLASSES = {"amx_bf16": "amx", "avx512_bf16": "avx512_bf16", "avx512f": "avx512", "avx2": "avx2"}
#: The lines before and after the summary in the page.
BEGIN, END = "<!-- benchmarks/all.py -->\n", "<!-- end -->\n"
#: Seconds that a part may take: one that hangs leaves time for the others.
LONGEST_PART = 240


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table.

    Attributes:
        what: is measured, and in which unit.
        ours, theirs: medians.
        peer: what theirs is.
        spread: largest over smallest of our measurements.
        peak: largest memory of the process, in bytes; of both engines where they share one.
    """

    what: str
    ours: float
    theirs: float
    peer: str
    spread: float
    peak: float | None = None

    def cells(self) -> str:
        """The row in Markdown."""
        peak = "" if self.peak is None else f"{self.peak / 1e9:.2f}"
        cells = (
            self.what,
            f"{self.ours:.4g}",
            f"{self.theirs:.4g}",
            self.peer,
            f"{self.ours / self.theirs:.2f}",
            f"{self.spread:.2f}",
            peak,
        )
        return f"| {' | '.join(cells)} |"


HEADER = (
    "| what | ours | theirs | theirs is | ours ÷ theirs | ours, largest ÷ smallest | peak memory, GB |\n"
    + "|---" * 7
    + "|"
)
Tell = Callable[[Row], None]


def decode_rows(tell: Tell, dtype: str, batches: tuple[int, ...]) -> None:
    """Time to the first token and tokens/s afterwards, against transformers, the memory bus and llama.cpp."""
    import decode
    import llama
    import numpy as np
    from flax import nnx

    import qwen_moe_jax as qmj

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        config, execution = qmj.ModelConfig.from_pretrained(decode.HUB_CONFIG), qmj.ExecutionConfig(dtype="float32")
        qmj.save_pretrained(qmj.CausalLM(config, rngs=nnx.Rngs(0), execution=execution), folder)
        engines = {"ours": decode.our_engine(folder, dtype)} | decode.their_engines(folder, dtype, ["grouped_mm"])
        has_llama = all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))
        if has_llama:
            llama.write_gguf(folder, Path(parent) / "model.gguf", dtype)
        bandwidth = decode.bandwidth()
        for batch in batches:
            if has_llama and batch <= 8:
                length, cores = decode.PROMPT + decode.STEPS + 1, len(os.sched_getaffinity(0))
                engines["llama.cpp"] = llama.engine(Path(parent) / "model.gguf", batch, length, cores, dtype)
            else:
                engines.pop("llama.cpp", None)
            numbers = np.random.default_rng(batch)
            prompts = numbers.integers(0, config.vocab_size, (batch, decode.PROMPT)).tolist()
            written = {name: engine(prompts, 1 + decode.STEPS) for name, engine in engines.items()}
            others = [name for name, texts in written.items() if dtype == "float32" and texts != written["ours"]]
            if others:
                print(f"batch {batch}: {', '.join(others)}: other tokens than ours; left out", flush=True)
            engines["ours"](prompts, 1)  # compiles the shorter request's shapes
            kept = {name: engine for name, engine in engines.items() if name not in others}
            rounds = [decode.measured(kept, prompts, 1) for _ in range(1 if batch > 8 else 3)]
            floor = decode.bytes_of_step(batch, dtype) / bandwidth
            for row in _decode_table(rounds, f"{dtype}, batch {batch}", batch, floor):
                tell(row)


def _decode_table(rounds: list[dict[str, tuple[float, float]]], where: str, batch: int, floor: float) -> list[Row]:
    """Rows of the seconds (to the first token, of a step) that every engine took in every round."""
    firsts, steps = (
        {name: statistics.median(times[name][part] for times in rounds) for name in rounds[0]} for part in (0, 1)
    )
    spread_first, spread_step = (_spread([times["ours"][part] for times in rounds]) for part in (0, 1))
    rows = []
    groups = {"transformers, grouped_mm": [name for name in steps if "cache" in name], "llama.cpp": ["llama.cpp"]}
    for peer, names in groups.items():
        found = [name for name in names if name in steps]
        if not found:
            continue
        rows += [
            Row(
                what=f"decode, {where}, tokens/s",
                ours=batch / steps["ours"],
                theirs=batch / min(steps[name] for name in found),
                peer=peer,
                spread=spread_step,
            ),
            Row(
                what=f"prefill of 128 tokens, {where}, ms",
                ours=1e3 * firsts["ours"],
                theirs=1e3 * min(firsts[name] for name in found),
                peer=peer,
                spread=spread_first,
            ),
        ]
    bus = Row(
        what=f"decode, {where}, steps/s",
        ours=1 / steps["ours"],
        theirs=1 / floor,
        peer="the memory bus",
        spread=spread_step,
    )
    return [*rows, bus]


def train_rows(tell: Tell, dtype: str) -> None:
    """The train step against transformers, and under capacity against dropless."""
    import train_step

    kinds = train_step.PRECISIONS[dtype]
    ours = {name: (train_step.our_step, (*kinds, name)) for name in ("dropless", "capacity")}
    theirs = {"grouped_mm": (train_step.their_step, (*kinds, "grouped_mm"))}
    found = train_step.measured({**ours, **theirs}, rounds=1, turn=2)
    tokens = train_step.ROWS * train_step.LENGTH
    for name, other in (("dropless", "grouped_mm"), ("capacity", "dropless")):
        if name in found and other in found:
            tell(
                Row(
                    what=f"train step of 4 × 512 tokens, {dtype}, {name}, tokens/s",
                    ours=tokens / found[name][0],
                    theirs=tokens / found[other][0],
                    peer="transformers, grouped_mm" if other == "grouped_mm" else "ours, dropless",
                    spread=1.0,
                    peak=found[name][1],
                )
            )


def block_rows(tell: Tell, dtype: str) -> None:
    """The sparse block against its limit and transformers, and with more experts."""
    import moe_block
    from moe_block_subject import JAX_LIMIT

    sizes = dict(zip(moe_block.SIZES, (2048, 512, 256, 32, 4), strict=True))
    subject = moe_block.Subject(dtype=dtype, routing="balanced", **sizes)
    builders = moe_block.all_builders(subject, ("limit", "dropless", "capacity", "torch"), not moe_block.why_no_torch())
    left_out = ("einsum", "square", "eager")
    builders = {row: build for row, build in builders.items() if not any(word in row[1] for word in left_out)}
    scaled = {row: build for row, build in moe_block.scaled_builders(subject).items() if row[0].experts in (16, 128)}
    methods, missing = moe_block.build_warm(builders | scaled)
    if missing:
        print("; ".join(missing), flush=True)
    taken = moe_block.measure(methods, rounds=5)
    for kind in moe_block.PASSES:
        times = {row: passes[kind] for row, passes in taken.items()}
        limit = subject.any_routing, JAX_LIMIT
        few, many = ((dataclasses.replace(subject, experts=count), "dropless") for count in (16, 128))
        pairs = [
            ("dropless block", (subject, "dropless"), limit, "JAX, limit"),
            ("dropless block", (subject, "dropless"), (subject, moe_block.GROUPED_MM), "transformers, grouped_mm"),
            ("capacity by index", (subject, "capacity by index"), limit, "JAX, limit"),
            ("128 experts", many, few, "ours, 16 experts"),
        ]
        for what, ours, theirs, peer in pairs:
            if ours in times and theirs in times:
                tell(
                    Row(
                        what=f"{what}, {dtype}, {kind}, ms",
                        ours=statistics.median(times[ours]),
                        theirs=statistics.median(times[theirs]),
                        peer=peer,
                        spread=_spread(times[ours]),
                    )
                )


def hybrid_rows(tell: Tell, part: str) -> None:
    """The hybrid against transformers: forward, train or decode."""
    import hybrid

    make = {"forward": hybrid.forward_lines, "train": hybrid.train_lines, "decode": hybrid.decode_lines}[part]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in make(1, time.perf_counter)]
    speeds = {name: float(speed) for _, name, speed, *_ in cells}
    best = max((name for name in speeds if name != "ours"), key=lambda name: speeds[name])
    peak = float(cells[0][3]) * 1e9 if cells[0][3] else None
    what = f"hybrid, float32, {cells[0][0]}, tokens/s"
    tell(Row(what=what, ours=speeds["ours"], theirs=speeds[best], peer=best, spread=1.0, peak=peak))


def _spread(times: list[float]) -> float:
    return max(times) / min(times)


#: The parts, the most important first.
PARTS: dict[str, Callable[[Tell], None]] = {
    "decode float32": functools.partial(decode_rows, dtype="float32", batches=(1, 8)),
    "train float32": functools.partial(train_rows, dtype="float32"),
    "block float32": functools.partial(block_rows, dtype="float32"),
    "decode bfloat16": functools.partial(decode_rows, dtype="bfloat16", batches=(1, 8)),
    "block bfloat16": functools.partial(block_rows, dtype="bfloat16"),
    "train bfloat16": functools.partial(train_rows, dtype="bfloat16"),
    "hybrid decode": functools.partial(hybrid_rows, part="decode"),
    "hybrid forward": functools.partial(hybrid_rows, part="forward"),
    "decode float32, batch 32": functools.partial(decode_rows, dtype="float32", batches=(32,)),
    "hybrid train": functools.partial(hybrid_rows, part="train"),
    "decode bfloat16, batch 32": functools.partial(decode_rows, dtype="bfloat16", batches=(32,)),
}


TORCH, LLAMA = "transformers, grouped_mm", "llama.cpp"
#: Rows of the README: what it says, the peer, and the rows of the files that are in its cells.
README_ROWS = [
    *(
        (
            f"decode, {dtype}, batch 1 / 8 / 32 (tokens/s)",
            TORCH,
            [f"decode, {dtype}, batch {n}, tokens/s" for n in (1, 8, 32)],
        )
        for dtype in ("float32", "bfloat16")
    ),
    *(
        (
            f"the same next to llama.cpp, {dtype}, batch 1 / 8",
            LLAMA,
            [f"decode, {dtype}, batch {n}, tokens/s" for n in (1, 8)],
        )
        for dtype in ("float32", "bfloat16")
    ),
    *(
        (
            f"prefill of 128 tokens, {dtype}, batch 1 / 8 / 32 (time)",
            TORCH,
            [f"prefill of 128 tokens, {dtype}, batch {n}, ms" for n in (1, 8, 32)],
        )
        for dtype in ("float32", "bfloat16")
    ),
    (
        "train step, 115M parameters, float32 / bfloat16 (tokens/s)",
        TORCH,
        [f"train step of 4 × 512 tokens, {dtype}, dropless, tokens/s" for dtype in ("float32", "bfloat16")],
    ),
    *(
        (
            f"dropless block, {dtype}, forward / with backward (time)",
            TORCH,
            [f"dropless block, {dtype}, {kind}, ms" for kind in ("forward", "forward+backward")],
        )
        for dtype in ("float32", "bfloat16")
    ),
]


def run_part(name: str, connection: Connection) -> None:
    """A part's rows, sent as they are measured, with the peak memory of this process where the row has none."""

    def tell(row: Row) -> None:
        peak = row.peak or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        connection.send(dataclasses.replace(row, peak=peak))

    try:
        PARTS[name](tell)
    except Exception:  # the other parts do not depend on it
        traceback.print_exc()
    connection.send(None)


def measured(name: str, seconds: float) -> list[Row]:
    """The rows that a part tells within so many seconds."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_part, args=(name, theirs))
    process.start()
    theirs.close()
    rows: list[Row] = []
    ends = time.monotonic() + seconds
    while ours.poll(max(0.0, ends - time.monotonic())):
        try:
            row = ours.recv()
        except EOFError:
            break
        if row is None:
            break
        rows.append(row)
        print(row.cells(), flush=True)
    else:
        print(f"{name}: not done in {seconds:.0f} s", flush=True)
        for child in _children(process.pid):
            os.kill(child, 9)
        process.terminate()
    process.join()
    return rows


def _children(pid: int | None) -> list[int]:
    """Processes that this one started, which would outlive it."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def processor_class(cpuinfo: str) -> str:
    """The class of a processor, from the text of /proc/cpuinfo; "other" where it is none of `CLASSES`."""
    flags = set(cpuinfo.split())
    return next((name for flag, name in CLASSES.items() if flag in flags), "other")


def report(rows: list[Row], processor: str, budget: float, loads: tuple[float, float]) -> str:
    """The file of a class."""
    names = ("jax", "torch", "transformers", "llama_cpp_python")
    found = [name for name in names if importlib.util.find_spec(name.removesuffix("_python"))]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in found)
    lines = [
        f"# All rows on one processor: {processor}",
        "",
        f"`python benchmarks/all.py --budget {budget:.0f}`, which says what is compared. Of tokens/s and steps/s a",
        "ratio above 1 is in our favour, of ms one below 1. Peak memory is that of the process up to the row: of both",
        "engines where they share one.",
        "",
        f"- {datetime.date.today()}, {len(os.sched_getaffinity(0))} cores, {versions}",
        f"- {os.environ.get('GLIBC_TUNABLES', 'no GLIBC_TUNABLES')}; load before {loads[0]:.1f}, after {loads[1]:.1f}",
        "",
        HEADER,
        *(row.cells() for row in rows),
    ]
    return "\n".join(lines) + "\n"


def result_files() -> list[Path]:
    """The files of all classes that have been measured."""
    return [path for path in sorted(RESULTS.glob("cpu-*.md")) if path.stem.removeprefix("cpu-") in CLASSES.values()]


def ratios_of(files: list[Path]) -> dict[tuple[str, str], dict[str, str]]:
    """By row and peer, the ratio of each file, by the file's stem."""
    ratios: dict[tuple[str, str], dict[str, str]] = {}
    for file in files:
        for cells in re.findall(
            r"^\| ([^|]+) \| [\d.e+-]+ \| [\d.e+-]+ \| ([^|]+) \| ([\d.]+) \|", file.read_text(), re.M
        ):
            ratios.setdefault(cells[:2], {})[file.stem] = cells[2]
    return ratios


def header_of(first: list[str], files: list[Path]) -> list[str]:
    """The first lines of a table with a column for each file."""
    cells = [*first, *(file.stem.removeprefix("cpu-") for file in files)]
    return [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]


def summary(files: list[Path]) -> str:
    """The ratios of all classes, as a table in Markdown."""
    if not files:
        return "No processor has been measured this way yet.\n"
    lines = header_of(["what", "theirs is"], files)
    for (what, peer), found in ratios_of(files).items():
        lines.append(f"| {what} | {peer} | {' | '.join(found.get(file.stem, '–') for file in files)} |")
    return "\n".join(lines) + "\n"


def short_summary(files: list[Path]) -> str:
    """The ratios of the README's rows: several of one kind in a row."""
    ratios, lines = ratios_of(files), header_of(["ours ÷ theirs"], files)
    for what, peer, rows in README_ROWS:
        found = [ratios.get((row, peer), {}) for row in rows]
        if any(found):
            cells = [" / ".join(one.get(file.stem, "–") for one in found) for file in files]
            lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_summary(page: str, text: str) -> str:
    """The page with this summary in its place."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + text + END + rest.split(END)[1]


def main() -> None:
    """Measures and writes the file of this processor, or the summary of all files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=720, metavar="SECONDS", help="for everything")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="in place of results/cpu-CLASS.md")
    parser.add_argument("--summary", action="store_true", help="measure nothing: write the tables of the pages anew")
    arguments = parser.parse_args()
    if arguments.summary:
        files = result_files()
        texts = {PAGE: summary(files)} | ({README: short_summary(files)} if files else {})
        for page, text in texts.items():
            page.write_text(with_summary(page.read_text(encoding="utf-8"), text), encoding="utf-8")
        return
    from train_step import processor

    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # read where a part's process starts
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    path = arguments.markdown or RESULTS / f"cpu-{processor_class(cpuinfo)}.md"
    ends, before, rows = time.monotonic() + arguments.budget, os.getloadavg()[0], []
    print(HEADER, flush=True)
    for name in arguments.parts:
        if (left := ends - time.monotonic()) > 10:
            rows += measured(name, min(left, LONGEST_PART))
            loads = before, os.getloadavg()[0]
            path.write_text(report(rows, processor(), arguments.budget, loads), encoding="utf-8")


if __name__ == "__main__":
    main()
