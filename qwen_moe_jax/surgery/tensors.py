"""What has happened to one tensor: the causes that are looked for, each tried until one explains it."""

import itertools
import math
import re
from collections.abc import Callable

import numpy as np

from qwen_moe_jax.storage.tensor import StoredTensor
from qwen_moe_jax.surgery.measure import Measure, compare_arrays
from qwen_moe_jax.surgery.names import layer_of
from qwen_moe_jax.surgery.result import Finding, Kind
from qwen_moe_jax.surgery.sides import CLOSE, Sides, compare_rows, find_match, is_rounded, read32
from qwen_moe_jax.surgery.tolerance import bounds

_ROPED = re.compile(r"\.self_attn\.([qk])_(proj\.weight|proj\.bias|norm\.weight)$")
_SHARDS = (2, 3, 4, 6, 8, 16)
#: The most values of a vector that is read whole.
_VECTOR = 1 << 22


def diagnose_tensor(name: str, sides: Sides) -> Finding:
    """The first cause that explains how B's tensor differs from A's of the same name; "changed" if none does."""
    causes: tuple[Callable[[str, Sides], Finding | None], ...] = (
        _not_finite, _constant, _norm_offset, _rope_order, _scaled, _other_tensor, _shape, _shards, _random,
    )  # fmt: skip
    found = next((finding for cause in causes if (finding := cause(name, sides)) is not None), None)
    return _changed(name, sides) if found is None else found


def finding(kind: Kind, words: str, name: str, factor: float | None = None) -> Finding:
    """A finding about one tensor."""
    return Finding(kind=kind, words=words, names=(name,), layer=layer_of(name), factor=factor)


def looks_fresh(measure: Measure, initializer_range: float) -> bool:
    """Whether these are the statistics of N(0, initializer_range²): mean, standard deviation, largest value."""
    deviation = initializer_range / math.sqrt(max(measure.size, 1))
    is_spread = abs(measure.std / initializer_range - 1) < max(0.05, 5 / math.sqrt(measure.size))
    return abs(measure.mean) < 5 * deviation and is_spread and measure.largest < 8 * initializer_range


def _not_finite(name: str, sides: Sides) -> Finding | None:
    first, second = (side.get(name) for side in sides.measures)
    if second.non_finite <= first.non_finite:
        return None
    return finding("not finite", "infinities or NaN, which A does not have there", name)


def _constant(name: str, sides: Sides) -> Finding | None:
    measure = sides.measures[1][name]
    if sides.second[name].shape != sides.first[name].shape or not sides.measures[0][name].norm:
        return None
    if not measure.norm:
        return finding("constant", "all zeros", name)
    if len(sides.second[name].shape) > 1 and measure.std <= 1e-6 * abs(measure.mean):
        return finding("constant", f"all values are {measure.mean:.4g}", name)
    return None


def _norm_offset(name: str, sides: Sides) -> Finding | None:
    difference = sides.differences.get(name)
    if difference is None or "norm" not in name or len(sides.first[name].shape) != 1:
        return None
    a, b = read32(sides.first[name]), read32(sides.second[name])
    limits = (0.01, *(bound.relative for bound in bounds(sides.first[name], sides.second[name])))
    for offset, words in ((1.0, "larger by one"), (-1.0, "smaller by one")):
        if np.abs(b - a - np.float32(offset)).max() <= max(limits):
            meaning = "zero-centred (× (1 + w)) and plain (× w) norms have been taken for each other"
            return finding("norm offset", f"the weights of norms are {words}: {meaning}", name)
    return None


def _rope_order(name: str, sides: Sides) -> Finding | None:
    part = _ROPED.search(name)
    if part is None or name not in sides.differences:
        return None
    head, rotary = sides.config.attention.head_dim, sides.config.rotary_dim
    own = np.arange(head)
    halves = np.arange(rotary).reshape(2, -1).T.ravel()  # row 2i + s of B is row s·H/2 + i of A
    gated = part[1] == "q" and part[2].startswith("proj") and sides.config.attention.output_gate
    for order, words in (
        (halves, "halves in A, interleaved in B"),
        (np.argsort(halves), "interleaved in A, halves in B"),
    ):
        rows = np.concatenate([order, own[rotary:], *([head + own] if gated else [])])
        if sides.first[name].shape[0] % len(rows) or not np.any(order != own[:rotary]):
            continue
        found = compare_rows(sides.first[name], sides.second[name], rows)
        if is_rounded(found) or found.distance < CLOSE / 10:
            return finding("rope order", f"rows of rotated dimensions are in another order: {words}", name)
    return None


def _scaled(name: str, sides: Sides) -> Finding | None:
    difference = sides.differences.get(name)
    if difference is None or difference.first.squares == 0:
        return None
    factor = difference.product / difference.first.squares
    # |B − c·A|² from the sums alone; what is left is the rounding of float32 sums.
    left = difference.second.squares - factor * difference.product
    if abs(factor - 1) < 1e-3 or left > (2e-3) ** 2 * difference.second.squares or difference.first.size < 4:
        return None
    return finding("scaled", f"A's values times {factor:.4g}", name, factor)


