"""What each expert does on a text: a forward pass that holds one layer's attention and one expert at a time.

Attention (or the gated delta rule) is the package's own, on one layer at a time whose feed-forward part is zero; the
feed-forward parts are `reference`'s. All in float32. The embedding's rows are read for the tokens alone.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import ExecutionConfig, LayerKind, ModelConfig
from qwen_moe_jax.huggingface.checkpoint import Checkpoint
from qwen_moe_jax.huggingface.layouts import EMBEDDING
from qwen_moe_jax.huggingface.sparse_families import FeedForward
from qwen_moe_jax.huggingface.tensors import hub_parameters
from qwen_moe_jax.inference.progress import progress_bar
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.model.inputs import TokenContext
from qwen_moe_jax.model.layer import DecoderLayer
from qwen_moe_jax.model.rotary import rotary_tables
from qwen_moe_jax.nn.matmul import matmul_precision
from qwen_moe_jax.sharding.explicit import with_explicit_axes
from qwen_moe_jax.sharding.rules import BATCH
from qwen_moe_jax.storage.tensor import StoredTensor
from qwen_moe_jax.surgery import reference

#: Rows whose attention is computed at once.
_ROWS = 8
_STACK = "model.layers.segments.0.0."


@dataclasses.dataclass(frozen=True)
class ExpertStatistics:
    """What the experts of one sparse layer did.

    Attributes:
        tokens: int64 [E]; tokens that chose the expert.
        weighted_norms: float64 [E]; sum over those tokens of the router's weight times the norm of the output.
        logits: float32 [T, E]; of the router, of all tokens.
    """

    tokens: np.ndarray
    weighted_norms: np.ndarray
    logits: np.ndarray


def expert_statistics(checkpoint: Checkpoint, tokens_BT: np.ndarray) -> list[ExpertStatistics]:
    """The statistics of each sparse layer on rows of tokens, of which none is padding.

    Args:
        checkpoint: of a mixture of experts, without problems.
        tokens_BT: int32; each row is a text of its own.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    hidden_BTD = _embedded(tensors[EMBEDDING], tokens_BT)
    found: list[ExpertStatistics] = []
    mixers: dict[LayerKind, CausalLM] = {}
    with progress_bar("layers") as advance:
        for layer, kind in enumerate(config.layers):
            alone = mixers.setdefault(kind, _layer_alone(config, kind))
            hidden_BTD = _mixed(alone, hidden_BTD, tensors, layer)
            names = FeedForward(config, f"model.layers.{layer}")
            norm = tensors[f"{names.path}.post_attention_layernorm.weight"].read().astype(np.float32)
            normed_TD = _normalised(hidden_BTD.reshape(-1, config.hidden_size), norm, config)
            if kind.mlp == "sparse":
                out_TD, statistics = _observed(normed_TD, names, tensors)
                found.append(statistics)
            else:
                out_TD = reference.dense(normed_TD, names, tensors)
            hidden_BTD = hidden_BTD + out_TD.reshape(hidden_BTD.shape)
            advance(layer + 1, len(config.layers))
    return found


def _observed(
    normed_TD: np.ndarray, names: FeedForward, tensors: Mapping[str, StoredTensor]
) -> tuple[np.ndarray, ExpertStatistics]:
    count = names.config.moe.num_experts
    tokens, norms = np.zeros(count, np.int64), np.zeros(count)

    def observe(expert: int, rows: np.ndarray, weights: np.ndarray, outputs: np.ndarray) -> None:
        tokens[expert] = len(rows)
        norms[expert] = (weights * np.linalg.norm(outputs, axis=1)).sum(dtype=np.float64)

    out_TD = reference.sparse(normed_TD, names, tensors, observe)
    return out_TD, ExpertStatistics(tokens, norms, reference.router_logits(normed_TD, names, tensors))


def _embedded(table: StoredTensor, tokens_BT: np.ndarray) -> np.ndarray:
    distinct, at = np.unique(tokens_BT, return_inverse=True)
    rows = [table.read((slice(int(token), int(token) + 1), slice(0, table.shape[1]))) for token in distinct]
    return np.concatenate(rows).astype(np.float32)[at.reshape(tokens_BT.shape)]


def _normalised(hidden_TD: np.ndarray, weight_D: np.ndarray, config: ModelConfig) -> np.ndarray:
    scale = np.mean(hidden_TD**2, axis=1, keepdims=True) + np.float32(config.rms_norm_eps)
    return hidden_TD / np.sqrt(scale) * (weight_D + np.float32(config.zero_centered_norm))


def _layer_alone(config: ModelConfig, kind: LayerKind) -> CausalLM:
    """An abstract model of one such layer, with a feed-forward part of one hidden unit."""
    alone = dataclasses.replace(kind, mlp="dense")
    linear = config.linear_attention if kind.mixer == "linear" else None
    window = config.attention.sliding_window if kind.mixer == "sliding" else None
    small = dataclasses.replace(
        config,
        layers=(alone,),
        moe=None,
        intermediate_size=1,
        num_mtp_layers=0,
        linear_attention=linear,
        attention=dataclasses.replace(config.attention, sliding_window=window),
        dtype="float32",
    )
    return CausalLM(small, rngs=None, execution=ExecutionConfig(dtype="float32"))


def _mixed(alone: CausalLM, hidden_BTD: np.ndarray, tensors: Mapping[str, StoredTensor], layer: int) -> np.ndarray:
    """The hidden states after a layer's mixer was added to them."""
    arrays = []
    for parameter in hub_parameters(alone):
        if not parameter.path.startswith(_STACK):
            continue
        name = str(parameter.names.flat[0]).replace("model.layers.0.", f"model.layers.{layer}.", 1)
        if ".mlp." in parameter.path:
            arrays.append(np.zeros(parameter.leaf.shape, np.float32))
        else:
            arrays.append(tensors[name].read().astype(np.float32).reshape(parameter.leaf.shape))
    stacked = alone.model.layers.segments[0][0]
    loaded = jax.tree.unflatten(jax.tree.structure(stacked), arrays)
    out = np.empty_like(hidden_BTD)
    for start in range(0, len(hidden_BTD), _ROWS):
        rows = hidden_BTD[start : start + _ROWS]
        padded = np.pad(rows, ((0, _ROWS - len(rows)), (0, 0), (0, 0)))
        mixed = _run(loaded, padded, config=alone.config, execution=alone.execution_in_use, mesh=alone.mesh)
        out[start : start + _ROWS] = np.asarray(mixed)[: len(rows)]
    return out


@functools.partial(jax.jit, static_argnames=("config", "execution", "mesh"))
def _run(
    stacked: DecoderLayer, hidden_BTD: jax.Array, *, config: ModelConfig, execution: ExecutionConfig, mesh: Mesh
) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(hidden_BTD.shape[1], dtype=jnp.int32), hidden_BTD.shape[:2])

    def run(stacked: DecoderLayer, hidden_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        rotary = rotary_tables(
            config.rope, config.rotary_dim, config.max_position_embeddings, positions_BT, jnp.dtype("float32")
        )
        context = TokenContext(segment_ids_BT=jnp.ones_like(positions_BT), rotary=rotary)
        layer = jax.tree.map(lambda x: x[0], stacked)
        return layer(hidden_BTD, context, execution).hidden_BTD

    specs = (P(BATCH, None, None), P(BATCH, None))
    with matmul_precision("float32"):
        return with_explicit_axes(run, mesh, specs)(stacked, hidden_BTD, positions_BT)
