"""The dispatch methods against each other, on one device and on eight."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_moe_jax as qmj
from qwen_moe_jax.moe.dispatch.capacity import expert_capacity
from qwen_moe_jax.moe.dispatch.dropless import device_rows
from tests.moe.blocks import block_config, build_block, relative, run_block, run_forward

#: Every way to run a block, with room for every token.
AMPLE = dict(capacity_factor=8.0, min_capacity=1, group_size=4, buffer_factor=None)
METHODS = {
    "dense": dict(dispatch="dense"),
    "capacity by einsum": dict(dispatch="capacity", capacity_by="einsum"),
    "capacity by index": dict(dispatch="capacity", capacity_by="index"),
    "dropless by gather": dict(dispatch="dropless", exchange="all_gather"),
    "dropless by all-to-all": dict(dispatch="dropless", exchange="all_to_all"),
}
CAPACITY = [name for name in METHODS if "capacity" in name]
MESHES = {
    "one device": {},
    "expert=8": dict(expert=8),
    "data=2·expert=4": dict(data=2, expert=4),
    "fsdp=2·expert=4": dict(fsdp=2, expert=4),
    "expert=4·tensor=2": dict(expert=4, tensor=2),
    "data=2·expert=2·tensor=2": dict(data=2, expert=2, tensor=2),
    "fsdp=2·expert=2·tensor=2": dict(fsdp=2, expert=2, tensor=2),
}
#: The mixtures of the three sparse families.
FAMILIES = {
    "qwen3_moe": dict(),
    "qwen2_moe": dict(norm_topk_prob=False, shared_expert_intermediate_size=20),
    "mixtral": dict(float32_weights=True),
}
# The methods sum the same products in another order; float32 leaves about 1e-7 of that, and 1e-6 is the promise.
SAME = 1e-6


def execution(method: str, **settings) -> qmj.ExecutionConfig:
    return qmj.ExecutionConfig(**({"dtype": "float32"} | AMPLE | METHODS[method] | settings))


def batch(seed=0, shape=(8, 6), padding=True):
    rng = np.random.default_rng(seed)
    hidden_BTD = rng.normal(size=(*shape, 16)).astype(np.float32)
    token_mask_BT = np.ones(shape, bool)
    if padding:
        token_mask_BT[0, :3] = False
        token_mask_BT[-1, -4:] = False
    return hidden_BTD, token_mask_BT


def crowded(shape=(8, 7)):
    """A batch with a common direction, so that some experts are asked for by almost everyone."""
    hidden_BTD, token_mask_BT = batch(seed=3, shape=shape)
    hidden_BTD[..., 0] += 2.0
    return hidden_BTD, token_mask_BT


@pytest.fixture(scope="module")
def reference():
    """`dense` on one device: what every method on every mesh is held to."""
    results = {}

    def run(family):
        if family not in results:
            results[family] = run_block(block_config(**FAMILIES[family]), qmj.make_mesh(), *batch(), execution("dense"))
        return results[family]

    return run


def assert_same(found, wanted, token_mask_BT):
    assert relative(found.mixed_BTD[token_mask_BT], wanted.mixed_BTD[token_mask_BT]) < SAME
    assert relative(found.input_gradient[token_mask_BT], wanted.input_gradient[token_mask_BT]) < SAME
    for ours, theirs in zip(found.weight_gradients, wanted.weight_gradients, strict=True):
        assert relative(ours, theirs) < SAME


#: A family's mixture has nothing to do with where things lie: one simulated mesh beside the single device is enough for
#: all but the one with most parts.
CASES = [
    (family, mesh)
    for family in FAMILIES
    for mesh in MESHES
    if family == "qwen2_moe" or mesh in ("one device", "data=2·expert=4")
]


@pytest.mark.parametrize("family, mesh", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_any_mesh_equals_dense_on_one_device(family, method, mesh, reference):
    hidden_BTD, token_mask_BT = batch()
    config = block_config(**FAMILIES[family])
    found = run_block(config, qmj.make_mesh(**MESHES[mesh]), hidden_BTD, token_mask_BT, execution(method))
    wanted = reference(family)
    assert_same(found, wanted, token_mask_BT)
    np.testing.assert_array_equal(found.tokens_per_expert, wanted.tokens_per_expert)
    assert found.dropped_per_expert.sum() == 0


def block_in_numpy(config, hidden_BTD, trace) -> np.ndarray:
    """What the block must return: a loop over the assignments that were not dropped."""
    block = build_block(config, qmj.make_mesh())
    gate_EFD, up_EFD, down_EDF = (np.asarray(w, np.float64) for w in jax.tree.leaves(block.experts.weights()))
    mixed_BTD = np.zeros_like(hidden_BTD, np.float64)
    for b, t, a in np.argwhere(~trace.dropped):
        expert, x_D = trace.experts[b, t, a], hidden_BTD[b, t].astype(np.float64)
        gated_F = gate_EFD[expert] @ x_D
        hidden_F = gated_F / (1 + np.exp(-gated_F)) * (up_EFD[expert] @ x_D)
        mixed_BTD[b, t] += trace.weights[b, t, a] * (down_EDF[expert] @ hidden_F)
    return mixed_BTD


def device_of_row(mesh: dict[str, int], batch_size: int, row: int) -> int:
    """The device that a row of the batch lies on."""
    num_shards = math.prod(mesh.get(axis, 1) for axis in ("data", "fsdp", "expert"))
    return row // (batch_size // num_shards)


def full_experts(trace, token_mask_BT, mesh, group_size, capacity, drop) -> np.ndarray:
    """A plain loop over tokens: which assignments find their expert full."""
    batch_size, length, _ = trace.experts.shape
    groups = {}
    for b, t in np.ndindex(batch_size, length):
        tokens = groups.setdefault(device_of_row(mesh, batch_size, b), [])
        tokens.append((b, t))
    dropped_BTA = np.zeros(trace.experts.shape, bool)
    for tokens in groups.values():
        for start in range(0, len(tokens), group_size):
            asking = [
                (b, t, a)
                for b, t in tokens[start : start + group_size]
                for a in range(trace.experts.shape[2])
                if token_mask_BT[b, t]
            ]
            if drop == "probs":
                asking.sort(key=lambda at: -trace.weights[at])  # a stable sort: ties stay in the order of the tokens
            taken = {}
            for at in asking:
                expert = trace.experts[at]
                taken[expert] = taken.get(expert, 0) + 1
                dropped_BTA[at] = taken[expert] > capacity
    return dropped_BTA


def rounds_needed(trace, token_mask_BT, mesh, num_experts, factor, exchange) -> int:
    """A plain loop over tokens: how often the fullest buffer is filled."""
    batch_size, length, chosen = trace.experts.shape
    num_shards = mesh.get("expert", 1)
    sources = {}  # the tokens that share a buffer: a device's own, or all that an expert axis gathers
    for b, t in np.ndindex(batch_size, length):
        device = device_of_row(mesh, batch_size, b)
        sources.setdefault(device // num_shards if exchange == "all_gather" else device, []).append((b, t))
    needed = 1
    for tokens in sources.values():
        rows = device_rows(len(tokens), chosen, num_experts, num_shards, factor)
        experts = np.concatenate([trace.experts[at] for at in tokens if token_mask_BT[at]])
        needed = max(needed, math.ceil(np.bincount(experts // (num_experts // num_shards)).max() / rows))
    return needed


@pytest.mark.parametrize("mesh", ["one device", "data=2·expert=4"])
@pytest.mark.parametrize("drop", ["position", "probs"])
@pytest.mark.parametrize("group_size, factor", [(5, 1.0), (6, 0.5), (64, 1.25)])
def test_capacity_drops_exactly_the_tokens_that_a_loop_over_tokens_predicts(mesh, drop, group_size, factor):
    hidden_BTD, token_mask_BT = crowded()
    config, axes = block_config(), MESHES[mesh]
    local = hidden_BTD.shape[0] * hidden_BTD.shape[1] // math.prod(axes.values())
    size = min(group_size, local)
    capacity = expert_capacity(size, 2, 8, factor, min_capacity=1)
    settings = dict(capacity_factor=factor, group_size=group_size, drop_policy=drop)
    results = [
        run_block(config, qmj.make_mesh(**axes), hidden_BTD, token_mask_BT, execution(method, **settings))
        for method in CAPACITY
    ]
    for found in results:
        dropped_BTA = full_experts(found.trace, token_mask_BT, axes, size, capacity, drop)
        assert dropped_BTA.any(), "the case is meant to drop tokens"
        np.testing.assert_array_equal(found.trace.dropped, dropped_BTA)
        counted_E = np.bincount(found.trace.experts[dropped_BTA], minlength=8)
        np.testing.assert_array_equal(found.stats.dropped_per_expert, counted_E)
        assert found.stats.rounds == 1
        assert found.tokens_per_expert.sum() == 2 * token_mask_BT.sum()
        assert relative(found.mixed_BTD, block_in_numpy(config, hidden_BTD, found.trace)) < SAME
    assert_same(*results, token_mask_BT)


@pytest.mark.parametrize("method", ["dropless by gather", "dropless by all-to-all"])
@pytest.mark.parametrize("mesh", ["expert=8", "data=2·expert=4"])
def test_rows_beyond_a_buffer_are_served_in_as_many_rounds_as_a_loop_over_tokens_predicts(method, mesh):
    hidden_BTD, token_mask_BT = crowded()
    config, axes = block_config(), MESHES[mesh]
    found = run_block(config, qmj.make_mesh(**axes), hidden_BTD, token_mask_BT, execution(method, buffer_factor=1.0))
    needed = rounds_needed(found.trace, token_mask_BT, axes, 8, 1.0, METHODS[method]["exchange"])
    assert needed > 1, "the case is meant to exceed the buffer"
    assert found.stats.rounds == needed
    assert not found.trace.dropped[token_mask_BT].any()
    assert not found.stats.dropped_per_expert.any()
    wanted = run_block(config, qmj.make_mesh(), hidden_BTD, token_mask_BT, execution("dense"))
    assert_same(found, wanted, token_mask_BT)


def test_dropless_drops_nothing_on_one_device_whatever_the_buffer():
    found = run_block(block_config(), qmj.make_mesh(), *crowded(), execution("dropless by gather", buffer_factor=1.0))
    assert not found.trace.dropped.any()


@pytest.mark.parametrize("method", METHODS)
def test_all_tokens_may_choose_the_same_experts(method):
    """Two experts do everything, six have no token: ties go to the lower expert, and nobody divides by zero."""
    hidden_BTD, token_mask_BT = batch()
    config = block_config()
    wanted = run_block(config, qmj.make_mesh(), hidden_BTD, token_mask_BT, execution("dense"), router=0.0)
    found = run_block(config, qmj.make_mesh(expert=4), hidden_BTD, token_mask_BT, execution(method), router=0.0)
    np.testing.assert_array_equal(found.tokens_per_expert, [token_mask_BT.sum()] * 2 + [0] * 6)
    assert_same(found, wanted, token_mask_BT)


@pytest.mark.parametrize("method", METHODS)
def test_padding_takes_no_expert_capacity(method):
    """Real tokens keep their places and their room whatever stands in the padding before them."""
    hidden_BTD, _ = batch(shape=(4, 12), padding=False)
    token_mask_BT = np.ones((4, 12), bool)
    token_mask_BT[:, :6] = False
    tight = execution(method, capacity_factor=1.0, group_size=12, buffer_factor=1.0)
    config, mesh = block_config(), qmj.make_mesh(expert=4)
    filled = hidden_BTD.copy()
    filled[:, :6] = filled[0, 6]  # padding that would fill one token's experts
    first_BTD, first_stats, first_trace = run_forward(config, mesh, hidden_BTD, token_mask_BT, tight)
    second_BTD, second_stats, _ = run_forward(config, mesh, filled, token_mask_BT, tight)
    np.testing.assert_array_equal(first_BTD[token_mask_BT], second_BTD[token_mask_BT])
    np.testing.assert_array_equal(first_stats.tokens_per_expert, second_stats.tokens_per_expert)
    assert first_stats.tokens_per_expert.sum() == 2 * token_mask_BT.sum()
    assert not second_BTD[~token_mask_BT].any(), "padding is routed nowhere"
    assert not first_trace.dropped[~token_mask_BT].any(), "and cannot be dropped"


@pytest.mark.parametrize("method", METHODS)
def test_nan_in_one_token_does_not_reach_another_token(method):
    hidden_BTD, token_mask_BT = batch(shape=(4, 8), padding=False)
    config, mesh = block_config(), qmj.make_mesh(expert=4)
    clean_BTD, _, _ = run_forward(config, mesh, hidden_BTD, token_mask_BT, execution(method))
    hidden_BTD[0, 1] = np.nan
    dirty_BTD, _, _ = run_forward(config, mesh, hidden_BTD, token_mask_BT, execution(method))
    assert np.isnan(dirty_BTD[0, 1]).all()
    others = np.ones((4, 8), bool)
    others[0, 1] = False
    np.testing.assert_allclose(dirty_BTD[others], clean_BTD[others], rtol=1e-6, atol=1e-7)


@settings(deadline=None, max_examples=8)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9)),
    experts=st.integers(1, 6),
    chosen=st.integers(1, 4),
    skew=st.floats(0, 8),
    method=st.sampled_from([name for name in METHODS if name != "dense"]),
)
def test_any_shape_and_any_skew_equal_dense(seed, shape, experts, chosen, skew, method):
    hidden_BTD, _ = batch(seed, shape, padding=False)
    hidden_BTD[..., 0] += skew
    token_mask_BT = np.random.default_rng(seed).random(shape) < 0.8
    config = block_config(num_experts=experts, num_experts_per_tok=min(chosen, experts))
    wanted = run_block(config, qmj.make_mesh(), hidden_BTD, token_mask_BT, execution("dense"))
    found = run_block(config, qmj.make_mesh(), hidden_BTD, token_mask_BT, execution(method))
    # Absolute as well as relative: with everything padded there is nothing to be relative to.
    np.testing.assert_allclose(found.mixed_BTD[token_mask_BT], wanted.mixed_BTD[token_mask_BT], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found.weight_gradients, wanted.weight_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(theirs).max()))
    np.testing.assert_array_equal(found.tokens_per_expert, wanted.tokens_per_expert)


def test_bfloat16_is_as_near_to_float32_by_every_method_as_densely():
    """Rows, places and exchanges must not cost precision beyond the matmuls' own rounding."""
    hidden_BTD, token_mask_BT = batch()
    config = block_config()
    exact_BTD, _, exact_trace = run_forward(config, qmj.make_mesh(), hidden_BTD, token_mask_BT, execution("dense"))
    rounded = hidden_BTD.astype(jax.numpy.bfloat16)
    error = {}
    for method in METHODS:
        mixed_BTD, _, trace = run_forward(config, qmj.make_mesh(), rounded, token_mask_BT, execution(method))
        assert mixed_BTD.dtype == rounded.dtype
        same_BT = token_mask_BT & (trace.experts == exact_trace.experts).all(-1)  # rounding may route otherwise
        assert same_BT.sum() > 0.8 * token_mask_BT.sum()
        error[method] = relative(mixed_BTD[same_BT].astype(np.float32), exact_BTD[same_BT])
    # 8 bits of mantissa, three matmuls in a row: about 1%. The methods differ by the order of a sum of two.
    assert max(error.values()) < 1.5 * error["dense"] < 0.02


