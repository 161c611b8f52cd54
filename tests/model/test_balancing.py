"""The routers' balancing biases: a parameter of every sparse layer, moved by a rule, trained and exported by nobody."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.model.balancing import update_balancing_biases
from tests.cases import CASES
from tests.subject import hub_arrays, run

TOKENS = np.random.default_rng(0).integers(1, 97, (8, 8)).astype(np.int32)
#: dense, sparse, dense, sparse, …: two scanned layers a period; and a dense layer before sparse ones: two segments.
STACKS = {
    "alternating": dict(num_hidden_layers=6, mlp_only_layers=[0, 2, 4]),
    "dense first": dict(num_hidden_layers=4, mlp_only_layers=[0]),
    "mixed period": dict(num_hidden_layers=6, mlp_only_layers=[0, 3]),
}


def make_model(*, balancing_bias=True, param_dtype="float32", axes=None, **settings):
    config = qmj.ModelConfig.from_pretrained({**CASES["qwen3_moe-plain"].config, **settings})
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, balancing_bias=balancing_bias))
    execution = qmj.ExecutionConfig(dtype="float32", param_dtype=param_dtype)
    return qmj.CausalLM(config, rngs=nnx.Rngs(0), mesh=qmj.make_mesh(**(axes or {})), execution=execution)


def biases(model) -> dict[int, np.ndarray]:
    """The bias of every sparse layer, by the number of the layer."""
    name = ".mlp.e_score_correction_bias"
    tensors = {key: values for key, values in hub_arrays(model) if key.endswith(name)}
    return {int(key.removesuffix(name).rpartition(".")[2]): values for key, values in tensors.items()}


def test_a_bias_of_zero_changes_nothing_and_is_float32_whatever_the_other_weights_are():
    with_bias, without = make_model(), make_model(balancing_bias=False)
    np.testing.assert_array_equal(run(with_bias, TOKENS).logits, run(without, TOKENS).logits)
    assert len(jax.tree.leaves(with_bias)) == len(jax.tree.leaves(without)) + 1
    for bias in biases(make_model(param_dtype="bfloat16")).values():
        assert bias.dtype == np.float32 and bias.shape == (8,) and not bias.any()


@pytest.mark.parametrize("stack, axes", [*((stack, {}) for stack in STACKS), ("alternating", dict(data=2, expert=4))])
def test_every_layers_bias_moves_by_its_own_load(stack, axes):
    model = make_model(axes=axes, **STACKS[stack])
    out = run(model, TOKENS)
    moved = jax.jit(update_balancing_biases, static_argnames="rate")(model, out.router.stats, rate=0.5)
    sparse = [layer for layer, kind in enumerate(model.config.layers) if kind.mlp == "sparse"]
    assert list(biases(moved)) == sparse
    loads_LE = np.asarray(out.router.stats.tokens_per_expert)
    for loads_E, layer in zip(loads_LE, sparse, strict=True):
        np.testing.assert_array_equal(biases(moved)[layer], 0.5 * np.sign(loads_E.mean() - loads_E))
        assert not biases(model)[layer].any(), "the model that was given stays as it was"
    others = [[values for name, values in hub_arrays(each) if "correction" not in name] for each in (model, moved)]
    for before, after in zip(*others, strict=True):
        np.testing.assert_array_equal(after, before)
    assert (np.asarray(run(moved, TOKENS).router.stats.tokens_per_expert) != loads_LE).any()


def test_no_gradient_and_no_nnx_optimizer_reaches_the_bias():
    model = make_model()
    gradients = jax.grad(lambda model: (run(model, TOKENS).logits ** 2).mean())(model)
    assert not any(bias.any() for bias in biases(gradients).values())
    trained = nnx.state(model, nnx.Param)
    assert len(jax.tree.leaves(trained)) == len(jax.tree.leaves(model)) - 1


def test_export_is_refused_by_name(tmp_path):
    with pytest.raises(qmj.ConfigError, match="balancing_bias=True cannot be written"):
        qmj.save_pretrained(make_model(), tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
