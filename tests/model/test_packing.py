"""Documents packed into one row are computed as if each stood alone, and padding touches nothing."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from tests.cases import CASES, VOCABULARY
from tests.distance import assert_near
from tests.subject import is_sparse, run

# The same numbers summed over rows of other lengths: a few float32 roundings.
TOLERANCE = 1e-5

NAMES = [
    "qwen2-plain",
    "qwen2_moe-plain",
    "qwen3_moe-plain",
    "mixtral-plain",
    "qwen2-sliding_layer_types",
    "qwen3_moe-mlp_only_and_sparse_step",
]
# segment → (row, slice): two rows of 16 with documents of 5, 6 and 3 tokens, padding at the end; and of 9 and 7.
DOCUMENTS = {
    1: (0, slice(0, 5)),
    2: (0, slice(5, 11)),
    3: (0, slice(11, 14)),
    4: (1, slice(0, 9)),
    5: (1, slice(9, 16)),
}


@functools.cache
def make_model(name: str):
    """Random weights large enough that attention and routing are far from uniform."""
    config = qmj.ModelConfig.from_pretrained({**CASES[name].config, "initializer_range": 0.25})
    return qmj.CausalLM(config, rngs=nnx.Rngs(0))


def pack():
    tokens = np.random.default_rng(1).integers(1, VOCABULARY, (2, 16)).astype(np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for segment, (row, where) in DOCUMENTS.items():
        segments[row, where] = segment if row == 0 else segment - 3  # ids start at 1 in every row
        positions[row, where] = np.arange(where.stop - where.start)
    return tokens, segments, positions


def unpack(tokens):
    """The documents one to a row, padded on the right, with their mask."""
    alone, mask = np.zeros((len(DOCUMENTS), 16), np.int32), np.zeros((len(DOCUMENTS), 16), np.int32)
    for index, (row, where) in enumerate(DOCUMENTS.values()):
        length = where.stop - where.start
        alone[index, :length], mask[index, :length] = tokens[row, where], 1
    return alone, mask


@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_equal_the_documents_alone(name):
    model = make_model(name)
    tokens, segments, positions = pack()
    alone_tokens, mask = unpack(tokens)
    packed = run(model, tokens, segments, positions)
    alone = run(model, alone_tokens, mask)
    for index, (row, where) in enumerate(DOCUMENTS.values()):
        expected = alone.logits[index, : where.stop - where.start]
        assert_near(packed.logits[row, where], expected, TOLERANCE, f"document {index}")
    if is_sparse(model.config):
        np.testing.assert_array_equal(packed.router.stats.tokens_per_expert, alone.router.stats.tokens_per_expert)
        expected = float(alone.router.losses.load_balancing)
        assert float(packed.router.losses.load_balancing) == pytest.approx(expected, rel=TOLERANCE)


def test_positions_left_out_give_the_same_since_rotation_is_relative():
    model = make_model("qwen3_moe-plain")
    tokens, segments, positions = pack()
    given, left_out = run(model, tokens, segments, positions), run(model, tokens, segments)
    real = segments != 0
    assert_near(np.asarray(left_out.logits)[real], np.asarray(given.logits)[real], TOLERANCE, "logits")


def test_a_masked_gap_inside_a_document_does_not_restart_its_positions():
    """A tokenizer's mask may hide tokens in the middle. Both sides attend to each other, so their distance must count;
    transformers counts positions by place in the row, whatever the mask."""
    model = make_model("qwen3_moe-plain")
    tokens, _, _ = pack()
    mask = np.ones_like(tokens)
    mask[:, 5:8] = 0
    by_place = np.tile(np.arange(16, dtype=np.int32), (2, 1))
    given, left_out = run(model, tokens, mask, by_place), run(model, tokens, mask)
    real = mask != 0
    assert_near(np.asarray(left_out.logits)[real], np.asarray(given.logits)[real], TOLERANCE, "logits")


def test_a_single_document_needs_no_segment_ids():
    model = make_model("qwen2_moe-plain")
    tokens, _, _ = pack()
    without = run(model, tokens)
    given = run(model, tokens, np.ones_like(tokens), np.tile(np.arange(16, dtype=np.int32), (2, 1)))
    assert_near(without.logits, given.logits, TOLERANCE, "logits")


@pytest.mark.parametrize("changed", [0, 7, 15])
def test_a_token_changes_only_its_own_document_from_its_place_on(changed):
    """Position 0 is in the first document of row 0, 7 in its second, 15 is padding there."""
    model = make_model("mixtral-plain")
    tokens, segments, positions = pack()
    before = np.asarray(run(model, tokens, segments, positions).logits)
    tokens[0, changed] = (tokens[0, changed] % (VOCABULARY - 1)) + 1
    after = np.asarray(run(model, tokens, segments, positions).logits)
    moved = np.abs(after - before).max(-1) > 1e-6
    reachable = (segments == segments[0, changed]) & (np.arange(16) >= changed) & (np.arange(2) == 0)[:, None]
    real = segments != 0
    assert not moved[real & ~reachable].any()
    assert moved[real & reachable].all()


def test_padding_has_no_gradient_and_takes_no_place():
    """The gradient of the real tokens' logits reaches the rows of the embedding that they use, and no other."""
    model = make_model("qwen2_moe-plain")
    tokens, segments, positions = pack()
    pad = VOCABULARY - 1
    tokens = np.where(segments == 0, pad, tokens % pad)

    def total(model):
        output = model(tokens, segment_ids=segments, positions=positions)
        return (output.logits * (segments != 0)[..., None]).sum() + output.router.losses.load_balancing

    gradient = np.asarray(jax.jit(jax.grad(total))(model).model.embed_tokens.weight)
    touched = np.abs(gradient).sum(-1) > 0
    np.testing.assert_array_equal(np.flatnonzero(touched), np.unique(tokens[segments != 0]))
