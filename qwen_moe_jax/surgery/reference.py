"""The feed-forward part of a layer on a few tokens, in float32 by NumPy, one expert in memory at a time."""

from collections.abc import Mapping

import numpy as np

from qwen_moe_jax.config import MoEConfig
from qwen_moe_jax.huggingface.sparse_families import FeedForward
from qwen_moe_jax.nn.mlp import ACTIVATIONS
from qwen_moe_jax.storage.tensor import StoredTensor


def dense(hidden_TD: np.ndarray, names: FeedForward, tensors: Mapping[str, StoredTensor]) -> np.ndarray:
    """Of a dense layer, [T, D]."""
    return _swiglu(hidden_TD, [names.dense(matrix) for matrix in ("gate", "up", "down")], names, tensors)


def sparse(hidden_TD: np.ndarray, names: FeedForward, tensors: Mapping[str, StoredTensor]) -> np.ndarray:
    """Of a sparse layer, [T, D]."""
    moe = names.config.moe
    logits_TE = hidden_TD @ _read(names.router, tensors).T
    weights_TE = routed_weights(logits_TE, moe)
    total = np.zeros_like(hidden_TD)
    for expert in range(moe.num_experts):
        rows = np.flatnonzero(weights_TE[:, expert])
        if len(rows):
            each = [names.expert(expert, matrix) for matrix in ("gate", "up", "down")]
            total[rows] += weights_TE[rows, expert, None] * _swiglu(hidden_TD[rows], each, names, tensors)
    if moe.shared_expert_intermediate_size:
        gate_T1 = 1 / (1 + np.exp(-(hidden_TD @ _read(names.shared_gate, tensors).T)))
        each = [names.shared(matrix) for matrix in ("gate", "up", "down")]
        total += gate_T1 * _swiglu(hidden_TD, each, names, tensors)
    return total


def routed_weights(logits_TE: np.ndarray, moe: MoEConfig) -> np.ndarray:
    """What each expert counts for each token, [T, E]; 0 for those that were not chosen."""
    probs_TE = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
    probs_TE /= probs_TE.sum(axis=1, keepdims=True)
    chosen_TA = np.argsort(-probs_TE, axis=1, kind="stable")[:, : moe.num_experts_per_tok]
    weights_TE = np.zeros_like(probs_TE)
    np.put_along_axis(weights_TE, chosen_TA, np.take_along_axis(probs_TE, chosen_TA, axis=1), axis=1)
    if moe.norm_topk_prob:
        weights_TE /= weights_TE.sum(axis=1, keepdims=True)
    return weights_TE


def _swiglu(
    hidden_TD: np.ndarray, matrices: list[str], names: FeedForward, tensors: Mapping[str, StoredTensor]
) -> np.ndarray:
    gate, up, down = matrices
    activation = ACTIVATIONS[names.config.hidden_act]
    inner = np.asarray(activation(hidden_TD @ _read(gate, tensors).T)) * (hidden_TD @ _read(up, tensors).T)
    return inner @ _read(down, tensors).T


def _read(name: str, tensors: Mapping[str, StoredTensor]) -> np.ndarray:
    return tensors[name].read().astype(np.float32, copy=False)
