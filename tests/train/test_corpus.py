"""The corpus is the same on every start, keeps documents out, and leaves a tokenizer that others open."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from qwen_moe_jax.errors import CheckpointError, ConfigError
from tests.inference.tokenizer_kinds import byte_fallback, byte_level
from train.config import DataConfig, SourceConfig
from train.data.corpus import load_corpus
from train.data.sources import read_records
from train.data.tokenizer import END_OF_TEXT, copy_tokenizer, save_tokenizer, train_tokenizer

SMALL = DataConfig(megabytes=0.05, vocab_size=300, seq_len=16, heldout_fraction=0.2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "corpus"
    return folder, load_corpus(folder, SMALL)


def write_tokenizer(folder, tokenizer, **config):
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def write_lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(file)


def test_documents_end_with_the_end_mark_and_decode_to_the_text(made):
    _, corpus = made
    [part] = corpus.parts
    texts = [record.content for record in read_records(SMALL.mixture[0], SMALL.megabytes)]
    documents = [*part.heldout, *part.training]
    assert len(part.heldout) == round(0.2 * len(texts))
    for text, document in zip(texts, documents, strict=True):
        assert document[-1] == corpus.end_id and (document[:-1] != corpus.end_id).all()
        assert corpus.tokenizer.decode(document[:-1]) == text
    assert all(part.training.learned_in(number).all() for number in range(len(part.training)))


def test_too_little_text_is_refused_and_leaves_no_corpus(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="Read more text"):
        load_corpus(tmp_path / "corpus", DataConfig(path=str(tmp_path / "text")))
    assert not (tmp_path / "corpus").exists()


def test_the_tokenizer_spells_any_text_within_its_vocabulary():
    tokenizer = train_tokenizer(["def f():\n    return 1\n"], vocab_size=270)
    assert tokenizer.get_vocab_size() <= 270
    text = "Übergrößenträger 🦉\n\tx = 0x1F"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_second_start_reads_the_same_documents_from_disk(made):
    folder, corpus = made
    read = load_corpus(folder, DataConfig(path="/nowhere"))
    for part in ("training", "heldout"):
        pairs = zip(getattr(corpus.parts[0], part), getattr(read.parts[0], part), strict=True)
        assert all((one == two).all() for one, two in pairs)
    assert read.end_id == corpus.end_id and read.parts[0].name == "Python's standard library"


def test_a_corpus_that_is_not_whole_is_refused(tmp_path):
    (tmp_path / "corpus").mkdir()
    with pytest.raises(ConfigError, match="no corpus.json.*--fresh"):
        load_corpus(tmp_path / "corpus", SMALL)


def test_a_corpus_of_an_earlier_version_is_refused_by_what_it_lacks(made, tmp_path):
    removals = {
        "turn_end_ids": lambda folder: _drop_key(folder / "corpus.json", "turn_end_ids"),
        "manifest.json": lambda folder: next(folder.glob("cache/*/manifest.json")).unlink(),
        "tokens.npy": lambda folder: next(folder.glob("cache/*/*/tokens.npy")).unlink(),
    }
    for name, remove in removals.items():
        folder = tmp_path / name
        shutil.copytree(made[0], folder)
        remove(folder)
        with pytest.raises(ConfigError, match=rf"{folder}: found no {name}, so an earlier version.*--fresh"):
            load_corpus(folder, SMALL)


def _drop_key(file, key):
    described = json.loads(file.read_text())
    del described[key]
    file.write_text(json.dumps(described))


def test_a_file_or_folder_that_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch):
    """The tests may run as root, who can read everything: the system's answer is made up."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.py").write_text("x = 1\n")
    config = DataConfig(path=str(tmp_path / "text"))

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for target, name, refused in [(Path, "read_bytes", "text/a.py"), (os, "scandir", "text")]:
        with monkeypatch.context() as patched:
            patched.setattr(target, name, refuse)
            with pytest.raises(ConfigError, match=f"data: .*{refused}: it cannot be read: Permission denied"):
                load_corpus(tmp_path / "run" / "corpus", config)


