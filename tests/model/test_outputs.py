"""Every optional output, on every mesh, with batches that fill the mesh and batches that do not."""

import jax
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from tests.cases import CASES

CONFIG = qmj.ModelConfig.from_pretrained({**CASES["qwen3_moe-plain"].config, "vocab_size": 96, "num_hidden_layers": 2})
TOKENS_BT = np.random.default_rng(0).integers(0, 96, (3, 5))
MESHES = [{}, {"data": 2, "expert": 2}, {"expert": 2, "tensor": 2}]


@pytest.fixture(scope="module")
def plain() -> qmj.CausalLM:
    return qmj.CausalLM(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module", params=MESHES, ids=str)
def model(request) -> qmj.CausalLM:
    return qmj.CausalLM(CONFIG, rngs=nnx.Rngs(0), mesh=qmj.make_mesh(**request.param))


@pytest.mark.parametrize("batch", [1, 3])
def test_every_output_has_the_rows_that_were_given(model, plain, batch):
    """Together and by row: a batch of one has a sharding that can be spelt in two ways on a single device."""
    tokens_BT = TOKENS_BT[:batch]
    out = model(tokens_BT, output_hidden_states=True, output_router_logits=True)
    assert out.logits.shape == (batch, 5, 96)
    assert out.hidden_states.shape == (3, batch, 5, CONFIG.hidden_size)
    assert out.router.trace.experts.shape == (2, batch, 5, CONFIG.moe.num_experts_per_tok)
    np.testing.assert_allclose(out.logits, plain(tokens_BT).logits, rtol=1e-4, atol=1e-5)
    at_B = np.arange(batch) + 1
    one = model(tokens_BT, output_hidden_states=True, logits_at=at_B)
    np.testing.assert_allclose(one.logits[:, 0], out.logits[np.arange(batch), at_B], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.hidden_states, out.hidden_states, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_mesh_that_the_caller_has_set_makes_no_difference(model, kind):
    expected_BTV = np.asarray(model(TOKENS_BT).logits)
    axis_type = getattr(jax.sharding.AxisType, kind)
    other = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type, axis_type))
    with jax.set_mesh(other):
        np.testing.assert_array_equal(np.asarray(model(TOKENS_BT).logits), expected_BTV)
        with pytest.raises(qmj.ShardingError, match="under another, {'x': 2, 'y': 4}.*jax.set_mesh.model.mesh."):
            jax.jit(lambda model: model(TOKENS_BT).logits)(model)
    with jax.set_mesh(model.mesh):
        np.testing.assert_array_equal(np.asarray(model(TOKENS_BT).logits), expected_BTV)


def test_generation_takes_the_models_mesh_whatever_the_caller_has_set(model):
    prompts = [[5, 6, 7], [8, 9]]
    expected = qmj.complete(model, prompts, max_new_tokens=3)
    with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        found = qmj.complete(model, prompts, max_new_tokens=3)
    assert [row.token_ids for row in found] == [row.token_ids for row in expected]


def test_one_prompt_is_continued_where_devices_share_an_expert_over_fsdp():
    """In the rows of the other devices are other tokens, which choose other experts."""
    config = {**CASES["qwen2_moe-plain"].config, "num_hidden_layers": 2, "initializer_range": 0.3}
    plain, sharded = (
        qmj.CausalLM(qmj.ModelConfig.from_pretrained(config), rngs=nnx.Rngs(0), mesh=qmj.make_mesh(**axes))
        for axes in ({}, {"fsdp": 2})
    )
    [expected], [found] = (qmj.complete(model, [list(range(4, 24))], max_new_tokens=4) for model in (plain, sharded))
    assert found.token_ids == expected.token_ids
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=1e-4)
