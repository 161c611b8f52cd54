"""Tensors measured block by block: statistics, fingerprints, and the difference of two.

A fingerprint is eight random projections of a matrix W [out, in]: p·W·q for four pairs of fixed random vectors, and
q·W·p for the same. Equal matrices have equal ones, the transposed matrix has the two halves exchanged, and each is
about as large as the matrix's norm, so that unrelated matrices are told apart. They are computed while it is read.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from qwen_moe_jax.storage.prefetch import prefetch
from qwen_moe_jax.storage.tensor import Index, StoredTensor
from qwen_moe_jax.surgery.tolerance import Bound, bounds

#: Values of a block: 4 MB in float32, of which about ten are held by each of the four threads.
BLOCK = 1 << 20
_PAIRS = 4


@dataclasses.dataclass(frozen=True)
class Measure:
    """Statistics of one tensor; those of several blocks are added.

    Attributes:
        size: number of values.
        total: their sum; of finite ones, as the following.
        squares: sum of squares.
        largest: largest magnitude.
        non_finite: number of infinities and NaN.
        fingerprint: [8]; of a vector and of other arrays, as matrices with the same first axis.
    """

    size: int
    total: float
    squares: float
    largest: float
    non_finite: int
    fingerprint: np.ndarray

    @property
    def norm(self) -> float:
        return math.sqrt(self.squares)

    @property
    def mean(self) -> float:
        return self.total / max(self.size, 1)

    @property
    def std(self) -> float:
        return math.sqrt(max(self.squares / max(self.size, 1) - self.mean**2, 0.0))

    def __add__(self, other: "Measure") -> "Measure":
        return Measure(
            self.size + other.size,
            self.total + other.total,
            self.squares + other.squares,
            max(self.largest, other.largest),
            self.non_finite + other.non_finite,
            self.fingerprint + other.fingerprint,
        )


@dataclasses.dataclass(frozen=True)
class Difference:
    """Two tensors of one shape; those of several blocks are added.

    Attributes:
        first, second: the two for themselves.
        equal: in every bit.
        within: for each of the pair's bounds, whether every difference keeps it.
        largest: largest |a − b|.
        relative: largest |a − b| / max(|a|, |b|).
        residual: sum of (b − a)².
        product: sum of a·b.
        changed: number of values that differ.
    """

    first: Measure
    second: Measure
    equal: bool
    within: tuple[bool, ...]
    largest: float
    relative: float
    residual: float
    product: float
    changed: int

    @property
    def distance(self) -> float:
        """|B − A| as a share of |A|."""
        return math.sqrt(self.residual) / self.first.norm if self.first.norm else math.inf

    @property
    def correlation(self) -> float:
        """Cosine of the angle between A and B; 0 if one of them is zero."""
        norms = self.first.norm * self.second.norm
        return self.product / norms if norms else 0.0

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(
            self.first + other.first,
            self.second + other.second,
            self.equal and other.equal,
            tuple(one and two for one, two in zip(self.within, other.within, strict=True)),
            max(self.largest, other.largest),
            max(self.relative, other.relative),
            self.residual + other.residual,
            self.product + other.product,
            self.changed + other.changed,
        )


def row_blocks(shape: tuple[int, ...], multiple: int = 1) -> Iterator[Index]:
    """Runs of rows of at most `BLOCK` values, each a multiple of so many rows (but the last)."""
    if not shape:
        yield ()
        return
    rows = max(BLOCK // max(math.prod(shape[1:]), 1) // multiple, 1) * multiple
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])), *(slice(0, size) for size in shape[1:]))


def measure_block(values: np.ndarray, shape: tuple[int, ...], first_row: int) -> Measure:
    """Statistics of rows of a tensor.

    Args:
        values: float32, the rows.
        shape: of the whole tensor.
        first_row: number of the first.
    """
    flat = values.reshape(len(values) if values.ndim else 1, -1)
    finite = np.isfinite(flat)
    non_finite = int(flat.size - finite.sum())
    if non_finite:
        flat = np.where(finite, flat, np.float32(0))
    rows = shape[0] if shape else 1
    left = _vectors(rows)[first_row : first_row + len(flat)]
    right = np.roll(_vectors(flat.shape[1]), _PAIRS, axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        fingerprint = (left * (flat @ right)).sum(axis=0, dtype=np.float64)
    return Measure(
        size=flat.size,
        total=float(flat.sum(dtype=np.float64)),
        squares=float(np.einsum("ij,ij->", flat, flat, dtype=np.float64)),
        largest=float(np.abs(flat).max(initial=0.0)),
        non_finite=non_finite,
        fingerprint=fingerprint,
    )


def transposed(fingerprint: np.ndarray) -> np.ndarray:
    """The fingerprint of the transposed matrix."""
    return np.roll(fingerprint, _PAIRS, axis=-1)


@functools.lru_cache(maxsize=64)
def _vectors(size: int) -> np.ndarray:
    """[size, 8] random numbers, the same for the same size: p, then q."""
    return np.random.default_rng([size, 20]).standard_normal((size, 2 * _PAIRS), dtype=np.float32)


def measure(tensors: Iterable[tuple[str, StoredTensor]], advance: Callable[[int], None]) -> dict[str, Measure]:
    """Measures tensors by name, reading each once."""
    parts = ((name, tensor, block) for name, tensor in tensors for block in row_blocks(tensor.shape))

    def one(part: tuple[str, StoredTensor, Index]) -> tuple[str, Measure, int]:
        name, tensor, block = part
        values = tensor.read(block)
        return name, measure_block(_float32(values), tensor.shape, _first(block)), values.nbytes

    found: dict[str, Measure] = {}
    for name, part, size in prefetch(one, parts):
        found[name] = found[name] + part if name in found else part
        advance(size)
    return found


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two tensors of one shape that are to be compared.

    Attributes:
        name: of the result.
        first, second: the tensors.
        base: where the first is a matrix with an adapter merged, that matrix; its rounding depends on both addends.
    """

    name: str
    first: StoredTensor
    second: StoredTensor
    base: StoredTensor | None = None


