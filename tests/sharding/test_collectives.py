"""What the compiled program sends over the network: read from the HLO of the very code that runs on a pod."""

import dataclasses
import re

import jax
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.model.remat import remat_policy
from qwen_moe_jax.moe.dispatch.capacity import expert_capacity
from qwen_moe_jax.moe.dispatch.dropless import device_rows
from tests.moe.blocks import block_config, build_block, forward

B, T, E, A, GROUP, FACTOR = 16, 8, 8, 2, 8, 1.25
MESH = dict(data=2, expert=4)
WAYS, DEVICES = 4, 8
KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
METHODS = {
    "einsum": dict(dispatch="capacity", capacity_by="einsum"),
    "index": dict(dispatch="capacity", capacity_by="index"),
    "all-to-all": dict(dispatch="dropless", exchange="all_to_all"),
    "gather": dict(dispatch="dropless", exchange="all_gather"),
}


@dataclasses.dataclass(frozen=True)
class Collectives:
    """(kind, bytes per device) of every collective: outside of loops, and in the loop over further rounds."""

    outside: list[tuple[str, int]]
    in_loops: list[tuple[str, int]]


def collectives(compiled) -> Collectives:
    """The collectives of a compiled program."""
    lines: dict[str, list[str]] = {}
    for line in compiled.as_text().splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*{$", line):
            computation = lines.setdefault(start[1], [])
        elif line.startswith(" "):
            computation.append(line)
    text = {name: "\n".join(body) for name, body in lines.items()}
    looped, open_ones = set(), re.findall(r"body=%?([\w.\-]+)", "\n".join(text.values()))
    while open_ones:  # what a loop's body calls is in the loop
        name = open_ones.pop()
        if name not in looped:
            looped.add(name)
            open_ones += re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", text[name])
    return Collectives(
        outside=[one for name in lines if name not in looped for one in collectives_in(lines[name])],
        in_loops=[one for name in lines if name in looped for one in collectives_in(lines[name])],
    )


def collectives_in(lines: list[str]) -> list[tuple[str, int]]:
    found = []
    for line in lines:
        match = re.search(rf"= (.+?) ({KINDS})(?:-start)?\(", line)
        if match:
            arrays = re.findall(r"\b[a-z]+(\d+)\[([\d,]*)\]", match[1])
            size = sum(int(bits) // 8 * int(np.prod([int(n) for n in dims.split(",") if n])) for bits, dims in arrays)
            found.append((match[2], size))
    return found


def of_kind(found: list[tuple[str, int]], kind: str, at_least: int = 0) -> list[int]:
    return sorted(size for name, size in found if name == kind and size >= at_least)


@pytest.fixture(scope="module")
def programs():
    """(method, "forward" or "both" passes, remat) → its `Collectives`; compiled on first use."""
    mesh, config, known = qmj.make_mesh(**MESH), block_config(), {}
    block = build_block(config, mesh)
    hidden_BTD = jax.ShapeDtypeStruct((B, T, config.hidden_size), np.float32)
    token_mask_BT = np.ones((B, T), bool)

    def get(method: str, passes: str, remat: str = "none") -> Collectives:
        key = method, passes, remat
        if key not in known:
            execution = qmj.ExecutionConfig(
                dtype="float32",
                **METHODS[method],
                capacity_factor=FACTOR,
                min_capacity=1,
                group_size=GROUP,
                buffer_factor=FACTOR,
            )

            def run(block, hidden_BTD):
                return forward(block, mesh, hidden_BTD, token_mask_BT, execution)[0]

            if remat != "none":
                run = jax.checkpoint(run, policy=remat_policy(qmj.ExecutionConfig(remat=remat)))

            def objective(block, hidden_BTD):
                return (run(block, hidden_BTD) ** 2).sum()

            program = run if passes == "forward" else jax.grad(objective, (0, 1))
            known[key] = collectives(jax.jit(program).lower(block, hidden_BTD).compile())
        return known[key]

    return get


WIDTH = block_config().hidden_size
CHOICES = B * T // DEVICES * A * 4
"""Bytes of one integer per assignment of a device: what index work may exchange."""
TOKENS = B * T // DEVICES * WIDTH * 4
"""Bytes of a device's own tokens in float32."""
ROWS = 4 * CHOICES
"""More than an integer or a float per row of a buffer, fewer than rows have."""


def exchange_bytes(method: str) -> int:
    """One direction, per device, of float32 rows."""
    if method == "all-to-all":
        return WAYS * device_rows(B * T // DEVICES, A, E, WAYS, FACTOR) * WIDTH * 4
    # [E, G, C, D], cut over the eight devices
    return E * (B * T // GROUP) * expert_capacity(GROUP, A, E, FACTOR, 1) * WIDTH * 4 // DEVICES


@pytest.mark.parametrize("method", ["einsum", "index", "all-to-all"])
def test_tokens_are_exchanged_with_two_all_to_alls_forward_and_two_backward(method, programs):
    size = exchange_bytes(method)
    assert of_kind(programs(method, "forward").outside, "all-to-all", ROWS) == [size] * 2
    assert of_kind(programs(method, "both").outside, "all-to-all", ROWS) == [size] * 4
    others = of_kind(programs(method, "both").outside, "all-to-all")[:-4]
    weights = size // WIDTH
    wanted = [E * 4, weights, weights] if method == "all-to-all" else []
    assert others == wanted, "dropless also exchanges the number of rows, and for the backward pass their weights"
    counts = of_kind(programs(method, "forward").outside, "all-to-all")[:-2]
    assert counts == wanted[:1], "which a forward pass alone does not"


def test_gathered_tokens_come_once_and_their_sums_go_once(programs):
    """All-gather there and reduce-scatter back; in the backward pass the other way round."""
    forward, both = programs("gather", "forward").outside, programs("gather", "both").outside
    assert not of_kind(both, "all-to-all")
    assert of_kind(forward, "all-gather", TOKENS) == [WAYS * TOKENS]
    assert of_kind(forward, "reduce-scatter") == [TOKENS]
    assert of_kind(both, "all-gather", TOKENS) == [WAYS * TOKENS] * 2
    assert of_kind(both, "reduce-scatter", TOKENS) == [TOKENS] * 2


@pytest.mark.parametrize("method", ["einsum", "index", "all-to-all"])
def test_nothing_larger_than_the_routers_scores_is_gathered(method, programs):
    """What is gathered is the router's own matrix [E, D]: tokens travel to experts, weights never."""
    router = E * WIDTH * 4
    scores = B * T // DEVICES * E * 4
    for passes in ("forward", "both"):
        found = programs(method, passes)
        assert all(size <= max(router, scores) for size in of_kind(found.outside + found.in_loops, "all-gather"))


@pytest.mark.parametrize("method", METHODS)
def test_expert_weights_are_never_gathered_over_the_expert_axis(method, programs):
    weight = E * WIDTH * block_config().moe.moe_intermediate_size * 4
    for passes in ("forward", "both"):
        found = programs(method, passes)
        gathered = of_kind(found.outside + found.in_loops, "all-gather")
        assert all(size != weight and size <= WAYS * TOKENS for size in gathered)


@pytest.mark.parametrize("method", ["einsum", "index", "all-to-all"])
def test_the_backward_pass_repeats_the_exchange_only_where_remat_asks_for_it(method, programs):
    """Of dropless' two exchanges the first alone: results are not needed, since the experts know their weights."""
    for remat in ("full", "experts") if method == "all-to-all" else ("full",):
        repeated = len(of_kind(programs(method, "both", remat).outside, "all-to-all", ROWS)) - 4
        assert repeated == 1 if method == "all-to-all" else repeated > 0
    for remat in ("exchange", "dots") if method == "all-to-all" else ("dots",):
        assert len(of_kind(programs(method, "both", remat).outside, "all-to-all", ROWS)) == 4


def test_a_further_round_sends_what_the_first_one_sends(programs):
    """Rows beyond the buffers go in loops; the backward one repeats its round's way there before it reverses it."""
    rows = exchange_bytes("all-to-all")
    forward, both = programs("all-to-all", "forward").in_loops, programs("all-to-all", "both").in_loops
    assert of_kind(forward, "all-to-all", ROWS) == [rows] * 2
    assert of_kind(both, "all-to-all", ROWS) == [rows] * (2 + 3), "of the round's two exchanges, one is repeated"
    assert {kind for kind, _ in both} == {"all-to-all"}
    forward, both = programs("gather", "forward").in_loops, programs("gather", "both").in_loops
    assert of_kind(forward, "reduce-scatter") == [TOKENS]
    assert not of_kind(forward, "all-gather", TOKENS), "the first round has gathered the tokens"
    assert {kind for kind, _ in both} <= {"all-gather", "reduce-scatter"}


@pytest.mark.parametrize("method", ["einsum", "index"])
def test_only_dropless_has_a_loop_with_collectives(method, programs):
    assert not programs(method, "both").in_loops
