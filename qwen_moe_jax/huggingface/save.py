"""Model → Hub folder: per-layer, per-expert safetensors that transformers 4 and 5 load."""

import itertools
import json
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from qwen_moe_jax.errors import ConfigError, ShardingError
from qwen_moe_jax.huggingface.export_config import config_to_hub
from qwen_moe_jax.huggingface.files import INDEX, SINGLE, replaced_folder
from qwen_moe_jax.huggingface.generation_config import generation_config_to_hub
from qwen_moe_jax.huggingface.tensors import HubParameter, hub_parameters, hub_tensors
from qwen_moe_jax.model.causal_lm import CausalLM, Model, SequenceClassifier, TokenClassifier

HUB_CLASSES = {
    CausalLM: "ForCausalLM",
    SequenceClassifier: "ForSequenceClassification",
    TokenClassifier: "ForTokenClassification",
}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def save_pretrained(model: Model, folder: str | PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
    """Writes a model as a Hub checkpoint folder: config.json, generation_config.json and safetensors.

    The folder is written beside and renamed, so that an interrupted export never looks finished. Where it exists
    already, its weights and configs are replaced and its other files (a tokenizer) are kept. Tensors are fetched from
    the devices layer by layer; in memory are at most one shard and the experts of one layer.

    Args:
        model: any head; its parameters keep their dtype.
        folder: to write.
        max_shard_size: bytes, or for example "5GB". More than that is written as several files with an index. A tensor
            is never split.

    Raises:
        ConfigError: the family cannot express the config, or max_shard_size is not a size.
        CheckpointError: `folder` is a file or a mount point.
        ShardingError: the model is spread over several hosts.
    """
    folder, limit = Path(folder), _bytes(max_shard_size)
    if jax.process_count() > 1:
        raise ShardingError("save_pretrained runs on one host; this program runs on several.")
    model.require_weights()
    head = next(suffix for head, suffix in HUB_CLASSES.items() if isinstance(model, head))
    config = config_to_hub(model.config, head) | {
        "dtype": model.execution.param_dtype,
        "torch_dtype": model.execution.param_dtype,
    }
    generation = generation_config_to_hub(model.generation_config, model.config)
    parameters = hub_parameters(model)
    shards = _plan_shards(parameters, limit)
    with replaced_folder(folder) as new:
        _write_json(new / "config.json", config)
        _write_json(new / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
        tensors = export_tensors(model)
        for file, names in shards.items():
            save_file(dict(itertools.islice(tensors, len(names))), new / file, metadata={"format": "pt"})
            (new / file).chmod((new / "config.json").stat().st_mode)  # safetensors leaves it to the owner alone
        if len(shards) > 1:
            _write_json(new / INDEX, _index(parameters, shards))


def export_tensors(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """Every (Hub name, array) of a model, or of its gradients, layer by layer."""
    held_key, held = None, None
    for name, parameter, index in hub_tensors(hub_parameters(model)):
        key = (id(parameter), index[:1])
        if key != held_key:  # the experts of a layer come one after the other: they are fetched together, once
            held_key, held = key, np.asarray(jax.device_get(parameter.leaf[index[0]] if index else parameter.leaf))
        yield name, held[index[1:]].copy()  # a view would keep all the experts of the layer in memory


def _plan_shards(parameters: list[HubParameter], limit: int) -> dict[str, list[str]]:
    """File names, and the tensors of each in order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, parameter, _ in hub_tensors(parameters):
        size = _tensor_bytes(parameter)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    return {f"model-{number:05d}-of-{count:05d}.safetensors": names for number, names in enumerate(shards, start=1)}


def _index(parameters: list[HubParameter], shards: dict[str, list[str]]) -> dict[str, Any]:
    total = sum(parameter.leaf.size for parameter in parameters)
    size = sum(_tensor_bytes(parameter) * parameter.names.size for parameter in parameters)
    return {
        "metadata": {"total_parameters": total, "total_size": size},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }


def _tensor_bytes(parameter: HubParameter) -> int:
    return int(np.prod(parameter.tensor_shape)) * parameter.leaf.dtype.itemsize


def _bytes(size: int | str) -> int:
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    parsed = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]B)?", str(size))
    if parsed is None or float(parsed[1]) * UNITS[parsed[2] or ""] < 1:
        raise ConfigError(f"max_shard_size={size!r} is not a size: expected bytes, or for example '500MB' or '5GB'.")
    return int(float(parsed[1]) * UNITS[parsed[2] or ""])


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
