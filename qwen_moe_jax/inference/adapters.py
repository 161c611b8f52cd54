"""Low-rank adapters by name: a model that has several at once, and which of them each row of a batch answers with."""

from collections.abc import Mapping
from os import PathLike

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.peft import load_adapter
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.model.lora import matrices
from qwen_moe_jax.moe.experts import Experts
from qwen_moe_jax.nn.lora import LoraAdapter
from qwen_moe_jax.nn.row_adapters import RowAdapters
from qwen_moe_jax.sharding.rules import BATCH


def with_adapters(model: CausalLM, folders: Mapping[str, str | PathLike[str]]) -> CausalLM:
    """A view of a model's weights with the adapters of these folders; the model itself stays as it is.

    Args:
        model: with weights, without adapters.
        folders: by name, in PEFT's layout, or names on the Hub. Their numbers count from 1, in this order.

    Raises:
        ConfigError, CheckpointError: as `load_adapter`; an adapter of routed experts, whose tokens are sorted by expert
            and no longer in the rows that say which adapter is meant.
    """
    found: dict[str, dict[int, LoraAdapter]] = {}
    for number, (name, folder) in enumerate(folders.items(), start=1):
        view = nnx.merge(*nnx.split(model))
        load_adapter(view, folder)
        for matrix in matrices(view):
            if matrix.lora is None:
                continue
            if isinstance(matrix.owner, Experts):
                raise ConfigError(
                    f"adapter {name!r} ({folder}) has a part for {matrix.path}, expected none for routed experts: they "
                    "are not served by name. `qwen-moe-jax convert --adapter` merges it into a checkpoint of its own."
                )
            found.setdefault(matrix.lora_path, {})[number] = matrix.lora
    model = nnx.merge(*nnx.split(model))
    for matrix in matrices(model):
        if matrix.lora_path in found:
            matrix.attach(RowAdapters(found[matrix.lora_path]))
    return model


def choose_adapters(model: CausalLM, rows_B: np.ndarray) -> None:
    """Says which adapter each row of the next call has: int32 [B], 0 for none."""
    stacks: dict[int | None, jax.Array] = {}
    for matrix in matrices(model):
        if not isinstance(matrix.lora, RowAdapters):
            continue
        repeats = None if matrix.segment is None else matrix.weight.shape[0]
        if repeats not in stacks:
            rows = rows_B if repeats is None else np.broadcast_to(rows_B, (repeats, len(rows_B)))
            spec = P(BATCH) if repeats is None else P(None, BATCH)
            stacks[repeats] = jax.device_put(np.ascontiguousarray(rows), NamedSharding(model.mesh, spec))
        matrix.lora.choose(stacks[repeats], stacked=repeats is not None)
