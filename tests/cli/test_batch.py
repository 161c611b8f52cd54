"""`generate --input --output`: every record is answered once, whatever was interrupted before."""

import json
import sys
import types

import pytest

from qwen_moe_jax.cli.main import main
from qwen_moe_jax.errors import RequestError
from tests.cli.fake_engine import write_folder
from tests.inference.tokenizer_kinds import KINDS
from tests.server.scripted import ScriptedEngine

TOKENIZER = KINDS["byte_level"]


class Killed(BaseException):
    """As a kill: nothing is tidied up."""


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "tiny")


@pytest.fixture
def engine(monkeypatch):
    """A scripted engine in place of the real one; two slots."""
    engine = ScriptedEngine(lambda prompt: f"{prompt}!", slots=2, tokenizer=TOKENIZER)
    module = types.SimpleNamespace(Engine=lambda model, *, slots, max_length: engine)
    monkeypatch.setitem(sys.modules, "qwen_moe_jax.inference.engine", module)
    monkeypatch.setattr("qwen_moe_jax.cli.batch.load_model", lambda arguments, generation: "the model")
    monkeypatch.setattr("qwen_moe_jax.inference.slot_memory.choose_slots", lambda model, longest: 2)
    return engine


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def batch(folder, *words):
    """Runs the batch of the files next to the folder; returns the exit code and the answers by id."""
    files = ["--input", str(folder.parent / "prompts.jsonl"), "--output", str(folder.parent / "answers.jsonl")]
    code = main(["generate", str(folder), *files, *words])
    lines = (folder.parent / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = {line["id"]: line for line in map(json.loads, lines)}
    assert len(answers) == len(lines)
    return code, answers


def test_texts_and_conversations_with_settings_of_their_own(folder, engine, tmp_path, capsys):
    write(
        tmp_path / "prompts.jsonl",
        {"prompt": "The quick"},
        {"id": "b", "prompt": "The", "max_new_tokens": 2, "temperature": 0.5, "seed": 7},
        {"id": "c", "messages": [{"role": "user", "content": "Hi"}]},
        {"id": "d", "prompt": "The quick", "stop": "ick"},
        {"id": 5, "prompt": "x", "top_p": 0.5, "temperature": 1},
    )
    code, answers = batch(folder, "--max-new-tokens", "50", "--temperature", "0")
    assert code == 0 and answers.keys() == {1, "b", "c", "d", 5}
    assert (answers[1]["text"], answers[1]["finish_reason"]) == ("The quick!", "stop")
    assert answers["b"]["finish_reason"] == "length" and len(answers["b"]["token_ids"]) == 2
    assert answers["c"]["text"] == "user\nHi"  # the prompt, up to its first <|im_end|>
    assert (answers["d"]["text"], answers["d"]["finish_reason"]) == ("The qu", "stop")
    assert len(answers[1]["log_probs"]) == len(answers[1]["token_ids"])
    by_length = {len(request.token_ids): request.config for request in engine.seen}
    assert by_length[len(TOKENIZER.encode("The").ids)].do_sample
    configs = [request.config for request in engine.seen]
    assert [config.do_sample for config in configs] == [False, True, False, False, True]
    assert (configs[1].temperature, configs[1].seed, configs[4].top_p) == (0.5, 7, 0.5)
    assert "5 answers" in capsys.readouterr().err


def test_an_interrupted_batch_goes_on_where_it_was(folder, engine, tmp_path, monkeypatch):
    """Killed at several moments, once within a line: every record has one answer, and no work is repeated."""
    records = [{"id": number, "prompt": f"x {number}"} for number in range(12)]
    write(tmp_path / "prompts.jsonl", *records)
    for steps in (5, 9, 8):

        def kill(prompts, ends=steps):
            if engine.steps >= ends:
                raise Killed

        engine.forget()
        engine.before_step = kill
        with pytest.raises(Killed):
            batch(folder)
    path = tmp_path / "answers.jsonl"
    done = path.read_bytes()
    answered = {json.loads(line)["id"] for line in done.splitlines()[:-1]}
    path.write_bytes(done[:-5])  # the last line is torn
    engine.forget()
    engine.before_step = lambda prompts: None
    code, answers = batch(folder)
    assert code == 0 and answers.keys() == set(range(12))
    assert all(answers[number]["text"] == f"x {number}!" for number in range(12))
    assert path.read_bytes().startswith(done[: done[:-1].rindex(b"\n") + 1])
    assert 0 < len(engine.seen) == 12 - len(answered)
    assert batch(folder) == (0, answers)


def test_records_that_cannot_be_served_are_answered_by_the_reason(folder, engine, tmp_path, capsys):
    write(
        tmp_path / "prompts.jsonl",
        {"id": "empty", "prompt": ""},
        {"id": "range", "prompt": "x", "top_p": 7},
        {"id": "type", "prompt": "x", "max_new_tokens": "many"},
        {"id": "long", "prompt": "x " * 600},
        {"id": "nan", "prompt": "bad one"},
        {"id": "good", "prompt": "x"},
    )
    engine.fails = lambda prompt: prompt == "bad one"
    code, answers = batch(folder)
    assert code == 2 and answers["good"]["text"] == "x!"
    for name, text in {"empty": "empty", "range": "top_p", "type": "", "long": "tokens", "nan": "NaN"}.items():
        assert text in answers[name]["error"]
    assert "5 of 6 requests could not be served" in capsys.readouterr().err


@pytest.mark.parametrize(
    "lines, message",
    [
        (['{"prompt": 1}'], "prompt is of type int, expected a string"),
        (["nonsense"], "line 1: is not JSON"),
        (['{"id": 1}'], "expected {"),
        (['{"prompt": "x", "id": null}'], "id is None"),
        (['{"prompt": "x", "id": "\\ud83d"}'], "line 1: id is not valid UTF-8"),
        (['{"prompt": "x", "temprature": 1}'], "did you mean 'temperature'"),
        (['{"prompt": "x", "id": 2}', '{"prompt": "y"}'], "the id 2 is that of an earlier line"),
        ([], "found no request"),
    ],
)
def test_an_input_that_is_no_batch_is_refused_whole(folder, tmp_path, capsys, lines, message):
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    assert main(["generate", str(folder), "--input", f"{tmp_path}/prompts.jsonl", "--output", f"{tmp_path}/out"]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, message", [("x\n", "is no answer"), ('{"id": 9}\n', "which the input does not have")]
)
def test_the_answers_of_another_batch_are_left_alone(folder, tmp_path, capsys, content, message):
    write(tmp_path / "prompts.jsonl", {"prompt": "x"})
    (tmp_path / "out").write_text(content)
    words = ["generate", str(folder), "--input", f"{tmp_path}/prompts.jsonl", "--output", f"{tmp_path}/out"]
    assert main(words) == 2
    assert message in capsys.readouterr().err and (tmp_path / "out").read_text() == content


def test_one_process_writes_at_a_time(tmp_path):
    from qwen_moe_jax.cli.batch_file import AnswerFile

    with AnswerFile(tmp_path / "out", [1]), pytest.raises(RequestError, match="another process is writing it"):
        AnswerFile(tmp_path / "out", [1])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--input", "x"], "needs both"),
        (["--input", "x", "--output", "y", "--prompt", "z"], "do not go with --input"),
        (["--input", "x", "--output", "y", "--slots", "0"], "at least 1"),
        (["--input", "x", "--output", "y", "--distributed"], "one process's work"),
    ],
)
def test_arguments_that_do_not_go_together(folder, capsys, words, message):
    assert main(["generate", str(folder), *words]) == 2
    assert message in capsys.readouterr().err
