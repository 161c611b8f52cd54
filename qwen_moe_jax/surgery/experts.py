"""What has happened to the experts and the router of one sparse block: which of A's expert each of B's is."""

import dataclasses
from collections import defaultdict

import numpy as np

from qwen_moe_jax.huggingface.sparse_families import MATRICES
from qwen_moe_jax.surgery.names import expert_name, layer_of, ranges
from qwen_moe_jax.surgery.result import Finding, Kind
from qwen_moe_jax.surgery.sides import Match, Sides, find_match, read32


@dataclasses.dataclass(frozen=True)
class Block:
    """A sparse block of the model in both checkpoints.

    Attributes:
        path: of the block, as model.layers.3.mlp.
        names: of the matrices that A and B have, by (matrix, expert).
        router: name of the router's weight.
    """

    path: str
    names: dict[tuple[str, int], str]
    router: str

    @property
    def layer(self) -> int | None:
        return layer_of(f"{self.path}.")

    @property
    def experts(self) -> list[int]:
        return sorted({expert for _, expert in self.names})


def sparse_blocks(sides: Sides) -> list[Block]:
    """The sparse blocks in the order of the layers."""
    found: dict[str, dict[tuple[str, int], str]] = defaultdict(dict)
    for name in sides.second:
        parts = expert_name(name)
        if parts is not None and name in sides.first:
            found[parts.block][parts.matrix, parts.expert] = name
    return [Block(path, names, f"{path}.gate.weight") for path, names in found.items()]


def diagnose_block(block: Block, sides: Sides) -> list[Finding]:
    """What has happened in one block; matrices of which nothing was recognised are in no finding."""
    different = [key for key, name in block.names.items() if not sides.is_same(name)]
    sources: dict[tuple[str, int], tuple[str, int]] = {}
    matches: dict[tuple[str, int], Match] = {}
    back = {name: key for key, name in block.names.items()}
    for key in different:
        name = block.names[key]
        match = None if sides.is_related(name) else find_match(name, sides, block.names.values())
        if match is not None:
            matches[key], sources[key] = match, back[match.name]
    findings = _matrices(block, sources, matches)
    orders = _orders(block, sources, different)
    findings += _reordered(block, orders, sides)
    return findings


def _matrices(
    block: Block, sources: dict[tuple[str, int], tuple[str, int]], matches: dict[tuple[str, int], Match]
) -> list[Finding]:
    """Transposed matrices, and those that are in the place of another kind."""
    findings = []
    turned = [key for key, match in matches.items() if match.is_transposed]
    if turned:
        kinds = [matrix for matrix in MATRICES if any(key[0] == matrix for key in turned)]
        findings.append(
            _finding("transposed", f"the {_listed(kinds)} matrices of experts are transposed", block, turned)
        )
    exchanged = [
        key
        for key, source in sources.items()
        if {key[0], source[0]} == {"gate", "up"} and sources.get((source[0], key[1]), ("", 0))[0] == key[0]
    ]
    if exchanged:
        words = "the gate and up matrices of experts are exchanged"
        findings.append(_finding("exchanged", words, block, exchanged))
    others = [key for key, source in sources.items() if key[0] != source[0] and key not in exchanged]
    for matrix in MATRICES:
        for source in MATRICES:
            keys = [key for key in others if key[0] == matrix and sources[key][0] == source]
            if keys:
                words = f"the {matrix} matrices of experts are A's {source} matrices"
                findings.append(_finding("another tensor", words, block, keys))
    return findings


def _orders(
    block: Block, sources: dict[tuple[str, int], tuple[str, int]], different: list[tuple[str, int]]
) -> dict[str, dict[int, int]]:
    """For each kind of matrix, which expert of A each expert of B is; those of unknown origin are left out."""
    found: dict[str, dict[int, int]] = {matrix: {} for matrix in MATRICES}
    unknown = set(different)
    for matrix, expert in block.names:
        if (matrix, expert) in sources:
            found[matrix][expert] = sources[matrix, expert][1]
        elif (matrix, expert) not in unknown:
            found[matrix][expert] = expert
    return found


