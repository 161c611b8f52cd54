"""`qwen-moe-jax score` prints the perplexity that the package computes; `eval` says where lm-eval is missing."""

import importlib.util
import json

import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.main import main
from qwen_moe_jax.inference.tokenizer import load_tokenizer
from tests.inference.checkpoints import make_checkpoint

TEXT = "def add(a, b):\n    return a + b  # déjà\n" * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("score") / "tiny")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.py"
    file.write_text(TEXT, encoding="utf-8")
    return file


def of_package(folder, window: int, stride: int):
    tokens, num_bytes = load_tokenizer(folder).encode(TEXT).ids, len(TEXT.encode())
    assert len(tokens) > window
    return qmj.perplexity(qmj.from_pretrained(folder), tokens, window=window, stride=stride, num_bytes=num_bytes)


def test_table(folder, file, capsys):
    """By default the model's own window, and half of it as stride."""
    assert main(["score", str(folder), str(file)]) == 0
    expected, message = of_package(folder, 96, 48), capsys.readouterr()
    assert message.err == ""  # no bar where there is no terminal
    assert f"{expected.num_tokens + 1:,} tokens, {len(TEXT.encode())} bytes; window 96, stride 48" in message.out
    assert f"perplexity      {expected.perplexity:.4f}" in message.out
    assert f"bits per byte   {expected.bits_per_byte:.4f}" in message.out


@pytest.mark.parametrize("mesh", [[], ["--mesh", "data=2,expert=2"]], ids=["one device", "mesh"])
def test_json(folder, file, capsys, mesh):
    assert main(["score", str(folder), str(file), "--window", "40", "--stride", "10", "--json", *mesh]) == 0
    found, expected = json.loads(capsys.readouterr().out), of_package(folder, 40, 10)
    for name in ("perplexity", "nats_per_token", "bits_per_byte", "log_likelihood"):
        assert found[name] == pytest.approx(getattr(expected, name), rel=1e-5)
    assert (found["num_tokens"], found["window"], found["stride"]) == (expected.num_tokens, 40, 10)


@pytest.mark.parametrize(
    "content, words, message",
    [
        (b"", [], "is empty"),
        (b"ab\xff", [], "byte 2 is not UTF-8"),
        (TEXT.encode(), ["--window", "10", "--stride", "10"], "stride=10, expected 1 to 9"),
        (TEXT.encode(), ["--window", "1"], "window=1, expected at least 2 tokens"),
        (None, [], "cannot be read (No such file or directory)"),
    ],
)
def test_refusals_come_before_the_weights(folder, tmp_path, capsys, monkeypatch, content, words, message):
    monkeypatch.setattr("qwen_moe_jax.cli.score.load_model", None)
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    assert main(["score", str(folder), str(file), *words]) == 2
    assert message in capsys.readouterr().err


def test_records_are_not_scored_as_their_json(folder, tmp_path, capsys):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "def f(): pass"}\n')
    assert main(["score", str(folder), str(file)]) == 2
    assert "x.jsonl: holds records" in capsys.readouterr().err


def test_eval_without_lm_eval(folder, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["eval", str(folder), "--tasks", "arc_easy"]) == 2
    assert "pip install 'qwen-moe-jax[eval]'" in capsys.readouterr().err
