"""Labelled texts and words become rows with labels in the order of the logits; the metrics are scikit-learn's."""

import json

import numpy as np
import pytest

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.model.output import ModelOutput
from train.config import ClassificationConfig, DataConfig
from train.data.corpus import load_corpus
from train.data.examples import example_rows
from train.data.labels import IGNORED, Labels, labelled_kind, sorted_names
from train.objectives.classification import Classification, LabelBatch, label_batch, macro_f1


def corpus_of(tmp_path, records, settings=ClassificationConfig(), **data):
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = DataConfig(path=str(file), format="jsonl", vocab_size=300, seq_len=24, heldout_fraction=0.2, **data)
    return load_corpus(tmp_path / "corpus", config, labelled_kind(settings))


def batch_of(corpus, settings=ClassificationConfig()):
    labels = Labels(**corpus.summary)
    names = settings.labels or sorted_names(labels.names)
    [part] = corpus.parts
    rows = example_rows(part, 24, heldout=False)
    return label_batch([rows[number] for number in range(len(rows))], labels, names, corpus.pad_id), names


def texts_in(batch, corpus):
    for tokens, segments in zip(batch.tokens_BT, batch.segment_ids_BT, strict=True):
        assert (tokens[segments == 0] == corpus.pad_id).all()
        yield corpus.tokenizer.decode(list(tokens[segments == 1]))


@pytest.mark.parametrize(
    ("label", "names"),
    [
        (lambda n: ["good", "bad"][n % 2], ("bad", "good")),
        (lambda n: [10, 9][n % 2], ("9", "10")),
        (lambda n: n % 2 == 0, ("False", "True")),
    ],
    ids=["names", "integers", "booleans"],
)
def test_a_label_has_its_number_in_the_order_of_the_logits(tmp_path, label, names):
    corpus = corpus_of(tmp_path, [{"text": f"text {n}", "label": label(n)} for n in range(10)])
    batch, order = batch_of(corpus)
    assert order == names and corpus.summary["problem_type"] == "single_label_classification"
    for text, number in zip(texts_in(batch, corpus), batch.labels, strict=True):
        assert names[number] == str(label(int(text.split()[-1])))


def test_several_labels_are_zeros_and_ones_and_a_number_is_a_number(tmp_path):
    kinds = {"multi": lambda n: [name for name in ("c", "a", "b") if n % 3 != ord(name) % 3], "one": lambda n: n / 2}
    for place, label in kinds.items():
        (tmp_path / place).mkdir()
        corpus = corpus_of(tmp_path / place, [{"prompt": f"text {n}", "label": label(n)} for n in range(9)])
        batch, names = batch_of(corpus)
        for text, row in zip(texts_in(batch, corpus), batch.labels, strict=True):
            wanted = label(int(text.split()[-1]))
            found = [name for name, one in zip(names, row, strict=True) if one] if place == "multi" else float(row[0])
            assert found == (sorted(wanted) if place == "multi" else wanted)


def test_the_first_token_of_each_word_has_its_label(tmp_path):
    settings = ClassificationConfig(level="token", labels=("O", "NAME"))
    words, labels = ["Ada", "unimaginably", "met", "Grace"], ["NAME", "O", "O", "NAME"]
    records = [{"tokens": [*words, "there"], "ner_tags": [*labels, IGNORED], "id": n} for n in range(5)]
    corpus = corpus_of(tmp_path, [*records, {"tokens": ["a"], "ner_tags": [IGNORED]}], settings)
    assert len(example_rows(corpus.parts[0], 24, heldout=False)) == 4  # of the last record nothing can be learned
    batch, _ = batch_of(corpus, settings)
    real, found = batch.segment_ids_BT[0] == 1, batch.labels[0]
    assert [settings.labels[number] for number in found[found != IGNORED]] == labels
    starts = np.flatnonzero(found != IGNORED)
    for start, word in zip(starts, words, strict=True):
        token = corpus.tokenizer.decode([int(batch.tokens_BT[0][start])])
        assert word.startswith(token.strip())
    assert (found[~real] == IGNORED).all()


@pytest.mark.parametrize(
    ("records", "complaint"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": 0.5}], "line 2: label: found 0.5, expected one for"),
        ([{"text": "a"}], "line 1: found the keys text, expected"),
        ([{"text": 3, "label": "x"}], "line 1: text: found 3, expected a string"),
        ([{"text": "a", "label": float("nan")}], "line 1: label: found nan, expected a finite number"),
    ],
)
def test_what_has_no_label_of_its_kind_is_refused_by_file_and_line(tmp_path, records, complaint):
    with pytest.raises(ConfigError, match=complaint):
        corpus_of(tmp_path, records)


def test_an_unknown_label_is_refused_with_the_nearest_known_one(tmp_path):
    settings = ClassificationConfig(labels=("good", "bad"))
    with pytest.raises(ConfigError, match="found 'godo'; did you mean 'good'"):
        corpus_of(tmp_path, [{"text": "a", "label": "godo"}], settings)


def test_macro_f1_is_the_mean_over_the_labels_that_occur():
    """Of scikit-learn: f1_score([0, 0, 1, 1, 2], [0, 1, 1, 1, 1], average="macro") is 0.4444…"""
    expected, found = [0, 0, 1, 1, 2], [0, 1, 1, 1, 1]
    counts = np.zeros((4, 3), int)  # the last label does not occur
    for right, wrong in zip(expected, found, strict=True):
        counts[right, 0] += right == wrong
        counts[wrong, 1] += 1
        counts[right, 2] += 1
    assert macro_f1(counts) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize("kind", ["single", "multi", "number", "token"])
def test_losses_are_those_of_transformers(kind):
    torch = pytest.importorskip("torch")
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    numbers = np.random.default_rng(0)
    real = np.ones((4, 3), np.int32)
    shape = {"single": (4, 5), "multi": (4, 5), "number": (4, 1), "token": (4, 3, 5)}[kind]
    logits = numbers.normal(size=shape).astype(np.float32)
    labels = {
        "single": numbers.integers(0, 5, 4),
        "multi": numbers.integers(0, 2, (4, 5)).astype(np.float32),
        "number": numbers.normal(size=(4, 1)).astype(np.float32),
        "token": np.where(numbers.integers(0, 2, (4, 3)), numbers.integers(0, 5, (4, 3)), IGNORED),
    }[kind]
    types = {"single": "single_label_classification", "multi": "multi_label_classification", "number": "regression"}
    config = type("Config", (), {"problem_type": types.get(kind), "num_labels": shape[-1]})()
    if kind == "token":
        expected = loss_utils.ForTokenClassification(torch.tensor(logits), torch.tensor(labels), config)
    else:
        expected = loss_utils.ForSequenceClassificationLoss(torch.tensor(labels), torch.tensor(logits), config)
    objective = Classification(ClassificationConfig(level="token" if kind == "token" else "sequence"))
    batch = LabelBatch(real, real, real, labels)
    sums = objective.heldout_sum(ModelOutput(logits=logits), batch)
    assert objective.heldout_metrics(sums)["loss"] == pytest.approx(float(expected), rel=1e-5)
