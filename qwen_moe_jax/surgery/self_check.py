"""A checkpoint looked at for itself: what does not load, is dead, repeated or not finite, or stands out."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from os import PathLike

import numpy as np

from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.huggingface.checkpoint import open_checkpoint, problems_of
from qwen_moe_jax.huggingface.convert import abstract_model
from qwen_moe_jax.huggingface.hub import local_folder
from qwen_moe_jax.huggingface.layouts import equal
from qwen_moe_jax.huggingface.tensors import hub_parameters
from qwen_moe_jax.storage.progress import bytes_bar
from qwen_moe_jax.storage.tensor import StoredTensor
from qwen_moe_jax.surgery.measure import Measure, measure
from qwen_moe_jax.surgery.names import MATRICES, expert_name, kind_of, layer_of, ranges
from qwen_moe_jax.surgery.result import Finding, Inspection, Kind
from qwen_moe_jax.surgery.sides import read32

#: An expert whose matrix is this much smaller than the median of its layer is dead.
_DEAD = 1e-3
#: A matrix whose standard deviation is this many times that of the same matrix in the median layer stands out.
_OUTLIER = 5.0


def check_checkpoint(source: str | PathLike[str]) -> Inspection:
    """Reads a checkpoint once, and says what is wrong with it or stands out.

    Args:
        source: a folder of any form that `from_pretrained` reads, or its name on the Hub.

    Raises:
        ConfigError: config.json is missing or not supported.
        CheckpointError: the folder has no weights or cannot be read.
    """
    checkpoint = open_checkpoint(local_folder(source))
    tensors = checkpoint.tensors
    if not tensors:
        raise CheckpointError(f"{checkpoint.folder}: there are no tensors in it that can be read. Check the folder.")
    problems = problems_of(checkpoint, hub_parameters(abstract_model(checkpoint)))
    findings = [Finding(kind="unreadable", words=problem, names=()) for problem in problems]
    size = sum(tensor.nbytes for tensor in tensors.values())
    with bytes_bar(f"Checking {checkpoint.folder.name}", size) as advance:
        measures = measure(tensors.items(), advance)
    for look in (_not_finite, _zero, _experts, _router_rows):
        findings += look(tensors, measures)
    explained = {name for finding in findings for name in finding.names}
    findings += _outliers({name: measures[name] for name in measures if name not in explained})
    return Inspection(folder=str(checkpoint.folder), tensors=len(tensors), nbytes=size, findings=tuple(findings))


def _not_finite(tensors: Mapping[str, StoredTensor], measures: Mapping[str, Measure]) -> list[Finding]:
    bad = {name: found.non_finite for name, found in measures.items() if found.non_finite}
    return [_one("not finite", f"{count:,} infinities or NaN", name) for name, count in bad.items()]


def _zero(tensors: Mapping[str, StoredTensor], measures: Mapping[str, Measure]) -> list[Finding]:
    """Matrices without any value but zero, experts aside."""
    names = [
        name
        for name, found in measures.items()
        if not found.largest and not found.non_finite and len(tensors[name].shape) > 1 and expert_name(name) is None
    ]
    return [_one("constant", "all zeros", name) for name in names]


def _experts(tensors: Mapping[str, StoredTensor], measures: Mapping[str, Measure]) -> list[Finding]:
    """Dead experts, and experts that are equal to one another."""
    blocks: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in tensors:
        part = expert_name(name)
        if part is not None:
            blocks[part.block][part.expert][part.matrix] = name
    findings = []
    for experts in blocks.values():
        dead = _dead(experts, measures)
        if dead:
            names = tuple(name for expert in dead for name in experts[expert].values())
            words = "dead experts: a matrix is zero, or a thousandth of the layer's median"
            findings.append(
                Finding(kind="dead", words=words, names=names, layer=layer_of(names[0]), experts=tuple(dead))
            )
        findings += _equal_experts({e: names for e, names in experts.items() if e not in dead}, tensors, measures)
    return findings


def _dead(experts: Mapping[int, Mapping[str, str]], measures: Mapping[str, Measure]) -> list[int]:
    found = set()
    for matrix in set(MATRICES.values()):
        norms = {expert: measures[names[matrix]].norm for expert, names in experts.items() if matrix in names}
        median = float(np.median(list(norms.values()))) if norms else 0.0
        found |= {expert for expert, norm in norms.items() if norm <= _DEAD * median}
    return sorted(found)


def _equal_experts(
    experts: Mapping[int, Mapping[str, str]], tensors: Mapping[str, StoredTensor], measures: Mapping[str, Measure]
) -> list[Finding]:
    """A finding for each group of experts with the same bits, found by their fingerprints."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for expert, names in experts.items():
        key = tuple(np.float32(measures[names[m]].fingerprint).tobytes() for m in sorted(names))
        groups[key].append(expert)
    findings = []
    for group in groups.values():
        first = experts[group[0]]
        same = [e for e in group[1:] if all(equal(tensors[first[m]], tensors[name]) for m, name in experts[e].items())]
        if same:
            numbers = [group[0], *same]
            words = f"experts {ranges(numbers)} are equal to one another"
            equals = tuple(name for expert in numbers for name in experts[expert].values())
            findings.append(
                Finding(kind="duplicate", words=words, names=equals, layer=layer_of(equals[0]), experts=tuple(numbers))
            )
    return findings


