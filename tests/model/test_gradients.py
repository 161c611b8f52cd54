"""Training loss and the gradient of every parameter are those of transformers, aux loss included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_moe_jax as qmj
from tests.cases import PLAIN, VOCABULARY, Case
from tests.distance import relative_l2
from tests.referee import LENGTH, Batch, Reference, ask, torch
from tests.subject import hub_arrays

# Gradients pass the network twice and add up over some 50 tokens, some of them cancelling: ten times the logits' 1e-5.
GRADIENT_TOLERANCE = 1e-4
# Cross-entropy and aux loss are means of float32 numbers near 1 to 10.
LOSS_TOLERANCE = 1e-5

NAMES = [
    *(f"{family}-plain" for family in PLAIN),
    "qwen3-pad_token_tied",
    "qwen3_moe-attention_bias",
    "qwen2_moe-mlp_only_layers",
    "qwen3_moe-sliding_everywhere",
    "mixtral-top_1",  # its weights are always one: the router learns from the aux loss alone
]


def training_loss(model, batch: Batch, labels):
    """transformers' ForCausalLM loss: mean cross-entropy of the labelled next tokens, plus the weighted aux loss."""
    output = model(jnp.asarray(batch.tokens), segment_ids=jnp.asarray(batch.mask))
    targets = jnp.asarray(labels)[:, 1:]
    counted = targets != -100
    log_probs = jax.nn.log_softmax(output.logits[:, :-1])
    picked = jnp.take_along_axis(log_probs, jnp.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    loss = -jnp.sum(jnp.where(counted, picked, 0)) / jnp.sum(counted)
    if output.router is not None:
        loss += model.config.moe.router_aux_loss_coef * output.router.losses.load_balancing
    return loss


def loss_and_gradients(model, batch: Batch):
    loss, gradients = jax.jit(jax.value_and_grad(lambda model: training_loss(model, batch, batch.labels)))(model)
    return float(loss), dict(hub_arrays(gradients))


def assert_same_gradients(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    distances = {name: relative_l2(found[name], expected[name]) for name in expected}
    far = {name: distance for name, distance in distances.items() if not distance <= GRADIENT_TOLERANCE}
    assert not far, far


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_every_gradient_equal_transformers(references, name):
    reference = references[name]
    model = qmj.from_pretrained(reference.folder, dtype="float32", param_dtype="float32")
    loss, gradients = loss_and_gradients(model, reference.batch)
    expected_loss, expected = reference.loss_and_gradients
    if "lm_head.weight" not in gradients:
        assert reference.case.config["tie_word_embeddings"]
    assert loss == pytest.approx(expected_loss, rel=LOSS_TOLERANCE)
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize(
    "execution",
    [
        pytest.param(dict(dispatch="capacity", capacity_factor=8.0, group_size=32), id="capacity"),
        pytest.param(dict(dispatch="dense", remat="full"), id="dense-remat-full"),
        pytest.param(dict(dispatch="capacity", capacity_factor=8.0, remat="dots"), id="capacity-remat-dots"),
        pytest.param(dict(dispatch="dropless", remat="experts"), id="dropless-remat-experts"),
    ],
)
def test_gradients_do_not_depend_on_how_the_model_is_run(references, execution):
    """In training mode, with room for every assignment."""
    reference = references["qwen2_moe-plain"]
    model = qmj.from_pretrained(
        reference.folder, dtype="float32", param_dtype="float32", execution=qmj.ExecutionConfig(**execution)
    )
    model.train()
    loss, gradients = loss_and_gradients(model, reference.batch)
    expected_loss, expected = reference.loss_and_gradients
    assert loss == pytest.approx(expected_loss, rel=LOSS_TOLERANCE)
    assert_same_gradients(gradients, expected)


def test_pad_tokens_embedding_is_not_trained_by_its_occurrences(tmp_path):
    """torch's padding_idx: where the pad token stands among real tokens (pad = eos is common), its row gets nothing."""
    case = Case(name="pad-among-real-tokens", model_type="qwen2", settings={"pad_token_id": 5, "num_hidden_layers": 1})
    reference = Reference(case, tmp_path)
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (2, LENGTH)).astype(np.int32)
    tokens[:, 3] = 5
    batch = Batch(tokens=tokens, mask=np.ones_like(tokens), rows={"unpadded": slice(0, 2)})
    ask(reference.model, batch, labels=torch.tensor(batch.labels, dtype=torch.long)).loss.backward()
    expected = reference.model.model.embed_tokens.weight.grad.numpy()
    assert not expected[5].any()

    _, gradients = loss_and_gradients(qmj.from_pretrained(reference.folder, dtype="float32"), batch)
    assert relative_l2(gradients["model.embed_tokens.weight"], expected) <= GRADIENT_TOLERANCE
