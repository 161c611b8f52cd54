"""Every kind of source gives its records in one order; what cannot be read is refused by its file and line."""

import gzip
import json
import math
import sys
from types import ModuleType

import numpy as np
import pytest

from qwen_moe_jax.errors import ConfigError
from train.config import SourceConfig
from train.data.sources import read_records

QUESTION, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def texts(megabytes=1.0, **source):
    return [record.content for record in read_records(SourceConfig(**source), megabytes)]


def test_the_standard_library_is_read_up_to_the_asked_size_in_the_same_order():
    found = texts(0.05)
    assert 0.03e6 < sum(len(text.encode()) for text in found) <= 0.05e6
    assert found == texts(0.05)


def test_a_source_that_is_cut_short_says_how_much_was_read_of_how_much(tmp_path):
    def said(megabytes, **source):
        notes = []
        list(read_records(SourceConfig(path=str(tmp_path), **source), megabytes, truncated=notes.append))
        return notes

    for name, size in {"a": 1_400_000, "b": 300_000, "c": 200_000}.items():
        (tmp_path / f"{name}.txt").write_text("x" * size)
    assert said(1, pattern="*.txt") == ["0.5 of 1.9 MB"]  # all but the one that is too long
    assert said(1.9, pattern="*.txt") == said(math.inf, pattern="*.txt") == []
    line = json.dumps({"text": "x" * 88}) + "\n"
    assert len(line) == 101
    (tmp_path / "a.jsonl").write_text(line * 20_000)
    assert said(1.01, format="jsonl") == ["1.0 of 2.0 MB"]
    assert said(2.02, format="jsonl") == []


def test_docstrings_become_questions_and_answers_about_public_names(tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text('"""A package."""')
    (tmp_path / "pack" / "deep.py").write_text(
        '''
class Reader:
    """Reads
    things.

    Slowly."""

    def read(self):
        "Reads \\d one."
    def _hidden(self):
        "Hidden."
    def silent(self): ...

def read(): "  "
async def wait():
    """Waits."""
'''
    )
    records = list(read_records(SourceConfig(path=str(tmp_path), format="docstrings"), 1))
    said = dict([message["content"] for message in record.content.messages] for record in records)
    assert said == {
        "What is pack?": "A package.",
        "What is pack.deep.Reader?": "Reads things.",
        "What does pack.deep.Reader.read do?": "Reads \\d one.",
        "What does pack.deep.wait do?": "Waits.",
    }
    assert len({record.name for record in records}) == 4  # each is held out or not for itself
    (tmp_path / "pack" / "old.py").write_text("print 3")
    with pytest.raises(ConfigError, match=r"old.py: this cannot be read as Python .*leave it out by data.pattern"):
        list(read_records(SourceConfig(path=str(tmp_path), format="docstrings"), 1))


def test_the_standard_library_answers_for_itself():
    records = read_records(SourceConfig(format="docstrings", pattern="textwrap.py"), 1)
    said = dict([message["content"] for message in record.content.messages] for record in records)
    assert said["What does textwrap.dedent do?"].startswith("Remove any common leading whitespace from every line")


def test_own_files_can_be_named(tmp_path):
    (tmp_path / "tests").mkdir()
    for name, text in {"a.md": "one", "tests/b.md": "two", "c.py": "three", "empty.md": " "}.items():
        (tmp_path / name).write_text(text)
    assert sorted(texts(path=str(tmp_path), pattern="*.md")) == ["one", "two"]
    assert texts(path=str(tmp_path / "c.py")) == ["three"]
    with pytest.raises(
        ConfigError, match=r"data.path: .* holds no readable text of at most 1.0 MB .*\*.txt"
    ) as refused:
        texts(path=str(tmp_path), pattern="*.txt")
    assert "files named *.txt, but a.md, c.py, empty.md. Set data.pattern" in str(refused.value)
    with pytest.raises(
        ConfigError, match=r"in files named \*.jsonl, which format jsonl reads, but a.md, .* as \"\*.md\""
    ):
        texts(path=str(tmp_path), format="jsonl")
    with pytest.raises(ConfigError, match="nowhere: there is no such file or folder"):
        texts(path=str(tmp_path / "nowhere"))


def test_lines_hold_texts_or_conversations(tmp_path):
    lines = [{"text": "one"}, {"messages": [QUESTION, ANSWER], "text": None}, {"text": " "}, {"text": "é", "id": 3}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)))
    one, two, three = read_records(SourceConfig(path=str(tmp_path), format="jsonl"), megabytes=1)
    assert (one.content, three.content) == ("one", "é")
    assert two.content.messages == [QUESTION, ANSWER]
    assert two.place == f"{file}, line 3" and two.name == "a.jsonl:3"
    assert texts(20e-6, path=str(file), format="jsonl") == ["one"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "cut"', "this is no JSON (Expecting ',' delimiter.*expected {\"text\": …}"),
        ("[1, 2]", "found [1, 2], expected {"),
        ('{"body": "x", "id": 1}', "found the keys body, id, expected {"),
        ("{}", "found the keys (none), expected {"),
        ('{"text": "x", "messages": []}', "found both text and messages"),
        ('{"text": 5}', "text: found 5, expected a string"),
        ('{"text": "\\ud800"}', "found half of a surrogate pair at character 0"),
        ('{"messages": "hi"}', "messages: found 'hi', expected a list"),
        ('{"messages": ["hi"]}', "messages[0]: found 'hi', expected {"),
        ('{"messages": [{"role": "human", "content": "x"}]}', "messages[0].role: found 'human', expected one of"),
        ('{"messages": [{"role": "user"}]}', "messages[0].content: found None, expected a string"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "messages[0].role: found 'assistant', expected a"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "found no message of the assistant (user), expected one"),
        (b"\xff{}", "found byte 0xff at offset 0, expected text in UTF-8"),
    ],
)  # fmt: skip
def test_a_bad_line_is_refused_by_its_file_and_number(tmp_path, line, expected):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ConfigError) as refusal:
        texts(path=str(file), format="jsonl")
    assert str(refusal.value).startswith(f"{file}, line 2: ")
    for part in expected.split(".*"):
        assert part in str(refusal.value)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_lines_are_read_to_the_end_of_all_frames_or_refused(tmp_path, ending):
    if ending == ".gz":
        compress = gzip.compress
    else:
        compress = pytest.importorskip("zstandard", reason="zstandard is not installed").ZstdCompressor().compress
    lines = "".join(json.dumps({"text": f"text {number} {number**3}"}) + "\n" for number in range(500)).encode()
    found = tmp_path / f"a.jsonl{ending}"
    found.write_bytes(compress(lines) * 2)  # two frames
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "plain"}')
    read = texts(path=str(tmp_path), format="jsonl")  # the files of both kinds
    assert len(read) == 1001 and "plain" in read
    for damaged in (compress(lines)[:-40], b"\n" + compress(lines), b'{"text": "plain"}'):
        found.write_bytes(damaged)
        with pytest.raises(ConfigError, match=f"a.jsonl{ending}: this is no whole {ending} file .* download it again"):
            texts(path=str(found), format="jsonl")


