"""The next-token head predicts the token after the next of every token, alone, packed, in pieces and on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.model.base import LogitsOf
from qwen_moe_jax.model.cache import abstract_mtp_cache, empty_cache
from qwen_moe_jax.moe.losses import load_balancing_loss
from qwen_moe_jax.nn.parameters import parameters_with_paths
from tests.cases import CASES, HYBRID_CASES
from tests.distance import assert_near
from tests.subject import on_mesh

TOLERANCE = 2e-5
DOCUMENTS = [np.random.default_rng(number).integers(1, 96, size) for number, size in enumerate((9, 1, 2, 4))]


@functools.cache
def model_of(name: str = "qwen3_moe-plain", **settings) -> qmj.CausalLM:
    """One layer and the head: what the decoder is made of does not matter to the head."""
    config = {**CASES[name].config, "num_hidden_layers": 1, "initializer_range": 0.1, "vocab_size": 96}
    config = qmj.ModelConfig.from_pretrained({**config, **settings})
    return qmj.CausalLM(dataclasses.replace(config, num_mtp_layers=1), rngs=0)


@jax.jit
def losses(model, tokens_BT, segment_ids_BT=None):
    targets_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
    return model.token_losses(tokens_BT, targets_BT, segment_ids_BT, mtp=True).mtp_losses


def test_packed_documents_have_the_losses_that_each_has_alone():
    model, width = model_of(), 18
    row, ids = np.zeros((1, width), np.int32), np.zeros((1, width), np.int32)
    starts = np.cumsum([1, *map(len, DOCUMENTS)])  # a token of padding before and after
    for number, (start, document) in enumerate(zip(starts, DOCUMENTS, strict=False), 1):
        row[0, start : start + len(document)], ids[0, start : start + len(document)] = document, number
    packed = np.asarray(losses(model, row, ids))[0]
    for start, document in zip(starts, DOCUMENTS, strict=False):
        alone = np.zeros((1, width), np.int32)
        alone[0, : len(document)] = document
        expected = np.asarray(losses(model, alone, (np.arange(width) < len(document))[None].astype(np.int32)))[0]
        count = max(len(document) - 2, 0)
        assert_near(packed[start : start + count], expected[:count], TOLERANCE, f"document at {start}")


@pytest.mark.parametrize("pieces", [(5, 3), (1,) * 8])
def test_reading_in_pieces_predicts_what_reading_at_once_does(pieces):
    model, tokens_BT = model_of(), np.stack([DOCUMENTS[0], DOCUMENTS[0][::-1]])
    hidden_BTD = model.run(qmj.model.inputs.checked_inputs(tokens_BT), LogitsOf(output_hidden_states=True))
    hidden_BTD = hidden_BTD.hidden_states[-1]
    cache = empty_cache(
        abstract_mtp_cache(model.config, model.mesh, batch=2, max_length=16, max_write=9, dtype="float32")
    )
    step, start, found = jax.jit(type(model).mtp_step), 0, []
    for size in pieces:
        stop, mask_BT = start + size, jnp.ones((2, size), bool)
        tokens, hidden = tokens_BT[:, start + 1 : stop + 1], hidden_BTD[:, start:stop]
        logits_BV, _, cache = step(model, tokens, hidden, mask_BT, cache)
        found.append((stop - 1, jax.nn.log_softmax(logits_BV)))
        start = stop
    expected = np.asarray(losses(model, tokens_BT))
    assert cache.lengths_B.tolist() == [8, 8]
    for position, log_probs_BV in found[:-1]:
        targets = tokens_BT[:, position + 2]
        assert_near(-log_probs_BV[np.arange(2), targets], expected[:, position], TOLERANCE, f"{position}")


@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"fsdp": 2, "expert": 4}, {"context": 2}], ids=str)
def test_a_mesh_computes_what_one_device_does(axes):
    # Heads for two devices, experts for four.
    model, tokens = model_of(), np.random.default_rng(0).integers(1, 96, (8, 6))
    expected = losses(model, tokens)
    assert_near(losses(on_mesh(model, qmj.make_mesh(**axes)), tokens)[:, :4], expected[:, :4], TOLERANCE, str(axes))


def test_the_head_is_counted_apart_from_the_model():
    for name in ("qwen3_next-plain", "qwen3_5_text-plain"):
        config = {**HYBRID_CASES[name].config, "mtp_num_hidden_layers": 1}
        model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(config), rngs=None)
        own = sum(leaf.size for leaf in jax.tree.leaves(model.mtp))
        assert own == model.config.num_mtp_parameters()
        assert sum(leaf.size for leaf in jax.tree.leaves(model)) - own == model.config.num_parameters()


def test_a_model_without_the_head_refuses_its_losses():
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(CASES["qwen3-plain"].config), rngs=None)
    with pytest.raises(qmj.RequestError, match="mtp=True needs a next-token head, and this model has none"):
        model.token_losses(np.ones((1, 3), np.int32), np.ones((1, 3), np.int32), mtp=True)


def test_gradients_do_not_depend_on_remat():
    model, tokens = model_of("qwen3-plain"), DOCUMENTS[0][None]

    def gradients(remat):
        own = on_mesh(model, model.mesh, qmj.ExecutionConfig(remat=remat))
        own.train()
        return jax.jit(jax.grad(lambda model: jnp.mean(losses(model, tokens)[:, :-2]), allow_int=True))(own)

    expected = jax.tree.leaves(gradients("none"))
    for found, wanted in zip(jax.tree.leaves(gradients("full")), expected, strict=True):
        assert_near(found, wanted, 1e-4, "gradient")


def test_the_heads_router_is_counted_over_the_tokens_that_have_another_after_them():
    """And its load-balancing loss reaches the head's router."""
    model, ids_BT = model_of(), np.array([[1, 1, 1, 2, 2, 0, 3, 0]])

    @jax.jit
    def gradient(model):
        def balance(model):
            out = model.token_losses(np.ones_like(ids_BT), np.ones_like(ids_BT), ids_BT, mtp=True)
            return load_balancing_loss(out.mtp_router), out.mtp_router.tokens

        return jax.grad(balance, has_aux=True)(model)

    found, tokens = gradient(model)
    assert tokens.tolist() == [3]
    gate = dict(parameters_with_paths(found))["mtp.layers.0.mlp.gate.weight"].get_value()
    assert np.abs(gate).max() > 0
