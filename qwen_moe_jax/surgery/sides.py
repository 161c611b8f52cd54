"""The two checkpoints of a comparison as the searches for a cause see them."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import numpy as np

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.storage.tensor import Index, StoredTensor
from qwen_moe_jax.surgery.measure import Difference, Measure, Pair, compare, compare_arrays, row_blocks, transposed
from qwen_moe_jax.surgery.tolerance import bounds

#: Fingerprints of the same matrix are apart by its rounding, as a share of its norm: float8's is about 0.03.
_NEAR = 0.2
#: |B − A| / |A| of matrices that are the same but for some training.
CLOSE = 0.1
_RELATED = 0.7


@dataclasses.dataclass(frozen=True)
class Sides:
    """Everything known about A and B once each has been read.

    Attributes:
        config: of A.
        first, second: the tensors of A and B by name.
        measures: of A's and of B's tensors.
        differences: of tensors with the same name and shape.
    """

    config: ModelConfig
    first: Mapping[str, StoredTensor]
    second: Mapping[str, StoredTensor]
    measures: tuple[Mapping[str, Measure], Mapping[str, Measure]]
    differences: Mapping[str, Difference]

    def is_same(self, name: str) -> bool:
        """Whether a tensor is the same in A and B up to rounding."""
        return name in self.differences and is_rounded(self.differences[name])

    def is_related(self, name: str) -> bool:
        """Whether B's tensor is a changed form of A's of the same name: no other tensor needs to be looked for."""
        return name in self.differences and self.differences[name].correlation > _RELATED

    @functools.cached_property
    def prints(self) -> Mapping[tuple[int, ...], tuple[list[str], np.ndarray]]:
        """Names and fingerprints [·, 8] of A's tensors, by shape."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, tensor in self.first.items():
            groups.setdefault(tensor.shape, []).append(name)
        found = self.measures[0]
        return {s: (names, np.stack([found[name].fingerprint for name in names])) for s, names in groups.items()}


@dataclasses.dataclass(frozen=True)
class Match:
    """A tensor of A that a tensor of B equals.

    Attributes:
        name: of A's.
        is_transposed: whether it is A's, transposed.
        distance: |B − A| / |A|; 0 if the difference is rounding.
    """

    name: str
    is_transposed: bool
    distance: float


def is_rounded(difference: Difference) -> bool:
    """Whether the difference is rounding, or none."""
    same_gaps = difference.first.non_finite == difference.second.non_finite
    return difference.equal or any(difference.within) or (difference.changed == 0 and same_gaps)


def find_match(name: str, sides: Sides, candidates: Iterable[str] | None = None) -> Match | None:
    """The tensor of A that B's tensor of this name is, by fingerprints, then value by value.

    Args:
        name: of the tensor in B.
        sides: both.
        candidates: names of A to look among, None for all; the same name counts only as transposed.
    """
    measure = sides.measures[1][name]
    shape = sides.second[name].shape
    near: list[tuple[float, str, bool]] = []
    if not measure.norm or len(shape) < 2:
        return None
    among = None if candidates is None else set(candidates)
    for turned in (False, True):
        wanted = shape if not turned else (shape[1], shape[0], *shape[2:])
        fitting, prints = sides.prints.get(wanted, ([], np.empty((0, 1))))
        own = transposed(measure.fingerprint) if turned else measure.fingerprint
        apart = np.abs(prints - own).max(axis=1, initial=0.0) / measure.norm
        likely = [at for at in np.flatnonzero(apart < _NEAR) if among is None or fitting[at] in among]
        likely = [at for at in likely if turned or fitting[at] != name]
        near += [(float(apart[at]), fitting[at], turned) for at in sorted(likely, key=lambda at: apart[at])[:3]]
    for _, one, turned in sorted(near):
        difference = compare_as(sides.first[one], sides.second[name], is_transposed=turned)
        if is_rounded(difference):
            return Match(one, turned, 0.0)
        if difference.distance < CLOSE:
            return Match(one, turned, difference.distance)
    return None


def compare_as(first: StoredTensor, second: StoredTensor, *, is_transposed: bool = False) -> Difference:
    """The difference of B's tensor to A's, or to A's transposed."""
    if not is_transposed:
        return compare([Pair("", first, second)])[""]
    limits = bounds(first, second)
    parts = []
    for block in row_blocks(second.shape):
        columns: Index = (slice(0, first.shape[0]), block[0])
        parts.append(compare_arrays(np.ascontiguousarray(first.read(columns).T), second.read(block), limits))
    return _sum(parts)


def compare_rows(first: StoredTensor, second: StoredTensor, rows: np.ndarray) -> Difference:
    """The difference of B's tensor to A's with the rows of each group of `len(rows)` in another order.

    Args:
        first, second: the tensors; their rows are a multiple of `len(rows)`.
        rows: row i of a group of B is row `rows[i]` of the group of A.
    """
    limits = bounds(first, second)
    parts = []
    for block in row_blocks(first.shape, multiple=len(rows)):
        a, b = first.read(block), second.read(block)
        groups = a.reshape(-1, len(rows), *a.shape[1:])
        parts.append(compare_arrays(np.ascontiguousarray(groups[:, rows]).reshape(a.shape), b, limits))
    return _sum(parts)


def read32(tensor: StoredTensor, index: Index | None = None) -> np.ndarray:
    """Values in float32."""
    return tensor.read(index).astype(np.float32, copy=False)


def _sum(parts: list[Difference]) -> Difference:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
