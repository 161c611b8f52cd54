"""Mixtures of fewer experts: pruned (the least salient ones are left out) or merged (averaged with similar ones).

Every layer chooses for itself; all layers keep the same number of experts, since a config.json has one number for all.
Shared experts, dense layers and everything else are kept as they are; a next-token head is left out.
"""

import dataclasses
from collections.abc import Sequence
from os import PathLike

import numpy as np

from qwen_moe_jax.config import MoEConfig
from qwen_moe_jax.config.checks import require_choice
from qwen_moe_jax.errors import ConfigError, RequestError
from qwen_moe_jax.huggingface.checkpoint import Checkpoint, open_checkpoint, problems_of, require_no_problems
from qwen_moe_jax.huggingface.convert import abstract_model, require_other_folder, write_checkpoint
from qwen_moe_jax.huggingface.hub import local_folder
from qwen_moe_jax.huggingface.sparse_families import FeedForward, sparse_layers, with_experts
from qwen_moe_jax.huggingface.tensors import hub_parameters
from qwen_moe_jax.storage.picked import Picked
from qwen_moe_jax.storage.tensor import StoredTensor
from qwen_moe_jax.surgery.calibration import ExpertStatistics, expert_statistics
from qwen_moe_jax.surgery.clusters import Cluster, aligned_units, clusters
from qwen_moe_jax.surgery.expert_plan import MATRICES
from qwen_moe_jax.surgery.saliency import CALIBRATED, Method, by_chance, by_magnitude, by_statistics, strongest
from qwen_moe_jax.surgery.slices import WeightedSum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reduced:
    """What has been written.

    Attributes:
        moe: the experts of the new model.
        groups: for each sparse layer and each new expert, the numbers of the old ones that it consists of.
        saliency: of the old experts of each sparse layer, [E] each.
    """

    moe: MoEConfig
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    saliency: tuple[np.ndarray, ...]


def prune(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    num_experts: int,
    method: Method = "reap",
    tokens: np.ndarray | None = None,
    num_experts_per_tok: int | None = None,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
) -> Reduced:
    """Writes the mixture with its most salient experts alone, and their rows of the router.

    Args:
        source: a mixture's folder, or its name on the Hub.
        target: folder to write.
        num_experts: that each layer keeps.
        method: what saliency is: see `saliency`.
        tokens: int [B, T]; the calibration text, for "reap" and "frequency". Each row is a text of its own.
        num_experts_per_tok: of the result; None is that of the model, or all experts if they are fewer.
        seed: of "random".
        max_shard_size: bytes of a file.

    Raises:
        ConfigError: a dense model, or numbers that do not fit.
        RequestError: a method that needs tokens, and none are given.
        CheckpointError: the folder does not load, or the target cannot be written.
    """
    require_choice("method", method, Method)
    if method in CALIBRATED and tokens is None:
        raise RequestError(
            f"method={method!r} is measured on a text: give one (--calibrate FILE; from Python, tokens), or take "
            "method 'magnitude' or 'random'."
        )
    checkpoint, moe = _opened(source, target, num_experts, num_experts_per_tok)
    layers = sparse_layers(checkpoint.config)
    if method in CALIBRATED:
        saliency = by_statistics(method, expert_statistics(checkpoint, np.asarray(tokens)))
    elif method == "magnitude":
        saliency = by_magnitude(layers, checkpoint.tensors)
    else:
        saliency = by_chance(len(layers), checkpoint.config.moe.num_experts, seed)
    kept = [strongest(of_layer, num_experts) for of_layer in saliency]
    groups = [[Cluster(int(expert), (int(expert),), (1.0,)) for expert in of_layer] for of_layer in kept]
    return _write(checkpoint, moe, groups, saliency, target, max_shard_size)


