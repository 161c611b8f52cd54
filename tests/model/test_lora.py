"""Low-rank adapters: no effect at first, then as if their products stood in the weights, however a model is run."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.model.lora import is_adapter, matrices, remove_lora
from qwen_moe_jax.nn.parameters import parameters_with_paths
from tests.distance import assert_near
from tests.subject import on_mesh

E, D, F, RANK = 8, 16, 24, 3
HUB_CONFIG = {
    "model_type": "qwen2_moe",
    "vocab_size": 64,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": F,
    "shared_expert_intermediate_size": 20,
    "num_experts": E,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
LORA = qmj.LoraConfig(r=RANK, lora_alpha=6.0, target_modules=("all-linear",))
TOKENS = np.random.default_rng(0).integers(1, 64, (8, 6))
METHODS = {
    "dense": dict(dispatch="dense"),
    "capacity": dict(dispatch="capacity", capacity_factor=8.0),
    "dropless": dict(dispatch="dropless", buffer_factor=None, exchange="all_to_all"),
}
MESHES = {"one device": {}, "expert=4": dict(expert=4), "fsdp=2·tensor=2": dict(fsdp=2, tensor=2)}
#: Of an adapter of routed experts whole, A and B of either width.
WHOLE = [(E, RANK, D), (E, F, RANK), (E, RANK, F), (E, D, RANK)]


def build(dtype="float32", **execution) -> qmj.CausalLM:
    config = qmj.ModelConfig.from_pretrained(HUB_CONFIG)
    return qmj.CausalLM(config, rngs=nnx.Rngs(0), execution=qmj.ExecutionConfig(dtype=dtype, **execution))


def adapted(**execution) -> qmj.CausalLM:
    """With adapters that have an effect."""
    model = build(**execution)
    qmj.add_lora(model, LORA, rngs=nnx.Rngs(1))
    numbers = np.random.default_rng(1)
    for matrix in matrices(model):
        if matrix.lora is not None:
            b = matrix.lora.lora_B
            b.set_value(jnp.asarray(numbers.normal(0, 0.2, b.shape), jnp.float32))
    return model


def loss(model) -> jax.Array:
    return jnp.mean(model.token_losses(TOKENS, np.roll(TOKENS, -1, axis=1)).losses)


def adapters(model) -> dict[str, np.ndarray]:
    """Of a model or its gradients, by path."""
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(model):
        path = jax.tree_util.keystr(keys, simple=True, separator=".").removesuffix(".value")
        if is_adapter(path):
            found[path] = np.asarray(leaf)
    return found


@pytest.fixture(scope="module")
def reference():
    """The loss, and the gradients of A and B by the rule for a product, from a model that has the sums as weights."""
    model = adapted(dispatch="dense")
    beside = {m.path: (m.lora.lora_A[...], m.lora.lora_B[...]) for m in matrices(model) if m.lora is not None}
    qmj.merge_lora(model)
    value, gradients = jax.jit(jax.value_and_grad(loss))(model)
    expected = []
    for matrix in matrices(gradients):
        if matrix.path in beside:
            (a, b), of_weight = beside[matrix.path], LORA.scaling * matrix.weight.get_value()
            of_a = jnp.einsum("...or,...oi->...ri", b, of_weight)
            expected += [of_a, jnp.einsum("...oi,...ri->...or", of_weight, a)]
    return float(value), expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_float32_and_change_no_bit_before_they_are_trained(dtype):
    model = build(dtype)
    before = np.asarray(model(TOKENS).logits)
    qmj.add_lora(model, LORA, rngs=nnx.Rngs(1))
    assert {leaf.dtype.name for leaf in adapters(model).values()} == {"float32"}
    np.testing.assert_array_equal(model(TOKENS).logits, before)


@pytest.mark.parametrize(
    ("method", "mesh"),
    # Each dispatcher over experts that are sharded, one of them over other axes, too: the rest of the grid is tested
    # without adapters.
    [
        ("dense", "one device"),
        ("dense", "expert=4"),
        ("capacity", "expert=4"),
        ("dropless", "expert=4"),
        ("dropless", "fsdp=2·tensor=2"),
    ],
)
def test_loss_and_gradients_are_those_of_the_merged_weights_under_every_dispatch_and_mesh(method, mesh, reference):
    execution = qmj.ExecutionConfig(dtype="float32", **METHODS[method], remat="dots")
    model = on_mesh(adapted(), qmj.make_mesh(**MESHES[mesh]), execution)
    model.train()
    compiled = jax.jit(jax.value_and_grad(loss)).lower(model).compile()
    value, gradients = compiled(model)
    expected_loss, expected = reference
    assert float(value) == pytest.approx(expected_loss, rel=1e-5)
    found = [leaf for m in matrices(gradients) if m.lora is not None for leaf in (m.lora.lora_A, m.lora.lora_B)]
    assert len(found) == len(expected) == 2 * 10
    for own, other in zip(found, expected, strict=True):
        assert_near(own.get_value(), other, 1e-5, f"{method} on {mesh}")
    if mesh == "expert=4":
        gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", compiled.as_text())
        shapes = {tuple(int(n) for n in dims.split(",") if n != "1") for dims in gathered if dims}
        assert shapes and not shapes & set(WHOLE), "adapters of experts are never gathered over `expert`"


def test_text_is_written_with_adapters_as_with_merged_weights():
    """One text alone, whose token goes through its experts one by one, and three together."""
    model, prompts = adapted(), [[5, 6, 7], [9, 8], [11]]
    write = functools.partial(qmj.complete, max_new_tokens=8)
    alone, together = write(model, prompts[:1]), write(model, prompts)
    qmj.merge_lora(model)
    expected = write(model, prompts)
    for found in (alone, together):
        for one, other in zip(found, expected, strict=found is together):
            assert one.token_ids == other.token_ids
            assert_near(one.log_probs, other.log_probs, 1e-5, "log-probabilities")


@pytest.mark.parametrize("mesh", [{}, dict(fsdp=2, expert=4)], ids=["one device", "fsdp=2·expert=4"])
def test_an_optimizer_of_lora_params_trains_the_adapters_and_no_bit_of_the_weights(mesh):
    config = qmj.ModelConfig.from_pretrained(HUB_CONFIG)
    execution = qmj.ExecutionConfig(dispatch="capacity" if mesh else "dense")
    model = qmj.CausalLM(config, rngs=0, mesh=qmj.make_mesh(**mesh), execution=execution)
    qmj.add_lora(model, qmj.LoraConfig(r=2, target_modules=("q_proj", "experts")), rngs=1)
    before = {path: np.asarray(param[...]) for path, param in parameters_with_paths(model)}
    optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.LoRAParam)
    gradients_of = nnx.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))
    losses = []
    for _ in range(4):
        value, gradients = gradients_of(model)
        optimizer.update(model, gradients)
        losses.append(float(value))
    assert losses[3] < losses[0] - 0.1
    for path, param in parameters_with_paths(model):
        assert isinstance(param, nnx.LoRAParam) == is_adapter(path), path
        assert np.array_equal(param[...], before[path]) != is_adapter(path), path
    assert len(jax.tree.leaves(nnx.state(model, nnx.LoRAParam))) == 2 * 4
    assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) == len(before), "an adapter is a parameter, too"


def test_adapters_are_lora_params_wherever_a_model_comes_from(tmp_path):
    """Abstract, read from a folder, and taken apart and put together again."""
    model = adapted()
    qmj.save_adapter(model, tmp_path / "adapter")
    remove_lora(model)
    qmj.save_pretrained(model, tmp_path / "base")
    loaded = qmj.from_pretrained(tmp_path / "base", adapter=tmp_path / "adapter")
    abstract = qmj.CausalLM(qmj.ModelConfig.from_pretrained(HUB_CONFIG), rngs=None)
    qmj.add_lora(abstract, LORA, rngs=None)
    for one in (loaded, abstract, nnx.merge(*nnx.split(loaded))):
        found = {path for path, param in parameters_with_paths(one) if isinstance(param, nnx.LoRAParam)}
        assert found and found == {path for path, _ in parameters_with_paths(one) if is_adapter(path)}


def test_merging_adds_the_product_and_leaves_no_adapter():
    model = adapted()
    expected = np.asarray(model(TOKENS).logits)
    qmj.merge_lora(model)
    assert model.lora is None and not adapters(model)
    assert_near(model(TOKENS).logits, expected, 1e-5, "merged logits")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), {"self_attn.q_proj"}),
        (("experts",), {f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")}),
        (("shared_expert.down_proj", "o_proj"), {"mlp.shared_expert.down_proj", "self_attn.o_proj"}),
    ],
    ids=["everywhere", "all three", "by path"],  # a set has no order of its own
)
def test_targets_are_names_in_the_paths_of_matrices(targets, expected):
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(HUB_CONFIG), rngs=None)
    qmj.add_lora(model, qmj.LoraConfig(target_modules=targets), rngs=None)
    assert {matrix.path for matrix in matrices(model) if matrix.lora is not None} == expected


def test_unknown_targets_second_adapters_and_ranks_of_nothing_are_refused():
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(HUB_CONFIG), rngs=None)
    with pytest.raises(qmj.ConfigError, match="found 'q_prj'.*did you mean 'q_proj'"):
        qmj.add_lora(model, qmj.LoraConfig(target_modules=("q_prj",)), rngs=None)
    qmj.add_lora(model, LORA, rngs=None)
    with pytest.raises(qmj.ConfigError, match="already"):
        qmj.add_lora(model, LORA, rngs=None)
    with pytest.raises(qmj.ConfigError, match="r=0 is not supported"):
        qmj.LoraConfig(r=0)
