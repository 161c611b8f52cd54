"""Classification heads answer as transformers' do, whatever the padding."""

import jax.numpy as jnp
import numpy as np
import pytest

import qwen_moe_jax as qmj
from tests.cases import FAMILIES, VOCABULARY, Case
from tests.distance import assert_near
from tests.referee import LENGTH, Batch, Reference, ask, torch, transformers
from tests.subject import run

# As for the logits of a language model: the same decoder, and one smaller matrix.
TOLERANCE = 1e-5
PAD = 5
LABELS = 3


def head_case(family: str, **settings) -> Case:
    # The same labels for both heads; transformers writes them as id2label.
    return Case(name=family, model_type=family, settings={"pad_token_id": PAD, "num_labels": LABELS, **settings})


@pytest.fixture(scope="module", params=FAMILIES)
def sequence_reference(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequence")
    return Reference(head_case(request.param), folder, transformers.AutoModelForSequenceClassification)


def padded_batch() -> Batch:
    """Rows: none, left, right, pad tokens inside (attended), pad tokens inside (masked), eos = pad as last real token,
    a single real token, nothing but attended pad tokens."""
    tokens = np.random.default_rng(3).integers(PAD + 1, VOCABULARY, (8, LENGTH)).astype(np.int32)
    mask = np.ones_like(tokens)
    mask[1, :5] = 0
    mask[2, 9:] = 0
    tokens[3, 4:6] = PAD
    mask[4, 6:8] = 0
    tokens[5, -1] = PAD
    mask[6, 1:] = 0
    tokens[mask == 0] = PAD
    tokens[7] = PAD
    return Batch(tokens=tokens, mask=mask, rows={})


def transformers_logits(reference, batch):
    with torch.no_grad():
        return ask(reference.model, batch).logits.numpy()


def test_sequence_logits_are_those_of_the_last_token_that_is_not_padding(sequence_reference):
    batch = padded_batch()
    model = qmj.SequenceClassifier.from_pretrained(sequence_reference.folder, dtype="float32")
    found, expected = run(model, batch.tokens, batch.mask).logits, transformers_logits(sequence_reference, batch)
    assert found.shape == (len(batch.tokens), LABELS)
    assert found.dtype == jnp.float32
    for row in range(len(batch.tokens)):
        assert_near(found[row], expected[row], TOLERANCE, f"row {row}")


def test_sequence_logits_without_a_pad_token_are_those_of_the_last_token(tmp_path):
    """transformers refuses more than one row then, and cannot know of padding."""
    case = head_case("qwen3_moe", pad_token_id=None)
    reference = Reference(case, tmp_path, transformers.AutoModelForSequenceClassification)
    tokens = np.random.default_rng(3).integers(1, VOCABULARY, (1, LENGTH)).astype(np.int32)
    batch = Batch(tokens=tokens, mask=np.ones_like(tokens), rows={})
    model = qmj.SequenceClassifier.from_pretrained(reference.folder, dtype="float32")
    assert_near(run(model, tokens).logits, transformers_logits(reference, batch), TOLERANCE, "logits")


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_next"])
def test_token_logits_have_a_bias_and_equal_transformers(family, tmp_path):
    reference = Reference(head_case(family), tmp_path, transformers.AutoModelForTokenClassification)
    assert reference.model.score.bias.abs().min() > 1e-3, "the case must be able to show a forgotten bias"
    batch = reference.batch
    model = qmj.TokenClassifier.from_pretrained(reference.folder, dtype="float32")
    found, expected = run(model, batch.tokens, batch.mask).logits, transformers_logits(reference, batch)
    assert found.shape == (*batch.tokens.shape, LABELS)
    assert_near(np.asarray(found)[batch.real], expected[batch.real], TOLERANCE, "logits")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (qmj.SequenceClassifier, transformers.AutoModelForSequenceClassification),
        (qmj.TokenClassifier, transformers.AutoModelForTokenClassification),
    ],
    ids=["sequence", "token"],
)
def test_transformers_reads_a_saved_head_completely(ours, theirs, tmp_path):
    reference = Reference(head_case("qwen2_moe"), tmp_path / "hub", theirs)
    qmj.save_pretrained(ours.from_pretrained(reference.folder), tmp_path / "saved")
    again, report = theirs.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    assert again.config.num_labels == LABELS
    for name, value in reference.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_language_model_without_the_head_is_refused_by_name(references):
    with pytest.raises(qmj.CheckpointError, match="score.weight"):
        qmj.SequenceClassifier.from_pretrained(references["qwen3-plain"].folder)