def _reordered(block: Block, orders: dict[str, dict[int, int]], sides: Sides) -> list[Finding]:
    moved = {matrix: {e: s for e, s in order.items() if e != s} for matrix, order in orders.items()}
    router = _router_order(block, sides)
    whole = moved["gate"] == moved["up"] == moved["down"]
    if whole and moved["gate"]:
        return [_experts_moved(block, orders["gate"], moved["gate"], router, sides)]
    findings = []
    for matrix in MATRICES:
        if moved[matrix] and not whole:
            keys = [(matrix, expert) for expert in moved[matrix]]
            kind: Kind = "permuted alone" if _is_permutation(orders[matrix], block) else "experts repeated"
            words = f"the {matrix} matrices of experts are those of other experts, the rest of the expert is not"
            findings.append(_finding(kind, words, block, keys, _permutation(orders[matrix], block)))
    if router is not None:
        words = (
            "the rows of the router are permuted, the experts are not: tokens go to the wrong experts; "
            f"row i of B is row {_shown(router)} of A"
        )
        findings.append(
            Finding(
                kind="router permuted",
                words=words,
                names=(block.router,),
                layer=block.layer,
                experts=tuple(e for e, source in enumerate(router) if e != source),
                permutation=router,
            )
        )
    return findings


def _experts_moved(
    block: Block, order: dict[int, int], moved: dict[int, int], router: tuple[int, ...] | None, sides: Sides
) -> Finding:
    """Whole experts that are other experts of A: permuted, with the router or without, or repeated."""
    keys = [(matrix, expert) for matrix in MATRICES for expert in moved]
    if not _is_permutation(order, block):
        lost = sorted(set(block.experts) - set(order.values()))
        pairs = ", ".join(f"{expert} is A's {source}" for expert, source in list(moved.items())[:8])
        words = f"experts are repeated: {pairs}; A's experts {ranges(lost)} are not in B"
        return _finding("experts repeated", words, block, keys)
    permutation = _permutation(order, block)
    shown = f"expert i of B is expert {_shown(permutation)} of A"
    if router == permutation:
        words = f"the experts are permuted and the rows of the router likewise, so the function is the same; {shown}"
        finding = _finding("experts permuted", words, block, keys, permutation)
        return dataclasses.replace(finding, names=(*finding.names, block.router), harmless=True)
    state = "are in another order than the experts" if router is not None else "are not"
    if router is None and not sides.is_same(block.router):
        state = "have changed"
    words = f"the experts are permuted, but the rows of the router {state}: tokens go to the wrong experts; {shown}"
    finding = _finding("experts permuted", words, block, keys, permutation)
    return dataclasses.replace(finding, names=(*finding.names, block.router) if router is not None else finding.names)


def _router_order(block: Block, sides: Sides) -> tuple[int, ...] | None:
    """Which row of A's router each row of B's is, if they are a permutation of one another and not equal."""
    name = block.router
    if name not in sides.differences or sides.is_same(name):
        return None
    a, b = read32(sides.first[name]), read32(sides.second[name])
    squares = (a**2).sum(1)[None, :] + (b**2).sum(1)[:, None] - 2 * (b @ a.T)
    order = squares.argmin(axis=1)
    near = np.linalg.norm(b - a[order]) <= 0.02 * np.linalg.norm(a)
    is_permutation = sorted(order.tolist()) == list(range(len(a)))
    if not near or not is_permutation or bool((order == np.arange(len(a))).all()):
        return None
    return tuple(order.tolist())


def _is_permutation(order: dict[int, int], block: Block) -> bool:
    return sorted(order) == block.experts and sorted(order.values()) == block.experts


def _permutation(order: dict[int, int], block: Block) -> tuple[int, ...] | None:
    return tuple(order[expert] for expert in block.experts) if _is_permutation(order, block) else None


def _finding(
    kind: Kind, words: str, block: Block, keys: list[tuple[str, int]], permutation: tuple[int, ...] | None = None
) -> Finding:
    experts = tuple(sorted({expert for _, expert in keys}))
    names = tuple(block.names[key] for key in keys)
    return Finding(kind=kind, words=words, names=names, layer=block.layer, experts=experts, permutation=permutation)


def _listed(kinds: list[str]) -> str:
    return kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} and {kinds[-1]}"


def _shown(permutation: tuple[int, ...] | None) -> str:
    return str(list(permutation or ()))
