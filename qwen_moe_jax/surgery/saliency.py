"""How much each expert of each layer matters: by its weights, or by what it does on a text."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from qwen_moe_jax.huggingface.sparse_families import FeedForward
from qwen_moe_jax.storage.progress import bytes_bar
from qwen_moe_jax.storage.tensor import StoredTensor
from qwen_moe_jax.surgery.calibration import ExpertStatistics
from qwen_moe_jax.surgery.expert_plan import MATRICES
from qwen_moe_jax.surgery.measure import measure

Method = Literal["reap", "frequency", "magnitude", "random"]
METHODS: tuple[Method, ...] = get_args(Method)
#: The methods that need a text.
CALIBRATED: tuple[Method, ...] = ("reap", "frequency")


def by_statistics(method: Method, layers: Sequence[ExpertStatistics]) -> list[np.ndarray]:
    """Saliencies [E] of each layer from what the experts did.

    "reap" is the mean, over the tokens that chose the expert, of the router's weight times the norm of its output
    (Router-weighted Expert Activation Pruning, arXiv 2510.13999); "frequency" the number of those tokens.
    """
    if method == "frequency":
        return [layer.tokens.astype(np.float64) for layer in layers]
    return [layer.weighted_norms / np.maximum(layer.tokens, 1) for layer in layers]


def by_magnitude(layers: Sequence[FeedForward], tensors: Mapping[str, StoredTensor]) -> list[np.ndarray]:
    """Saliencies [E] of each layer: the norm of all of an expert's values."""
    found = []
    count = layers[0].config.moe.num_experts
    names = [layer.expert(expert, matrix) for layer in layers for expert in range(count) for matrix in MATRICES]
    with bytes_bar("Reading experts", sum(tensors[name].nbytes for name in names)) as advance:
        measures = measure(((name, tensors[name]) for name in names), advance)
    for layer in layers:
        squares = [
            sum(measures[layer.expert(expert, matrix)].squares for matrix in MATRICES) for expert in range(count)
        ]
        found.append(np.sqrt(squares))
    return found


def by_chance(layers: int, num_experts: int, seed: int) -> list[np.ndarray]:
    """Saliencies [E] of each layer that mean nothing: what a method has to be better than."""
    return [np.random.default_rng((seed, layer)).random(num_experts) for layer in range(layers)]


def strongest(saliency_E: np.ndarray, count: int) -> np.ndarray:
    """The numbers of the most salient experts, in their order; the first of equal ones."""
    return np.sort(np.argsort(-saliency_E, kind="stable")[:count])
