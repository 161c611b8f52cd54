"""What each expert of a new sparse layer is made of, and whether the layer computes what the old one did."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from qwen_moe_jax.config import MoEConfig
from qwen_moe_jax.huggingface.sparse_families import MATRICES, FeedForward
from qwen_moe_jax.storage.arrays import ArrayTensor
from qwen_moe_jax.storage.picked import Picked
from qwen_moe_jax.storage.tensor import StoredTensor
from qwen_moe_jax.surgery.slices import Redrawn, Scaled


@dataclasses.dataclass(frozen=True)
class Redraw:
    """A share of an expert's values that is drawn anew.

    Attributes:
        share: of the values, 0 to 1.
        std: standard deviation of the drawn ones.
        seed: of the draw; layer, expert and matrix are added.
    """

    share: float
    std: float
    seed: int


@dataclasses.dataclass(frozen=True)
class NewExpert:
    """An expert that is made of an old one (of the dense layer, number 0).

    Attributes:
        source: number of the old one.
        units: numbers of its hidden units that it has: rows of gate and up, columns of down. None: all of them.
        redraw: what is drawn anew, if anything.
    """

    source: int
    units: np.ndarray | None = None
    redraw: Redraw | None = None


def layer_tensors(
    old: Mapping[str, StoredTensor],
    sources: Sequence[Mapping[str, str]],
    new: FeedForward,
    experts: Sequence[NewExpert],
    router_ED: np.ndarray,
    *,
    number: int,
    factor: float,
) -> dict[str, StoredTensor]:
    """The router and the routed experts of a new layer.

    Args:
        old: tensors of the old model.
        sources: the names of each old expert's matrices, by "gate", "up", "down".
        new: names of the new layer.
        experts: of the new layer.
        router_ED: float32, its router.
        number: of the layer, for the draws.
        factor: that down matrices are multiplied with.
    """
    found: dict[str, StoredTensor] = {}
    for expert, made in enumerate(experts):
        for place, matrix in enumerate(MATRICES):
            tensor = old[sources[made.source][matrix]]
            if made.units is not None:
                tensor = Picked(tensor, int(matrix == "down"), made.units)
            if made.redraw is not None and made.redraw.share:
                seed = (made.redraw.seed, number, expert, place)
                tensor = Redrawn(tensor, made.redraw.share, made.redraw.std, seed)
            if matrix == "down" and factor != 1:
                tensor = Scaled(tensor, factor)
            found[new.expert(expert, matrix)] = tensor
    dtype = old[sources[0]["gate"]].dtype
    found[new.router] = ArrayTensor(router_ED.astype(dtype), "the new router")
    return found


def slices(
    width: int, size: int, count: int, *, shuffle: bool, generator: np.random.Generator
) -> list[np.ndarray | None]:
    """The hidden units of so many experts of `size` units: copies of a layer of `width` units, cut one after the other.

    Args:
        width: units of the old layer or expert.
        size: units of a new expert.
        count: number of new experts; the last copy need not be used up.
        shuffle: bring the units of each copy into an order of its own first.
        generator: of the orders.
    """
    if size == width and not shuffle:
        return [None] * count
    found: list[np.ndarray | None] = []
    while len(found) < count:
        order = generator.permutation(width) if shuffle else np.arange(width)
        found += [order[start : start + size] for start in range(0, width - size + 1, size)]
    return found[:count]


def reasons_against(old_moe: MoEConfig | None, new_moe: MoEConfig, *, width: int, redraw: float) -> tuple[str, ...]:
    """Why the new layer does not compute what the old one did; empty if it does.

    Args:
        old_moe: of the old model; None of a dense one, which counts as one expert of which one is chosen.
        new_moe: of the new one.
        width: hidden units of an old expert.
        redraw: share of values that are drawn anew.
    """
    experts, chosen = (1, 1) if old_moe is None else (old_moe.num_experts, old_moe.num_experts_per_tok)
    size, count, per_token = new_moe.moe_intermediate_size, new_moe.num_experts, new_moe.num_experts_per_tok
    found = []
    if redraw:
        found.append(f"{redraw:.0%} of the new experts' values are drawn anew")
    if width % size:
        found.append(f"experts of {size} hidden units do not divide {width}")
        return tuple(found)
    parts = width // size
    whole = count % (experts * parts) == 0
    if not whole:
        found.append(f"{count} experts are no whole number of copies of {experts * parts}")
    if old_moe is None and per_token % parts:
        found.append(f"{per_token} experts a token are no whole number of copies, each of which is {parts} experts")
    if old_moe is not None and whole and per_token * experts != chosen * count:
        wanted = chosen * count // experts
        found.append(f"{per_token} experts a token, where {wanted} would choose the same ones as before")
    return tuple(found)
