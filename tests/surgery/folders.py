"""Checkpoint folders from random tensors: written by NumPy alone, so that a corruption costs milliseconds."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.storage.arrays import write_arrays
from tests.cases import CASES, HYBRID_CASES
from tests.subject import hub_arrays

#: An MoE model with square query projections, and the routed experts' sizes apart from the others'.
SETTINGS = {"initializer_range": 0.02, "num_experts": 8, "head_dim": 8, "num_attention_heads": 4}


@functools.cache
def arrays_of(name: str = "qwen3_moe-plain", seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of a random model of a case, under its published names; vectors are random, too."""
    config = qmj.ModelConfig.from_pretrained(config_of(name))
    rng = np.random.default_rng(seed)
    shapes = {key: value.shape for key, value in hub_arrays(_model(name))}
    scale = {key: 0.02 if len(shape) > 1 else 0.1 for key, shape in shapes.items()}
    plain = 0.0 if config.zero_centered_norm else 1.0
    return {
        key: (rng.standard_normal(shape) * scale[key] + (plain if "norm" in key else 0.0)).astype(np.float32)
        for key, shape in shapes.items()
    }


def config_of(name: str) -> dict:
    settings = SETTINGS if name.startswith("qwen3_moe") else {}
    return {**{**CASES, **HYBRID_CASES}[name].config, **settings}


@functools.cache
def _model(name: str):
    return qmj.CausalLM(qmj.ModelConfig.from_pretrained(config_of(name)), rngs=nnx.Rngs(0))


def write(folder: Path, arrays: Mapping[str, np.ndarray], config: Mapping) -> Path:
    """A Hub folder of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    write_arrays(folder / "model.safetensors", arrays)
    return folder


def fused(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts as transformers 5 stores them: [E, 2F, D] and [E, D, F] a layer."""
    found = {name: value for name, value in arrays.items() if ".experts." not in name}
    blocks = {name.split(".experts.")[0] for name in arrays if ".experts." in name}
    for block in blocks:
        count = len({name for name in arrays if name.startswith(f"{block}.experts.") and "down_proj" in name})

        def stack(matrix, block=block, count=count):
            return np.stack([arrays[f"{block}.experts.{e}.{matrix}_proj.weight"] for e in range(count)])

        found[f"{block}.experts.gate_up_proj"] = np.concatenate([stack("gate"), stack("up")], axis=1)
        found[f"{block}.experts.down_proj"] = stack("down")
    return found


def in_float8(arrays: Mapping[str, np.ndarray], block: int = 16) -> dict[str, np.ndarray]:
    """Projections in block-scaled float8, as the published FP8 folders."""
    found = dict(arrays)
    for name, value in arrays.items():
        if value.ndim != 2 or "_proj." not in name:
            continue
        rows, columns = (-(-size // block) for size in value.shape)
        scale = np.ones((rows, columns), np.float32)
        quantised = np.empty(value.shape, ml_dtypes.float8_e4m3fn)
        for i in range(rows):
            for j in range(columns):
                part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
                scale[i, j] = np.abs(value[part]).max() / 448
                quantised[part] = (value[part] / scale[i, j]).astype(ml_dtypes.float8_e4m3fn)
        found[name], found[f"{name}_scale_inv"] = quantised, scale
    return found


def fp8_config(config: Mapping, block: int = 16) -> dict:
    return {**config, "quantization_config": {"quant_method": "fp8", "weight_block_size": [block, block]}}


def interleaved(value: np.ndarray, head: int, rotary: int) -> np.ndarray:
    """Rows of heads with the two halves of rotated dimensions interleaved."""
    heads = value.reshape(-1, head, *value.shape[1:])
    turned = heads[:, :rotary].reshape(len(heads), 2, rotary // 2, *value.shape[1:]).swapaxes(1, 2)
    return np.concatenate([turned.reshape(heads[:, :rotary].shape), heads[:, rotary:]], axis=1).reshape(value.shape)
