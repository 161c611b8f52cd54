"""Losses token by token equal those of the whole logits, gradients too, and the logits are never whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from tests.distance import assert_near

SIZES = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}


def build(mesh=None, dtype="float32", **changes):
    config = qmj.ModelConfig.from_pretrained({**SIZES, **changes})
    execution = qmj.ExecutionConfig(dtype=dtype, param_dtype="float32")
    return qmj.CausalLM(config, rngs=nnx.Rngs(0), mesh=qmj.make_mesh(**(mesh or {})), execution=execution)


def batch(rows=3, length=10):
    numbers = np.random.default_rng(0)
    tokens, targets = numbers.integers(0, 64, (2, rows, length))
    segment_ids = np.ones((rows, length), np.int32)
    segment_ids[0, 4:], segment_ids[1, 7:] = 2, 0
    return tokens, targets, segment_ids


def from_logits(model, tokens, targets, segment_ids):
    logits = model(tokens, segment_ids=segment_ids).logits
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, jnp.asarray(targets)[..., None], axis=-1)[..., 0]
    return logsumexp - picked, logsumexp


def in_chunks(model, tokens, targets, segment_ids, chunk=4):
    out = model.token_losses(tokens, targets, segment_ids=segment_ids, chunk=chunk)
    return out.losses, out.logsumexp


def objective(parts, segment_ids):
    losses, logsumexp = parts
    return jnp.sum(losses + 0.01 * logsumexp**2, where=segment_ids != 0)


def outcome(function, model):
    """Losses, logsumexps and the gradient of a loss that reads both."""
    tokens, targets, segment_ids = batch()

    @jax.jit
    def run(model):
        def loss(model):
            parts = function(model, tokens, targets, segment_ids)
            return objective(parts, segment_ids), parts

        return jax.value_and_grad(loss, has_aux=True)(model)

    (_, parts), gradients = run(model)
    real = segment_ids != 0
    return [np.asarray(part)[real] for part in parts], jax.tree.map(np.asarray, jax.tree.leaves(gradients))


@functools.cache
def expected_outcome(tied: bool):
    """Of the whole logits on one device."""
    return outcome(from_logits, build(tie_word_embeddings=tied))


@pytest.mark.parametrize(
    ("mesh", "tied"),
    [({}, False), (dict(fsdp=2, tensor=2), True), (dict(data=2, expert=2, tensor=2), False)],
    ids=["one device, untied", "fsdp x tensor, tied", "data x expert x tensor, untied"],
)
def test_losses_and_gradients_are_those_of_the_whole_logits_on_every_mesh(mesh, tied):
    """Three rows and ten tokens: neither the devices nor the chunks of four come out even."""
    expected, expected_gradients = expected_outcome(tied)
    found, gradients = outcome(in_chunks, build(mesh, tie_word_embeddings=tied))
    for part, expected_part in zip(found, expected, strict=True):
        assert_near(part, expected_part, 1e-6, "losses")
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_near(gradient, expected_gradient, 1e-5, "gradients")


@pytest.mark.parametrize("chunk", [1, None])
def test_the_size_of_a_chunk_changes_nothing(chunk):
    model = build()
    expected, found = in_chunks(model, *batch()), in_chunks(model, *batch(), chunk=chunk)
    for part, expected_part in zip(found, expected, strict=True):
        assert_near(part, expected_part, 1e-6, "losses")


def test_in_bfloat16_the_losses_are_those_of_the_float32_logits_it_gives():
    model, (tokens, targets, segment_ids) = build(dtype="bfloat16"), batch()
    expected, found = (jax.jit(f)(model, tokens, targets, segment_ids) for f in (from_logits, in_chunks))
    for part, expected_part in zip(found, expected, strict=True):
        assert part.dtype == np.float32
        assert_near(part[segment_ids != 0], expected_part[segment_ids != 0], 1e-6, "losses")


@pytest.mark.parametrize(("function", "whole"), [(in_chunks, False), (from_logits, True)])
def test_neither_pass_holds_the_logits_of_more_than_a_chunk(function, whole):
    """64 tokens of a vocabulary of 8192 are 2 MiB of logits, and everything else is small beside them."""
    tokens, targets = np.zeros((2, 2, 32), np.int32)
    model = build(vocab_size=8192, hidden_size=16)
    segment_ids = np.ones((2, 32), np.int32)

    def loss(model):
        return objective(function(model, tokens, targets, segment_ids), segment_ids)

    compiled = jax.jit(jax.grad(loss)).lower(model).compile()
    table, logits = 8192 * 16 * 4, 2 * 32 * 8192 * 4
    held = compiled.memory_analysis().temp_size_in_bytes
    assert (held > logits) == whole
    if not whole:
        # Gathered table, its gradient and their copies, and three chunks of 8 tokens: logits, gradient, exponentials.
        assert held < 6 * table < 2 * logits


def test_packed_documents_have_the_losses_they_have_alone():
    tokens, targets = (x[:1] for x in batch()[:2])
    segment_ids = np.array([[1] * 4 + [2] * 6])
    model = build()
    packed = np.asarray(model.token_losses(tokens, targets, segment_ids=segment_ids, chunk=4).losses)[0]
    apart = np.zeros((2, 2, 6), np.int32)  # tokens and targets of two rows, the first one padded
    for side, whole in zip(apart, (tokens[0], targets[0]), strict=True):
        side[0, :4], side[1] = whole[:4], whole[4:]
    alone = np.asarray(model.token_losses(*apart, segment_ids=np.array([[1] * 4 + [0] * 2, [1] * 6]), chunk=4).losses)
    assert_near(packed, np.concatenate([alone[0, :4], alone[1]]), 1e-6, "losses")


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "tensor": 2}], ids=["one device", "a sharded vocabulary"])
def test_temperature_and_entropy_are_those_of_the_whole_logits(mesh):
    tokens, targets, segment_ids = batch()
    model = build(mesh, vocab_size=61)  # it does not divide: there are rows of padding
    tokens, targets, real = tokens % 61, targets % 61, segment_ids != 0
    out = model.token_losses(tokens, targets, segment_ids, chunk=4, temperature=0.7, entropy=True)
    logits = model(tokens, segment_ids).logits / 0.7
    log_probs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    picked = np.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    assert_near(np.asarray(out.losses)[real], -picked[real], 1e-5, "losses")
    entropy = -np.sum(np.exp(log_probs) * log_probs, axis=-1)
    assert_near(np.asarray(out.entropy)[real], entropy[real], 1e-5, "entropy")


def test_a_target_outside_the_vocabulary_is_seen():
    tokens, targets, segment_ids = batch()
    targets[0, 0], targets[0, 1] = 64, -100
    losses = np.asarray(build().token_losses(tokens, targets, segment_ids=segment_ids).losses)
    assert np.isnan(losses[0, :2]).all() and np.isfinite(losses[segment_ids != 0][2:]).all()


def test_requests_that_cannot_be_served_are_refused():
    tokens, targets, _ = batch()
    with pytest.raises(qmj.RequestError, match="targets has shape"):
        build().token_losses(tokens, targets[:, 1:])
    with pytest.raises(qmj.RequestError, match="chunk=0"):
        build().token_losses(tokens, targets, chunk=0)
    with pytest.raises(qmj.RequestError, match="temperature=0"):
        build().token_losses(tokens, targets, temperature=0)
