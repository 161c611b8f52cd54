"""A sparse block with prescribed experts, held to the definition in NumPy; and what recordings refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.moe.replay import packed_dtype
from qwen_moe_jax.moe.router import ForcedRouting
from tests.moe.blocks import relative

B, T, D, E, A, F = 4, 6, 16, 8, 3, 12
RNG = np.random.default_rng(0)
HIDDEN_BTD = RNG.normal(size=(B, T, D)).astype(np.float32)
SEED_BTD = RNG.normal(size=(B, T, D)).astype(np.float32)
FORCED_BTA = np.argsort(RNG.random((B, T, E)), axis=-1)[..., :A].astype(np.int32)
MASK_BT = np.arange(T) < np.array([[6], [4], [1], [0]])


def moe(renormalise: bool = True) -> qmj.MoEConfig:
    return qmj.MoEConfig(num_experts=E, num_experts_per_tok=A, moe_intermediate_size=F, norm_topk_prob=renormalise)


def block_of(renormalise: bool = True) -> qmj.SparseMoeBlock:
    make = qmj.ParameterFactory(mesh=qmj.make_mesh(), dtype="float32", initializer_range=0.3, rngs=nnx.Rngs(0))
    return qmj.SparseMoeBlock(D, moe(renormalise), make=make)


def by_definition(block, router_ED, experts_BTA, renormalise: bool):
    """The block as a plain sum over the given experts, in the dtype of the router's weight."""
    hidden_BTD = HIDDEN_BTD.astype(router_ED.dtype)
    probs_BTE = jax.nn.softmax(hidden_BTD @ router_ED.T, axis=-1)
    weights_BTA = jnp.take_along_axis(probs_BTE, jnp.asarray(experts_BTA), axis=-1)
    if renormalise:
        weights_BTA = weights_BTA / weights_BTA.sum(-1, keepdims=True)
    names = ("gate_proj", "up_proj", "down_proj")
    gate, up, down = (jnp.asarray(np.asarray(getattr(block.experts, name)[...]), router_ED.dtype) for name in names)
    inner_BTEF = jax.nn.silu(jnp.einsum("BTD,EFD->BTEF", hidden_BTD, gate))
    inner_BTEF = inner_BTEF * jnp.einsum("BTD,EFD->BTEF", hidden_BTD, up)
    results_BTED = jnp.einsum("BTEF,EDF->BTED", inner_BTEF, down)
    chosen_BTAD = jnp.take_along_axis(results_BTED, jnp.asarray(experts_BTA)[..., None], axis=2)
    return jnp.sum(weights_BTA[..., None] * chosen_BTAD, axis=2)


@pytest.mark.parametrize("renormalise", [True, False])
def test_forced_experts_and_the_routers_gradient_are_the_definitions(renormalise):
    block = block_of(renormalise)
    forced = ForcedRouting(experts=FORCED_BTA)

    def objective(block):
        mixed_BTD, stats, trace = block(HIDDEN_BTD, execution=qmj.ExecutionConfig(dispatch="dense"), forced=forced)
        return jnp.sum(mixed_BTD * SEED_BTD), (mixed_BTD, stats, trace)

    (_, (found_BTD, stats, trace)), gradient = jax.value_and_grad(objective, has_aux=True)(block)
    with jax.enable_x64(True):
        router_ED = jnp.asarray(np.asarray(block.gate.weight[...]), jnp.float64)
        expected_BTD, pull = jax.vjp(lambda w: by_definition(block, w, FORCED_BTA, renormalise), router_ED)
        [expected_ED] = pull(jnp.asarray(SEED_BTD, jnp.float64))
        expected_BTD, expected_ED = np.asarray(expected_BTD), np.asarray(expected_ED)
    assert relative(np.asarray(found_BTD), expected_BTD) < 1e-6
    assert relative(np.asarray(gradient.gate.weight[...]), expected_ED) < 1e-5
    np.testing.assert_array_equal(trace.experts, FORCED_BTA)
    np.testing.assert_array_equal(stats.tokens_per_expert, np.bincount(FORCED_BTA.ravel(), minlength=E))


