"""Tensors that only one of two checkpoints has, and vocabularies of different sizes."""

import math

import numpy as np

from qwen_moe_jax.huggingface.layouts import EMBEDDING, HEAD
from qwen_moe_jax.storage.tensor import TensorSlice
from qwen_moe_jax.surgery.measure import Pair, compare, measure
from qwen_moe_jax.surgery.names import MTP, expert_name, kind_of, layer_of
from qwen_moe_jax.surgery.result import Finding, Kind
from qwen_moe_jax.surgery.sides import CLOSE, Sides, is_rounded
from qwen_moe_jax.surgery.tensors import looks_fresh

_VOCABULARY = (EMBEDDING, HEAD)


def absent(sides: Sides, *, damaged: bool) -> list[Finding]:
    """A finding for each kind of tensor that A has and B does not, and the other way round.

    Args:
        sides: both.
        damaged: whether some tensors could not be read; what is missing may be among them.
    """
    lost = [name for name in sides.first if name not in sides.second]
    extra = [name for name in sides.second if name not in sides.first]
    findings = []
    for names, has, has_not in ((lost, "A", "B"), (extra, "B", "A")):
        head = tuple(name for name in names if name.startswith(MTP))
        other_has = any(name.startswith(MTP) for name in (sides.second if has == "A" else sides.first))
        if head and not other_has:
            words = f"the next-token head ({MTP}*) is in {has} and not in {has_not}"
            kind: Kind = "mtp lost" if has == "A" else "extra"
            findings.append(Finding(kind=kind, words=words, names=head))
            names = [name for name in names if not name.startswith(MTP)]
        groups: dict[tuple[str, int | None], list[str]] = {}
        for name in names:
            groups.setdefault((kind_of(name), layer_of(name)), []).append(name)
        hint = " or cannot be read" if damaged else ""
        for (_, layer), group in groups.items():
            experts = tuple(sorted(part.expert for name in group if (part := expert_name(name)) is not None))
            words = f"missing in B{hint}" if has == "A" else f"in B alone{hint}"
            absence: Kind = "missing" if has == "A" else "extra"
            findings.append(Finding(kind=absence, words=words, names=tuple(group), layer=layer, experts=experts))
    return findings


def diagnose_vocabulary(sides: Sides, names: list[str], tied: tuple[bool, bool]) -> list[Finding]:
    """Embeddings and heads with more or fewer rows, and a head that was tied to the embedding in A.

    Args:
        sides: both.
        names: of the tensors that differ.
        tied: whether A and B have no head of their own.
    """
    findings = [_rows(name, sides) for name in names if name in _VOCABULARY]
    found = [finding for finding in findings if finding is not None]
    if HEAD in names and tied[0] != tied[1]:
        done = {name for finding in found for name in finding.names}
        if HEAD not in done:
            found.append(_head(sides, was_tied=tied[0]))
    return found


def _head(sides: Sides, *, was_tied: bool) -> Finding:
    state = ("is tied to the embedding in A", "has values of its own in B")
    if not was_tied:
        state = ("has values of its own in A", "is tied to the embedding in B")
    fresh = ""
    if was_tied and looks_fresh(sides.measures[1][HEAD], sides.config.initializer_range):
        difference = sides.differences.get(HEAD)
        if difference is not None and abs(difference.correlation) < 0.05:
            fresh = ", fresh random ones"
    return Finding(kind="head replaced", words=f"the output head {state[0]} and {state[1]}{fresh}", names=(HEAD,))


def _rows(name: str, sides: Sides) -> Finding | None:
    first, second = sides.first[name], sides.second[name]
    if first.shape[1:] != second.shape[1:] or first.shape[0] == second.shape[0]:
        return None
    rows = min(first.shape[0], second.shape[0])
    window = (slice(0, rows),)
    common = compare([Pair("", TensorSlice(first, window), TensorSlice(second, window))])[""]
    if is_rounded(common):
        state = f"the first {rows:,} rows are the same"
    elif common.distance < CLOSE:
        state = f"the first {rows:,} rows differ by {common.distance:.1%}"
    else:
        state = f"the first {rows:,} rows differ, too"
    if second.shape[0] < first.shape[0]:
        what = f"the vocabulary is truncated from {first.shape[0]:,} to {second.shape[0]:,} rows"
    else:
        added = TensorSlice(second, (slice(rows, second.shape[0]),))
        measured = measure([("", added)], lambda size: None)[""]
        values = "zeros" if not measured.largest else "values"
        if values != "zeros" and looks_fresh(measured, sides.config.initializer_range):
            values = "random values"
        elif values != "zeros" and _is_one_row(
            added.read((slice(0, min(2, added.shape[0])), slice(0, added.shape[1])))
        ):
            values = "one row, repeated"
        what = f"the vocabulary is padded from {first.shape[0]:,} to {second.shape[0]:,} rows with {values}"
    return Finding(kind="vocabulary", words=f"{what}; {state}", names=(name,))


def _is_one_row(rows: np.ndarray) -> bool:
    return len(rows) > 1 and bool((rows[0] == rows[1]).all()) and math.isfinite(float(rows[0, 0]))