@settings(deadline=None, max_examples=200)
@given(
    group_size=st.integers(1, 4096),
    num_experts=st.integers(1, 256),
    chosen=st.integers(1, 8),
    factor=st.floats(0.01, 16),
    min_capacity=st.integers(1, 8),
)
def test_capacity_is_at_least_the_minimum_at_most_the_group_and_covers_a_balanced_load(
    group_size, num_experts, chosen, factor, min_capacity
):
    chosen = min(chosen, num_experts)
    capacity = expert_capacity(group_size, chosen, num_experts, factor, min_capacity)
    assert min(min_capacity, group_size) <= capacity <= group_size
    if factor >= 1:
        assert capacity * num_experts >= min(group_size * chosen, group_size * num_experts)


@settings(deadline=None, max_examples=200)
@given(
    tokens=st.integers(1, 4096),
    own=st.integers(1, 64),
    num_shards=st.integers(1, 64),
    chosen=st.integers(1, 8),
    factor=st.one_of(st.none(), st.floats(1, 16)),
)
def test_a_device_has_room_for_a_balanced_load_and_never_for_more_than_can_come(
    tokens, own, num_shards, chosen, factor
):
    chosen = min(chosen, own * num_shards)
    room = device_rows(tokens, chosen, own * num_shards, num_shards, factor)
    assert tokens * chosen / num_shards <= room <= tokens * min(chosen, own)
    if num_shards == 1:
        assert room == tokens * chosen, "on one device everything fits"


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_alone_equals_dense(family):
    """Decoding one text takes a path of its own on CPUs; padding takes it, too."""
    hidden_BTD, _ = batch(shape=(1, 1), padding=False)
    config = block_config(**FAMILIES[family])
    for real in (True, False):
        token_mask_BT = np.array([[real]])
        wanted_BTD, _, _ = run_forward(config, qmj.make_mesh(), hidden_BTD, token_mask_BT, execution("dense"))
        found_BTD, stats, _ = run_forward(
            config, qmj.make_mesh(), hidden_BTD, token_mask_BT, execution("dropless by gather")
        )
        np.testing.assert_allclose(found_BTD, wanted_BTD, rtol=1e-5, atol=1e-6)
        assert stats.tokens_per_expert.sum() == 2 * real