def _router_rows(tensors: Mapping[str, StoredTensor], measures: Mapping[str, Measure]) -> list[Finding]:
    """Rows of routers that are zero, or equal to one another."""
    blocks = {part.block for name in tensors if (part := expert_name(name)) is not None}
    findings = []
    for block in sorted(blocks):
        name = f"{block}.gate.weight"
        if name not in tensors or measures[name].non_finite:
            continue
        rows = read32(tensors[name])
        zero = np.flatnonzero(~rows.any(axis=1)).tolist()
        _, first, counts = np.unique(rows, axis=0, return_index=True, return_counts=True)
        twice = [int(at) for at, count in zip(first, counts, strict=True) if count > 1 and rows[at].any()]
        if zero:
            findings.append(_one("dead", f"rows {ranges(zero)} of the router are zero", name))
        if twice:
            equals = [np.flatnonzero((rows == rows[at]).all(axis=1)).tolist() for at in twice]
            text = "; ".join(ranges(numbers) for numbers in equals)
            findings.append(_one("duplicate", f"rows of the router are equal to one another: {text}", name))
    return findings


def _outliers(measures: Mapping[str, Measure]) -> list[Finding]:
    """Matrices whose standard deviation stands out from that of the same matrix in other layers: remarks."""
    return [
        _one(
            "suspicious",
            f"the root mean square is {value:.3g}, {_times(value, median)} the median of its kind ({median:.3g})",
            name,
            harmless=True,
        )
        for name, value, median in _far_from_median(measures, lambda found: found.norm / math.sqrt(max(found.size, 1)))
    ]


def _far_from_median(
    measures: Mapping[str, Measure], value_of: Callable[[Measure], float]
) -> list[tuple[str, float, float]]:
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for name, found in measures.items():
        if layer_of(name) is not None and found.norm:
            groups[kind_of(name)][name] = value_of(found)
    far = []
    for group in groups.values():
        median = float(np.median(list(group.values())))
        if len(group) > 2:
            far += [
                (name, value, median)
                for name, value in group.items()
                if not median / _OUTLIER <= value <= median * _OUTLIER
            ]
    return far


def _times(value: float, median: float) -> str:
    return f"{value / median:.3g} times" if value > median else f"1/{median / value:.3g} of"


def _one(kind: Kind, words: str, name: str, *, harmless: bool = False) -> Finding:
    return Finding(kind=kind, words=words, names=(name,), layer=layer_of(name), harmless=harmless)
