"""A vocabulary that does not divide over the mesh is padded inside the model, and nothing outside shows it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.convert import convert
from qwen_moe_jax.huggingface.tensors import hub_parameters
from qwen_moe_jax.plan.compile import group_of
from qwen_moe_jax.storage import placement
from tests.distance import assert_near
from tests.subject import hub_arrays

SIZES = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "initializer_range": 0.3,
}
VOCABULARY = 211
#: The vocabulary over two mesh axes, as a table of rules may have it: 216 rows over 2 * 3 shards.
BOTH = qmj.ShardingRules(vocab=("tensor", "fsdp"), embed=())
MESHES = [
    (dict(tensor=2), qmj.ShardingRules(), 212),
    (dict(tensor=4), qmj.ShardingRules(), 212),
    (dict(tensor=2, fsdp=3), BOTH, 216),
]
PROMPTS = [[1, 2, 3], [210, 5]]


@functools.cache
def build(vocab_size=VOCABULARY, rules=qmj.ShardingRules(), head=qmj.CausalLM, changes=(), **axes):
    config = qmj.ModelConfig.from_pretrained(SIZES | {"vocab_size": vocab_size} | dict(changes))
    execution = qmj.ExecutionConfig(sharding=rules)
    return head(config, rngs=nnx.Rngs(0), mesh=qmj.make_mesh(**axes), execution=execution)


@functools.cache
def outcome(model_key):
    """(logits, losses, logsumexps) and the gradients by Hub name, of an objective that reads all three."""
    vocab_size, rules, changes, axes = model_key
    model = build(vocab_size, rules, changes=changes, **dict(axes))
    tokens_BT = np.random.default_rng(0).integers(0, vocab_size, (2, 8))

    @jax.jit
    def run(model):
        def objective(model):
            logits = model(tokens_BT).logits
            out = model.token_losses(tokens_BT, tokens_BT[:, ::-1])
            loss = out.losses.mean() + 0.01 * (out.logsumexp**2).mean() + (jax.nn.log_softmax(logits) ** 2).mean()
            return loss, (logits, out.losses, out.logsumexp)

        return jax.grad(objective, has_aux=True)(model)

    gradients, values = run(model)
    return [np.asarray(value) for value in values], gradients


def key(vocab_size=VOCABULARY, rules=qmj.ShardingRules(), changes=(), **axes):
    return vocab_size, rules, changes, tuple(axes.items())


def bits(model) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in hub_arrays(model)}


def padding(model) -> list[np.ndarray]:
    """The rows of padding of every parameter that has some."""
    return [
        np.asarray(of.leaf)[of.shape[0] :] for of in hub_parameters(model) if of.shape and of.leaf.shape != of.shape
    ]


def same_outcome(found, expected, vocab_size):
    (values, gradients), (expected_values, expected_gradients) = found, expected
    for name, value, wanted in zip(("logits", "losses", "logsumexps"), values, expected_values, strict=True):
        assert_near(value, wanted, 1e-6, name)
    assert values[0].shape == (2, 8, vocab_size)
    wanted = dict(hub_arrays(expected_gradients))
    for name, gradient in hub_arrays(gradients):
        assert_near(gradient, wanted[name], 1e-5, name)  # sums over devices in another order
    assert padding(gradients) and not any(rows.any() for rows in padding(gradients))


@pytest.mark.parametrize(("axes", "rules", "rows"), MESHES, ids=[str(axes) for axes, *_ in MESHES])
def test_logits_losses_and_gradients_are_those_of_one_device(axes, rules, rows):
    model = build(rules=rules, **axes)
    assert model.lm_head.weight.shape == (rows, 16) and model.lm_head.weight.unpadded_shape == (VOCABULARY, 16)
    same_outcome(outcome(key(rules=rules, **axes)), outcome(key()), VOCABULARY)


def test_a_device_whose_rows_are_all_padding_has_finite_gradients():
    """Five tokens over four devices: two rows each, and none of a token on the last one."""
    changes = (("tie_word_embeddings", True),)
    same_outcome(outcome(key(5, changes=changes, tensor=4)), outcome(key(5, changes=changes)), 5)


def test_the_vocabulary_of_qwen_with_its_added_tokens_over_two_devices():
    changes = (("hidden_size", 8), ("num_attention_heads", 2), ("num_key_value_heads", 2))
    tokens_BT = np.array([[151_668, 0, 75_834, 75_835]])  # the last token, and the edge between the devices
    values = []
    for axes in ({}, dict(tensor=2)):
        model = build(151_669, changes=changes, **axes)
        values.append((model(tokens_BT).logits, model.token_losses(tokens_BT, tokens_BT[:, ::-1]).losses))
    for found, wanted in zip(values[1], values[0], strict=True):
        assert found.shape == wanted.shape
        assert_near(np.asarray(found), np.asarray(wanted), 1e-6, "logits and losses")


@pytest.mark.parametrize("axes", [dict(tensor=2), dict(tensor=4)], ids=str)
def test_values_do_not_depend_on_the_mesh_and_padding_is_zero(axes):
    model = build(**axes)
    assert bits(model) == bits(build())
    assert len(padding(model)) == 2 and not any(rows.any() for rows in padding(model))
    assert model.config.num_parameters() == build().config.num_parameters()


def test_a_token_of_the_padding_is_outside_the_vocabulary():
    model = build(tensor=2)
    tokens_BT = np.full((1, 8), VOCABULARY)
    assert np.isnan(model(tokens_BT).logits).all()
    assert np.isnan(model.token_losses(np.zeros((1, 8), int), tokens_BT).losses).all()


def test_generation_draws_the_same_tokens():
    wanted, found = (
        [answer.token_ids for answer in qmj.complete(model, PROMPTS, max_new_tokens=6, do_sample=True, seed=3)]
        for model in (build(), build(tensor=2))
    )
    assert found == wanted


def test_every_form_of_checkpoint_is_without_padding_and_loads_onto_any_mesh(tmp_path):
    expected = bits(build())
    qmj.save_pretrained(build(tensor=2), tmp_path / "hub")
    qmj.save_orbax(build(rules=BOTH, tensor=2, fsdp=3), tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "back")
    convert(tmp_path / "hub", tmp_path / "again", to="orbax")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "hub/model.safetensors").read_bytes()
    both = qmj.ExecutionConfig(sharding=BOTH)
    for folder, axes, execution in (
        ("hub", dict(tensor=2, fsdp=3), both),
        ("native", dict(tensor=4), qmj.ExecutionConfig()),
        ("native", {}, qmj.ExecutionConfig()),
        ("again", dict(tensor=2), qmj.ExecutionConfig()),
    ):
        model = qmj.from_pretrained(tmp_path / folder, mesh=qmj.make_mesh(**axes), execution=execution)
        assert bits(model) == expected and not any(rows.any() for rows in padding(model))


def test_padding_is_filled_in_whatever_the_blocks_that_are_read(tmp_path, monkeypatch):
    """Blocks of five rows of the two shards of 106: the last one has four rows of tokens and one of padding."""
    qmj.save_pretrained(build(), tmp_path)
    monkeypatch.setattr(placement, "BLOCK", 2 * 5 * 16 * 4)
    model = qmj.from_pretrained(tmp_path, mesh=qmj.make_mesh(tensor=2))
    assert bits(model) == bits(build()) and not any(rows.any() for rows in padding(model))


@pytest.mark.parametrize("head", [qmj.TokenClassifier, qmj.SequenceClassifier])
def test_three_labels_and_an_odd_vocabulary_classify_as_on_one_device(head, tmp_path):
    changes = (("num_labels", 3),)
    one, two = (build(head=head, changes=changes, **axes) for axes in ({}, dict(tensor=2)))
    tokens_BT = np.random.default_rng(0).integers(1, VOCABULARY, (2, 8))
    assert_near(np.asarray(two(tokens_BT).logits), np.asarray(one(tokens_BT).logits), 1e-6, "logits")
    qmj.save_orbax(two, tmp_path)
    assert bits(head.from_pretrained(tmp_path, mesh=qmj.make_mesh(tensor=4))) == bits(one)


def test_adapters_of_a_model_with_an_odd_vocabulary_are_those_of_one_device(tmp_path):
    models = []
    for axes in ({}, dict(tensor=2)):
        graph, state = nnx.split(build(**axes))
        model = nnx.merge(graph, jax.tree.map(jnp.copy, state))
        qmj.add_lora(model, qmj.LoraConfig(r=2), rngs=nnx.Rngs(1))
        models.append(model)
    assert bits(models[1]) == bits(models[0])


def test_a_plan_counts_the_padding_in_bytes_and_not_in_parameters():
    config = build().config
    model = qmj.CausalLM(config, rngs=None, mesh=qmj.make_mesh(tensor=2))
    [table] = [array for array in group_of("parameters", model).arrays if array.name.endswith("tokens.weight")]
    assert table.shape == (212, 16) and table.bytes == 106 * 16 * 4


def test_a_hidden_size_over_three_devices_is_refused_with_the_axis_and_the_numbers():
    with pytest.raises(qmj.ShardingError, match="'embed' axis of size 16 .* fsdp=3.*Choose mesh sizes that divide 16"):
        build(fsdp=3)
