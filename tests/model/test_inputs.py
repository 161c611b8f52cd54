"""What a model makes of its inputs: lists, bad ids, one token's logits, and a model that has no weights."""

import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj

CONFIG = qmj.ModelConfig.from_pretrained(
    dict(
        model_type="qwen3",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.3,
    )
)
TOKENS_BT = np.random.default_rng(0).integers(0, 32, (3, 7))


@pytest.fixture(scope="module")
def model():
    return qmj.CausalLM(CONFIG, rngs=nnx.Rngs(0))


def test_lists_are_taken_as_tokens(model):
    np.testing.assert_array_equal(model(TOKENS_BT.tolist()).logits, model(TOKENS_BT).logits)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([[1, 2], [3]],), "rows have different lengths"),
        ((3,), r"shape \(\), expected \[batch, length\]"),
        ((np.zeros((2, 0), int),), "neither of them 0"),
        ((np.ones((2, 3)),), "dtype float64, expected integers"),
        ((), r"there are no tokens, expected integers \[batch, length\]"),
        ((TOKENS_BT, TOKENS_BT[:, 1:]), r"segment_ids has shape \(3, 6\), expected that of the tokens, \(3, 7\)"),
    ],
)
def test_what_is_no_batch_of_tokens_is_refused(model, arguments, message):
    with pytest.raises(qmj.RequestError, match=message):
        model(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(input_ids=TOKENS_BT), "'input_ids': here that is tokens, the first argument"),
        (lambda model: model.token_losses(TOKENS_BT, labels=TOKENS_BT), r"'labels': here that is targets of the met"),
        (lambda model: model.token_losses(TOKENS_BT, target=TOKENS_BT), r"'target': did you mean 'targets_BT'"),
    ],
)
def test_arguments_of_transformers_alone_are_refused_with_the_name_of_ours(model, call, message):
    with pytest.raises(TypeError, match=message):
        call(model)


def test_losses_without_targets_are_refused(model):
    with pytest.raises(qmj.RequestError, match="there are no targets, expected the token that should follow each one"):
        model.token_losses(TOKENS_BT)


def test_methods_of_transformers_are_refused_with_what_does_the_same(model):
    with pytest.raises(AttributeError, match=r"no attribute 'generate': here that is qwen_moe_jax.generate\("):
        model.generate(TOKENS_BT)
    with pytest.raises(AttributeError, match=r"no attribute 'parameters': here that is nnx.state\("):
        model.parameters()
    with pytest.raises(AttributeError, match="^'CausalLM' object has no attribute 'anything'$"):
        model.anything  # noqa: B018
    assert not hasattr(model, "device")


@pytest.mark.parametrize("bad", [-1, 32])
def test_a_token_outside_the_vocabulary_makes_its_own_sequence_nan(model, bad):
    tokens_BT = TOKENS_BT.copy()
    tokens_BT[1, 2] = bad
    logits_BTV = np.asarray(model(tokens_BT).logits)
    assert np.isnan(logits_BTV[1, 2:]).all()
    np.testing.assert_allclose(logits_BTV[[0, 2]], np.asarray(model(TOKENS_BT).logits)[[0, 2]], rtol=1e-6)


def test_what_stands_in_the_padding_means_nothing(model):
    mask_BT = np.ones_like(TOKENS_BT)
    mask_BT[:, :2] = 0
    tokens_BT = TOKENS_BT.copy()
    tokens_BT[:, :2] = 10**6
    np.testing.assert_array_equal(model(tokens_BT, mask_BT).logits[:, 2:], model(TOKENS_BT, mask_BT).logits[:, 2:])


def test_logits_at_is_that_token_of_every_row(model):
    every_BTV = np.asarray(model(TOKENS_BT).logits)
    found_B1V = np.asarray(model(TOKENS_BT, logits_at=[6, 0, 3]).logits)
    assert found_B1V.shape == (3, 1, 32)
    # the same products in a matmul of another shape
    np.testing.assert_allclose(found_B1V[:, 0], every_BTV[np.arange(3), [6, 0, 3]], rtol=1e-5, atol=1e-6)


def test_an_abstract_model_is_not_run_or_saved(tmp_path):
    abstract = qmj.CausalLM(CONFIG, rngs=None)
    with pytest.raises(qmj.RequestError, match="abstract, without weights"):
        abstract(TOKENS_BT)
    with pytest.raises(qmj.RequestError, match="abstract, without weights"):
        qmj.save_pretrained(abstract, tmp_path / "out")
    assert not list(tmp_path.iterdir())
