"""What training mode changes: tokens may be dropped, and noise that is not applied is refused rather than left out."""

import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from tests.cases import CASES
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


@pytest.mark.parametrize(
    ("name", "field"), [("qwen2-plain", "attention_dropout"), ("mixtral-plain", "router_jitter_noise")]
)
def test_noise_that_transformers_adds_in_training_is_refused_by_name(name, field):
    model = make_model(name, **{field: 0.25})
    assert run(model, TOKENS).logits.shape == (4, 8, 97)
    model.train()
    with pytest.raises(qmj.ConfigError, match=f"{field}=0.25"):
        run(model, TOKENS)
