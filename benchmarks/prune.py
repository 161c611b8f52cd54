"""What pruning and merging cost: the held-out loss of a trained mixture, for each method and three seeds.

    python -m train configs/train/tiny.toml --run.output_dir runs/tiny
    python benchmarks/prune.py runs/tiny

Calibration text is drawn from the run's training documents, other rows for each seed; the loss is that of the first
rows of its held-out documents.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

import qwen_moe_jax as qmj
from qwen_moe_jax.surgery.prune import merge, prune

ROW, CALIBRATION, HELDOUT = 128, 128, 64


def rows(run: Path, *, heldout: bool) -> np.ndarray:
    """Rows of tokens [B, 128] of the training or the held-out documents, one after the other."""
    arrays = np.load(run / "corpus/0/documents.npz")
    tokens = np.memmap(run / "corpus/0/tokens.uint32", np.uint32, mode="r")
    of_document = np.repeat(arrays["heldout"], arrays["lengths"])
    chosen = tokens[of_document == heldout]
    return chosen[: len(chosen) // ROW * ROW].reshape(-1, ROW).astype(np.int32)


def loss(folder: Path, heldout: np.ndarray) -> float:
    """Nats a token."""
    scores = qmj.score(qmj.from_pretrained(folder), list(heldout))
    return -sum(one.log_likelihood for one in scores) / sum(one.num_tokens for one in scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    heldout, training = rows(run, heldout=True)[:HELDOUT], rows(run, heldout=False)
    print(f"all experts: {loss(run / 'hub', heldout):.3f}")
    print("| experts | method | loss, seed 0 | seed 1 | seed 2 |\n|---|---|---|---|---|")
    for count in (12, 8):
        for method in ("reap", "frequency", "magnitude", "random", "merge"):
            found = []
            for seed in range(1 if method == "magnitude" else 3):
                drawn = np.random.default_rng(seed).choice(len(training), CALIBRATION, replace=False)
                with tempfile.TemporaryDirectory() as folder:
                    out, options = Path(folder) / "out", dict(num_experts=count, tokens=training[drawn])
                    if method == "merge":
                        merge(run / "hub", out, **options)
                    else:
                        prune(run / "hub", out, method=method, seed=seed, **options)
                    found.append(f"{loss(out, heldout):.3f}")
            print(f"| {count} | {method} | {' | '.join(found + ['the same'] * (3 - len(found)))} |", flush=True)


if __name__ == "__main__":
    main()
