"""The dispatch methods against each other, on one device and on eight."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_moe_jax as qmj
from qwen_moe_jax.moe.capacity import expert_capacity
from tests.moe.blocks import block_config, relative, run_block

MESHES = {
    "one device": {},
    "expert=8": dict(expert=8),
    "data=2·expert=4": dict(data=2, expert=4),
    "fsdp=2·expert=2·tensor=2": dict(fsdp=2, expert=2, tensor=2),
}
MIXTURES = {
    "renormalised": dict(),
    "unnormalised with shared expert": dict(norm_topk_prob=False, shared_expert_intermediate_size=20),
    "float32 weights": dict(float32_weights=True),
}
# The methods sum the same products in another order; float32 leaves about 1e-7 of that, and 1e-6 is the promise.
SAME = 1e-6


def batch(seed=0, shape=(8, 6), padding=True):
    rng = np.random.default_rng(seed)
    hidden_BTD = rng.normal(size=(*shape, 16)).astype(np.float32)
    real_BT = np.ones(shape, bool)
    if padding:
        real_BT[0, :3] = False
        real_BT[-1, -4:] = False
    return hidden_BTD, real_BT


@pytest.fixture(scope="module")
def reference():
    """`dense` on one device: what every method on every mesh is held to."""
    results = {}

    def run(name):
        if name not in results:
            hidden_BTD, real_BT = batch()
            dense = qmj.ExecutionConfig(dtype="float32", dispatch="dense")
            results[name] = run_block(block_config(**MIXTURES[name]), qmj.make_mesh(), hidden_BTD, real_BT, dense)
        return results[name]

    return run


#: The weights' dtype has nothing to do with where they lie: one mesh is enough for it.
CASES = [(mixture, mesh) for mixture in MIXTURES for mesh in MESHES if mixture != "float32 weights" or not MESHES[mesh]]


@pytest.mark.parametrize("mixture, mesh", CASES)
@pytest.mark.parametrize("dispatch", ["dense", "capacity"])
def test_ample_capacity_and_any_mesh_equal_dense_on_one_device(mixture, dispatch, mesh, reference):
    hidden_BTD, real_BT = batch()
    execution = qmj.ExecutionConfig(
        dtype="float32", dispatch=dispatch, capacity_factor=8.0, group_size=4, eval_capacity_factor=8.0
    )
    config = block_config(**MIXTURES[mixture])
    found = run_block(config, qmj.make_mesh(**MESHES[mesh]), hidden_BTD, real_BT, execution)
    wanted = reference(mixture)
    assert relative(found.mixed_BTD[real_BT], wanted.mixed_BTD[real_BT]) < SAME
    assert relative(found.input_gradient[real_BT], wanted.input_gradient[real_BT]) < SAME
    for ours, theirs in zip(found.weight_gradients, wanted.weight_gradients, strict=True):
        assert relative(ours, theirs) < SAME
    np.testing.assert_array_equal(found.tokens_per_expert, wanted.tokens_per_expert)
    assert found.dropped_per_expert.sum() == 0


def predicted_drops(logits_BTE, real_BT, devices, group_size, capacity, chosen):
    """A plain loop over tokens: which (token, expert) find no place."""
    batch_size, length, num_experts = logits_BTE.shape
    dropped_E = np.zeros(num_experts, int)
    kept = {}
    per_device = batch_size // devices
    for device in range(devices):
        rows = range(device * per_device, (device + 1) * per_device)
        tokens = [(b, t) for b in rows for t in range(length)]
        size = min(group_size, len(tokens))
        for start in range(0, len(tokens), size):
            taken = np.zeros(num_experts, int)
            for b, t in tokens[start : start + size]:
                kept[b, t] = []
                if not real_BT[b, t]:
                    continue
                for expert in np.argsort(-logits_BTE[b, t], kind="stable")[:chosen]:
                    if taken[expert] < capacity:
                        kept[b, t].append(expert)
                    else:
                        dropped_E[expert] += 1
                    taken[expert] += 1
    return dropped_E, kept


@pytest.mark.parametrize("mesh", ["one device", "data=2·expert=4"])
@pytest.mark.parametrize("group_size, factor", [(5, 1.0), (6, 0.5), (64, 1.25)])
def test_dropped_tokens_are_exactly_those_a_loop_over_tokens_predicts(mesh, group_size, factor):
    hidden_BTD, real_BT = batch(seed=3, shape=(8, 7))
    hidden_BTD[..., 0] += 2.0  # a common direction, so that some experts are crowded
    config = block_config()
    axes = MESHES[mesh]
    devices = math.prod(axes.values())
    local = hidden_BTD.shape[0] * hidden_BTD.shape[1] // devices
    capacity = expert_capacity(min(group_size, local), 2, 8, factor)
    execution = qmj.ExecutionConfig(dtype="float32", dispatch="capacity", capacity_factor=factor, group_size=group_size)
    found = run_block(config, qmj.make_mesh(**axes), hidden_BTD, real_BT, execution)
    dropped_E, kept = predicted_drops(found.logits_BTE, real_BT, devices, group_size, capacity, chosen=2)
    assert dropped_E.sum() > 0, "the case is meant to drop tokens"
    np.testing.assert_array_equal(found.dropped_per_expert, dropped_E)
    assert found.tokens_per_expert.sum() == 2 * real_BT.sum()
    lost_all = [at for at, experts in kept.items() if real_BT[at] and not experts]
    for b, t in lost_all:
        assert not found.mixed_BTD[b, t].any(), "a token without any place contributes nothing"


def test_padding_takes_no_expert_capacity():
    """Real tokens keep their places whatever stands in the padding before them."""
    hidden_BTD, _ = batch(shape=(1, 12), padding=False)
    real_BT = np.ones((1, 12), bool)
    real_BT[0, :6] = False
    execution = qmj.ExecutionConfig(dtype="float32", dispatch="capacity", capacity_factor=1.0, group_size=12)
    config, mesh = block_config(), qmj.make_mesh()
    crowded = hidden_BTD.copy()
    crowded[0, :6] = crowded[0, 6]  # padding that would fill one token's experts
    first = run_block(config, mesh, hidden_BTD, real_BT, execution)
    second = run_block(config, mesh, crowded, real_BT, execution)
    np.testing.assert_array_equal(first.mixed_BTD[0, 6:], second.mixed_BTD[0, 6:])
    np.testing.assert_array_equal(first.tokens_per_expert, second.tokens_per_expert)
    assert first.tokens_per_expert.sum() == 2 * 6


@pytest.mark.parametrize("dispatch", ["dense", "capacity"])
def test_nan_in_one_token_does_not_reach_another_token(dispatch):
    hidden_BTD, real_BT = batch(shape=(2, 8), padding=False)
    execution = qmj.ExecutionConfig(
        dtype="float32", dispatch=dispatch, capacity_factor=8.0, group_size=4, eval_capacity_factor=8.0
    )
    config, mesh = block_config(), qmj.make_mesh()
    clean = run_block(config, mesh, hidden_BTD, real_BT, execution)
    hidden_BTD[0, 1] = np.nan
    dirty = run_block(config, mesh, hidden_BTD, real_BT, execution)
    assert np.isnan(dirty.mixed_BTD[0, 1]).all()
    others = np.ones((2, 8), bool)
    others[0, 1] = False
    np.testing.assert_allclose(dirty.mixed_BTD[others], clean.mixed_BTD[others], rtol=1e-6, atol=1e-7)


@settings(deadline=None, max_examples=200)
@given(
    group_size=st.integers(1, 4096),
    num_experts=st.integers(1, 256),
    chosen=st.integers(1, 8),
    factor=st.floats(0.01, 16),
)
def test_capacity_is_never_zero_never_more_than_the_group_and_covers_a_balanced_load(
    group_size, num_experts, chosen, factor
):
    chosen = min(chosen, num_experts)
    capacity = expert_capacity(group_size, chosen, num_experts, factor)
    assert 1 <= capacity <= group_size
    if factor >= 1:
        assert capacity * num_experts >= min(group_size * chosen, group_size * num_experts)
