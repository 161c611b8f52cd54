"""A sparse block alone, called with ordinary arrays in somebody's own model."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.moe.dispatch import dense, dropless

MOE = qmj.MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True)
HIDDEN_BTD = np.random.default_rng(0).normal(size=(4, 6, 16)).astype(np.float32)


def block_on(**axes) -> qmj.SparseMoeBlock:
    make = qmj.ParameterFactory(mesh=qmj.make_mesh(**axes), dtype="float32", initializer_range=0.3, rngs=nnx.Rngs(0))
    return qmj.SparseMoeBlock(16, MOE, make=make)


@pytest.mark.parametrize("axes", [{}, dict(data=2, expert=2)], ids=str)
def test_called_with_ordinary_arrays_it_is_the_dense_reference(axes):
    expected_BTD, _, _ = block_on()(HIDDEN_BTD, execution=qmj.ExecutionConfig(dispatch="dense"))
    block = block_on(**axes)
    found_BTD, stats, _ = block(HIDDEN_BTD)
    np.testing.assert_allclose(found_BTD, expected_BTD, rtol=1e-5, atol=1e-6)
    assert int(stats.tokens) == 24
    compiled_BTD = jax.jit(lambda block, x: block(x)[0])(block, HIDDEN_BTD)
    np.testing.assert_allclose(compiled_BTD, found_BTD, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda block: jnp.sum(block(HIDDEN_BTD)[0] ** 2))(block)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(gradient.experts))


def test_padding_is_routed_nowhere():
    mask_BT = np.arange(6) < np.array([[6], [3], [1], [0]])
    _, stats, _ = block_on()(HIDDEN_BTD, mask_BT)
    assert int(stats.tokens) == 10 and int(stats.tokens_per_expert.sum()) == 20


@pytest.mark.parametrize("shape", [(4, 16), (4, 6, 15), (3, 6, 16)])
def test_hidden_states_of_another_shape_are_refused_with_the_expected_one(shape):
    with pytest.raises(qmj.RequestError, match=r"expected \[batch, length, 16\], batch a multiple of the 4 devices"):
        block_on(data=2, expert=2)(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("function", "result", "expected"),
    [
        ("dispatch", lambda *_: None, "dispatch returned nothing, expected a pair of rows (one of Slots, AllTokens, "),
        (
            "dispatch",
            lambda hidden_BTD, *_: (hidden_BTD, None),
            "dispatch returned a tuple of 2 (an array [4, 6, 16], ",
        ),
        ("combine", lambda rows, plan: rows.x_BTD, "combine returned an array [4, 6, 16], expected a pair of"),
        (
            "combine",
            lambda rows, plan: (rows.x_BTD[:, 1:], None),
            "combine returned a tuple of 2 (an array [4, 5, 16], ",
        ),
    ],
)
def test_a_dispatcher_that_returns_something_else_is_refused_with_what_is_expected(function, result, expected):
    functions = {"dispatch": dense.dispatch, "combine": dense.combine} | {function: result}
    qmj.register_dispatcher("wrong", SimpleNamespace(**functions), overwrite=True)
    with pytest.raises(qmj.ConfigError, match=r"^dispatcher 'wrong': ") as refusal:
        block_on()(HIDDEN_BTD, execution=qmj.ExecutionConfig(dispatch="wrong"))
    assert expected in str(refusal.value)


def test_a_registered_name_is_taken_again_only_to_overwrite():
    qmj.register_dispatcher("mine", dense)
    with pytest.raises(qmj.ConfigError, match="overwrite=True"):
        qmj.register_dispatcher("mine", dropless)
    qmj.register_dispatcher("mine", dropless, overwrite=True)
