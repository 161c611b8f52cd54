"""Checkpoint folder → checkpoint folder of another format, block by block, without a model in memory."""

import functools
import shutil
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Literal

from qwen_moe_jax.config import DTypeLike, ExecutionConfig
from qwen_moe_jax.config.checks import dtype_name, require_choice
from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.huggingface.checkpoint import (
    ORBAX,
    Checkpoint,
    non_finite,
    open_checkpoint,
    problems_of,
    require_no_problems,
    stacked_tensor,
)
from qwen_moe_jax.huggingface.fields import read_json
from qwen_moe_jax.huggingface.generation_config import read_generation_config
from qwen_moe_jax.huggingface.hub import local_folder
from qwen_moe_jax.huggingface.linear_rows import in_published_order
from qwen_moe_jax.huggingface.peft import merged, open_adapter
from qwen_moe_jax.huggingface.save import configs_to_hub, shard_limit, write_configs, write_shards
from qwen_moe_jax.huggingface.target import checkpoint_folder, is_card, is_companion, require_target
from qwen_moe_jax.huggingface.tensors import HubParameter, hub_parameters, hub_tensors
from qwen_moe_jax.huggingface.unused_fields import say_once, say_unused_fields
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.storage.progress import bytes_bar
from qwen_moe_jax.storage.tensor import CastTensor

Format = Literal["hub", "orbax"]


def convert(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    to: Format = "hub",
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = "5GB",
    check_finite: bool = False,
    adapter: str | PathLike[str] | None = None,
    drop_mtp: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Writes a checkpoint in another format.

    No device is used, and memory holds a few blocks, however large a tensor is. The target is written under a temporary
    name and renamed when complete. Tokenizer, chat template and licence are copied; README.md only where the model
    stays the same: of a plain folder, without an adapter.

    Args:
        source: a folder that `from_pretrained` reads, or a name on the Hub.
        target: folder to write. Weights and configs of an existing checkpoint are replaced, its other files are kept
            and named on stderr.
        to: "hub" is safetensors under the names of the family's published checkpoints, "orbax" the format of
            `save_orbax`.
        dtype: of the weights, anything that `jnp.dtype` takes; None keeps the checkpoint's (of an FP8 one, the dtype
            that config.json names).
        max_shard_size: with "hub", bytes of a file, or for example "5GB".
        adapter: a folder of low-rank adapters in PEFT's layout, or its name on the Hub, added to the weights in float32
            and rounded once.
        drop_mtp: leave out the next-token head (`mtp.*`) that the checkpoint may have.
        check_finite: reads all weights once before writing, and refuses infinities and NaN.
        check: called with the complete folder, still under its temporary name; if it raises, the target is unchanged.

    Raises:
        ConfigError: config.json is not supported; an unknown format or dtype.
        CheckpointError: tensors are missing, damaged or do not fit the config, all problems in one message; the target
            is the source, or a folder of other files.
    """
    require_choice("to", to, Format)
    dtype = None if dtype is None else dtype_name("dtype", dtype)
    shard_limit(max_shard_size)
    checkpoint = open_checkpoint(local_folder(source, drop_mtp=drop_mtp), drop_mtp=drop_mtp)
    say_unused_fields(checkpoint.folder)
    require_other_folder(checkpoint.folder, target)
    require_no_problems(checkpoint.folder, problems_of(checkpoint, hub_parameters(abstract_model(checkpoint, dtype))))
    if adapter is not None:
        checkpoint = merged(checkpoint, open_adapter(adapter, checkpoint.config))
    stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    if check_finite:
        with bytes_bar(f"Checking {checkpoint.folder.name}", stored) as advance:
            require_no_problems(checkpoint.folder, non_finite(checkpoint.tensors, advance))
    # Of a quantised folder, a plain one is written: what the card says of bits and libraries is not true of it.
    same_model = adapter is None and "quantization_config" not in read_json(checkpoint.folder / "config.json")
    write_checkpoint(
        checkpoint, target, to=to, dtype=dtype, max_shard_size=max_shard_size, same_model=same_model, check=check
    )


def require_other_folder(source: Path, target: str | PathLike[str]) -> None:
    """Checks that a target is not the source, and may be written; see `require_target`.

    Raises:
        CheckpointError: it is the source, or a folder of other files.
    """
    if Path(target).resolve() == source.resolve():
        raise CheckpointError(f"{target} is the checkpoint itself: give another folder to write to.")
    require_target(target)


def write_checkpoint(
    checkpoint: Checkpoint,
    target: str | PathLike[str],
    *,
    to: Format = "hub",
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = "5GB",
    same_model: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Writes an opened checkpoint, whose config and tensors may have been changed, block by block; see `convert`.

    Args:
        same_model: whether the source's model card is true of the result, and is copied.

    Raises:
        ConfigError: the family cannot express the config.
        CheckpointError: tensors do not fit the config; the target cannot be written.
    """
    target, limit = Path(target).absolute(), shard_limit(max_shard_size)
    abstract = abstract_model(checkpoint, dtype)
    parameters = hub_parameters(abstract)
    require_no_problems(checkpoint.folder, problems_of(checkpoint, parameters))
    written = sum(parameter.leaf.size * parameter.leaf.dtype.itemsize for parameter in parameters)
    with checkpoint_folder(target) as new, bytes_bar(f"Writing {target.name}", written) as advance:
        write_configs(new, configs_to_hub(abstract))
        _copy_companions(checkpoint.folder, new, same_model=same_model)
        write = _write_orbax if to == "orbax" else functools.partial(_write_hub, limit=limit)
        write(new, checkpoint, parameters, advance)
        if check is not None:
            check(new)


def _write_orbax(
    folder: Path, checkpoint: Checkpoint, parameters: list[HubParameter], advance: Callable[[int], None]
) -> None:
    from qwen_moe_jax.storage.orbax_stream import stream_tensors

    stacked = {parameter.path: stacked_tensor(parameter, checkpoint.tensors) for parameter in parameters}
    stream_tensors(folder / ORBAX, stacked, advance=advance)


def _write_hub(
    folder: Path,
    checkpoint: Checkpoint,
    parameters: list[HubParameter],
    advance: Callable[[int], None],
    *,
    limit: int,
) -> None:
    rounded = {
        name: CastTensor(checkpoint.tensors[name], str(parameter.leaf.dtype))
        for name, parameter, _ in hub_tensors(parameters)
    }
    write_shards(folder, in_published_order(rounded, checkpoint.config), limit, advance)


def abstract_model(checkpoint: Checkpoint, dtype: DTypeLike | None = None) -> Model:
    """The model of a checkpoint with `jax.ShapeDtypeStruct` leaves."""
    return checkpoint.head(
        checkpoint.config,
        rngs=None,
        execution=ExecutionConfig(dtype=dtype),
        generation_config=read_generation_config(checkpoint.folder, checkpoint.config),
    )


def _copy_companions(source: Path, target: Path, *, same_model: bool) -> None:
    """Copies tokenizer, chat template and licence, and the model card where it is true of what is written."""
    for path in sorted(source.iterdir()):
        if is_companion(path.name) or (same_model and is_card(path.name)):
            # Links, as in the Hub's cache, are followed.
            shutil.copytree(path, target / path.name) if path.is_dir() else shutil.copy2(path, target / path.name)
        elif is_card(path.name):
            say_once(f"{path} is about the model that it came with, and was not copied; `card` writes one of the new.")