def test_linked_folders_are_read_once_each(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.md").write_text("linked")
    (tmp_path / "one" / "b.md").write_text("own")
    for name, target in (("link", "two"), ("again", "two"), ("loop", "one")):
        (tmp_path / "one" / name).symlink_to(tmp_path / target)
    assert sorted(texts(path=str(tmp_path / "one"), pattern="*.md")) == ["linked", "own"]


def test_a_text_in_another_encoding_is_refused_by_its_file_and_place(tmp_path):
    (tmp_path / "latin.md").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="latin.md: found byte 0xe9 at offset 3, expected text in UTF-8"):
        texts(path=str(tmp_path), pattern="*.md")


@pytest.mark.parametrize(("name", "form"), [("a.jsonl", "jsonl"), ("a.txt", "text"), ("a.npy", "tokens")])
def test_a_git_lfs_pointer_is_refused_with_what_to_run(tmp_path, name, form):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4096\n")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ConfigError, match=rf"^data.path: .*{name} is a Git LFS pointer, .*: run `git lfs pull` in"):
            texts(path=str(path), format=form, pattern=name)


def test_utf_16_without_a_mark_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("utf-16-le"))
    (tmp_path / "a.jsonl").write_bytes('{"text": "one"}\n{"text": "é"}\n'.encode("utf-16-be"))
    assert texts(path=str(tmp_path), pattern="*.txt") == ["café"]
    assert texts(path=str(tmp_path), format="jsonl") == ["one", "é"]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((2, 3), np.int32), "found int32 of shape (2, 3), expected one row of integer"),
        (np.zeros(3), "found float64 of shape (3,), expected"),
        (b"text", "this is no .npy file"),
    ],
)
def test_an_array_that_holds_no_ids_is_refused(tmp_path, array, expected):
    file = tmp_path / "ids.npy"
    file.write_bytes(array) if isinstance(array, bytes) else np.save(file, array)
    with pytest.raises(ConfigError) as refusal:
        list(read_records(SourceConfig(path=str(tmp_path), format="tokens"), 1, end_id=0))
    assert str(file) in str(refusal.value) and expected in str(refusal.value)


def test_without_the_datasets_library_a_dataset_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install 'qwen-moe-jax"):
        texts(path=str(tmp_path), format="datasets")


def test_rows_of_a_dataset_are_read_as_lines_are(monkeypatch):
    library = ModuleType("datasets")
    rows = [
        {"text": "one", "messages": None, "id": 1},
        {"text": None, "messages": [QUESTION, ANSWER], "id": 2},
        {"id": 3},
    ]
    asked = []
    library.load_dataset = lambda name, split: asked.append((name, split)) or rows
    library.exceptions = ModuleType("datasets.exceptions")
    library.exceptions.DatasetsError = RuntimeError
    monkeypatch.setitem(sys.modules, "datasets", library)
    found = read_records(SourceConfig(path="owner/name", format="datasets", split="validation"), 1)
    assert next(found).content == "one"
    assert next(found).content.messages == [QUESTION, ANSWER]
    with pytest.raises(ConfigError, match="owner/name, row 2 of validation: found the keys id, expected"):
        next(found)
    assert asked == [("owner/name", "validation")]


def test_datasets_are_opened_from_a_saved_folder_and_from_parquet(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `hf` is not installed")
    dataset = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "splits")
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "a.parquet")
    for folder, split in [("saved", "train"), ("splits", "test"), ("parquet", "train")]:
        assert texts(path=str(tmp_path / folder), format="datasets", split=split) == ["one", "two"]
    with pytest.raises(ConfigError, match="splits: datasets cannot open it .KeyError"):
        texts(path=str(tmp_path / "splits"), format="datasets")
