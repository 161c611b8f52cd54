"""Checkpoint folder → model on its mesh: each tensor is read in blocks and placed on the devices that own it."""

import dataclasses
from os import PathLike
from pathlib import Path
from typing import TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh

from qwen_moe_jax.config import ExecutionConfig
from qwen_moe_jax.huggingface.checkpoint import (
    Checkpoint,
    assembled,
    open_checkpoint,
    problems_of,
    require_sound,
)
from qwen_moe_jax.huggingface.generation_config import read_generation_config
from qwen_moe_jax.huggingface.hub import local_folder
from qwen_moe_jax.huggingface.peft import load_adapter
from qwen_moe_jax.huggingface.tensors import HubParameter, hub_parameters
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.storage.placement import local_bytes, place
from qwen_moe_jax.storage.progress import bytes_bar

AnyModel = TypeVar("AnyModel", bound=Model)

#: How the names of all tensors but the head's begin.
_BACKBONE = "model."


def from_pretrained(
    folder: str | PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    param_dtype: str | None = None,
    execution: ExecutionConfig = ExecutionConfig(),
    adapter: str | PathLike[str] | None = None,
) -> CausalLM:
    """Loads a checkpoint as a causal language model.

    Args:
        folder: a Hub folder (config.json beside safetensors or PyTorch files) of a Qwen2, Qwen2-MoE, Qwen3, Qwen3-MoE
            or Mixtral checkpoint, one that `save_orbax` wrote, or a name on the Hub ("Qwen/Qwen3-30B-A3B"), which
            is downloaded to its cache unless it is there.
        mesh: see `make_mesh`; None is one device. Weights go straight to the devices that own them, in blocks: beside
            the model the host holds 400 to 650 MB, whatever its size. Each process reads what its own devices need.
        dtype: of activations and matmuls; None keeps the checkpoint's.
        param_dtype: of the stored weights; None takes `dtype`.
        execution: how the model is run; `dtype` and `param_dtype` here win over those in it.
        adapter: a folder of low-rank adapters in PEFT's layout, or its name on the Hub: they stand beside the weights
            (`merge_lora` adds them).

    Returns:
        The model, in eval mode.

    Raises:
        ConfigError: config.json is missing, or asks for what is not supported.
        CheckpointError: the tensors do not make up the model; all problems in one message.
        ShardingError: a weight does not divide over the mesh.
    """
    model = load_model(CausalLM, folder, mesh=mesh, dtype=dtype, param_dtype=param_dtype, execution=execution)
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def load_model(
    model_class: type[AnyModel],
    folder: str | PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    param_dtype: str | None = None,
    execution: ExecutionConfig = ExecutionConfig(),
    rngs: nnx.Rngs | None = None,
) -> AnyModel:
    """`from_pretrained` for any head.

    Args:
        rngs: draws the head where the checkpoint has none of this kind, to be trained; a head of another kind is left
            where it is. None refuses such a checkpoint.
    """
    checkpoint = open_checkpoint(local_folder(folder))
    dtype = dtype or execution.dtype
    described = model_class(
        checkpoint.config,
        rngs=None,
        mesh=mesh,
        execution=dataclasses.replace(
            execution, dtype=dtype, param_dtype=param_dtype or execution.param_dtype or dtype
        ),
        generation_config=read_generation_config(checkpoint.folder, checkpoint.config),
    )
    spare = () if rngs is None else _draw_missing_head(described, checkpoint, rngs)
    wanted = [parameter for parameter in hub_parameters(described) if not isinstance(parameter.leaf, jax.Array)]
    require_sound(checkpoint.folder, problems_of(checkpoint, wanted, spare))
    read = iter(_read(checkpoint, wanted, Path(folder).name))
    arrays = [leaf if isinstance(leaf, jax.Array) else next(read) for leaf in jax.tree.leaves(described)]
    return jax.tree.unflatten(jax.tree.structure(described), arrays)


def _draw_missing_head(described: Model, checkpoint: Checkpoint, rngs: nnx.Rngs) -> list[str]:
    """Draws the head, unless the checkpoint has one of its kind. Returns another kind of head's tensor names."""
    own = [str(name) for parameter in hub_parameters(described) for name in parameter.names.flat]
    if any(name in checkpoint.tensors for name in own if not name.startswith(_BACKBONE)):
        return []
    described.draw_head(rngs)
    return [name for name in checkpoint.tensors if not name.startswith(_BACKBONE)]


def _read(checkpoint: Checkpoint, parameters: list[HubParameter], name: str) -> list[jax.Array]:
    described = [parameter.leaf for parameter in parameters]
    tensors = [assembled(parameter, checkpoint.tensors) for parameter in parameters]
    with bytes_bar(f"Loading {name}", local_bytes(described)) as advance:
        return place(tensors, described, advance)
