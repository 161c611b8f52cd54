"""What the compiled program sends over the network: read from the HLO of the very code that runs on a pod."""

import re

import jax
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.moe.capacity import expert_capacity
from tests.moe.blocks import block_config, build_block, forward

B, T, GROUP, FACTOR = 16, 8, 8, 1.25
MESH = dict(data=2, expert=4)
KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def collectives(compiled) -> list[tuple[str, int]]:
    """(kind, bytes per device) of every collective of a compiled program."""
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(rf"= (.+?) ({KINDS})(?:-start)?\(", line)
        if match:
            arrays = re.findall(r"\b[fs](\d+)\[([\d,]*)\]", match[1])
            size = sum(int(bits) // 8 * int(np.prod([int(n) for n in dims.split(",") if n])) for bits, dims in arrays)
            found.append((match[2], size))
    return found


@pytest.fixture(scope="module")
def programs():
    mesh = qmj.make_mesh(**MESH)
    config = block_config()
    block = build_block(config, mesh)
    execution = qmj.ExecutionConfig(dtype="float32", dispatch="capacity", capacity_factor=FACTOR, group_size=GROUP)
    hidden_BTD = jax.ShapeDtypeStruct((B, T, config.hidden_size), np.float32)
    real_BT = np.ones((B, T), bool)

    def run(block, hidden_BTD):
        return forward(block, mesh, hidden_BTD, real_BT, execution)[0]

    def objective(block, hidden_BTD):
        return (run(block, hidden_BTD) ** 2).sum()

    return {
        "forward": collectives(jax.jit(run).lower(block, hidden_BTD).compile()),
        "both": collectives(jax.jit(jax.grad(objective, (0, 1))).lower(block, hidden_BTD).compile()),
    }, config


def exchange_bytes(config) -> int:
    """One direction, per device: [E, G, C, D] of float32, cut over the eight devices."""
    capacity = expert_capacity(GROUP, 2, 8, FACTOR)
    return 8 * (B * T // GROUP) * capacity * config.hidden_size * 4 // 8


def test_capacity_exchanges_tokens_with_two_all_to_alls_forward_and_two_backward(programs):
    found, config = programs
    size = exchange_bytes(config)
    assert [bytes_ for kind, bytes_ in found["forward"] if kind == "all-to-all"] == [size] * 2
    assert [bytes_ for kind, bytes_ in found["both"] if kind == "all-to-all"] == [size] * 4


def test_nothing_as_large_as_an_expert_weight_is_gathered(programs):
    """The only gather is the router's own matrix [E, D]: tokens travel to experts, weights never."""
    found, config = programs
    router = 8 * config.hidden_size * 4
    for program in found.values():
        assert all(bytes_ <= router for kind, bytes_ in program if kind == "all-gather"), program
