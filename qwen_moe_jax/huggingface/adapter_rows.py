"""Adapters of linear layers' projections: PEFT's, of the matrices in a family's files ↔ those of the model's matrices.

Only B of an adapter has its matrix's rows, which files and model order differently (`linear_rows`). Where a matrix of
the files is two of the model (Qwen3-Next), both get its A and each its own rows of B; written, two adapters are one
whose ranks add up, with a block-diagonal B, or one of the same rank where they have the same A.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from qwen_moe_jax.config import LoraConfig, ModelConfig
from qwen_moe_jax.huggingface.adapter_layouts import LowRank, own_pairs
from qwen_moe_jax.huggingface.linear_rows import Run, model_rows, published_rows

#: The path of linear layers' matrices within a layer.
_OWNER = "linear_attn"
_MATRIX = re.compile(rf"(.+\.{_OWNER})\.(\w+)\.weight")


def in_model_rows(pairs: Mapping[str, LowRank], config: ModelConfig) -> tuple[dict[str, LowRank], list[str]]:
    """Adapters by the names of the model's matrices, from those of the files' matrices; and problems, a line each."""
    published, own = published_rows(config), model_rows(config)
    found: dict[str, LowRank] = {}
    problems: list[str] = []
    for name, pair in pairs.items():
        matrix = _MATRIX.fullmatch(name)
        if matrix is None or matrix[2] not in published:
            found[name] = pair
            continue
        rows = sum(stop - start for _, start, stop in published[matrix[2]])
        if pair.b.shape[0] != rows:
            size = [pair.b.shape[0], pair.a.shape[1]]
            problems.append(f"shape: the adapter of {name} is for {size}, expected {[rows, config.hidden_size]}")
            continue
        names = _parts(published[matrix[2]])
        parts = [np.concatenate([pair.b[start:stop] for _, start, stop in own[part]]) for part in names]
        for part, (a, b) in zip(names, own_pairs(pair.a, parts), strict=True):
            found[f"{matrix[1]}.{part}.weight"] = LowRank(a, b, pair.scaling)
    return found, problems


def in_published_rows(
    arrays: Mapping[str, np.ndarray], adapted: Mapping[str, LoraConfig], config: ModelConfig
) -> tuple[dict[str, np.ndarray], dict[str, LoraConfig]]:
    """lora_A and lora_B of the files' matrices, from those of the model's matrices.

    Args:
        arrays: by the names of `hub_parameters`.
        adapted: rank and scaling of every adapted matrix, by its path in a layer.
        config: of the model.

    Returns:
        The arrays, by the names of the files' matrices; and `adapted` with the paths and ranks of these.
    """
    remaining, ranks = dict(arrays), dict(adapted)
    found: dict[str, np.ndarray] = {}
    for matrix, runs in published_rows(config).items():
        parts = [part for part in _parts(runs) if f"{_OWNER}.{part}" in adapted]
        if not parts:
            continue
        layers = [name.removesuffix(f".{parts[0]}.lora_A.weight") for name in arrays if f".{parts[0]}.lora_A." in name]
        pairs = {layer: [_pair(remaining, f"{layer}.{part}") for part in parts] for layer in layers}
        configs = [ranks.pop(f"{_OWNER}.{part}") for part in parts]
        scaling = configs[0].scaling
        one_a = len(parts) == len(_parts(runs)) and all(
            np.array_equal(a, of_layer[0][0]) for of_layer in pairs.values() for a, _ in of_layer
        )
        for layer, of_layer in pairs.items():
            scaled = [
                (a, b if own.scaling == scaling else b * np.float32(own.scaling / scaling))
                for (a, b), own in zip(of_layer, configs, strict=True)
            ]
            a, b = _joined(dict(zip(parts, scaled, strict=True)), runs, one_a=one_a)
            found |= {f"{layer}.{matrix}.lora_A.weight": a, f"{layer}.{matrix}.lora_B.weight": b}
        rank = configs[0].r if one_a else sum(own.r for own in configs)
        alpha = scaling * (math.sqrt(rank) if configs[0].use_rslora else rank)
        ranks[f"{_OWNER}.{matrix}"] = dataclasses.replace(configs[0], r=rank, lora_alpha=alpha)
    return remaining | found, ranks


def _parts(runs: tuple[Run, ...]) -> list[str]:
    """The matrices that runs are of, in the order of their first run."""
    return list(dict.fromkeys(matrix for matrix, _, _ in runs))


def _pair(arrays: dict[str, np.ndarray], matrix: str) -> tuple[np.ndarray, np.ndarray]:
    """Takes A and B of a matrix out of the arrays."""
    return arrays.pop(f"{matrix}.lora_A.weight"), arrays.pop(f"{matrix}.lora_B.weight")


def _joined(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], runs: tuple[Run, ...], *, one_a: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a matrix whose rows are runs of rows of several, some of which have no adapter."""
    matrices = [a for a, _ in pairs.values()]
    a = matrices[0] if one_a else np.concatenate(matrices)
    columns, first = {}, 0
    for part, (own_a, _) in pairs.items():
        columns[part] = slice(0, a.shape[0]) if one_a else slice(first, first + own_a.shape[0])
        first += own_a.shape[0]
    b = np.zeros((sum(stop - start for _, start, stop in runs), a.shape[0]), matrices[0].dtype)
    row = 0
    for part, start, stop in runs:
        if part in pairs:
            b[row : row + stop - start, columns[part]] = pairs[part][1][start:stop]
        row += stop - start
    return a, b
