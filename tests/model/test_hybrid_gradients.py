"""The gradient of every parameter of a hybrid is that of transformers, however the backward pass is run."""

import jax
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.nn.parameters import parameters_with_paths
from tests.distance import relative_l2
from tests.model.hybrid_configs import hybrid_config, hybrid_model
from tests.model.hybrids import FAMILIES, by_path, hybrid
from tests.referee import torch

# Parameter by parameter, matrices of .1: transformers' chunks differ from its own recurrence by 6e-6 over all of them,
# and by 4e-5 in the gradient of A_log, a sum over the row of small numbers that cancel.
TOLERANCE = 1e-4
#: Two chunks of 64 tokens, the second of them short.
TOKENS_BT = np.random.default_rng(0).integers(1, 97, (2, 71)).astype(np.int32)


def gradients_of(model: qmj.CausalLM, tokens_BT=TOKENS_BT, segment_ids=None) -> dict[str, np.ndarray]:
    """Of the mean cross-entropy, by path."""

    def loss(model):
        return model.token_losses(tokens_BT[:, :-1], tokens_BT[:, 1:], segment_ids).losses.mean()

    found = jax.jit(jax.grad(loss))(model)
    return {path: np.asarray(param.get_value()) for path, param in parameters_with_paths(found)}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    distances = {path: relative_l2(found[path], expected[path]) for path in expected}
    far = {path: distance for path, distance in distances.items() if not distance <= tolerance}
    assert not far, far


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_equals_transformers(family):
    model = hybrid(family, scale=0.1, batch=(TOKENS_BT, np.ones_like(TOKENS_BT)))
    model.ask(TOKENS_BT, labels=torch.tensor(TOKENS_BT, dtype=torch.long)).loss.backward()
    theirs = {name: param.grad.numpy() for name, param in model.hub.named_parameters()}
    assert_same(gradients_of(model.model), by_path(theirs, model.model), TOLERANCE)


@pytest.fixture(scope="module")
def kept() -> dict[str, np.ndarray]:
    """Gradients where the backward pass recomputes nothing of a layer."""
    return gradients_of(hybrid_model(hybrid_config("LF"), execution=qmj.ExecutionConfig(remat="none")))


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_gradients_do_not_depend_on_what_is_recomputed(remat, kept):
    model = hybrid_model(hybrid_config("LF"), execution=qmj.ExecutionConfig(remat=remat))
    assert_same(gradients_of(model), kept, 1e-5)


def test_with_remat_dots_the_chunks_are_not_run_through_again():
    """Loops over chunks in the program of a linear layer: with everything recomputed there is one more."""

    def loops(remat: str) -> int:
        model = qmj.CausalLM(hybrid_config("L"), rngs=None, execution=qmj.ExecutionConfig(remat=remat))

        def loss(model):
            return model(TOKENS_BT).logits.sum()

        return jax.jit(jax.grad(loss)).lower(model).as_text().count("stablehlo.while")

    assert loops("full") - loops("dots") == 1


def test_padding_passes_no_gradient_on_whatever_its_tokens_are():
    """Of the losses of real tokens, bit for bit."""
    model = hybrid_model(hybrid_config("LF"))
    mask_BT = (np.arange(70) < np.array([[70], [33]])).astype(np.int32)

    @jax.jit
    def gradients(model, tokens_BT):
        def loss(model):
            return (model.token_losses(tokens_BT, TOKENS_BT[:, 1:], mask_BT).losses * mask_BT).sum()

        return jax.tree.leaves(jax.grad(loss)(model))

    found, expected = (gradients(model, np.where(mask_BT, TOKENS_BT[:, :-1], padding)) for padding in (3, 90))
    for one, other in zip(found, expected, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, other)


def test_strong_decay_leaves_gradients_finite():
    """exp(A_log) at its largest, 16, and a time step far beyond it: a token forgets all that was before it."""
    model = hybrid_model(hybrid_config("LF"))
    for path, param in parameters_with_paths(model):
        if path.endswith("dt_bias"):
            param.set_value(param.get_value() + 50)
    found = gradients_of(model)
    assert all(np.isfinite(values).all() for values in found.values())
    assert np.abs(found["model.layers.segments.0.0.linear_attn.in_proj_qkv.weight"]).max() > 0
