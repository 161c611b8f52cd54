"""`qwen-moe-jax generate`: prompts in, texts out, in order; refused prompts do not affect the others."""

import io
import json
import re

import pytest

from qwen_moe_jax.cli.main import main
from tests.cli.fake_engine import END, install, write_folder
from tests.inference.tokenizer_kinds import KINDS


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "tiny")


def generate(folder, *words: str) -> int:
    return main(["generate", str(folder), *words])


def test_text_of_one_prompt_is_all_there_is(folder, monkeypatch, capsys):
    engine = install(monkeypatch, f" fox 你好👍🏽{END}")
    assert generate(folder, "--prompt", "The quick") == 0
    out, err = capsys.readouterr()
    assert out == " fox 你好👍🏽\n"
    assert re.search(
        r"^\d+ tokens in [\d.]+ s, \d+ programs compiled or read in that time: [\d.]+ tokens per second$", err, re.M
    )
    [(prompt, config)] = engine.asked
    assert prompt == "The quick"
    assert config.max_new_tokens == 128 and not config.do_sample
    assert config.eos_token_id == (KINDS["byte_level"].token_to_id(END),)


def test_text_comes_while_it_is_made(folder, monkeypatch, capsys):
    seen = []
    install(monkeypatch, f"the lazy dog{END}", size=1, on_chunk=lambda: seen.append(capsys.readouterr().out))
    assert generate(folder, "--prompt", "x") == 0
    assert len(list(filter(None, seen))) > 2
    assert "".join(seen) + capsys.readouterr().out == "the lazy dog\n"


def test_several_prompts_are_one_batch_and_stay_in_order(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "second.txt").write_text("second\n", encoding="utf-8")
    engine = install(monkeypatch, f"one, which takes longer{END}", f"two{END}", f"three\n{END}")
    words = ["--prompt", "first", "--file", str(tmp_path / "second.txt"), "--prompt", "third"]
    assert generate(folder, *words) == 0
    assert capsys.readouterr().out == "── 1 ──\none, which takes longer\n── 2 ──\ntwo\n── 3 ──\nthree\n\n"
    assert [prompt for prompt, _ in engine.asked] == ["first", "second\n", "third"]


def test_json_lines(folder, monkeypatch, capsys):
    install(monkeypatch, f" fox{END}", "jumps over the lazy dog")
    assert generate(folder, "--json", "--prompt", "1", "--prompt", "2", "--max-new-tokens", "5") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    ids = KINDS["byte_level"].encode(f" fox{END}").ids
    assert first == {
        "number": 1,
        "prompt": "1",
        "text": " fox",
        "token_ids": ids,
        "log_probs": [index / -8 for index in range(len(ids))],
        "finish_reason": "stop",
    }
    assert second["finish_reason"] == "length"
    assert second["token_ids"] == KINDS["byte_level"].encode("jumps over the lazy dog").ids[:5]
    assert len(second["log_probs"]) == 5


@pytest.mark.parametrize("words", [[], ["--json"]], ids=["text", "json"])
def test_prompts_that_cannot_be_served_do_not_stop_the_others(folder, monkeypatch, capsys, words):
    engine = install(monkeypatch, f"one{END}", f"four{END}")
    prompts = [word for prompt in ("a", "", "\udce4", "d") for word in ("--prompt", prompt)]
    assert generate(folder, *words, *prompts) == 2
    out, err = capsys.readouterr()
    message = ["the prompt is empty, expected at least one token.", "the prompt is not valid UTF-8, expected a text."]
    assert f"prompt 2: {message[0]}\nprompt 3: {message[1]}\n" in err
    assert err.endswith("qwen-moe-jax generate: error: 2 of 4 prompts could not be served: see above.\n")
    assert [prompt for prompt, _ in engine.asked] == ["a", "d"]
    if words:
        lines = [json.loads(line) for line in out.splitlines()]
        assert [line.get("text") for line in lines] == ["one", None, None, "four"]
        assert lines[1] == {"number": 2, "prompt": "", "error": message[0]}
    else:
        assert out == "── 1 ──\none\n── 4 ──\nfour\n"


