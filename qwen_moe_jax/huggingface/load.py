"""Hub folder → model: each tensor is read from the file in the parts the devices need, and placed there."""

import dataclasses
import itertools
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen_moe_jax.config import ExecutionConfig
from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.huggingface.config import read_config
from qwen_moe_jax.huggingface.files import DTYPES, TensorFile, open_tensors
from qwen_moe_jax.huggingface.generation_config import read_generation_config
from qwen_moe_jax.huggingface.tensors import HARMLESS, HubParameter, hub_parameters, hub_tensors, unfused
from qwen_moe_jax.model.causal_lm import CausalLM, Model

AnyModel = TypeVar("AnyModel", bound=Model)


def from_pretrained(
    folder: str | PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    param_dtype: str | None = None,
    execution: ExecutionConfig = ExecutionConfig(),
) -> CausalLM:
    """Loads a Hub checkpoint folder (config.json and safetensors) as a causal language model.

    Args:
        folder: of a Qwen2, Qwen2-MoE, Qwen3, Qwen3-MoE or Mixtral checkpoint.
        mesh: see `make_mesh`; None is one device. Weights go straight to the devices that own them.
        dtype: of activations and matmuls; None keeps the checkpoint's.
        param_dtype: of the stored weights; None takes `dtype`.
        execution: how the model is run; `dtype` and `param_dtype` here win over those in it.

    Returns:
        The model, in eval mode.

    Raises:
        ConfigError: config.json is missing, or asks for what is not supported.
        CheckpointError: the tensors do not make up the model; all problems in one message.
        ShardingError: a weight does not divide over the mesh.
    """
    return load_model(CausalLM, folder, mesh=mesh, dtype=dtype, param_dtype=param_dtype, execution=execution)


def load_model(
    model_class: type[AnyModel],
    folder: str | PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    param_dtype: str | None = None,
    execution: ExecutionConfig = ExecutionConfig(),
) -> AnyModel:
    """`from_pretrained` for any head."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Download the checkpoint first and give its folder.")
    config = read_config(folder)
    tensors = unfused(open_tensors(folder), config.model_type)
    config = dataclasses.replace(config, dtype=config.dtype or _stored_dtype(tensors.values()))
    dtype = dtype or execution.dtype
    execution = dataclasses.replace(execution, dtype=dtype, param_dtype=param_dtype or execution.param_dtype or dtype)
    generation_config = read_generation_config(folder, config)
    described = model_class(config, rngs=None, mesh=mesh, execution=execution, generation_config=generation_config)
    parameters = hub_parameters(described)
    _check(folder, parameters, tensors, tied=config.tie_word_embeddings)
    arrays = [_read(parameter, tensors) for parameter in parameters]
    return jax.tree.unflatten(jax.tree.structure(described), arrays)


def _stored_dtype(tensors: Iterable[TensorFile]) -> Any:
    """What a config without a dtype means: that of the first floating-point tensor, as in transformers."""
    return next((tensor.dtype for tensor in tensors if tensor.dtype in DTYPES.values()), None)


def _check(folder: Path, parameters: list[HubParameter], tensors: dict[str, TensorFile], *, tied: bool) -> None:
    """Compares what the model needs with what the folder has, and reports every difference at once."""
    wanted = {name: parameter.tensor_shape for name, parameter, _ in hub_tensors(parameters)}
    problems = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in wanted:
            if not HARMLESS.search(name) and not (tied and _repeats_embedding(name, tensors)):
                problems.append(f"unexpected: {name} {list(tensor.shape)} in {tensor.path.name}")
        elif tensor.shape != wanted[name]:
            expected = list(wanted[name])
            problems.append(f"shape: {name} is {list(tensor.shape)} in {tensor.path.name}, expected {expected}")
        elif tensor.dtype not in DTYPES.values():
            problems.append(f"dtype: {name} is {tensor.dtype} in {tensor.path.name}, expected one of {list(DTYPES)}")
    if problems:
        listed = "\n  ".join(problems[:40] + ([f"… and {len(problems) - 40} more"] if len(problems) > 40 else []))
        raise CheckpointError(
            f"{folder}: the tensors and config.json disagree ({len(problems)} problems):\n  {listed}\n"
            "Check that config.json belongs to these files and that the download is complete."
        )


def _repeats_embedding(name: str, tensors: dict[str, TensorFile]) -> bool:
    """A tied checkpoint may carry its head as well, as long as it is the embedding."""
    embedding = tensors.get("model.embed_tokens.weight")
    if name != "lm_head.weight" or embedding is None:
        return False
    return np.array_equal(tensors[name].read(), embedding.read())


def _read(parameter: HubParameter, tensors: dict[str, TensorFile]) -> jax.Array:
    """Assembles one parameter on the devices that own it, one device's part after the other.

    Host memory holds one part at a time; devices with copies of a part share one reading of it.
    """
    shape, sharding = parameter.leaf.shape, parameter.leaf.sharding
    owners: dict[str, list[tuple[jax.Device, tuple[slice, ...]]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        owners.setdefault(str(index), []).append((device, index))
    placed = []
    for group in owners.values():
        part = _read_part(parameter, tensors, group[0][1])
        placed += jax.block_until_ready([jax.device_put(part, device) for device, _ in group])
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def _read_part(parameter: HubParameter, tensors: dict[str, TensorFile], index: tuple[slice, ...]) -> np.ndarray:
    shape = parameter.leaf.shape
    ranges = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    stacked = parameter.names.ndim
    values = np.empty([len(span) for span in ranges], jnp.dtype(parameter.leaf.dtype))
    inner = tuple(slice(span.start, span.stop) for span in ranges[stacked:])
    for place in itertools.product(*(enumerate(span) for span in ranges[:stacked])):
        ours, theirs = tuple(at for at, _ in place), tuple(number for _, number in place)
        name = parameter.names[theirs]
        values[ours] = tensors[name].read(inner).astype(values.dtype)
    return values
