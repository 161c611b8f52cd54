"""`qwen-moe-jax chat`: the whole conversation in the model's own form, turn after turn, whatever happens in one."""

import io
import os
import signal

import pytest

from qwen_moe_jax.cli.main import main
from tests.cli.fake_engine import END, install, write_folder


def chat(monkeypatch, folder, lines: str | bytes, *words: str) -> int:
    lines = lines if isinstance(lines, bytes) else lines.encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    return main(["chat", str(folder), *words])


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def asked(engine) -> list[str]:
    return [prompt for prompt, _ in engine.asked]


OPEN = "<|im_start|>assistant\n"


def test_every_turn_has_the_whole_conversation(tmp_path, monkeypatch, capsys):
    engine = install(monkeypatch, f"Hello 👍🏽{END}", f"<think>\nhm\n</think>\n\nFour.{END}", f"Bye{END}")
    folder = write_folder(tmp_path / "tiny")
    assert chat(monkeypatch, folder, "Hi 你好\n\n  two and two?  \nbye", "--system", "Be brief.") == 0
    out, err = capsys.readouterr()
    assert out == "Hello 👍🏽\n<think>\nhm\n</think>\n\nFour.\nBye\n"
    assert err == ""
    first = turn("system", "Be brief.") + turn("user", "Hi 你好")
    second = first + turn("assistant", "Hello 👍🏽") + turn("user", "two and two?")
    third = second + turn("assistant", "Four.") + turn("user", "bye")  # the template forgets old thoughts
    assert asked(engine) == [part + OPEN for part in (first, second, third)]
    assert engine.max_length == 512  # as many positions as the model has


def test_answer_comes_while_it_is_made(tmp_path, monkeypatch, capsys):
    seen = []
    install(monkeypatch, f"the lazy dog{END}", size=1, on_chunk=lambda: seen.append(capsys.readouterr().out))
    assert chat(monkeypatch, write_folder(tmp_path / "tiny"), "x\n") == 0
    assert len(list(filter(None, seen))) > 2
    assert "".join(seen) + capsys.readouterr().out == "the lazy dog\n"


def test_commands(tmp_path, monkeypatch, capsys):
    engine = install(monkeypatch, *[f"ok{END}"] * 5)
    lines = ["a", "/reset", "b", "/system Be kind.", "c", "/reset", "d", "/system", "/etc is a folder?", "/quit", "e"]
    assert chat(monkeypatch, write_folder(tmp_path / "tiny"), "\n".join(lines), "--system", "Be brief.") == 0
    brief, kind = turn("system", "Be brief."), turn("system", "Be kind.")
    expected = [
        brief + turn("user", "a"),
        brief + turn("user", "b"),
        kind + turn("user", "c"),
        kind + turn("user", "d"),
    ]
    assert asked(engine) == [part + OPEN for part in [*expected, turn("user", "/etc is a folder?")]]


def test_thinking_is_the_templates_business(tmp_path, monkeypatch):
    engine = install(monkeypatch, f"ok{END}")
    assert chat(monkeypatch, write_folder(tmp_path / "tiny"), "a", "--no-thinking") == 0
    assert asked(engine)[0].endswith(OPEN + "<think>\n\n</think>\n\n")


def test_a_failing_turn_is_reported_and_the_conversation_goes_on(tmp_path, monkeypatch, capsys):
    """Too long, no UTF-8: the turn counts as not said."""
    engine = install(monkeypatch, f"one{END}", f"two{END}")
    lines = b"a\n" + b"xyz " * 60 + b"\n\xe4\xbd\nb\n"
    assert chat(monkeypatch, write_folder(tmp_path / "tiny"), lines, "--max-length", "90") == 0
    out, err = capsys.readouterr()
    assert out == "one\ntwo\n"
    assert "tokens: no room." in err and "not valid UTF-8" in err
    assert asked(engine)[1] == turn("user", "a") + turn("assistant", "one") + turn("user", "b") + OPEN


