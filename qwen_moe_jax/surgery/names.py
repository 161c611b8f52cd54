"""Names of tensors, taken apart and put together again."""

import dataclasses
import re
from collections.abc import Iterable

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.weight")
#: The three matrices of an expert, by the two ways that files name them.
MATRICES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
#: First word of the names of the next-token head.
MTP = "mtp."


@dataclasses.dataclass(frozen=True)
class ExpertName:
    """A matrix of a routed expert: its sparse block's path, its number, and "gate", "up" or "down"."""

    block: str
    expert: int
    matrix: str


def expert_name(name: str) -> ExpertName | None:
    """The parts of the name of an expert's matrix; None for other tensors."""
    found = _EXPERT.fullmatch(name)
    if found is None or found[3] not in MATRICES:
        return None
    return ExpertName(found[1], int(found[2]), MATRICES[found[3]])


def layer_of(name: str) -> int | None:
    """The number of a tensor's decoder layer."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def kind_of(name: str) -> str:
    """The name without the numbers of layer and expert: tensors that do the same in every layer."""
    return re.sub(r"\.(layers|experts)\.\d+\.", r".\1.*.", name)


def patterns(names: Iterable[str]) -> list[str]:
    """Names with the numbers of layers and experts, where several differ in them alone, in braces."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(kind_of(name), []).append(name)
    return [_pattern(group) for group in groups.values()]


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] as 0-2,5."""
    ordered = sorted(set(numbers))
    first = [number for number in ordered if number - 1 not in ordered]
    last = [number for number in ordered if number + 1 not in ordered]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(first, last, strict=True))


def _pattern(group: list[str]) -> str:
    pattern = group[0]
    for word in ("layers", "experts"):
        numbers = {int(found[1]) for name in group if (found := re.search(rf"\.{word}\.(\d+)\.", name))}
        if len(numbers) > 1:
            pattern = re.sub(rf"\.{word}\.\d+\.", f".{word}.{{{ranges(numbers)}}}.", pattern, count=1)
    return pattern