def compare(pairs: Iterable[Pair], advance: Callable[[int], None] = lambda size: None) -> dict[str, Difference]:
    """Compares pairs by name, reading every tensor once."""

    def parts() -> Iterator[tuple[Pair, tuple[Bound, ...], Index]]:
        for pair in pairs:
            limits = bounds(pair.first, pair.second, computed=pair.base is not None)
            for block in row_blocks(pair.first.shape):
                yield pair, limits, block

    def one(part: tuple[Pair, tuple[Bound, ...], Index]) -> tuple[str, Difference, int]:
        pair, limits, block = part
        a, b = pair.first.read(block), pair.second.read(block)
        base = None if pair.base is None else _float32(pair.base.read(block))
        found = _difference(a, b, base, limits, pair.first.shape, _first(block))
        return pair.name, found, a.nbytes + b.nbytes

    found: dict[str, Difference] = {}
    for name, part, size in prefetch(one, parts()):
        found[name] = found[name] + part if name in found else part
        advance(size)
    return found


def compare_arrays(first: np.ndarray, second: np.ndarray, limits: tuple[Bound, ...]) -> Difference:
    """The difference of two arrays in memory."""
    return _difference(first, second, None, limits, first.shape, 0)


def _difference(
    a: np.ndarray,
    b: np.ndarray,
    base: np.ndarray | None,
    limits: tuple[Bound, ...],
    shape: tuple[int, ...],
    first_row: int,
) -> Difference:
    equal = a.dtype == b.dtype and a.tobytes() == b.tobytes()  # NaN is equal to itself
    a32 = _float32(a)
    first = measure_block(a32, shape, first_row)
    if equal:
        return Difference(first, first, True, (True,) * len(limits), 0.0, 0.0, 0.0, first.squares, 0)
    b32 = _float32(b)
    second = measure_block(b32, shape, first_row)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        apart = np.abs(b32 - a32)
        apart[(a32 == b32) | (np.isnan(a32) & np.isnan(b32))] = 0  # infinities, too
        size = np.maximum(np.abs(a32), np.abs(b32))
        share = np.nan_to_num(apart / size, nan=0.0, posinf=1.0)
        if base is not None:
            size = np.abs(base) + np.abs(a32 - base)
        # A NaN or an infinity on one side alone keeps no bound.
        within = tuple(bool((apart <= bound.relative * size + bound.absolute).all()) for bound in limits)
        within = tuple(keeps and first.non_finite == second.non_finite for keeps in within)
    known = np.where(np.isfinite(apart), apart, np.float32(0)).ravel()
    clean_a, clean_b = (np.nan_to_num(part.ravel(), nan=0.0, posinf=0.0, neginf=0.0) for part in (a32, b32))
    return Difference(
        first=first,
        second=second,
        equal=False,
        within=within,
        largest=float(known.max(initial=0.0)),
        relative=float(share.max(initial=0.0)),
        residual=float(np.einsum("i,i->", known, known, dtype=np.float64)),
        product=float(np.einsum("i,i->", clean_a, clean_b, dtype=np.float64)),
        changed=int((apart != 0).sum()),
    )


def _float32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32, copy=False)


def _first(block: Index) -> int:
    return block[0].start if block else 0