def test_a_template_that_refuses_is_reported(tmp_path, monkeypatch, capsys):
    engine = install(monkeypatch, f"one{END}")
    monkeypatch.setattr(
        "tests.cli.fake_engine.TEMPLATES", {"picky": "{{ messages[0].content or raise_exception('no') }}"}
    )
    folder = write_folder(tmp_path / "tiny", "picky")
    assert chat(monkeypatch, folder, "a\n/system b\nc", "--system", "") == 0
    assert capsys.readouterr() == ("one\n", "the chat template refuses the messages: no\n")
    assert asked(engine) == ["b"]


def test_interrupt_stops_the_answer_and_not_the_program(tmp_path, monkeypatch, capsys):
    chunks = []

    def interrupt() -> None:
        chunks.append(1)
        if len(chunks) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    engine = install(monkeypatch, "the lazy dog. " * 9, f"ok{END}", size=1, on_chunk=interrupt)
    assert chat(monkeypatch, write_folder(tmp_path / "tiny"), "a\nb") == 0
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert "the lazy".startswith(first.rstrip()) and second == "ok"
    assert err == "stopped after 3 tokens\n"
    # What came of the answer was said.
    assert asked(engine)[1] == turn("user", "a") + turn("assistant", first) + turn("user", "b") + OPEN
    assert signal.getsignal(signal.SIGINT) is before


def test_second_interrupt_ends_the_program(tmp_path, monkeypatch):
    def interrupt() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    install(monkeypatch, "the lazy dog", on_chunk=interrupt)
    assert chat(monkeypatch, write_folder(tmp_path / "tiny"), "a\nb") == 130


def test_answer_cut_short_says_so(tmp_path, monkeypatch, capsys):
    install(monkeypatch, "the lazy dog jumps")
    assert chat(monkeypatch, write_folder(tmp_path / "tiny"), "a", "--max-new-tokens", "3") == 0
    assert capsys.readouterr().err == "stopped after 3 tokens\n"


def test_a_full_conversation_names_reset_and_goes_on_after_it(tmp_path, monkeypatch, capsys):
    engine = install(monkeypatch, f"one{END}", f"two{END}")
    lines = "a\n" + "xyz " * 60 + "\n/reset\nb"
    assert chat(monkeypatch, write_folder(tmp_path / "tiny"), lines, "--max-length", "90") == 0
    out, err = capsys.readouterr()
    assert out == "one\ntwo\n"
    assert "no room. /reset begins a new conversation; --max-length N, at the start, allows for a longer one." in err
    assert asked(engine)[1] == turn("user", "b") + OPEN


def test_an_answer_that_fills_the_conversation_names_reset(tmp_path, monkeypatch, capsys):
    install(monkeypatch, "the lazy dog jumps")
    folder = write_folder(tmp_path / "tiny", max_length=12)
    assert chat(monkeypatch, folder, "a") == 0
    assert "tokens: /reset begins a new conversation" in capsys.readouterr().err


def test_stop_string_ends_the_answer(tmp_path, monkeypatch, capsys):
    engine = install(monkeypatch, "the lazy dog. user: more", f"ok{END}")
    assert chat(monkeypatch, write_folder(tmp_path / "tiny"), "a\nb", "--stop", " user:") == 0
    assert capsys.readouterr() == ("the lazy dog.\nok\n", "")
    assert turn("assistant", "the lazy dog.") in asked(engine)[1]


@pytest.mark.parametrize("words, message", [(["--max-length", "0"], "--max-length 0"), ([], "found no chat template")])
def test_what_cannot_be_is_refused_before_weights_are_read(tmp_path, monkeypatch, capsys, words, message):
    install(monkeypatch)
    monkeypatch.setattr("qwen_moe_jax.cli.chat.load_model", lambda arguments: pytest.fail("loaded"))
    folder = write_folder(tmp_path / "tiny")
    (folder / "tokenizer_config.json").unlink()
    assert chat(monkeypatch, folder, "a", *words) == 2
    assert message in capsys.readouterr().err