def test_nothing_is_loaded_for_nothing(folder, monkeypatch, capsys):
    install(monkeypatch)
    monkeypatch.setattr("qwen_moe_jax.cli.generate.load_model", lambda arguments: pytest.fail("loaded"))
    assert generate(folder, "--prompt", "") == 2
    assert generate(folder, "--file", str(folder / "absent.txt")) == 2
    assert "absent.txt: cannot be read (No such file or directory)" in capsys.readouterr().err


@pytest.mark.parametrize("content, message", [(b"The quick", None), (b"\xe4\xbd", "not valid UTF-8"), (b"", "empty")])
def test_prompt_from_standard_input(folder, monkeypatch, capsys, content, message):
    engine = install(monkeypatch, f"fox{END}")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert generate(folder) == (2 if message else 0)
    out, err = capsys.readouterr()
    assert message in err if message else (out, engine.asked[0][0]) == ("fox\n", "The quick")


def test_stop_strings_end_texts_before_the_engine_does(folder, monkeypatch, capsys):
    """The token that completes one is the last; decoding does not continue."""
    chunks = []
    texts = ["over the lazy dog. The end, and so on and on and on and on and on", "a stop. And more"]
    install(monkeypatch, *texts, size=1, on_chunk=lambda: chunks.append(1))
    prompts = ["--prompt", "x", "--prompt", "y", "--stop", "dog", "--stop", "stop"]
    assert generate(folder, "--json", *prompts) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["text"], second["text"]) == ("over the lazy ", "a ")
    assert first["finish_reason"] == second["finish_reason"] == "stop"
    with_last = KINDS["byte_level"].decode(first["token_ids"])
    without_last = KINDS["byte_level"].decode(first["token_ids"][:-1])
    assert "dog" in with_last and "dog" not in without_last
    assert len(chunks) == len(first["token_ids"]) + len(second["token_ids"])


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], {"do_sample": True, "temperature": 0.6, "top_k": 20, "max_new_tokens": 7, "seed": None}),
        (["--temperature", "0"], {"do_sample": False, "temperature": 0.0, "top_k": 20}),
        (["--temperature", "1.5", "--seed", "3"], {"do_sample": True, "temperature": 1.5, "top_k": 20, "seed": 3}),
        (["--top-p", "0.5", "--top-k", "0", "--min-p", "0.1"], {"top_p": 0.5, "top_k": 0, "min_p": 0.1}),
        (["--repetition-penalty", "1.1", "--max-new-tokens", "9"], {"repetition_penalty": 1.1, "max_new_tokens": 9}),
        (["--stop", "a", "--stop", "b"], {"stop_strings": ("a", "b"), "temperature": 0.6}),
    ],
)
def test_arguments_speak_before_the_checkpoints_own_settings(tmp_path, monkeypatch, words, expected):
    own = {"do_sample": True, "temperature": 0.6, "top_k": 20, "max_new_tokens": 7}
    engine = install(monkeypatch, f"x{END}")
    assert generate(write_folder(tmp_path / "own", **own), "--prompt", "x", *words) == 0
    [(_, config)] = engine.asked
    assert {name: getattr(config, name) for name in expected} == expected


