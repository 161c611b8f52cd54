"""The corpus is the same on every start, keeps documents out, and leaves a tokenizer that others open."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from qwen_moe_jax.errors import ConfigError
from train.config import DataConfig
from train.corpus import END_OF_TEXT, load_corpus, make_corpus, read_texts, save_tokenizer, train_tokenizer

SMALL = DataConfig(megabytes=0.05, vocab_size=300, seq_len=16, heldout_fraction=0.2)


@pytest.fixture(scope="module")
def corpus():
    return make_corpus(SMALL)


def test_the_standard_library_is_read_up_to_the_asked_size_in_the_same_order():
    texts = read_texts(SMALL)
    assert 0.03e6 < sum(len(text.encode()) for text in texts) <= 0.05e6
    assert texts == read_texts(SMALL)


def test_own_text_can_be_named(tmp_path):
    (tmp_path / "tests").mkdir()
    for name, text in {"a.md": "one", "tests/b.md": "two", "c.py": "three", "empty.md": " "}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.md").write_bytes(b"\xe9")
    assert sorted(read_texts(DataConfig(folder=str(tmp_path), pattern="*.md"))) == ["one", "two"]
    with pytest.raises(ConfigError, match="data.folder: .* no readable"):
        read_texts(DataConfig(folder=str(tmp_path), pattern="*.txt"))


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="Read more text"):
        make_corpus(DataConfig(folder=str(tmp_path)))


def test_documents_end_with_the_end_mark_and_decode_to_the_text(corpus):
    texts = read_texts(SMALL)
    documents = corpus.heldout + corpus.training
    assert len(corpus.heldout) == round(0.2 * len(texts))
    for text, document in zip(texts, documents, strict=True):
        assert document[-1] == corpus.end_id and (document[:-1] != corpus.end_id).all()
        assert corpus.tokenizer.decode(document[:-1]) == text


def test_the_tokenizer_spells_any_text_within_its_vocabulary():
    tokenizer = train_tokenizer(["def f():\n    return 1\n"], vocab_size=270)
    assert tokenizer.get_vocab_size() <= 270
    text = "Übergrößenträger 🦉\n\tx = 0x1F"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_second_start_reads_the_same_documents_from_disk(tmp_path, corpus):
    made, read = load_corpus(tmp_path, SMALL), load_corpus(tmp_path, DataConfig(folder="/nowhere"))
    for part in ("training", "heldout"):
        for one, two, three in zip(getattr(corpus, part), getattr(made, part), getattr(read, part), strict=True):
            np.testing.assert_array_equal(one, two)
            np.testing.assert_array_equal(one, three)
    assert read.end_id == corpus.end_id


def test_saved_tokenizer_files_name_a_class_that_reads_them(tmp_path, corpus):
    save_tokenizer(corpus.tokenizer, tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["eos_token"] == END_OF_TEXT
    text = "import os  # é"
    ids = Tokenizer.from_file(str(tmp_path / "hub" / "tokenizer.json")).encode(text).ids
    assert ids == corpus.tokenizer.encode(text).ids
    transformers = pytest.importorskip("transformers")
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    assert opened(text)["input_ids"] == ids and opened.decode(ids) == text
    assert opened.eos_token_id == corpus.end_id
