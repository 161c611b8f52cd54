"""generate and chat with the engine itself: the tokens of `qmj.generate`, and a cache that changes no answer."""

import io
import json

import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.main import main
from qwen_moe_jax.inference.chat_template import load_chat_template
from qwen_moe_jax.inference.tokenizer import decode, encode, load_tokenizer
from tests.cli.fake_engine import write_folder

PROMPTS = ["The quick brown", "naïve 你好", "x"]
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("engine") / "tiny")
    config = qmj.ModelConfig.from_pretrained(
        {**json.loads((folder / "config.json").read_text()), "initializer_range": 0.4}
    )
    qmj.save_pretrained(qmj.CausalLM(config, rngs=nnx.Rngs(3)), folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return qmj.from_pretrained(folder)


def test_generated_tokens(folder, model, capsys):
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert main(["generate", str(folder), *words, "--json", "--max-new-tokens", str(NEW_TOKENS)]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tokenizer = load_tokenizer(folder)
    expected = qmj.generate(model, [encode(tokenizer, prompt) for prompt in PROMPTS], max_new_tokens=NEW_TOKENS)
    assert [line["token_ids"] for line in found] == expected
    assert [line["text"] for line in found] == [decode(tokenizer, ids) for ids in expected]


def test_conversation(folder, model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Hi\nHow 你?".encode()), encoding="utf-8"))
    assert main(["chat", str(folder), "--max-new-tokens", str(NEW_TOKENS)]) == 0
    tokenizer, template, messages, expected = load_tokenizer(folder), load_chat_template(folder), [], ""
    for text in ("Hi", "How 你?"):
        messages.append({"role": "user", "content": text})
        ids = encode(tokenizer, template.render(messages), add_special_tokens=False)
        answer = decode(tokenizer, qmj.generate(model, [ids], max_new_tokens=NEW_TOKENS)[0])
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert capsys.readouterr().out == expected
