"""A model's low-rank adapters → the content of adapter_config.json and of adapter_model.safetensors."""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from qwen_moe_jax.config import LoraConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.adapter_layouts import PREFIX, fused
from qwen_moe_jax.huggingface.adapter_rows import in_published_rows
from qwen_moe_jax.huggingface.checkpoint import HEADS
from qwen_moe_jax.huggingface.linear_rows import published_name
from qwen_moe_jax.huggingface.tensors import hub_parameters, renamer
from qwen_moe_jax.huggingface.unused_fields import say_once
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.model.lora import Matrix, matrices
from qwen_moe_jax.text import join_words

#: How adapters of routed experts are written: a pair for each expert, or one for all experts of a layer.
ExpertLayout = Literal["separate", "fused"]

#: Model types of which PEFT over transformers 5 converts adapters of single experts, where all three matrices have one.
_CONVERTED = ("mixtral", "qwen3_moe")
_TASKS = {"CausalLM": "CAUSAL_LM", "SequenceClassifier": "SEQ_CLS", "TokenClassifier": "TOKEN_CLS"}
_TABLE = "model.embed_tokens."


def adapter_files(
    model: Model, arrays: Mapping[str, np.ndarray], *, base: str, experts: ExpertLayout | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The content of adapter_config.json, and PEFT's tensors by name.

    Args:
        model: with adapters.
        arrays: lora_A and lora_B of each Hub matrix, by `hub_parameters`' names.
        base: for `base_model_name_or_path`.
        experts: layout of the experts' adapters; None is one that PEFT loads, see `save_adapter`.

    Raises:
        ConfigError: an unknown layout; "fused" with adapters of only one of gate_proj and up_proj.
    """
    adapted = [matrix for matrix in matrices(model) if matrix.lora is not None]
    configs = {matrix.path: model.lora.of_matrix(matrix.path) for matrix in adapted}
    arrays, configs = in_published_rows(arrays, configs, model.config)
    routed = [matrix for matrix in adapted if ".experts." in matrix.path]
    head = next(head.__name__ for head in HEADS.values() if isinstance(model, head))
    config = {
        "peft_type": "LORA",
        "task_type": _TASKS[head],
        "base_model_name_or_path": base or None,
        "lora_dropout": 0.0,
        "use_rslora": model.lora.use_rslora,
        "bias": "none",
        "inference_mode": True,
    }
    experts = experts or _layout(model, {matrix.name for matrix in routed})
    if experts == "separate" or (experts == "fused" and not routed):
        config |= _ranks(model, configs) | {"target_modules": _target_modules(model, adapted)}
        return config, dict(_peft_tensors(arrays))
    if experts != "fused":
        raise ConfigError(f"experts={experts!r} is not known: expected 'separate' or 'fused'.")
    if len({matrix.name for matrix in routed} & {"gate_proj", "up_proj"}) == 1:
        raise ConfigError("experts='fused' needs adapters of both gate_proj and up_proj of the experts, found one.")
    tensors, parameters = _fused_tensors(model, routed, arrays)
    others = [matrix for matrix in adapted if matrix not in routed and matrix.name != "gate"]
    paths = {matrix.path for matrix in routed}
    ranks = _ranks(model, {path: own for path, own in configs.items() if path not in paths})
    for parameter, (rank, scaling) in parameters.items():
        pattern = rf".*\.{parameter}"
        ranks["rank_pattern"][pattern] = rank
        ranks["alpha_pattern"][pattern] = scaling * (math.sqrt(rank) if model.lora.use_rslora else rank)
    routers = ["mlp.gate.weight"] if any(matrix.path == "mlp.gate" for matrix in adapted) else []
    config |= ranks | {
        "target_modules": _target_modules(model, others) if others else [],
        "target_parameters": [f"mlp.experts.{parameter}" for parameter in parameters] + routers,
    }
    return config, tensors


def _layout(model: Model, routed: set[str]) -> ExpertLayout:
    """The layout that PEFT loads, by the names of the experts' matrices that have an adapter."""
    converted = model.config.model_type in _CONVERTED and len(routed) == 3
    if converted or not routed:
        return "separate"
    if len(routed & {"gate_proj", "up_proj"}) != 1:
        return "fused"
    say_once(
        f"the adapters of the experts' {join_words(sorted(routed))} are written for each expert, which PEFT over "
        "transformers 5 does not load: it needs gate_proj and up_proj together. This package and vLLM do."
    )
    return "separate"


def _ranks(model: Model, lora: Mapping[str, LoraConfig]) -> dict[str, Any]:
    """r and lora_alpha, and their patterns by the Hub's names of the matrices that differ, from those of each path.

    PEFT's conversion to fused experts knows the rank of gate and up only as `r`, so theirs is the default.
    """
    default: LoraConfig = lora.get("mlp.experts.gate_proj", model.lora)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, own in lora.items():
        pattern = _pattern(path, model.config.model_type)
        if own.r != default.r:
            ranks[pattern] = own.r
        if own.lora_alpha != default.lora_alpha:
            alphas[pattern] = own.lora_alpha
    return {"r": default.r, "lora_alpha": default.lora_alpha, "rank_pattern": ranks, "alpha_pattern": alphas}


def _pattern(path: str, model_type: str) -> str:
    """A regular expression for a matrix's path in a layer, under its names in transformers 4 and 5."""
    numbered = f".{path}.weight".replace(".experts.", ".experts.0.")
    names = {numbered, renamer(model_type)(numbered)}
    escaped = {re.escape(name.removeprefix(".").removesuffix(".weight")) for name in names}
    # The router is a parameter to PEFT over transformers 5, with `.weight` in its path.
    suffix = r"(\.weight)?" if path == "mlp.gate" else ""
    return "|".join(sorted(name.replace(r"\.experts\.0\.", r"\.experts\.(\d+\.)?") + suffix for name in escaped))


def _target_modules(model: Model, adapted: list[Matrix]) -> list[str] | str:
    """The last words of the adapted matrices' Hub names; a regular expression if other matrices end in them, too."""
    parameters = {parameter.path: parameter for parameter in hub_parameters(model)}
    inside: set[str] = set()
    outside: set[str] = set()
    for matrix in matrices(model):
        names = inside if any(matrix.path == own.path and matrix.segment == own.segment for own in adapted) else outside
        found = [published_name(name, model.config) for name in parameters[matrix.parameter_path].names.flat]
        names.update(name.removesuffix(".weight") for name in found)
    outside -= inside  # a matrix of the files may be two of the model, of which one is adapted
    words = {name.rpartition(".")[2] for name in inside}
    if not any(name.rpartition(".")[2] in words for name in outside):
        return sorted(words)
    # Without layer numbers, and with optional expert numbers, which PEFT omits for fused experts.
    kinds = {re.sub(r"^model\.layers\.\d+\.", "", re.sub(r"\.experts\.\d+\.", ".experts.", name)) for name in inside}
    paths = "|".join(re.escape(kind).replace(r"\.experts\.", r"\.experts\.(\d+\.)?") for kind in sorted(kinds))
    return rf".*\.layers\.\d+\.({paths})" if all("." in kind for kind in kinds) else rf"(.*\.)?({paths})"


def _peft_tensors(arrays: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """(PEFT's name, array) of adapters that are not fused; those of an embedding are transposed there."""
    tensors = []
    for name, array in arrays.items():
        if name.startswith(_TABLE):
            side = "B" if name.endswith("lora_A.weight") else "A"
            tensors.append((f"{PREFIX}{_TABLE}lora_embedding_{side}", array.T))
        else:
            tensors.append((PREFIX + name, array))
    return tensors


def _fused_tensors(
    model: Model, routed: list[Matrix], arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, float]]]:
    """PEFT's tensors with fused experts; and (rank, scaling) of each fused parameter."""
    remaining = dict(arrays)
    pairs: dict[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]] = {}
    names = {parameter.path: parameter.names for parameter in hub_parameters(model)}
    for matrix in routed:
        for layer in zip(*(names[f"{matrix.lora_path}.lora_{side}"] for side in "AB"), strict=True):
            number = re.match(r"model\.layers\.\d+\.", str(layer[0][0]))[0]
            own = [(remaining.pop(str(a)), remaining.pop(str(b))) for a, b in zip(*layer, strict=True)]
            pairs.setdefault(f"{number}mlp.experts", {})[matrix.name] = own
    by_name = {matrix.name: model.lora.of_matrix(matrix.path) for matrix in routed}
    shared_a = "gate_proj" in by_name and all(
        np.array_equal(gate[0], up[0])
        for layer in pairs.values()
        for gate, up in zip(layer["gate_proj"], layer["up_proj"], strict=True)
    )
    tensors = {name.replace(".block_sparse_moe.", ".mlp."): array for name, array in _peft_tensors(remaining)}
    parameters: dict[str, tuple[int, float]] = {}
    for parameter, kinds in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        if kinds[0] not in by_name:
            continue
        # PEFT nests the wrappers of a module's parameters: the first one is the inner, `base_layer`.
        inner = ".base_layer" if parameter == "gate_up_proj" and "down_proj" in by_name else ""
        scaling = by_name[kinds[0]].scaling
        for experts, kind_pairs in pairs.items():
            matrices_of = [kind_pairs[kind] for kind in kinds]
            if len(kinds) == 2 and by_name["up_proj"].scaling != scaling:
                ratio = np.float32(by_name["up_proj"].scaling / scaling)
                matrices_of[1] = [(a, b * ratio) for a, b in matrices_of[1]]
            a, b = fused(matrices_of, shared_a=shared_a and len(kinds) == 2)
            tensors[f"{PREFIX}{experts}{inner}.lora_A.weight"] = a
            tensors[f"{PREFIX}{experts}{inner}.lora_B.weight"] = b
        ranks = [by_name[kind].r for kind in kinds]
        parameters[parameter] = (ranks[0] if shared_a and len(kinds) == 2 else sum(ranks), scaling)
    return tensors, parameters
