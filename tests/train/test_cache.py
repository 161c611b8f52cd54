"""Tokenized documents are kept in shards: the same by any number of processes, after any interruption, in any run."""

import gzip
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from qwen_moe_jax.errors import CheckpointError, ConfigError
from train.config import ClassificationConfig, DataConfig
from train.data import cache, parts, shards, workers
from train.data.corpus import load_corpus
from train.data.documents import FileArray, as_documents
from train.data.labels import labelled_kind
from train.data.rows import Rows, pack
from train.data.tokenizer import save_tokenizer, train_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog and is gone".split()
RECORDS = 300
WITHOUT_THOUGHTS = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def record(number):
    """A text, or every third a conversation; of many lengths."""
    random = np.random.default_rng(number)
    text = " ".join(random.choice(WORDS, random.integers(1, 40)))
    if number % 3:
        return {"text": text}
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    save_tokenizer(train_tokenizer([" ".join(WORDS)], 300), folder / "tokenizer")
    lines = [json.dumps(record(number)) + "\n" for number in range(RECORDS)]
    (folder / "a.jsonl").write_text("".join(lines))
    return folder


def data(source, **settings):
    own = {"path": str(source / "a.jsonl"), "format": "jsonl", "tokenizer": str(source / "tokenizer")}
    return DataConfig(**{**own, "seq_len": 32, "heldout_fraction": 0.1, "num_proc": 1, **settings})


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "TOKENS_OF_A_SHARD", 1500)
    monkeypatch.setattr(workers, "_RECORDS_OF_A_GROUP", 25)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The corpus in one shard."""
    return load_corpus(tmp_path_factory.mktemp("whole") / "corpus", data(source))


def documents(part):
    return [
        (side, part_documents[number].tolist(), part_documents.learned_in(number).tolist())
        for side, part_documents in (("training", part.training), ("heldout", part.heldout))
        for number in range(len(part_documents))
    ]


def rows_of(part):
    return [row for rows in (pack(part.training, 32), pack(part.training, 32).with_targets())
            for row in (rows[number] for number in range(len(rows)))]  # fmt: skip


def same(one, other):
    """Whether two corpora have the same documents, rows and words for the start of the run."""
    assert (one.forms, one.notes, one.turn_end_ids) == (other.forms, other.notes, other.turn_end_ids)
    [part], [other_part] = one.parts, other.parts
    assert documents(part) == documents(other_part)
    for row, other_row in zip(rows_of(part), rows_of(other_part), strict=True):
        for name, array in vars(row).items():
            np.testing.assert_array_equal(array, getattr(other_row, name))


def shard_folders(corpus_folder):
    return sorted(path.name for path in corpus_folder.glob("cache/a-jsonl-*/*") if path.is_dir())


def test_documents_and_rows_do_not_depend_on_shards(source, whole, tmp_path, small_shards):
    corpus = load_corpus(tmp_path / "corpus", data(source))
    assert len(shard_folders(tmp_path / "corpus")) > 5
    same(corpus, whole)
    [part] = corpus.parts
    in_memory = as_documents([part.training[number] for number in range(len(part.training))])
    assert in_memory.num_tokens == part.training.num_tokens == sum(map(len, part.training))
    with pytest.raises(IndexError):
        part.training[len(part.training)]


def test_rows_without_a_target_are_those_of_all_rows_that_have_none(source, whole, tmp_path, small_shards):
    for corpus in (whole, load_corpus(tmp_path / "corpus", data(source))):
        rows = pack(corpus.parts[0].training, 24)
        has = [_targets(rows[number]) > 0 for number in range(len(rows))]
        kept = rows.with_targets()
        assert 0 < sum(has) < len(has) and len(kept) == sum(has)
        expected = [rows[number] for number in np.flatnonzero(has)]
        for number, row in enumerate(expected):
            np.testing.assert_array_equal(kept[number].tokens_T, row.tokens_T)
        assert kept.num_tokens == sum(int((row.segment_ids_T > 0).sum()) for row in expected)


def _targets(row):
    same_segment = (row.segment_ids_T[:-1] == row.segment_ids_T[1:]) & (row.segment_ids_T[1:] > 0)
    return int((same_segment & row.learned_T[1:]).sum())


def test_the_last_row_may_be_left_out():
    rows = Rows(as_documents([np.arange(1, 8)]), 3, "documents", left_out=np.array([0, 2]))
    assert len(rows) == 1 and rows[0].tokens_T.tolist() == [4, 5, 6] and rows.num_tokens == 3


def test_held_out_documents_do_not_depend_on_how_many_hashes_fit_into_memory(source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_HASHES_IN_MEMORY", 100)
    same(load_corpus(tmp_path / "corpus", data(source)), whole)


def test_several_processes_make_what_one_makes(source, whole, tmp_path, small_shards):
    same(load_corpus(tmp_path / "corpus", data(source, num_proc=2)), whole)


def test_a_refusal_in_a_worker_is_that_of_its_record(source, tmp_path):
    lines = [json.dumps(record(1)) for _ in range(600)]
    answer = {"role": "assistant", "content": "3", "reasoning_content": "2 + 1"}
    lines[400] = json.dumps({"messages": [{"role": "user", "content": "?"}, answer]})
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    shutil.copytree(source / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(WITHOUT_THOUGHTS)
    config = data(source, path=str(tmp_path / "a.jsonl"), tokenizer=str(tmp_path / "tokenizer"), num_proc=2)
    with pytest.raises(ConfigError, match="a.jsonl, line 401: .*reasoning_content"):
        load_corpus(tmp_path / "corpus", config)


class Killed(BaseException):
    pass


def interrupted(folder, config, monkeypatch, shard, kind=None):
    """A start that ends as one that is killed does, while it writes a shard of this number."""
    replace = os.replace

    def kill(old, new):
        if Path(new).name == f"{shard:06}":
            raise Killed
        replace(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(shards.os, "replace", kill)
        with pytest.raises(Killed):
            load_corpus(folder, config, *[kind] * (kind is not None))
    assert not folder.exists()


def test_an_interrupted_build_goes_on_after_its_last_whole_shard(source, whole, tmp_path, monkeypatch, small_shards):
    folder = tmp_path / "corpus"
    interrupted(folder, data(source), monkeypatch, 3)
    partial = folder.with_name("corpus.partial")
    assert len(shard_folders(partial)) == 4  # and one of them has a temporary name
    [second] = partial.glob("cache/*/000002/tokens.npy")
    second.write_bytes(second.read_bytes()[:-4] + b"\1\1\1\1")  # damaged on the disk: it is made anew
    before = {path: path.stat().st_ino for path in partial.glob("cache/*/*/tokens.npy")}
    same(load_corpus(folder, data(source)), whole)
    after = {partial / path.relative_to(folder): path.stat().st_ino for path in folder.glob("cache/*/*/tokens.npy")}
    kept = [path.parent.name for path, inode in before.items() if after.get(path) == inode]
    assert sorted(kept) == ["000000", "000001"]


def test_labels_keep_their_numbers_over_an_interruption_and_from_the_cache(source, tmp_path, monkeypatch, small_shards):
    lines = [json.dumps({"text": " ".join(WORDS), "label": f"label {number // 20}"}) for number in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = data(source, path=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))
    expected = load_corpus(tmp_path / "expected", data(source, path=config.path), labelled_kind(ClassificationConfig()))
    interrupted(tmp_path / "one", config, monkeypatch, 2, labelled_kind(ClassificationConfig()))
    for name in ("one", "two"):
        corpus = load_corpus(tmp_path / name, config, labelled_kind(ClassificationConfig()))
        assert corpus.summary == expected.summary and len(corpus.summary["names"]) == 15
        for side in ("training_numbers", "heldout_numbers"):
            [found, wanted] = [getattr(one.parts[0], side)["label"] for one in (corpus, expected)]
            np.testing.assert_array_equal(found, wanted)


def test_runs_share_a_cache_and_what_changed_is_tokenized_anew_and_said(source, whole, tmp_path, monkeypatch, capsys):
    file, shared = tmp_path / "a.jsonl", tmp_path / "cache"
    shutil.copy(source / "a.jsonl", file)
    config = data(source, path=str(file), cache_dir=str(shared))
    load_corpus(tmp_path / "one", config)
    with monkeypatch.context() as patched:
        patched.setattr("train.data.cache.read_records", lambda *_: pytest.fail("the source was read again"))
        again = load_corpus(tmp_path / "two", data(source, path=str(file), cache_dir=str(shared), seq_len=64))
        assert documents(again.parts[0]) == documents(whole.parts[0])
    assert capsys.readouterr().out == ""
    with file.open("a") as opened:
        opened.write(json.dumps({"text": "the end"}) + "\n")
    longer = load_corpus(tmp_path / "three", config)
    assert "anew: changed since a-jsonl-" in (said := capsys.readouterr().out) and said.strip().endswith("its files")
    assert len(documents(longer.parts[0])) == len(documents(whole.parts[0])) + 1
    resumed = load_corpus(tmp_path / "two", config)
    assert re.search(r"a.jsonl had [\d,]+ bytes and has [\d,]+\. The run goes on .*--fresh", resumed.notes[-1])
    assert len(documents(resumed.parts[0])) == len(documents(whole.parts[0]))
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(source / "tokenizer", tokenizer)
    (tokenizer / "chat_template.jinja").write_text((source / "tokenizer/chat_template.jinja").read_text() + "{# 2 #}")
    load_corpus(tmp_path / "four", data(source, path=str(file), cache_dir=str(shared), tokenizer=str(tokenizer)))
    assert "the tokenizer" in capsys.readouterr().out
    shutil.rmtree(shared)
    with pytest.raises(ConfigError, match="no manifest.json.*data.cache_dir"):
        load_corpus(tmp_path / "two", config)


def test_a_run_goes_on_where_its_files_are_gone_and_says_where_only_their_times_changed(source, whole, tmp_path):
    file = tmp_path / "a.jsonl"
    shutil.copy(source / "a.jsonl", file)
    config = data(source, path=str(file))
    assert not any("changed since" in note for note in load_corpus(tmp_path / "corpus", config).notes)
    os.utime(file, ns=(0, 0))
    touched = load_corpus(tmp_path / "corpus", config)
    assert f"{file} changed since this run began: a.jsonl was written again, with the same size." in touched.notes[-1]
    file.unlink()
    gone = load_corpus(tmp_path / "corpus", config)
    assert gone.notes == touched.notes[:-1] and documents(gone.parts[0]) == documents(whole.parts[0])


def test_a_trained_tokenizer_is_in_the_cache_too(source, tmp_path, monkeypatch):
    config = data(source, tokenizer="", vocab_size=280, cache_dir=str(tmp_path / "cache"))
    one = load_corpus(tmp_path / "one", config)
    monkeypatch.setattr("train.data.corpus.train_tokenizer", lambda *_: pytest.fail("a tokenizer was trained again"))
    assert load_corpus(tmp_path / "two", config).tokenizer.get_vocab() == one.tokenizer.get_vocab()


def test_the_second_of_two_processes_waits_and_finds_it_made(source, tmp_path, capsys):
    config = data(source, cache_dir=str(tmp_path / "cache"))
    made = threading.Barrier(2)
    build, builds = cache._Build.run, []

    def slow(self, *args):
        builds.append(self)
        made.wait()
        time.sleep(0.2)
        build(self, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cache._Build, "run", slow)
        first = threading.Thread(target=load_corpus, args=(tmp_path / "one", config))
        first.start()
        made.wait()
        load_corpus(tmp_path / "two", config)
        first.join()
    assert len(builds) == 1 and "waiting for another process" in capsys.readouterr().out


def test_files_that_change_while_they_are_read_are_refused(source, tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    shutil.copy(source / "a.jsonl", file)
    run = cache._Build.run

    def touch(self, *args):
        run(self, *args)
        os.utime(file, (1, 1))

    with monkeypatch.context() as patched:
        patched.setattr(cache._Build, "run", touch)
        with pytest.raises(ConfigError, match="a.jsonl changed while they were read"):
            load_corpus(tmp_path / "corpus", data(source, path=str(file)))


def test_compressed_lines_are_read(source, whole, tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write((source / "a.jsonl").read_bytes())
    config = data(source, path=str(tmp_path / "a.jsonl.gz"), heldout_fraction=0.5)
    expected = {str(one[1:]) for one in documents(whole.parts[0])}
    assert {str(one[1:]) for one in documents(load_corpus(tmp_path / "corpus", config).parts[0])} == expected


def test_rows_of_parquet_are_records(source, whole, tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    parquet.write_table(
        arrow.Table.from_pylist([record(number) for number in range(1, 300, 3)]), tmp_path / "a.parquet"
    )
    config = data(source, path=str(tmp_path), format="parquet")
    corpus = load_corpus(tmp_path / "corpus", config)
    texts = sorted(corpus.tokenizer.decode(ids[:-1]) for _, ids, _ in documents(corpus.parts[0]))
    assert texts == sorted(record(number)["text"] for number in range(1, 300, 3))
    (tmp_path / "b.parquet").write_bytes(b"none")
    with pytest.raises(ConfigError, match="b.parquet: this is no parquet file"):
        load_corpus(tmp_path / "other", config)


def test_a_file_that_was_shortened_is_refused_where_it_is_read(tmp_path):
    file = tmp_path / "tokens.npy"
    np.save(file, np.arange(1000, dtype=np.uint32))
    array = FileArray(file)
    np.testing.assert_array_equal(array[990:1010], np.arange(990, 1000))
    os.truncate(file, 2000)
    with pytest.raises(CheckpointError, match="tokens.npy: found fewer than its 1,000 items"):
        array[0:1000]


def _trainer(folder, config):
    load_corpus(folder, config)


@pytest.mark.multiprocess
def test_workers_end_with_a_trainer_that_is_killed(source, tmp_path):
    config = data(source, num_proc=2, path=str(tmp_path / "a.jsonl"))
    text = (source / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(text * 80)
    trainer = multiprocessing.get_context("spawn").Process(target=_trainer, args=(tmp_path / "corpus", config))
    trainer.start()
    children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children")
    if not children.exists():
        pytest.skip("finds the workers in /proc/PID/task/PID/children, which this kernel does not have")
    until = time.monotonic() + 60
    while len(found := children.read_text().split()) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.join()
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in found) and time.monotonic() < until:
        time.sleep(0.05)
    assert found and not any(_alive(pid) for pid in found)


def _alive(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()
