"""What a comparison of two checkpoints, or a look at one, has found."""

import dataclasses
from typing import Literal

Verdict = Literal["same", "rounding", "reordered", "differs"]

Kind = Literal[
    "adapter missing", "adapter scaled", "adapter twice", "another tensor", "changed", "config", "constant", "dead",
    "duplicate", "exchanged", "experts permuted", "experts repeated", "extra", "head replaced", "missing",
    "mtp lost", "norm offset", "not finite", "permuted alone", "random", "rope order", "router permuted", "scaled",
    "shards", "shape", "suspicious", "transposed", "unreadable", "vocabulary",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that has happened to tensors of one layer.

    Attributes:
        kind: what has happened.
        words: the same in words, without the names of the tensors: findings with equal words are printed as one.
        names: of the tensors that it explains.
        layer: number of their layer; None for tensors of none and of the next-token head.
        experts: numbers of the experts that are concerned.
        permutation: expert or row i of B is number `permutation[i]` of A.
        factor: of a scaled tensor or adapter.
        harmless: the model computes the same function all the same, or it is a remark and no fault.
    """

    kind: Kind
    words: str
    names: tuple[str, ...]
    layer: int | None = None
    experts: tuple[int, ...] = ()
    permutation: tuple[int, ...] | None = None
    factor: float | None = None
    harmless: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounded:
    """Tensors that are the same up to rounding.

    Attributes:
        dtypes: in A and in B, as "float32 → bfloat16".
        bound: what the differences were held to, in words.
        count: number of tensors.
        largest: largest absolute difference.
        relative: largest difference as a share of the larger of the two values.
        name: the tensor with the largest absolute difference.
    """

    dtypes: str
    bound: str
    count: int
    largest: float
    relative: float
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two checkpoints, compared.

    Attributes:
        first, second: folders A and B.
        adapter: the adapter that B was expected to have merged into it, or None.
        verdict: "same" is equal in every bit; "rounding" the same up to it; "reordered" the same function with its
            experts in another order; "differs" anything else.
        tensors: number of names in A or B.
        equal: number of tensors that are equal in every bit.
        rounded: those that are the same up to rounding, by dtypes and bound.
        findings: everything else.
    """

    first: str
    second: str
    adapter: str | None
    verdict: Verdict
    tensors: int
    equal: int
    rounded: tuple[Rounded, ...]
    findings: tuple[Finding, ...]

    @property
    def same(self) -> bool:
        """Whether both compute the same function, up to rounding."""
        return self.verdict != "differs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """One checkpoint, looked at for itself.

    Attributes:
        folder: the checkpoint.
        tensors: number of them.
        nbytes: as they are read (float8 as float32).
        findings: faults, and remarks (`harmless`).
    """

    folder: str
    tensors: int
    nbytes: int
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        """Whether there are no findings but remarks."""
        return all(finding.harmless for finding in self.findings)