@pytest.mark.parametrize("routing", ["learned", "balanced"])
def test_open_places_take_the_best_experts_that_are_left(routing):
    block, execution = block_of(), qmj.ExecutionConfig(dispatch="dense", routing=routing)
    _, _, plain = block(HIDDEN_BTD, MASK_BT, execution)
    given_BTA = np.full((B, T, A), -1)
    given_BTA[0] = FORCED_BTA[0]  # all of them
    given_BTA[1, :, 1] = FORCED_BTA[1, :, 1]  # one of three
    given_BTA[3] = 99  # padding: not read
    without_E = np.arange(E) == int(plain.experts[2, 0, 0])
    _, stats, edited = block(HIDDEN_BTD, MASK_BT, execution, forced=ForcedRouting(experts=given_BTA, without=without_E))
    order_BTE = np.argsort(-np.asarray(plain.logits), axis=-1)
    if routing == "balanced":
        order_BTE = (A * np.arange(B * T).reshape(B, T, 1) + np.arange(E)) % E
    for b, t in np.argwhere(MASK_BT):
        given = [int(x) if x >= 0 and not without_E[x] else -1 for x in given_BTA[b, t]]
        others = (int(x) for x in order_BTE[b, t] if x not in given and not without_E[x])
        assert edited.experts[b, t].tolist() == [next(others) if x < 0 else x for x in given], (b, t)
    assert int(stats.tokens_per_expert[np.argmax(without_E)]) == 0
    assert not np.asarray(edited.weights)[~MASK_BT].any()
    assert int(stats.tokens_per_expert.sum()) == A * MASK_BT.sum()


def recording() -> qmj.RecordedRouting:
    return qmj.RecordedRouting(np.argsort(RNG.random((2, 5, 300)), axis=-1)[..., :4], 300)


@pytest.mark.parametrize("name", ["routing.npz", "routing.safetensors"])
@pytest.mark.parametrize("some_open", [False, True])
def test_a_recording_is_stored_and_read_bit_equal(tmp_path, name, some_open):
    recorded = recording()
    recorded = recorded.edit(layers=1, tokens=[0, 3], experts=[7]) if some_open else recorded
    recorded.save(tmp_path / name)
    found = qmj.RecordedRouting.load(tmp_path / name)
    np.testing.assert_array_equal(found.experts, recorded.experts)
    assert found.num_experts == 300 and found.experts.dtype == packed_dtype(300, some_open)


def test_recordings_take_the_fewest_bytes():
    assert [packed_dtype(count).name for count in (128, 256, 257, 2**16)] == ["uint8", "uint8", "uint16", "uint16"]
    assert packed_dtype(256, some_open=True) == np.int16
    assert qmj.RecordedRouting(np.array([[[255, 0]]]), 256).experts.tolist() == [[[255, 0]]]


def test_an_edit_changes_what_it_names():
    recorded = recording()
    edited = recorded.edit(layers=1, tokens=slice(2, 4), experts=[7, 9])
    expected = recorded.experts.astype(int)
    expected[1, 2:4] = [7, 9, -1, -1]
    np.testing.assert_array_equal(edited.experts, expected)
    assert (recorded.edit(layers=[0], experts=None).experts[0] == -1).all()
    assert (qmj.RecordedRouting.all_open(2, 5, moe()).experts == -1).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: qmj.RecordedRouting(np.zeros((2, 3), int), 8), r"int64 \[2, 3\], expected integers \[sparse layers"),
        (lambda _: qmj.RecordedRouting(np.full((1, 2, 1), 8), 8), "found expert 8, expected numbers from 0 to 7"),
        (lambda _: qmj.RecordedRouting(np.zeros((1, 2, 2), int), 8), r"one expert twice for the token at \(0, 0\)"),
        (lambda _: recording().edit(experts=[1, 2, 3, 4, 5]), "has 5 experts, expected at most 4"),
        (lambda _: recording().edit(experts=[300]), "expected numbers from 0 to 299"),
        (lambda _: recording().edit(layers=2, experts=[3]), "2 sparse layers and 5 tokens"),
        (lambda folder: recording().save(folder / "routing.json"), "expected .npz or .safetensors"),
    ],
)
def test_what_is_no_routing_is_refused(tmp_path, make, message):
    with pytest.raises(qmj.RequestError, match=message):
        make(tmp_path)


@pytest.mark.parametrize("name", ["routing.npz", "routing.safetensors"])
def test_a_file_that_is_missing_or_damaged_is_refused_by_name(tmp_path, name):
    with pytest.raises(qmj.CheckpointError, match=f"{name}: no such file"):
        qmj.RecordedRouting.load(tmp_path / name)
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(qmj.CheckpointError, match=f"{name}: damaged"):
        qmj.RecordedRouting.load(tmp_path / name)
