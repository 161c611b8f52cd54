"""Model → Hub folder: per-layer, per-expert safetensors that transformers 4 and 5 load."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.checkpoint import HEADS
from qwen_moe_jax.huggingface.export_config import config_to_hub
from qwen_moe_jax.huggingface.files import INDEX, SINGLE
from qwen_moe_jax.huggingface.generation_config import generation_config_to_hub
from qwen_moe_jax.huggingface.linear_rows import in_published_order
from qwen_moe_jax.huggingface.model_card import CARD, ModelCard
from qwen_moe_jax.huggingface.model_card import model_card as card_text
from qwen_moe_jax.huggingface.readback import require_same_files
from qwen_moe_jax.huggingface.target import checkpoint_folder, is_companion
from qwen_moe_jax.huggingface.tensors import HubParameter, hub_parameters, hub_tensors
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.sharding.distributed import is_process_zero
from qwen_moe_jax.storage.placement import DeviceTensor
from qwen_moe_jax.storage.progress import bytes_bar
from qwen_moe_jax.storage.safetensors_file import write_safetensors
from qwen_moe_jax.storage.tensor import StoredTensor, TensorSlice
from qwen_moe_jax.units import parse_bytes


def save_pretrained(
    model: Model,
    folder: str | PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    verify: bool = False,
    model_card: ModelCard | None = None,
) -> None:
    """Writes a model as a Hub checkpoint folder: config.json, generation_config.json and safetensors.

    The folder is written under a temporary name and renamed when complete, so that an interrupted export never looks
    finished. Weights and configs of an existing folder are replaced, its other files (a tokenizer) are kept; those that
    are no tokenizer, template or licence are named on stderr. Tensors are copied from the devices in blocks; the host
    holds a few of them.

    Under several processes all call it, with a folder that all of them see. Each writes the shards of its own devices,
    from which process 0 writes the Hub's layout: meanwhile the disk holds the weights twice.

    Args:
        model: any head; its parameters keep their dtype.
        folder: to write.
        max_shard_size: bytes, or for example "5GB". Larger checkpoints are several files with an index; a tensor is
            never split.
        verify: read the files back before they replace the folder, and compare every tensor with the model's, bit for
            bit.
        model_card: write README.md, which says this in addition to what the checkpoint says; None writes none. A
            README.md that the folder has is kept.

    Raises:
        ConfigError: the family cannot express the config, or max_shard_size is not a size.
        CheckpointError: `folder` is a file, a mount point or a folder of other files; with `verify`, the files differ
            from the model.
    """
    folder, limit = Path(folder), shard_limit(max_shard_size)
    model.require_weights()
    configs = configs_to_hub(model)
    target = checkpoint_folder(folder, expected=is_companion)
    with target as new, readable_tensors(hub_parameters(model), scratch=new) as tensors:
        published = in_published_order(tensors, model.config)
        size = sum(tensor.nbytes for tensor in published.values())
        if is_process_zero():
            with bytes_bar(f"Writing {folder.name}", size) as advance:
                write_configs(new, configs)
                write_shards(new, published, limit, advance)
            if verify:
                require_same_files(new, folder, published)
            if model_card is not None and not (folder / CARD).exists():
                (new / CARD).write_text(card_text(new, model_card, name=folder.name), encoding="utf-8")


@contextlib.contextmanager
def readable_tensors(parameters: list[HubParameter], scratch: Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of parameters by their names in `hub_parameters`, readable by process 0.

    From its devices, or, if process 0 cannot address every shard, from a copy on disk under `scratch`, which all
    processes write and which is removed at the end.
    """
    if all(parameter.leaf.is_fully_addressable for parameter in parameters):
        yield {
            name: TensorSlice(DeviceTensor(of.leaf), of.window(index)) for name, of, index in hub_tensors(parameters)
        }
        return
    from qwen_moe_jax.storage.orbax import save_arrays, stored_tensors

    parts = scratch / ".parts"
    save_arrays(parts, {parameter.path: parameter.leaf for parameter in parameters})
    if is_process_zero():
        stored = stored_tensors(parts)
        yield {name: TensorSlice(stored[of.path], of.window(index)) for name, of, index in hub_tensors(parameters)}
        shutil.rmtree(parts)
    else:
        yield {}


def configs_to_hub(model: Model) -> dict[str, dict[str, Any]]:
    """Content of config.json and generation_config.json, by file name.

    Raises:
        ConfigError: the family cannot express the config; the model has adapters, or weights in few bits.
    """
    if model.lora is not None:
        raise ConfigError(
            "the model has low-rank adapters, which a checkpoint cannot contain: save_adapter writes them alone, and "
            "after merge_lora the model can be saved."
        )
    if model.execution.weights is not None:
        raise ConfigError(
            f"the weights are {model.execution.weights}, rounded when they were loaded, and are not written: the "
            "folder that they were read from has the model. save_adapter writes adapters that were trained over them."
        )
    head = next(suffix for suffix, head in HEADS.items() if isinstance(model, head))
    dtype = model.execution.param_dtype
    generation = generation_config_to_hub(model.generation_config, model.config)
    return {
        "config.json": config_to_hub(model.config, head) | {"dtype": dtype, "torch_dtype": dtype},
        "generation_config.json": {key: value for key, value in generation.items() if value is not None},
    }


def write_configs(folder: Path, configs: Mapping[str, dict[str, Any]]) -> None:
    """Writes JSON files by name into an existing folder."""
    for name, content in configs.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_shards(folder: Path, tensors: Mapping[str, StoredTensor], limit: int, advance: Callable[[int], None]) -> None:
    """Writes safetensors and, where there are several, their index into an existing folder.

    Args:
        folder: an existing folder.
        tensors: by Hub name, in the order of the files.
        limit: bytes of a file.
        advance: called with the number of bytes after each block.
    """
    shards = _plan_shards(tensors, limit)
    for file, names in shards.items():
        write_safetensors(folder / file, {name: tensors[name] for name in names}, advance)
    if len(shards) > 1:
        write_configs(folder, {INDEX: _index(tensors, shards)})


def _plan_shards(tensors: Mapping[str, StoredTensor], limit: int) -> dict[str, list[str]]:
    """File names, and the tensors of each in order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    return {f"model-{number:05d}-of-{count:05d}.safetensors": names for number, names in enumerate(shards, start=1)}


def _index(tensors: Mapping[str, StoredTensor], shards: dict[str, list[str]]) -> dict[str, Any]:
    sizes = [(tensor.nbytes, tensor.nbytes // np.dtype(tensor.dtype).itemsize) for tensor in tensors.values()]
    size, total = (sum(column) for column in zip(*sizes, strict=True))
    return {
        "metadata": {"total_parameters": total, "total_size": size},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }


def shard_limit(max_shard_size: int | str) -> int:
    """Bytes of a shard at most: 5_000_000_000 of "5GB".

    Raises:
        ConfigError: it is not a size.
    """
    try:
        return parse_bytes(max_shard_size)
    except ValueError as error:
        raise ConfigError(f"max_shard_size: {error}.") from None
