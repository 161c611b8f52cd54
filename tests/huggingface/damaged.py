"""Checkpoint folders that are whole, ways to damage them, and what a refusal leaves behind."""

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
ROUTER, GATE = "model.layers.1.mlp.gate.weight", "model.layers.0.mlp.experts.1.gate_proj.weight"
COMMON = dict(
    vocab_size=24,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    num_experts_per_tok=1,
    max_position_embeddings=32,
    torch_dtype="float32",
)
QWEN = dict(model_type="qwen3_moe", num_experts=2, moe_intermediate_size=6, **COMMON)
MIXTRAL = dict(model_type="mixtral", num_local_experts=2, **COMMON)
FP8 = {"quant_method": "fp8", "weight_block_size": [4, 4]}
DTYPES = {"F32": "float32", "I32": "int32", "F8_E4M3": "float8_e4m3fn", "F64": "float64"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`single`: one file of a Qwen3-MoE. `sharded`: several files of a Mixtral. `fp8`: the first one, quantised."""
    root = tmp_path_factory.mktemp("whole")
    for name, hub, limit in (("single", QWEN, "5GB"), ("sharded", MIXTRAL, 3000)):
        config = qmj.ModelConfig.from_pretrained(hub)
        qmj.save_pretrained(qmj.CausalLM(config, rngs=nnx.Rngs(0)), root / name, max_shard_size=limit)
    shutil.copytree(root / "single", root / "fp8")
    in_config(quantization_config=FP8)(root / "fp8")

    def quantise(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
            tensors[name + "_scale_inv"] = np.ones([-(-size // 4) for size in tensors[name].shape], np.float32)

    in_tensors(quantise)(root / "fp8")
    return root


# ---- ways to damage a folder ----------------------------------------------------------------------------------------

Damage = Callable[[Path], object]


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes, said: int = 0) -> None:
    """Any text as a header, with its length or another one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((said or len(text)).to_bytes(8, "little") + text + data)


def in_header(edit: Callable[[dict[str, Any]], object], file: str = SINGLE) -> Damage:
    """Changes the header of a file, and not its data."""

    def damage(folder: Path) -> None:
        header, data = read_raw(folder / file)
        edit(header)
        write_raw(folder / file, header, data)

    return damage


def in_tensors(edit: Callable[[dict[str, np.ndarray]], object], file: str = SINGLE) -> Damage:
    """Changes the tensors of a file, which stays a sound one."""

    def damage(folder: Path) -> None:
        header, data = read_raw(folder / file)
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            part = data[slice(*entry["data_offsets"])]
            tensors[name] = np.frombuffer(part, DTYPES[entry["dtype"]]).reshape(entry["shape"])
        edit(tensors)
        written, end = {}, 0
        for name, values in tensors.items():
            start, end = end, end + values.nbytes
            dtype = next(short for short, long in DTYPES.items() if long == values.dtype)
            written[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [start, end]}
        write_raw(folder / file, written, b"".join(values.tobytes() for values in tensors.values()))

    return damage


def set_tensor(name: str, *shape: int, dtype: str = "float32", file: str = SINGLE) -> Damage:
    return in_tensors(lambda tensors: tensors.update({name: np.zeros(shape, dtype)}), file)


def without_tensor(name: str, file: str = SINGLE) -> Damage:
    return in_tensors(lambda tensors: tensors.pop(name), file)


def in_json(file: str, edit: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        edit(content)
        (folder / file).write_text(json.dumps(content))

    return damage


def in_config(**fields: Any) -> Damage:
    return in_json(CONFIG, lambda config: config.update(fields))


def text(file: str, content: bytes | str) -> Damage:
    return lambda folder: (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def without(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def shard(number: int) -> str:
    """The name of a file of the Mixtral; what is in each is asserted where it matters."""
    return f"model-{number:05d}-of-00003.safetensors"


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def cut(file: str, change: int) -> Damage:
    """Cuts bytes off the end of a file, or adds some."""

    def damage(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:change] if change < 0 else content + bytes(change))

    return damage


def move(name: str, by: int) -> Callable[[dict[str, Any]], None]:
    """Moves a tensor in the header: its data begins and ends so many bytes later."""

    def edit(header: dict[str, Any]) -> None:
        header[name]["data_offsets"] = [at + by for at in header[name]["data_offsets"]]

    return edit


def entry_of(name: str, **fields: Any) -> Damage:
    return in_header(lambda header: header[name].update(fields))


def named_twice(folder: Path) -> None:
    header, data = read_raw(folder / SINGLE)
    text = json.dumps(header)
    write_raw(folder / SINGLE, (text[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}').encode(), data)


def fused_beside(folder: Path) -> None:
    in_tensors(lambda tensors: tensors.update({"model.layers.0.mlp.experts.down_proj": np.zeros((2, 8, 6), "f")}))(
        folder
    )


def as_folder(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and when it was written."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def open_files(folder: Path) -> list[str]:
    """Files of a folder that this process holds open, where the system tells."""
    held = Path("/proc/self/fd")
    links = [os.readlink(path) for path in held.iterdir() if path.is_symlink()] if held.is_dir() else []
    return [link for link in links if link.startswith(str(folder))]


def refused(folder: Path, error: type[Exception]) -> str:
    """The message of a refusal that left nothing behind: no file, no open file, no array."""
    before, arrays = state_of(folder), len(jax.live_arrays())
    gc.freeze()  # what other tests of this process left is not looked through: that takes two seconds
    with pytest.raises(error) as failure:
        qmj.from_pretrained(folder)
    message, kind = str(failure.value), failure.type
    del failure
    gc.collect()
    gc.unfreeze()
    assert kind is error
    assert str(folder) in message
    assert state_of(folder) == before and not open_files(folder) and len(jax.live_arrays()) <= arrays
    return message