def merge(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    num_experts: int,
    tokens: np.ndarray,
    num_experts_per_tok: int | None = None,
    max_shard_size: int | str = "5GB",
) -> Reduced:
    """Writes the mixture with each expert merged into the one of the most chosen that is most like it.

    As M-SMoE (arXiv 2310.01334): the `num_experts` that most tokens choose are centres, every other expert joins the
    centre whose router logits, over the tokens, have the largest correlation with its own; hidden units are brought
    into the order of the centre's (a matching of their weights), and the matrices are averaged by how often each expert
    was chosen. The new expert has its centre's row of the router.

    Args:
        source, target, num_experts, num_experts_per_tok, max_shard_size: as of `prune`.
        tokens: int [B, T]; the calibration text.

    Raises:
        ConfigError, CheckpointError: as `prune`.
    """
    checkpoint, moe = _opened(source, target, num_experts, num_experts_per_tok)
    statistics = expert_statistics(checkpoint, np.asarray(tokens))
    groups = [clusters(layer.tokens, layer.logits, num_experts) for layer in statistics]
    return _write(checkpoint, moe, groups, by_statistics("frequency", statistics), target, max_shard_size)


def statistics_of(source: str | PathLike[str], tokens: np.ndarray) -> list[ExpertStatistics]:
    """What each expert of each sparse layer does on rows of tokens; see `expert_statistics`."""
    checkpoint = open_checkpoint(local_folder(source, drop_mtp=True), drop_mtp=True)
    require_no_problems(checkpoint.folder, problems_of(checkpoint, hub_parameters(abstract_model(checkpoint))))
    return expert_statistics(checkpoint, np.asarray(tokens))


def _opened(
    source: str | PathLike[str], target: str | PathLike[str], num_experts: int, num_experts_per_tok: int | None
) -> tuple[Checkpoint, MoEConfig]:
    """The source, and the experts of the target."""
    folder = local_folder(source)
    require_other_folder(folder, target)
    checkpoint = open_checkpoint(folder, drop_mtp=True)
    old = checkpoint.config.moe
    if old is None:
        raise ConfigError(f"{folder}: the model is dense: expected a mixture of experts.")
    if not 1 <= num_experts < old.num_experts:
        raise ConfigError(f"num_experts={num_experts}: expected 1 to {old.num_experts - 1}, fewer than the model has.")
    chosen = num_experts_per_tok or min(old.num_experts_per_tok, num_experts)
    require_no_problems(folder, problems_of(checkpoint, hub_parameters(abstract_model(checkpoint))))
    return checkpoint, dataclasses.replace(old, num_experts=num_experts, num_experts_per_tok=chosen)


def _write(
    checkpoint: Checkpoint,
    moe: MoEConfig,
    groups: Sequence[Sequence[Cluster]],
    saliency: Sequence[np.ndarray],
    target: str | PathLike[str],
    max_shard_size: int | str,
) -> Reduced:
    config = with_experts(checkpoint.config, moe)
    old_layers, new_layers = sparse_layers(checkpoint.config), sparse_layers(config)
    old = checkpoint.tensors
    routed = {
        layer.expert(expert, matrix)
        for layer in old_layers
        for expert in range(checkpoint.config.moe.num_experts)
        for matrix in MATRICES
    }
    tensors = {name: tensor for name, tensor in old.items() if name not in routed}
    for before, after, own in zip(old_layers, new_layers, groups, strict=True):
        centres = np.array([cluster.centre for cluster in own])
        tensors[after.router] = Picked(old[before.router], 0, centres)
        for number, cluster in enumerate(own):
            tensors |= _merged(cluster, before, after, number, old)
    write_checkpoint(
        dataclasses.replace(checkpoint, config=config, tensors=tensors), target, max_shard_size=max_shard_size
    )
    numbers = tuple(tuple(cluster.members for cluster in own) for own in groups)
    return Reduced(moe=moe, groups=numbers, saliency=tuple(saliency))


def _merged(
    cluster: Cluster, before: FeedForward, after: FeedForward, number: int, tensors: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """A new expert: an old one, or the mean of several with their hidden units in the order of the centre's."""
    others = [member for member in cluster.members if member != cluster.centre]
    orders = {member: aligned_units(before, cluster.centre, member, tensors) for member in others}
    found: dict[str, StoredTensor] = {}
    for matrix in MATRICES:
        parts = [tensors[before.expert(member, matrix)] for member in cluster.members]
        if others:
            picked = [
                Picked(part, int(matrix == "down"), orders[member]) if member in orders else part
                for part, member in zip(parts, cluster.members, strict=True)
            ]
            found[after.expert(number, matrix)] = WeightedSum(tuple(picked), cluster.weights)
        else:
            found[after.expert(number, matrix)] = parts[0]
    return found
