"""Which experts of a layer are merged, and which hidden units of two experts correspond."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from qwen_moe_jax.huggingface.sparse_families import FeedForward
from qwen_moe_jax.storage.tensor import StoredTensor
from qwen_moe_jax.surgery.expert_plan import MATRICES


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Experts that become one.

    Attributes:
        centre: the expert whose row of the router and order of hidden units are kept.
        members: all of them, the centre included.
        weights: what each counts in the mean; they sum to one.
    """

    centre: int
    members: tuple[int, ...]
    weights: tuple[float, ...]


def clusters(tokens_E: np.ndarray, logits_TE: np.ndarray, count: int) -> list[Cluster]:
    """The most chosen experts as centres, each with the experts whose logits have the largest correlation with its own.

    Args:
        tokens_E: tokens that chose each expert.
        logits_TE: of the router.
        count: number of clusters.
    """
    centres = np.sort(np.argsort(-tokens_E, kind="stable")[:count])
    centred = logits_TE - logits_TE.mean(axis=0)
    centred = centred / np.maximum(np.linalg.norm(centred, axis=0), 1e-30)
    nearest = centres[(centred.T @ centred[:, centres]).argmax(axis=1)]
    nearest[centres] = centres
    found = []
    for centre in centres:
        members = np.flatnonzero(nearest == centre)
        counts = tokens_E[members].astype(np.float64)
        weights = counts / counts.sum() if counts.sum() else np.full(len(members), 1 / len(members))
        found.append(Cluster(int(centre), tuple(members.tolist()), tuple(weights.tolist())))
    return found


def aligned_units(layer: FeedForward, centre: int, member: int, tensors: Mapping[str, StoredTensor]) -> np.ndarray:
    """For each hidden unit of an expert the one of another that is most like it, each used once, [F].

    The sum of the products of matched rows of gate and up and columns of down is the largest there is.
    """
    from scipy.optimize import linear_sum_assignment  # late: only `merge` needs it

    width = layer.config.moe.moe_intermediate_size
    likeness = np.zeros((width, width), np.float32)
    for matrix in MATRICES:
        one, two = (tensors[layer.expert(expert, matrix)].read().astype(np.float32) for expert in (centre, member))
        likeness += one.T @ two if matrix == "down" else one @ two.T
    return linear_sum_assignment(likeness, maximize=True)[1]
