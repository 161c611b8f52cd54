"""Checkpoint folder → model on a mesh: each process reads its devices' shards, block by block."""

import dataclasses
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh

from qwen_moe_jax.config import DTypeLike, ExecutionConfig, GenerationConfig, ModelConfig
from qwen_moe_jax.config.checks import dtype_name
from qwen_moe_jax.config.weights import Weights
from qwen_moe_jax.huggingface.checkpoint import (
    MTP,
    Checkpoint,
    open_checkpoint,
    problems_of,
    require_no_problems,
    stacked_tensor,
)
from qwen_moe_jax.huggingface.generation_config import read_generation_config
from qwen_moe_jax.huggingface.hub import local_folder
from qwen_moe_jax.huggingface.low_bit import float_parameters, stored_tensors
from qwen_moe_jax.huggingface.peft import load_adapter
from qwen_moe_jax.huggingface.tensors import HubParameter, hub_parameters
from qwen_moe_jax.huggingface.unused_fields import say_unused_fields
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.storage.placement import local_bytes, place
from qwen_moe_jax.storage.progress import bytes_bar
from qwen_moe_jax.suggest import refuse_hub_arguments

_ARGUMENTS = (
    "mesh", "dtype", "param_dtype", "weights", "execution", "adapter", "generation_config", "drop_mtp", "rngs",
    "num_labels", "revision", "token", "cache_dir",
)  # fmt: skip

AnyModel = TypeVar("AnyModel", bound=Model)

#: Prefix of all tensor names except the heads'.
_BACKBONE = "model."


def from_pretrained(
    folder: str | PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    weights: Weights | None = None,
    execution: ExecutionConfig = ExecutionConfig(),
    adapter: str | PathLike[str] | None = None,
    generation_config: GenerationConfig | None = None,
    drop_mtp: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    **hub_arguments: Any,
) -> CausalLM:
    """Loads a checkpoint as a causal language model.

    Args:
        folder: a Hub folder (config.json with safetensors or PyTorch files) of a Qwen2, Qwen2-MoE, Qwen3, Qwen3-MoE,
            Qwen3-Next, Qwen3.5 (of a multimodal one, the text model) or Mixtral checkpoint, one that `save_orbax`
            wrote, or a name on the Hub ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B@main"), of which the files that are
            needed are downloaded if they are not cached.
        mesh: see `make_mesh`; None is one device. Each process reads the shards of its own devices in blocks: besides
            the model, the host holds 400 to 650 MB, whatever its size.
        dtype: of activations and matmuls, anything that `jnp.dtype` takes; None keeps the checkpoint's.
        param_dtype: of the stored weights; None is `dtype`.
        weights: "int8" or "int4" quantise the layers' matrices while they are read, so that the floats never exist
            whole; see `ExecutionConfig.weights`. None is the execution's.
        execution: how the model is run; the arguments `dtype`, `param_dtype` and `weights` override its fields.
        adapter: a folder of low-rank adapters in PEFT's layout, or its name on the Hub. They are kept separate from the
            weights; `merge_lora` adds them.
        generation_config: how text is generated; None reads generation_config.json, the adapter's if it has one.
        drop_mtp: load the model without the next-token head (`mtp.*`) that the checkpoint may have.
        revision: of a name on the Hub, a branch, a tag or a commit; None is that of the name, or main.
        token: of the Hub, for private and gated models; None is HF_TOKEN, or that of `hf auth login`.
        cache_dir: folder of downloads; None is HF_HUB_CACHE.
        hub_arguments: none is taken; those of transformers are refused with the name of ours.

    Returns:
        The model, in eval mode.

    Raises:
        ConfigError: config.json is missing or not supported.
        CheckpointError: tensors are missing, damaged or do not fit the config; all problems in one message.
        ShardingError: a weight does not divide over the mesh.
        TypeError: an argument of another name.
    """
    refuse_hub_arguments("from_pretrained", hub_arguments, _ARGUMENTS)
    model = load_model(
        CausalLM,
        folder,
        mesh=mesh,
        dtype=dtype,
        param_dtype=param_dtype,
        weights=weights,
        execution=execution,
        generation_config=generation_config,
        drop_mtp=drop_mtp,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
    )
    if adapter is not None:
        load_adapter(model, adapter)
        if generation_config is not None:
            model.generation_config = generation_config
    return model