def _other_tensor(name: str, sides: Sides) -> Finding | None:
    if sides.is_related(name):
        return None
    path = name.rsplit(".", 2)[0]
    same_part = [other for other in sides.first if other.rsplit(".", 2)[0] == path]
    match = find_match(name, sides, same_part) or find_match(name, sides)
    if match is None:
        return None
    nearly = f" (with a difference of {match.distance:.1%})" if match.distance else ""
    if match.name == name:
        return finding("transposed", f"transposed{nearly}", name)
    partner = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    parts = name.split(".")
    swapped = ".".join([*parts[:-2], partner.get(parts[-2], ""), parts[-1]]) if len(parts) > 1 else ""
    back = find_match(swapped, sides, [name]) if match.name == swapped and swapped in sides.second else None
    if back is not None:
        turned = " and transposed" if match.is_transposed else ""
        return finding("exchanged", f"gate and up are exchanged{turned}{nearly}", name)
    turned = ", transposed" if match.is_transposed else ""
    return finding("another tensor", f"it is A's {match.name}{turned}{nearly}", name)


def _shape(name: str, sides: Sides) -> Finding | None:
    first, second = sides.first[name].shape, sides.second[name].shape
    if first == second:
        return None
    return finding("shape", f"shape {list(first)} in A, {list(second)} in B", name)


def _shards(name: str, sides: Sides) -> Finding | None:
    """Parts of equal size along an axis that are A's parts, in another order or one of them repeated."""
    first, second = sides.first[name], sides.second[name]
    if len(first.shape) < 2 or math.prod(first.shape) < 64:
        return None
    for axis, count in itertools.product((0, 1), _SHARDS):
        if first.shape[axis] % count or first.shape[axis] == count:
            continue
        width = first.shape[axis] // count
        a, b = (_probe(tensor, axis, count) for tensor in (first, second))
        scale = float(np.abs(a).max())
        apart = np.abs(b[:, None] - a[None]).reshape(count, count, -1).max(axis=2)
        order = apart.argmin(axis=1)
        if apart.min(axis=1).max() > 0.08 * scale or bool((order == np.arange(count)).all()):
            continue
        if not _are_shards(name, sides, axis, width, order):
            continue
        side = "rows" if axis == 0 else "columns"
        is_permuted = len(set(order.tolist())) == count
        what = "the parts are in another order" if is_permuted else "a part is repeated and another lost"
        return finding("shards", f"of {count} equal parts of the {side}, {what}: A's {order.tolist()}", name)
    return None


def _probe(tensor: StoredTensor, axis: int, count: int) -> np.ndarray:
    """[count, …] a few values of each part along an axis, at the same places of every part."""
    width, across = tensor.shape[axis] // count, min(tensor.shape[1 - axis], 16)
    along = min(width, 8)
    parts = []
    for part in range(count):
        run = slice(part * width, part * width + along)
        index = (run, slice(0, across)) if axis == 0 else (slice(0, across), run)
        values = read32(tensor, (*index, *(slice(0, size) for size in tensor.shape[2:])))
        parts.append(np.swapaxes(values, 0, axis))
    return np.stack(parts)


def _are_shards(name: str, sides: Sides, axis: int, width: int, order: np.ndarray) -> bool:
    first, second = sides.first[name], sides.second[name]
    limits = bounds(first, second)
    step = max((1 << 20) // max(math.prod(first.shape) // first.shape[axis], 1), 1)
    for part, source in enumerate(order.tolist()):
        for start in range(0, width, step):
            size = min(step, width - start)
            index = [[slice(0, length) for length in first.shape] for _ in range(2)]
            index[0][axis] = slice(source * width + start, source * width + start + size)
            index[1][axis] = slice(part * width + start, part * width + start + size)
            a, b = first.read(tuple(index[0])), second.read(tuple(index[1]))
            if not is_rounded(compare_arrays(a, b, limits)):
                return False
    return True


def _random(name: str, sides: Sides) -> Finding | None:
    difference = sides.differences.get(name)
    if difference is None or len(sides.first[name].shape) < 2 or not difference.second.norm:
        return None
    noise = 6 / math.sqrt(difference.first.size)
    if abs(difference.correlation) > max(noise, 0.02) or difference.first.size < 64:
        return None
    std = f"standard deviation {difference.second.std:.3g}"
    if looks_fresh(difference.second, sides.config.initializer_range):
        words = f"fresh random values: mean 0, {std} as initializer_range, not correlated with A's"
        return finding("random", words, name)
    return finding("changed", f"other values, not correlated with A's ({std}; A's {difference.first.std:.3g})", name)


def _changed(name: str, sides: Sides) -> Finding:
    difference = sides.differences[name]
    if not difference.first.norm:
        return finding("changed", "all zeros in A, and not in B", name)
    share = difference.changed / max(difference.first.size, 1)
    where = _different_rows(name, sides) if share < 0.5 else ""
    words = (
        f"{_rough(share)} of the values differ{where}, by about {_rough(difference.distance)} of A's norm, correlation "
        f"{difference.correlation:.2f}"
    )
    return finding("changed", words, name)


def _rough(share: float) -> str:
    """A share with one digit: findings whose words are equal are printed as one."""
    return f"{share:.0%}" if share >= 0.095 else f"{float(f'{share:.0e}') * 100:.2g}%"


def _different_rows(name: str, sides: Sides) -> str:
    first, second = sides.first[name], sides.second[name]
    if len(first.shape) < 2 or math.prod(first.shape) > _VECTOR:
        return ""
    rows = np.flatnonzero((read32(first) != read32(second)).reshape(first.shape[0], -1).any(axis=1))
    if len(rows) > first.shape[0] // 2:
        return ""
    return f" (rows {', '.join(map(str, rows[:8]))}{', …' if len(rows) > 8 else ''})"
