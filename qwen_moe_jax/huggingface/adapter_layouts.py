"""The layouts in which PEFT stores low-rank adapters ↔ one pair (A, B) per Hub matrix.

Linear layers: `X.lora_A.weight` [r, in] and `X.lora_B.weight` [out, r]. Embeddings: `X.lora_embedding_A` [r, V] and
`X.lora_embedding_B` [D, r]. Experts as modules (transformers 4, vLLM) are linear layers with a number each. Fused
experts (`target_parameters`, PEFT since 0.18 on transformers 5) are one pair per layer and parameter: A is [E·r, in]
and B [out, r·E] with the expert as the last axis; gate and up share a pair, `experts.base_layer`, of twice the rank.

Letters of this file: `r` rank; the rest as in the package.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping

import numpy as np

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.huggingface.adapter_config import AdapterConfig
from qwen_moe_jax.huggingface.files import VISION
from qwen_moe_jax.huggingface.layouts import prefixed
from qwen_moe_jax.huggingface.tensors import renamer
from qwen_moe_jax.huggingface.unused_fields import say_once

PREFIX = "base_model.model."
#: (module, "embedding_" or "", "A" or "B") of a tensor's name.
_SIDE = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
_EXPERTS = re.compile(r"(.+\.mlp\.experts)(\.base_layer)?")
#: How transformers 5 names Mixtral's sparse block.
_BLOCK = (".block_sparse_moe.", ".mlp.")
#: Modules whose base weight PEFT saves along with their adapter.
EMBEDDINGS = ("model.embed_tokens", "lm_head")


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The adapter of one Hub matrix W [out, in]: `W + scaling · b @ a`.

    Attributes:
        a: [r, in].
        b: [out, r].
        scaling: factor of the product.
    """

    a: np.ndarray
    b: np.ndarray
    scaling: float

    @property
    def rank(self) -> int:
        """Rows of a."""
        return self.a.shape[0]


def low_rank_pairs(
    arrays: Mapping[str, np.ndarray], config: AdapterConfig, model: ModelConfig
) -> tuple[dict[str, LowRank], dict[str, np.ndarray], list[str]]:
    """The adapters in a file's arrays, whatever their layout.

    Args:
        arrays: by their names in the file.
        config: of the same folder.
        model: that they are for.

    Returns:
        Adapters by the Hub's name of their matrix ("model.layers.0.self_attn.q_proj.weight"); base weights of
        embeddings that PEFT saved along with them, by the same names; and all problems, a line each.
    """
    sides: dict[str, dict[str, np.ndarray]] = {}
    bases: dict[str, np.ndarray] = {}
    problems: list[str] = []
    vision: list[str] = []
    for name, array in arrays.items():
        module = prefixed(name.removeprefix(PREFIX))
        if VISION.search(module):
            vision.append(name)
            continue
        found = _SIDE.fullmatch(module)
        if module in [f"{embedding}.base_layer.weight" for embedding in EMBEDDINGS]:
            bases[module.replace(".base_layer", "")] = array
        elif found is None or not name.startswith(PREFIX) or array.ndim != 2:
            problems.append(f"unexpected: {name} {list(array.shape)}")
        else:
            transposed = found[2] is not None
            side = {"A": "B", "B": "A"}[found[3]] if transposed else found[3]
            sides.setdefault(found[1], {})[side] = array.T if transposed else array
    if vision:
        say_once(f"{config.where}: {len(vision)} tensors are adapters of the vision tower, and are skipped.")
    pairs: dict[str, LowRank] = {}
    rename = renamer(model.model_type)
    for module, found_sides in sides.items():
        if len(found_sides) == 1:
            missing = "B" if "A" in found_sides else "A"
            problems.append(f"missing: lora_{missing} of {module}")
            continue
        for own, pair in _pairs_of(module, found_sides["A"], found_sides["B"], config, model, problems):
            pairs[rename(f"{own}.weight")] = pair
    return pairs, bases, problems


def _pairs_of(
    module: str, a: np.ndarray, b: np.ndarray, config: AdapterConfig, model: ModelConfig, problems: list[str]
) -> Iterator[tuple[str, LowRank]]:
    fused = _EXPERTS.fullmatch(module.replace(*_BLOCK))
    if fused is not None and model.moe is not None:
        yield from _unfused(module, fused[1], a, b, config, model, problems)
        return
    rank = config.rank(module)
    if a.shape[0] != rank or b.shape[1] != rank:
        problems.append(
            f"shape: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, expected rank {rank} of both"
        )
        return
    yield module, LowRank(a, b, config.scaling(module))