def test_the_heldout_documents_of_lines_are_spread_and_the_same_every_time(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"text": f"number {number}"} for number in range(100)])
    config = DataConfig(path=file, format="jsonl", vocab_size=300, seq_len=8, heldout_fraction=0.2)
    corpora = [load_corpus(tmp_path / name, config) for name in ("one", "two")]
    heldout = [
        [int(corpus.tokenizer.decode(document).split()[1]) for document in corpus.parts[0].heldout]
        for corpus in corpora
    ]
    assert heldout[0] == heldout[1] and len(set(heldout[0])) == 20
    assert min(heldout[0]) < 25 and max(heldout[0]) > 75
    assert len(corpora[0].parts[0].training) == 80


def test_an_existing_tokenizer_reads_and_ends_documents_its_own_way(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [{"text": "The quick brown fox"}] * 10)
    folder = write_tokenizer(tmp_path / "tokenizer", byte_fallback(), eos_token={"content": "</s>"})
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    corpus = load_corpus(tmp_path / "corpus", DataConfig(path=source, format="jsonl", tokenizer=folder, seq_len=4))
    expected = [*byte_fallback().encode("The quick brown fox").ids, byte_fallback().token_to_id("</s>")]
    assert expected[0] == byte_fallback().token_to_id("<s>")
    assert corpus.parts[0].training[0].tolist() == expected
    assert corpus.vocab_size == max(byte_fallback().get_vocab().values()) + 1
    copy_tokenizer(tmp_path / "corpus" / "tokenizer", tmp_path / "hub")
    assert (tmp_path / "hub" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert {file.name for file in (tmp_path / "hub").iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
    }  # fmt: skip


def test_a_tokenizer_without_an_end_of_documents_is_refused(tmp_path):
    config = DataConfig(tokenizer=write_tokenizer(tmp_path / "tokenizer", byte_level(), eos_token="<|no|>"))
    with pytest.raises(ConfigError, match="data.tokenizer: .*found '<.no.>' as eos_token"):
        load_corpus(tmp_path / "corpus", config)
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        load_corpus(tmp_path / "corpus", DataConfig(tokenizer="nowhere"))


def test_token_ids_are_taken_as_they_are_and_those_of_another_tokenizer_refused(tmp_path):
    tokenizer = byte_level()
    end_id = tokenizer.token_to_id("<|im_end|>")
    folder = write_tokenizer(tmp_path / "tokenizer", tokenizer, eos_token="<|im_end|>")
    documents = [[5, 6, 7, end_id], [8, end_id], [9, 10, 11, 12]]
    np.save(tmp_path / "ids.npy", np.concatenate(documents).astype(np.uint16))
    config = DataConfig(path=str(tmp_path / "ids.npy"), format="tokens", tokenizer=folder, seq_len=2)
    [part] = load_corpus(tmp_path / "corpus", config).parts
    assert sorted([document.tolist() for document in [*part.training, *part.heldout]]) == sorted(documents)
    np.save(tmp_path / "ids.npy", np.array([1, 2, end_id, 5, 70_000]))
    message = f"ids.npy, document 1 .ids 3 to 4.: found token id 70000, expected ids from 0 to {end_id + 1}"
    with pytest.raises(ConfigError, match=message):
        load_corpus(tmp_path / "other", config)


def test_a_mixture_keeps_its_sources_apart_and_its_tokenizer_knows_them_all(tmp_path):
    one = write_lines(tmp_path / "one.jsonl", [{"text": "aaaa aaaa"}] * 8)
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_text("bbbb bbbb")
    sources = (
        SourceConfig(path=one, format="jsonl"),
        SourceConfig(path=str(tmp_path / "texts"), pattern="*.txt"),
    )
    corpus = load_corpus(tmp_path / "corpus", DataConfig(sources=sources, vocab_size=264, seq_len=2))
    assert [part.name for part in corpus.parts] == [one, str(tmp_path / "texts")]
    assert [corpus.tokenizer.decode(part.training[0]) for part in corpus.parts] == ["aaaa aaaa", "bbbb bbbb"]
    assert len(corpus.tokenizer.encode("aaaa aaaa").ids) < 9 and len(corpus.tokenizer.encode("bbbb bbbb").ids) < 9


def test_saved_tokenizer_files_name_a_class_that_reads_them(tmp_path, made):
    _, corpus = made
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
