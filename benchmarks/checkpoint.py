"""What reading and converting a checkpoint costs in time and memory, beside safetensors' own plain read.

    python benchmarks/checkpoint.py [--layers 1] [--rounds 3] [--folder FOLDER]

writes a checkpoint of random bfloat16 weights with the layer shapes of Qwen2-57B-A14B (6.2 GB with one layer), and
runs, each in a process of its own and in turn: safetensors' plain read of all its files, `from_pretrained` on one
device and on eight simulated ones, and `qwen-moe-jax convert` to Orbax and back. Memory is the peak resident set of the
whole process; of an import, what lies above the arrays themselves. The disk's cache is warm: what is compared is our
work.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/models/qwen2-57b-a14b.json"
SHARD = 2_000_000_000


def write_checkpoint(folder: Path, layers: int) -> None:
    """A folder of random weights, made as it is written."""
    import qwen_moe_jax as qmj
    from qwen_moe_jax.huggingface.save import write_configs, write_shards
    from qwen_moe_jax.huggingface.tensors import hub_parameters, hub_tensors
    from qwen_moe_jax.storage.tensor import Index, StoredTensor, index_shape

    noise = np.random.default_rng(0).normal(size=1 << 24).astype("bfloat16")

    class Noise(StoredTensor):
        source, dtype = "nowhere", "bfloat16"

        def __init__(self, shape: tuple[int, ...], begin: int):
            self.shape, self.begin = shape, begin

        def read_into(self, index: Index, out: np.ndarray) -> None:
            out[...] = np.resize(noise[self.begin :], index_shape(index))

    content = json.loads(CONFIG.read_text()) | {"num_hidden_layers": layers}
    described = qmj.CausalLM(qmj.ModelConfig.from_pretrained(content), rngs=None)
    tensors = {
        name: Noise(parameter.tensor_shape, 8191 * number % (1 << 20))
        for number, (name, parameter, _) in enumerate(hub_tensors(hub_parameters(described)))
    }
    folder.mkdir(parents=True)
    write_configs(folder, {"config.json": content})
    write_shards(folder, tensors, SHARD, lambda done: None)


# ---- what is measured, each run as `python benchmarks/checkpoint.py --only NAME --folder FOLDER` -------------------


def peak() -> int:
    """Bytes of the largest resident set this process has had."""
    # Not getrusage, whose figure begins with that of the process that started this one.
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def plain_read(folder: Path) -> dict[str, float]:
    import ml_dtypes  # noqa: F401  bfloat16 for NumPy
    from safetensors.numpy import load_file

    begin = time.perf_counter()
    tensors = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "bytes": sum(array.nbytes for file in tensors for array in file.values())}


def load(folder: Path, **axes: int) -> dict[str, float]:
    import jax

    import qwen_moe_jax as qmj

    mesh = qmj.make_mesh(**axes) if axes else None
    jax.block_until_ready(jax.numpy.zeros(8))
    before, begin = peak(), time.perf_counter()
    model = jax.block_until_ready(qmj.from_pretrained(folder, mesh=mesh))
    seconds = time.perf_counter() - begin
    # On every device: simulated ones hold their copies in this process.
    arrays = sum(shard.data.nbytes for leaf in jax.tree.leaves(model) for shard in leaf.addressable_shards)
    return {"seconds": seconds, "bytes": arrays, "peak": peak() - before - arrays}


def convert(folder: Path, target: Path, to: str) -> dict[str, float]:
    from qwen_moe_jax.cli.main import main

    begin = time.perf_counter()
    assert main(["convert", str(folder), str(target), "--to", to]) == 0
    seconds = time.perf_counter() - begin
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return {"seconds": seconds, "bytes": size, "peak": peak()}


MEASURED = {
    "safetensors' plain read": lambda folder: plain_read(folder),
    "from_pretrained, one device": lambda folder: load(folder),
    "from_pretrained, expert=8": lambda folder: load(folder, expert=8),
    "from_pretrained, data=2 expert=2 tensor=2": lambda folder: load(folder, data=2, expert=2, tensor=2),
    "convert --to orbax": lambda folder: convert(folder, folder.parent / "orbax", "orbax"),
    "from_pretrained of it, expert=8": lambda folder: load(folder.parent / "orbax", expert=8),
    "convert --to hub (from orbax)": lambda folder: convert(folder.parent / "orbax", folder.parent / "again", "hub"),
}


def measure(name: str, folder: Path) -> dict[str, float]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--only", name, "--folder", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1, help="each has 4 GB, beside 2.2 GB of embedding and head")
    parser.add_argument("--rounds", type=int, default=3, help="medians are taken over them")
    parser.add_argument("--folder", type=Path, help="to write the checkpoint to; a temporary one if not given")
    parser.add_argument("--only", choices=MEASURED, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(MEASURED[arguments.only](arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "checkpoint"
        if not folder.exists():
            write_checkpoint(folder, arguments.layers)
        runs = [{name: measure(name, folder) for name in MEASURED} for _ in range(arguments.rounds)]
    baseline = "safetensors' plain read"
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("| | GB | seconds | × the plain read | peak memory, MB |\n|---|---|---|---|---|")
    for name in MEASURED:
        seconds = statistics.median(run[name]["seconds"] for run in runs)
        ratio = statistics.median(run[name]["seconds"] / run[baseline]["seconds"] for run in runs)
        peaks = [run[name]["peak"] / 1e6 for run in runs if "peak" in run[name]]
        size = runs[0][name]["bytes"] / 1e9
        print(f"| {name} | {size:.2f} | {seconds:.1f} | {ratio:.2f} | {max(peaks):.0f} |" if peaks else
              f"| {name} | {size:.2f} | {seconds:.1f} | 1 | |")  # fmt: skip


if __name__ == "__main__":
    main()