def _unfused(
    module: str,
    experts: str,
    a: np.ndarray,
    b: np.ndarray,
    config: AdapterConfig,
    model: ModelConfig,
    problems: list[str],
) -> Iterator[tuple[str, LowRank]]:
    """One pair per expert and matrix from the pair of a fused parameter, which its sizes identify."""
    count, width, inner = model.moe.num_experts, model.hidden_size, model.moe.moe_intermediate_size
    sizes = {"gate_up_proj": (2 * inner, width), "down_proj": (width, inner)}
    parameter = next((name for name, size in sizes.items() if size == (b.shape[0], a.shape[1])), None)
    path = f"{module.removesuffix('.base_layer')}.{parameter}"
    if parameter is None or a.shape[0] != b.shape[1] or a.shape[0] != count * config.rank(path):
        expected = ", or ".join(
            f"{[count * config.rank(f'{experts}.{name}'), size[1]]} and "
            f"{[size[0], count * config.rank(f'{experts}.{name}')]} ({name})"
            for name, size in sizes.items()
        )
        problems.append(
            f"shape: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, expected {expected} of {count} "
            "fused experts"
        )
        return
    rank, scaling = config.rank(path), config.scaling(path)
    a_Ero, b_orE = a.reshape(count, rank, -1), b.reshape(-1, rank, count)
    for expert in range(count):
        name, a_ri, b_or = f"{experts}.{expert}", a_Ero[expert], b_orE[..., expert]
        if parameter == "down_proj":
            yield f"{name}.down_proj", LowRank(a_ri, b_or, scaling)
            continue
        for own, (a_own, b_own) in zip(("gate_proj", "up_proj"), own_pairs(a_ri, np.split(b_or, 2)), strict=True):
            yield f"{name}.{own}", LowRank(a_own, b_own, scaling)


def own_pairs(a: np.ndarray, parts: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The pair of each of several matrices with one A in common; of its share of the rank where B is block-diagonal.

    PEFT makes such a B of adapters that were trained for gate and up separately, and so does what writes adapters here.

    Args:
        a: [r, in].
        parts: each matrix's rows of B, [out, r].
    """
    rank = a.shape[0] // len(parts)
    shares = [slice(number * rank, (number + 1) * rank) for number in range(len(parts))]
    is_block_diagonal = len(parts) * rank == a.shape[0] and not any(
        part[:, share].any() for number, part in enumerate(parts) for share in shares[:number] + shares[number + 1 :]
    )
    if is_block_diagonal:
        return [(a[share], part[:, share]) for share, part in zip(shares, parts, strict=True)]
    return [(a, part) for part in parts]


def fused(pairs: list[list[tuple[np.ndarray, np.ndarray]]], *, shared_a: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The pair of a fused parameter of one layer.

    Args:
        pairs: for gate and up, or for down alone: (a [r, in], b [out, r]) of every expert.
        shared_a: gate and up have the same a.

    Returns:
        A [E·r, in] and B [out, r·E]; r is the rank of each pair, or without `shared_a` the sum of gate's and up's.
    """
    a_Eri, b_Eor = [], []
    for of_expert in zip(*pairs, strict=True):
        matrices_b = [b for _, b in of_expert]
        if shared_a:
            a_Eri.append(of_expert[0][0])
            b_Eor.append(np.concatenate(matrices_b))
            continue
        a_Eri.append(np.concatenate([a for a, _ in of_expert]))
        rows, ranks = [b.shape[0] for b in matrices_b], [b.shape[1] for b in matrices_b]
        block_diagonal = np.zeros((sum(rows), sum(ranks)), matrices_b[0].dtype)
        for number, b in enumerate(matrices_b):
            row, column = sum(rows[:number]), sum(ranks[:number])
            block_diagonal[row : row + rows[number], column : column + ranks[number]] = b
        b_Eor.append(block_diagonal)
    b_orE = np.stack(b_Eor, axis=-1)
    return np.concatenate(a_Eri), b_orE.reshape(b_orE.shape[0], -1)