def load_model(
    model_class: type[AnyModel],
    folder: str | PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    weights: Weights | None = None,
    execution: ExecutionConfig = ExecutionConfig(),
    generation_config: GenerationConfig | None = None,
    drop_mtp: bool = False,
    rngs: nnx.Rngs | jax.Array | int | None = None,
    num_labels: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    **hub_arguments: Any,
) -> AnyModel:
    """`from_pretrained` for any head.

    Args:
        rngs: initialises the head if the checkpoint has none of this kind; another kind of head in the checkpoint is
            ignored. None refuses such a checkpoint.
        num_labels: of a classifier's head that `rngs` initialises; None is the config's.
        hub_arguments: none is taken; those of transformers are refused with the name of ours.
    """
    refuse_hub_arguments("from_pretrained", hub_arguments, _ARGUMENTS)
    # Next-token heads are a language model's.
    drop_mtp = drop_mtp or not issubclass(model_class, CausalLM)
    source = local_folder(folder, revision=revision, token=token, cache_dir=cache_dir, drop_mtp=drop_mtp)
    checkpoint = open_checkpoint(source, drop_mtp=drop_mtp)
    if num_labels is not None:
        checkpoint = dataclasses.replace(checkpoint, config=_with_labels(checkpoint, num_labels))
    say_unused_fields(checkpoint.folder)
    dtype = execution.dtype if dtype is None else dtype_name("dtype", dtype)
    param_dtype = execution.param_dtype if param_dtype is None else dtype_name("param_dtype", param_dtype)
    abstract = model_class(
        checkpoint.config,
        rngs=None,
        mesh=mesh,
        execution=dataclasses.replace(
            execution, dtype=dtype, param_dtype=param_dtype or dtype, weights=weights or execution.weights
        ),
        generation_config=generation_config or read_generation_config(checkpoint.folder, checkpoint.config),
    )
    own, others = _heads(abstract, checkpoint)
    lacks_head = not any(name in checkpoint.tensors for name in own)
    if lacks_head and rngs is not None:
        abstract.draw_head(rngs)
    # Another kind's head is not the problem of a folder that lacks the model's own.
    optional = others if lacks_head and (own or rngs is not None) else []
    wanted = [parameter for parameter in hub_parameters(abstract) if not isinstance(parameter.leaf, jax.Array)]
    require_no_problems(checkpoint.folder, problems_of(checkpoint, float_parameters(wanted), optional))
    read = iter(_read(checkpoint, wanted, Path(folder).name))
    arrays = [leaf if isinstance(leaf, jax.Array) else next(read) for leaf in jax.tree.leaves(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def _with_labels(checkpoint: Checkpoint, num_labels: int) -> ModelConfig:
    names = ("id2label", "label2id", "num_labels")  # of the old head
    fields = tuple(pair for pair in checkpoint.config.hub_fields if pair[0] not in names)
    same = num_labels == checkpoint.config.num_labels
    return (
        checkpoint.config if same else dataclasses.replace(checkpoint.config, num_labels=num_labels, hub_fields=fields)
    )


def _heads(abstract: Model, checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    """Names of the tensors of the model's head, and of all tensors of a checkpoint outside the decoder."""
    own = [str(name) for parameter in hub_parameters(abstract) for name in parameter.names.flat]
    outside = (_BACKBONE, MTP)
    heads = [[name for name in names if not name.startswith(outside)] for names in (own, checkpoint.tensors)]
    return heads[0], heads[1]


def _read(checkpoint: Checkpoint, parameters: list[HubParameter], name: str) -> list[jax.Array]:
    abstract = [parameter.leaf for parameter in parameters]
    tensors = stored_tensors(parameters, lambda parameter: stacked_tensor(parameter, checkpoint.tensors))
    with bytes_bar(f"Loading {name}", local_bytes(abstract)) as advance:
        return place(tensors, abstract, advance)