def test_drawing_is_asked_for_by_what_shapes_it(folder, monkeypatch):
    engine = install(monkeypatch, *[f"x{END}"] * 3)
    for words in (["--top-k", "5"], ["--temperature", "0.5"], ["--seed", "1"]):
        assert generate(folder, "--prompt", "x", *words) == 0
    assert [config.do_sample for _, config in engine.asked] == [True, True, False]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--temperature", "0", "--top-p", "0.9", "--min-p", "0.1"],
            "--temperature 0 draws nothing: leave out --top-p, ",
        ),
        (["--temperature", "-1"], "temperature"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--stop", ""], "stop_strings"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_weights_are_read(folder, monkeypatch, capsys, words, message):
    install(monkeypatch)
    monkeypatch.setattr("qwen_moe_jax.cli.generate.load_model", lambda arguments: pytest.fail("loaded"))
    assert generate(folder, "--prompt", "x", *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"top_k": -1}, ["--top-k", "5"]),
        ({"do_sample": True, "temperature": 0.0}, ["--temperature", "0.5"]),
        ({"do_sample": True, "temperature": 0.0}, ["--temperature", "0"]),
        ({"top_p": "high", "max_new_tokens": 0}, ["--top-p", "0.5", "--max-new-tokens", "3"]),
    ],
)
def test_the_command_line_overrules_a_file_that_would_be_refused(tmp_path, monkeypatch, capsys, fields, words):
    folder = write_folder(tmp_path / "tiny", **fields)
    engine = install(monkeypatch, f"one{END}")
    assert generate(folder, "--prompt", "x") == 2
    assert "is not supported" in capsys.readouterr().err
    assert generate(folder, "--prompt", "x", *words) == 0
    [(_, config)] = engine.asked
    assert config.do_sample == (words != ["--temperature", "0"])


def test_a_jsonl_file_has_one_request_a_line(folder, tmp_path, monkeypatch, capsys):
    engine = install(monkeypatch, f"one{END}", f"two{END}", f"four{END}")
    lines = [
        json.dumps({"prompt": "first\nline"}),
        json.dumps({"messages": [{"role": "user", "content": "Hi"}]}),
        "",
        json.dumps({"prompt": "half \ud83d"}),
        json.dumps({"prompt": "last \u2028 line"}, ensure_ascii=False),
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    assert generate(folder, "--file", str(path)) == 2
    out, err = capsys.readouterr()
    assert out == "── 1 ──\none\n── 2 ──\ntwo\n── 4 ──\nfour\n"
    assert "prompt 3: the prompt is not valid UTF-8" in err
    first, second, last = [prompt for prompt, _ in engine.asked]
    assert (first, last) == ("first\nline", "last \u2028 line")
    assert second == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("name", ["prompt.txt", "prompts.jsonl"])
def test_a_file_of_any_unicode_encoding_is_read(folder, tmp_path, monkeypatch, capsys, encoding, name):
    engine = install(monkeypatch, f"one{END}")
    text = "hélas" if name == "prompt.txt" else json.dumps({"prompt": "hélas"}, ensure_ascii=False)
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert generate(folder, "--file", str(tmp_path / name)) == 0
    assert [prompt for prompt, _ in engine.asked] == ["hélas"]


def test_a_git_lfs_pointer_is_no_prompt(folder, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4096\n")
    assert generate(folder, "--file", str(tmp_path / "prompt.txt")) == 2
    assert f"prompt.txt is a Git LFS pointer, not the file itself: run `git lfs pull` in {tmp_path}" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: is not JSON"),
        ("[]", "line 2: found \\[\\], expected"),
        ("{}", "line 2: found {}, expected"),
        ('{"prompt": "a", "messages": []}', "line 2: found .*, expected"),
        ('{"prompt": 5}', "line 2: prompt is of type int, expected a string"),
        ('{"prompt": "a", "temperature": 1}', "line 2: found the field 'temperature', .* on the command line"),
    ],
)
def test_a_line_that_is_no_request_is_refused_by_file_and_line(folder, tmp_path, capsys, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n", encoding="utf-8")
    assert generate(folder, "--file", str(path)) == 2
    assert re.search(re.escape(str(path)) + ", " + message, capsys.readouterr().err)


def test_messages_that_the_template_refuses_fail_alone(tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "tiny", template="alternating")
    install(monkeypatch, f"one{END}")
    path = tmp_path / "prompts.jsonl"
    turn = {"role": "user", "content": "Hi"}
    path.write_text(json.dumps({"messages": [turn, turn]}) + "\n" + json.dumps({"messages": [turn]}), encoding="utf-8")
    assert generate(folder, "--json", "--file", str(path)) == 2
    refused, served = map(json.loads, capsys.readouterr().out.splitlines())
    assert refused["number"] == 1 and "the chat template refuses the messages" in refused["error"]
    assert served["number"] == 2 and served["text"] == "one"
