"""What upcycling saves: a mixture made of a trained dense model, against that model trained on and one from scratch.

    python benchmarks/upcycle.py runs/upcycle

A dense Qwen3 is trained for 300 steps on the documents, tokenizer and schedule of configs/train/tiny.toml. It is made a
mixture of 8 experts, 2 a token, by copies and by copies with half of their values drawn anew. Then each of them, the
dense model itself and a mixture with random weights take the same 300 steps: other rows than the first, in the same
order for all.
"""

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from qwen_moe_jax.surgery.upcycle import upcycle

TINY = Path(__file__).parents[1] / "configs/train/tiny.toml"
STEPS, EVAL_STEPS = 300, 50
DENSE = {"model_type": "qwen3", "intermediate_size": 256}
SPARSE = {"model_type": "qwen3_moe", "moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2}
#: Keys of the tiny file's model that a dense one does not have.
OF_EXPERTS = ("moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob")


def settings(model: dict[str, Any] | Path, *, dense: bool, seed: int) -> dict[str, dict[str, Any]]:
    """The tables of a run: those of the tiny file on one device, without dropped tokens."""
    tables = tomllib.loads(TINY.read_text(encoding="utf-8"))
    tables["mesh"] = {}
    if dense:
        tables["loss"] = {}
    tables["execution"] = {"dispatch": "dropless"}
    tables["run"] = {"max_steps": STEPS, "eval_steps": EVAL_STEPS, "save_steps": STEPS, "seed": seed}
    if isinstance(model, Path):
        tables["model"] = {}
        tables["run"]["model_name_or_path"] = str(model)
        return tables
    tables["model"] |= model
    if dense:
        tables["model"] = {key: value for key, value in tables["model"].items() if key not in OF_EXPERTS}
    return tables


def train(folder: Path, tables: dict[str, dict[str, Any]]) -> dict[int, float]:
    """Runs one training, unless it has ended before; returns held-out losses in nats a token, by step."""
    tables["run"]["output_dir"] = str(folder)
    if not (folder / "result.json").is_file():
        lines = [f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
                 for name, table in tables.items() if table]  # fmt: skip
        file = folder.with_suffix(".toml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "train", str(file)], check=True, stdout=sys.stderr)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {record["step"]: record["heldout_loss"] for record in records if "heldout_loss" in record}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    train(folder / "dense", settings(DENSE, dense=True, seed=0))
    dense = folder / "dense/hub"
    for name, redraw in (("copies", 0.0), ("redrawn", 0.5)):
        upcycle(dense, folder / name, num_experts=8, num_experts_per_tok=2, redraw=redraw)
    models: dict[str, dict[str, Any] | Path] = {
        "dense, trained on": dense,
        "upcycled by copies": folder / "copies",
        "upcycled, half drawn anew": folder / "redrawn",
        "from scratch": SPARSE,
    }
    steps = range(0, STEPS + 1, EVAL_STEPS)
    print(f"| model | {' | '.join(f'step {step}' for step in steps)} |\n|{'---|' * (len(steps) + 1)}")
    for number, (name, model) in enumerate(models.items()):
        losses = train(folder / f"run-{number}", settings(model, dense=model is dense, seed=1))
        print(f"| {name} | {' | '.join(f'{losses[step]:.3f}' for step in steps)} |", flush=True)


if __name__ == "__main__":
    main()
