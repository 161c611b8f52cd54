"""The referee itself: its cases must be able to fail, and it must agree with itself."""

import pytest

from tests.cases import CASES, FAMILIES, HYBRID_CASES
from tests.distance import relative_l2
from tests.referee import SMALLEST_ROUTING_GAP, build, logits_of, routing_gap, torch

# The smallest change that an odd setting may make. The tests allow 1e-5; a setting that moves the logits by less than
# a thousand times that would be held too loosely.
VISIBLE = 1e-2


EVERY = CASES | HYBRID_CASES


@pytest.mark.parametrize("name", [case.name for case in EVERY.values() if case.inert is not None])
def test_the_odd_setting_of_a_case_changes_its_logits(references, name):
    reference = references[name]
    other = build(reference.case, **reference.case.inert)
    other.load_state_dict(reference.model.state_dict())
    real = reference.batch.real
    assert relative_l2(logits_of(other, reference.batch)[real], reference.logits[real]) > VISIBLE


@pytest.mark.parametrize("name", CASES)
def test_logits_have_the_size_of_a_trained_model(references, name):
    """Tiny logits would hide errors in attention and experts behind the embedding; huge ones would amplify rounding."""
    reference = references[name]
    assert 4 < abs(reference.logits[reference.batch.real]).max() < 12
    if reference.num_sparse_layers:
        assert routing_gap(reference.router_logits[:, reference.batch.real], reference.top_k) > SMALLEST_ROUTING_GAP


@pytest.mark.parametrize("name", HYBRID_CASES)
def test_every_layer_of_a_hybrid_counts_in_its_logits(references, name):
    """Without one of its mixers, a hybrid answers otherwise by much more than the tests allow."""
    reference = references[name]
    real = reference.batch.real
    for layer in reference.model.model.layers:
        mixer = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn
        out = mixer.out_proj if hasattr(layer, "linear_attn") else mixer.o_proj
        weight = out.weight.detach().clone()
        with torch.no_grad():
            out.weight.zero_()
            without = logits_of(reference.model, reference.batch)
            out.weight.copy_(weight)
        assert relative_l2(without[real], reference.logits[real]) > VISIBLE


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_implementations_agree_in_float32(references, family):
    """The distance between its own implementations is the floor below which no tolerance makes sense."""
    reference = references[f"{family}-plain"]
    other = build(reference.case, attention="sdpa", experts="grouped_mm")
    other.load_state_dict(reference.model.state_dict())
    real = reference.batch.real
    assert relative_l2(logits_of(other, reference.batch)[real], reference.logits[real]) < 2e-6
