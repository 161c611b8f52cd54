"""Float32 logits, hidden states and routing are those of transformers, for every case of the table."""

import dataclasses

import numpy as np
import pytest

import qwen_moe_jax as qmj
from tests.cases import CASES, FAMILIES, SPARSE_FAMILIES
from tests.distance import assert_near, relative_l2
from tests.referee import logits_of
from tests.subject import is_sparse, run

# transformers' own implementations (eager, sdpa, grouped) differ by up to 2e-6 here (tests/test_referee.py). Rounding
# is a few 1e-7 per operation over two to four layers; a wrong setting moves the logits by more than 1e-2.
LOGITS_TOLERANCE = 1e-5
# The aux loss is a sum of products of means near 1/E; its rounding is that of one float32 sum.
LOSS_TOLERANCE = 1e-5


def load(reference, **execution):
    return qmj.from_pretrained(
        reference.folder, dtype="float32", param_dtype="float32", execution=qmj.ExecutionConfig(**execution)
    )


#: Past its pretrained length, transformers' dynamic rope gives a row the base of the longest row of its batch.
DEPENDS_ON_THE_BATCH = "qwen3_moe-dynamic_past_maximum"


@pytest.mark.parametrize("name", [name for name in CASES if name != DEPENDS_ON_THE_BATCH])
def test_logits_and_routing_equal_transformers(references, name):
    reference = references[name]
    batch, model = reference.batch, load(reference)
    sparse = is_sparse(model.config)
    output = run(model, batch.tokens, batch.mask, output_router_logits=sparse)

    assert output.logits.dtype == np.float32
    distances = {
        kind: relative_l2(output.logits[rows][batch.real[rows]], reference.logits[rows][batch.real[rows]])
        for kind, rows in batch.rows.items()
    }
    assert max(distances.values()) <= LOGITS_TOLERANCE, distances

    assert sparse == bool(reference.num_sparse_layers)
    if not sparse:
        assert output.router is None
        return
    found, expected = np.asarray(output.router.trace.logits), reference.router_logits
    assert_near(found[:, batch.real], expected[:, batch.real], LOGITS_TOLERANCE, "router logits")
    np.testing.assert_array_equal(output.router.stats.tokens_per_expert, reference.tokens_per_expert)
    assert not np.asarray(output.router.stats.dropped_per_expert).any(), "a model in eval mode drops nothing"
    aux = reference.output.aux_loss.item()
    assert float(output.router.losses.load_balancing) == pytest.approx(aux, rel=LOSS_TOLERANCE)


def test_under_a_dynamic_rope_every_row_equals_transformers_on_that_row_alone(references):
    reference = references[DEPENDS_ON_THE_BATCH]
    batch = reference.batch
    found_BTV = np.asarray(run(load(reference), batch.tokens, batch.mask).logits)
    for row, real_T in enumerate(batch.real):
        alone = dataclasses.replace(batch, tokens=batch.tokens[row, real_T][None], mask=batch.mask[row, real_T][None])
        # transformers keeps the base of the longest row so far, until a row is shorter than the pretrained length.
        one_token = dataclasses.replace(alone, tokens=alone.tokens[:, :1], mask=alone.mask[:, :1])
        logits_of(reference.model, one_token)
        expected_TV = logits_of(reference.model, alone)[0]
        assert_near(found_BTV[row, real_T], expected_TV, LOGITS_TOLERANCE, f"row {row}")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_without_segment_ids_equal_transformers_without_mask(references, family):
    reference = references[f"{family}-plain"]
    output = run(load(reference), reference.batch.tokens)
    expected = logits_of(reference.model, reference.batch, masked=False)
    assert_near(output.logits, expected, LOGITS_TOLERANCE, "logits")


@pytest.mark.parametrize(
    "name", [*(f"{family}-plain" for family in FAMILIES), "qwen3_moe-mlp_only_and_sparse_step", "qwen2_moe-sliding"]
)
def test_hidden_states_of_every_layer_equal_transformers(references, name):
    """[L+1,B,T,D]: what enters each layer, and the last layer's result after the final norm."""
    reference = references[name]
    batch = reference.batch
    output = run(load(reference), batch.tokens, batch.mask, output_hidden_states=True)
    assert output.hidden_states.shape == reference.hidden_states.shape
    for layer, (found, expected) in enumerate(zip(output.hidden_states, reference.hidden_states, strict=True)):
        assert_near(np.asarray(found)[batch.real], expected[batch.real], LOGITS_TOLERANCE, f"hidden state {layer}")


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
@pytest.mark.parametrize(
    "execution",
    [
        pytest.param(dict(dispatch="dense"), id="dense"),
        # 84 tokens in groups that do not divide them, with room for every assignment in one expert: nothing is dropped.
        pytest.param(dict(dispatch="capacity", capacity_factor=8.0, group_size=32), id="capacity"),
    ],
)
def test_every_dispatch_method_gives_transformers_logits(references, family, execution):
    reference = references[f"{family}-plain"]
    batch = reference.batch
    output = run(load(reference, **execution), batch.tokens, batch.mask)
    assert not np.asarray(output.router.stats.dropped_per_expert).any()
    found, expected = np.asarray(output.logits)[batch.real], reference.logits[batch.real]
    assert_near(found, expected, LOGITS_TOLERANCE, "logits")
