"""The order in which a family's files store the rows of a linear layer's projections ↔ the model's order.

The model has one order for all families, so that rows can be sharded by heads: `in_proj_qkv` and the channels of
`conv1d` have, for each key head, its rows of q, then of k, then those of its value heads' v. The files have

- Qwen3.5: the same matrices with the rows of all q, then all k, then all v;
- Qwen3-Next: `in_proj_qkvz`, for each key head q, k, v and z, and `in_proj_ba`, for each key head b and a; its channels
  of `conv1d` are those of Qwen3.5.

One table per family says which rows of the model each of the file's matrices consists of. Reading is its inverse.

Letters of this file: `g` key head; the rest as in the package.
"""

import functools
import re
from collections.abc import Mapping

from qwen_moe_jax.config import LinearAttentionConfig, ModelConfig
from qwen_moe_jax.storage.tensor import PickedRows, StoredTensor

#: A run of rows of a matrix of a linear layer: its name, the first row, the row after the last.
Run = tuple[str, int, int]

QKV, Z, B, A, CONV = "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d"
QKVZ, BA = "in_proj_qkvz", "in_proj_ba"
_MATRIX = re.compile(r"(.+\.linear_attn)\.(\w+)\.weight")


def published_rows(config: ModelConfig) -> Mapping[str, tuple[Run, ...]]:
    """The file's matrices whose rows are not in the model's order: each one's runs of rows of the model's matrices."""
    if config.linear_attention is None:
        return {}
    return _published_rows(config.model_type, config.linear_attention)


def model_rows(config: ModelConfig) -> Mapping[str, tuple[Run, ...]]:
    """The model's matrices whose rows the file has in another order: each one's runs of rows of the file's matrices."""
    if config.linear_attention is None:
        return {}
    return _model_rows(config.model_type, config.linear_attention)


def in_model_order(
    tensors: Mapping[str, StoredTensor], config: ModelConfig
) -> tuple[dict[str, StoredTensor], list[str]]:
    """A folder's tensors with the rows of linear layers in the model's order; and the problems found, a line each."""
    published, own = published_rows(config), model_rows(config)
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for name, tensor in tensors.items():
        matrix = _MATRIX.fullmatch(name)
        if matrix is None or matrix[2] not in published.keys() | own.keys():
            found[name] = tensor
        elif matrix[2] not in published:
            expected = sorted({run[0] for run in own[matrix[2]]})
            problems.append(f"unexpected: {name} in {tensor.source}, expected {', '.join(expected)} of this family")
        elif tensor.shape[:1] != (rows := _row_count(published[matrix[2]]),):
            problems.append(
                f"shape: {name} is {list(tensor.shape)} in {tensor.source}, expected {[rows, *tensor.shape[1:]]}"
            )
    layers = {matrix[1]: None for name in tensors if (matrix := _MATRIX.fullmatch(name))}
    return found | _picked(tensors, layers, own), problems


def in_published_order(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """A model's tensors under the names, and with the rows in the order, of the family's published files."""
    published, own = published_rows(config), model_rows(config)
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        matrix = _MATRIX.fullmatch(name)
        if matrix is None or matrix[2] not in own:
            found[name] = tensor
        else:  # at the place of the first of its sources
            found |= _picked(tensors, {matrix[1]: None}, {own[matrix[2]][0][0]: published[own[matrix[2]][0][0]]})
    return found


def published_name(name: str, config: ModelConfig) -> str:
    """The file's tensor that has a tensor of the model, or some of its rows."""
    matrix = _MATRIX.fullmatch(name)
    own = model_rows(config)
    if matrix is None or matrix[2] not in own:
        return name
    return f"{matrix[1]}.{own[matrix[2]][0][0]}.weight"


def _picked(
    tensors: Mapping[str, StoredTensor], layers: Mapping[str, None], table: Mapping[str, tuple[Run, ...]]
) -> dict[str, StoredTensor]:
    """The matrices of a table in each of these layers, as far as the tensors that they consist of are there."""
    found: dict[str, StoredTensor] = {}
    for layer in layers:
        for matrix, runs in table.items():
            names = {source: f"{layer}.{source}.weight" for source, _, _ in runs}
            if all(name in tensors for name in names.values()):
                picked = tuple((tensors[names[source]], start, stop) for source, start, stop in runs)
                found[f"{layer}.{matrix}.weight"] = PickedRows(picked)
    return found


def _row_count(runs: tuple[Run, ...]) -> int:
    return sum(stop - start for _, start, stop in runs)


@functools.cache
def _published_rows(model_type: str, linear: LinearAttentionConfig) -> Mapping[str, tuple[Run, ...]]:
    heads, key_rows = linear.num_key_heads, linear.key_head_dim
    values = linear.num_value_heads // heads
    value_rows = values * linear.value_head_dim
    group = 2 * key_rows + value_rows

    def flat(matrix: str) -> tuple[Run, ...]:
        """All q, then all k, then all v, from rows that are grouped by key head."""
        parts = ((0, key_rows), (key_rows, 2 * key_rows), (2 * key_rows, group))
        return tuple((matrix, g * group + start, g * group + stop) for start, stop in parts for g in range(heads))

    def grouped(*matrices: tuple[str, int]) -> tuple[Run, ...]:
        """For each key head its rows of several matrices, of each of which it has so many."""
        return tuple((matrix, g * rows, (g + 1) * rows) for g in range(heads) for matrix, rows in matrices)

    if model_type != "qwen3_next":
        return {QKV: flat(QKV), CONV: flat(CONV)}
    return {
        QKVZ: grouped((QKV, group), (Z, value_rows)),
        BA: grouped((B, values), (A, values)),
        CONV: flat(CONV),
    }


@functools.cache
def _model_rows(model_type: str, linear: LinearAttentionConfig) -> Mapping[str, tuple[Run, ...]]:
    found: dict[str, list[tuple[int, Run]]] = {}
    for matrix, runs in _published_rows(model_type, linear).items():
        row = 0
        for source, start, stop in runs:
            found.setdefault(source, []).append((start, (matrix, row, row + stop - start)))
            row += stop - start
    return {matrix: tuple(run for _, run in sorted(parts)) for matrix, parts in found.items()}
