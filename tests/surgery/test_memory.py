"""Comparing holds a few blocks in memory, however large the folders are."""

import json
import tracemalloc

import numpy as np

from qwen_moe_jax.surgery.self_check import check_checkpoint
from qwen_moe_jax.surgery.verify import compare_checkpoints
from tests.surgery.folders import config_of

ROWS, COLUMNS = 24_000, 1024


def sparse_folder(folder, last_value):
    """Embedding and head of zeros, 197 MB that take no room on the disk, and one value at the end."""
    folder.mkdir()
    settings = {"vocab_size": ROWS, "hidden_size": COLUMNS}
    (folder / "config.json").write_text(json.dumps({**config_of("qwen3-plain"), **settings}))
    size = ROWS * COLUMNS * 4
    header = json.dumps(
        {
            name: {"dtype": "F32", "shape": [ROWS, COLUMNS], "data_offsets": [number * size, (number + 1) * size]}
            for number, name in enumerate(["model.embed_tokens.weight", "lm_head.weight"])
        }
    ).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * size - 4)
        file.seek(0, 2)
        file.write(np.float32(last_value).tobytes())
    return folder


def test_memory_is_a_few_blocks(tmp_path):
    first, second = sparse_folder(tmp_path / "A", 0.5), sparse_folder(tmp_path / "B", 0.25)
    tracemalloc.start()
    comparison = compare_checkpoints(first, second)
    checked = check_checkpoint(first)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert comparison.equal == 1 and [f.names for f in comparison.findings] == [("lm_head.weight",)]
    assert checked.nbytes == 2 * ROWS * COLUMNS * 4
    assert peak < 150e6, f"{peak / 1e6:.0f} MB, of folders with 197 MB each"
