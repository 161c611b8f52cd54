"""Weights in few bits: what rounding costs, that products are those of the dequantised floats, and what is refused."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import qwen_moe_jax as qmj
from qwen_moe_jax.config.weights import WeightFormat
from qwen_moe_jax.nn.quantised import Quantised, quantise
from tests.distance import assert_near
from tests.model.low_bit import dequantised, hybrid, low_bit_model, sparse_config
from tests.subject import on_mesh, run

TOKENS = np.random.default_rng(0).integers(0, 98, (8, 12))
#: Of a float32 model: the order of its sums differs.
ROUNDING = 1e-5


@st.composite
def matrices(draw):
    """(floats [O, I], groups of I)."""
    rows, groups, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([16, 18, 32]))
    magnitudes = st.floats(2.0**-20, 2.0**20, width=32)
    numbers = st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda x: -x))
    return draw(arrays(np.float32, (rows, groups * group), elements=numbers)), groups


@given(matrices())
@settings(max_examples=60, deadline=None)
def test_a_weight_differs_from_its_quantised_value_by_half_a_scale_at_most(drawn):
    floats, groups = drawn
    for bits in (8, 4):
        own = groups if bits == 4 else 1
        matrix = quantise(floats, bits, own, np)
        back = _numpy_dequantised(matrix, own)
        scales = np.repeat(np.abs(matrix.scales.astype(np.float32).T), floats.shape[1] // own, axis=1)
        assert (np.abs(floats - back) <= scales * np.float32(0.5001)).all()
        assert matrix.shape == floats.shape


def test_numpy_and_jax_quantise_to_the_same_bits_and_back():
    floats = np.random.default_rng(1).normal(size=(2, 5, 96)).astype(np.float32)
    floats[0, 1] = 0
    for bits, groups in ((8, 1), (4, 3)):
        ours = quantise(floats, bits, groups, np)
        compiled = jax.jit(quantise, static_argnums=(1, 2))(floats, bits, groups)
        for found, expected in zip(jax.tree.leaves(compiled), jax.tree.leaves(ours), strict=True):
            np.testing.assert_array_equal(np.asarray(found), expected)
        for row in range(2):
            own = Quantised(ours.integers[row], ours.scales[row])
            np.testing.assert_array_equal(
                np.asarray(compiled.dequantised("float32"))[row], _numpy_dequantised(own, groups)
            )


def _numpy_dequantised(matrix: Quantised, groups: int) -> np.ndarray:
    """Unpacked number by number, as the formulas are written."""
    outputs, inputs = matrix.shape
    floats = np.empty((outputs, inputs), np.float32)
    group = inputs // groups
    run = 16 if group % 16 == 0 else group
    for output, column in np.ndindex(outputs, inputs):
        if matrix.bits == 8:
            number = int(matrix.integers[output, column])
        else:
            begin, within = column // run * run, column % run
            byte = int(matrix.integers[output, begin // 2 + within % (run // 2)])
            number = (byte >> 4 if within >= run // 2 else byte & 15) - 8
        floats[output, column] = np.float32(number) * np.float32(matrix.scales[column // group, output])
    return floats


@pytest.fixture(scope="module")
def sparse():
    return {weights: low_bit_model(sparse_config(), weights) for weights in ("int8", "int4")}


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_logits_are_those_of_the_dequantised_weights(sparse, weights):
    expected = run(dequantised(sparse[weights]), TOKENS).logits
    assert_near(run(sparse[weights], TOKENS).logits, expected, ROUNDING, weights)


def test_logits_of_a_hybrid_are_those_of_the_dequantised_weights():
    model = low_bit_model(hybrid(), "int4")
    assert_near(run(model, TOKENS).logits, run(dequantised(model), TOKENS).logits, ROUNDING, "int4")


@pytest.mark.parametrize("dispatch", ["dropless", "capacity", "dense"])
def test_a_mesh_computes_what_one_device_does(sparse, dispatch):
    weights = "int8" if dispatch == "capacity" else "int4"
    mesh = qmj.make_mesh(fsdp=2, expert=2, tensor=2)
    own = sparse[weights]
    execution = qmj.ExecutionConfig(
        weights=weights, weights_group_size=16, dtype="float32", dispatch=dispatch, eval_capacity_factor=4.0
    )
    over_mesh = on_mesh(own, mesh, execution)
    assert over_mesh.model.layers.segments[0][0].mlp.experts.down_proj.scales[...].sharding.spec[1] == "expert"
    assert_near(run(over_mesh, TOKENS).logits, run(own, TOKENS).logits, ROUNDING, dispatch)


def test_the_same_tokens_are_decoded_as_with_the_dequantised_weights(sparse):
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    for weights, model in sparse.items():
        found = qmj.generate(model, prompts, max_new_tokens=6)
        assert found == qmj.generate(dequantised(model), prompts, max_new_tokens=6), weights
        assert qmj.generate(model, prompts[:1], max_new_tokens=6) == found[:1], weights


def test_no_floats_of_a_layers_experts_are_compiled():
    """Of int4 stacks [L, E, F, D] an expert at a time exists in float32."""
    moe = dataclasses.replace(sparse_config().moe, num_experts=64)
    execution = qmj.ExecutionConfig(weights="int4", weights_group_size=16)
    model = qmj.CausalLM(dataclasses.replace(sparse_config(), moe=moe), rngs=None, execution=execution)
    compiled = jax.jit(lambda model, tokens: model(tokens).logits).lower(model, TOKENS[:1, :4]).compile()
    shapes = re.findall(r"\b(?:f32|bf16|f16)\[([\d,]+)\]", compiled.as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest < math.prod(model.model.layers.segments[0][0].mlp.experts.gate_proj.shape[1:]) / 2


def test_adapters_over_int4_learn_as_over_the_dequantised_floats(sparse, tmp_path):
    """QLoRA: twenty steps, the adapter saved, and loaded over another model of the same shape."""
    lora = qmj.LoraConfig(r=2, target_modules=("q_proj", "experts"))
    models, losses = [sparse["int4"], dequantised(sparse["int4"])], []
    for model in models:
        qmj.add_lora(model, lora, rngs=1)
        model.train()
        losses.append(_learned(model, steps=20))
        model.eval()
    np.testing.assert_allclose(*losses, atol=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.1
    qmj.save_adapter(models[0], tmp_path)
    qmj.merge_lora(models[1])
    floats = dequantised(low_bit_model(sparse_config(), "int4"))
    qmj.load_adapter(floats, tmp_path)
    assert_near(run(floats, TOKENS).logits, run(models[1], TOKENS).logits, 1e-4, "the saved adapter")
    with pytest.raises(qmj.ConfigError, match="convert --adapter"):
        qmj.merge_lora(models[0])


def _learned(model: qmj.CausalLM, steps: int) -> list[float]:
    graph, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    optimizer = optax.adam(1e-2)

    def loss_of(adapters, rest):
        model = nnx.merge(graph, adapters, rest)
        return jnp.mean(model.token_losses(TOKENS[:, :-1], TOKENS[:, 1:]).losses)

    @jax.jit
    def step(adapters, state, rest):
        loss, gradients = jax.value_and_grad(loss_of)(adapters, rest)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(adapters, updates), state, loss

    state, losses = optimizer.init(adapters), []
    for _ in range(steps):
        adapters, state, loss = step(adapters, state, rest)
        losses.append(float(loss))
    nnx.update(model, adapters)
    return losses


def test_integers_are_not_trained_merged_or_written(tmp_path):
    model = low_bit_model(sparse_config(), "int8")
    with pytest.raises(qmj.ConfigError, match="weights are int8.*not written"):
        qmj.save_pretrained(model, tmp_path / "hub")
    model.train()
    with pytest.raises(qmj.ConfigError, match="weights are int8.*add_lora"):
        model(TOKENS)


def test_groups_that_a_matrix_cannot_have_are_refused():
    with pytest.raises(qmj.ConfigError, match=r"up_proj has 100 inputs.*groups of 4.*weights_group_size"):
        WeightFormat(bits=4, group_size=64).groups("up_proj", 100)
    assert WeightFormat(bits=4, group_size=64).groups("up_proj", 96) == 3
    with pytest.raises(qmj.ConfigError, match="weights_group_size=17.*even"):
        qmj.ExecutionConfig(weights_group_size=17)
    mesh = qmj.make_mesh(fsdp=4)
    with pytest.raises(qmj.ShardingError, match=r"scales.*'embed' axis of size 1"):
        qmj.CausalLM(sparse_config(), rngs=None, mesh=mesh, execution=qmj.ExecutionConfig(weights="int4"))


def test_head_embedding_routers_and_norms_stay_floats():
    described = low_bit_model(hybrid(), "int4")
    floats = {path for path, _ in nnx.to_flat_state(nnx.state(described, nnx.Param))}
    names = {".".join(str(word) for word in path if not isinstance(word, int)) for path in floats}
    kept = {"gate.weight", "shared_expert_gate.weight", "in_proj_a.weight", "in_proj_b.weight", "conv1d.weight"}
    assert {".".join(name.split(".")[-2:]) for name in names} >= kept
    assert not any("q_proj" in name and name.endswith("weight") for name in names)
