"""The feed-forward part of a layer in float32 by NumPy, one expert in memory at a time."""

from collections.abc import Callable, Mapping

import numpy as np

from qwen_moe_jax.config import MoEConfig
from qwen_moe_jax.huggingface.sparse_families import MATRICES, FeedForward
from qwen_moe_jax.nn.mlp import ACTIVATIONS
from qwen_moe_jax.storage.tensor import StoredTensor

#: (number of an expert, tokens that chose it, their weights, its output of each of them [·, D]) → nothing.
Observer = Callable[[int, np.ndarray, np.ndarray, np.ndarray], None]


def dense(hidden_TD: np.ndarray, names: FeedForward, tensors: Mapping[str, StoredTensor]) -> np.ndarray:
    """Of a dense layer, [T, D]."""
    return _swiglu(hidden_TD, [names.dense(matrix) for matrix in MATRICES], names, tensors)


def sparse(
    hidden_TD: np.ndarray,
    names: FeedForward,
    tensors: Mapping[str, StoredTensor],
    observe: Observer = lambda expert, rows, weights, outputs: None,
) -> np.ndarray:
    """Of a sparse layer, [T, D]; `observe` is called for each expert that was chosen."""
    moe = names.config.moe
    weights_TE = routed_weights(router_logits(hidden_TD, names, tensors), moe)
    total = np.zeros_like(hidden_TD)
    for expert in range(moe.num_experts):
        rows = np.flatnonzero(weights_TE[:, expert])
        if len(rows):
            each = [names.expert(expert, matrix) for matrix in MATRICES]
            outputs = _swiglu(hidden_TD[rows], each, names, tensors)
            observe(expert, rows, weights_TE[rows, expert], outputs)
            total[rows] += weights_TE[rows, expert, None] * outputs
    if moe.shared_expert_intermediate_size:
        gate_T1 = _sigmoid(hidden_TD @ _read(names.shared_gate, tensors).T)
        each = [names.shared(matrix) for matrix in MATRICES]
        total += gate_T1 * _swiglu(hidden_TD, each, names, tensors)
    return total


def router_logits(hidden_TD: np.ndarray, names: FeedForward, tensors: Mapping[str, StoredTensor]) -> np.ndarray:
    """[T, E]."""
    return hidden_TD @ _read(names.router, tensors).T


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
    gate_TF = hidden_TD @ _read(gate, tensors).T
    if names.config.hidden_act == "silu":  # by NumPy: JAX would compile for each number of tokens
        gate_TF *= _sigmoid(gate_TF)
    else:
        gate_TF = np.asarray(ACTIVATIONS[names.config.hidden_act](gate_TF))
    return (gate_TF * (hidden_TD @ _read(up, tensors).T)) @ _read(down, tensors).T


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x))


def _read(name: str, tensors: Mapping[str, StoredTensor]) -> np.ndarray:
    return tensors[name].read().astype(np.float32, copy=False)
