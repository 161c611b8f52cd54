"""What training mode changes: tokens may be dropped, noise is drawn, and noise that is not drawn here is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.config import LayerKind
from qwen_moe_jax.model.decoder import _layer_keys
from qwen_moe_jax.model.segments import Segment
from tests.cases import CASES
from tests.distance import relative_l2
from tests.subject import run

TOKENS = np.random.default_rng(0).integers(1, 97, (4, 8)).astype(np.int32)


def make_model(name: str, execution: qmj.ExecutionConfig | None = None, **settings):
    config = qmj.ModelConfig.from_pretrained({**CASES[name].config, **settings})
    return qmj.CausalLM(config, rngs=nnx.Rngs(0), execution=execution or qmj.ExecutionConfig())


def test_training_drops_what_exceeds_capacity_and_counts_it_and_evaluation_drops_nothing():
    model = make_model("qwen3_moe-plain", qmj.ExecutionConfig(capacity_factor=0.5))
    assignments = TOKENS.size * 3  # three experts a token
    stats = run(model, TOKENS).router.stats
    assert not np.asarray(stats.dropped_per_expert).any(), "a model starts in eval mode"
    model.train()
    stats = run(model, TOKENS).router.stats
    assert (np.asarray(stats.dropped_per_expert).sum(-1) >= assignments / 4).all()
    assert (np.asarray(stats.tokens_per_expert).sum(-1) == assignments).all(), "what was asked for, drops included"
    model.eval()
    assert not np.asarray(run(model, TOKENS).router.stats.dropped_per_expert).any()


def test_dropout_that_transformers_applies_in_training_is_refused_by_name():
    model = make_model("qwen2-plain", attention_dropout=0.25)
    assert run(model, TOKENS).logits.shape == (4, 8, 97)
    model.train()
    with pytest.raises(qmj.ConfigError, match="attention_dropout=0.25"):
        run(model, TOKENS)


# Jitter. The block's own test holds it to transformers' formula.

#: Nothing is dropped, so that noise is all that training mode changes.
DROPLESS = qmj.ExecutionConfig(dispatch="dropless", buffer_factor=None)
JITTERED = dict(router_jitter_noise=0.25)


@pytest.fixture(scope="module")
def jittered():
    """A model in training mode, and its logits under the key 1."""
    model = make_model("mixtral-plain", DROPLESS, **JITTERED)
    model.train()
    return model, np.asarray(run(model, TOKENS, noise_key=jax.random.key(1)).logits)


def test_jitter_is_the_keys_and_the_keys_alone(jittered):
    model, logits = jittered
    np.testing.assert_array_equal(run(model, TOKENS, noise_key=jax.random.key(1)).logits, logits)
    assert relative_l2(run(model, TOKENS, noise_key=jax.random.key(2)).logits, logits) > 1e-4


def test_jitter_without_a_key_is_refused_with_the_way_out(jittered):
    model, _ = jittered
    with pytest.raises(qmj.RequestError, match=r"router_jitter_noise=0.25.*noise_key=jax.random.key"):
        model(TOKENS)
    for wrong in (0, np.zeros(2, np.uint32), jax.random.split(jax.random.key(0), 3)):
        with pytest.raises(qmj.RequestError, match="expected one key"):
            model(TOKENS, noise_key=wrong)


def test_neither_evaluation_nor_a_config_without_jitter_reads_the_key(jittered):
    still = make_model("mixtral-plain", DROPLESS)
    expected = np.asarray(run(still, TOKENS).logits)
    assert relative_l2(jittered[1], expected) > 1e-4
    np.testing.assert_array_equal(
        run(make_model("mixtral-plain", DROPLESS, **JITTERED), TOKENS, noise_key=jax.random.key(1)).logits, expected
    )
    still.train()
    np.testing.assert_array_equal(run(still, TOKENS, noise_key=jax.random.key(1)).logits, expected)


@pytest.mark.parametrize("axes", [dict(data=8), dict(data=2, fsdp=2, expert=2)], ids=["data=8", "data, fsdp, expert"])
def test_jitter_is_the_same_on_every_mesh(axes, jittered):
    """Four rows on eight devices are padded to eight: the rows that are there draw what they drew."""
    config = qmj.ModelConfig.from_pretrained({**CASES["mixtral-plain"].config, **JITTERED})
    model = qmj.CausalLM(config, rngs=nnx.Rngs(0), mesh=qmj.make_mesh(**axes), execution=DROPLESS)
    model.train()
    found = run(model, TOKENS, noise_key=jax.random.key(1)).logits
    assert relative_l2(found, jittered[1]) < 1e-6


def test_every_layer_draws_noise_of_its_own_however_the_layers_are_stacked():
    key, kind = jax.random.key(3), LayerKind(mlp="sparse")
    found = _layer_keys(key, Segment(start=1, period=(kind, kind), repeats=2))
    expected = [[jax.random.fold_in(key, layer) for layer in layers] for layers in ((1, 2), (3, 4))]
    assert all(bool(found[i, j] == expected[i][j]) for i in range(2) for j in range(2))
    assert len({str(jax.random.key_data(key)) for key in found.reshape(-1)}) == 4


def test_recomputation_in_the_backward_pass_draws_the_same_noise(jittered):
    def gradients(model):
        loss = jax.jit(jax.grad(lambda model, key: (model(TOKENS, noise_key=key).logits ** 2).mean()))
        return loss(model, jax.random.key(1))

    again = make_model("mixtral-plain", dataclasses.replace(DROPLESS, remat="full"), **JITTERED)
    again.train()
    for kept, recomputed in zip(
        jax.tree.leaves(gradients(jittered[0])), jax.tree.leaves(gradients(again)), strict=True
    ):
        assert relative_l2(recomputed, kept) < 1e-5
