"""What a model writes reaches a pipe as it is, and a terminal without power over it."""

import sys

import pytest

from qwen_moe_jax.cli.terminal import show

TEXT = "naïve 你\t\n\x1b[31m\x07\r\x9b"


@pytest.mark.parametrize("terminal, shown", [(False, TEXT), (True, "naïve 你\t\n‹U+001B›[31m‹U+0007›‹U+000D›‹U+009B›")])
def test_controls_are_shown_on_terminals_alone(monkeypatch, capsys, terminal, shown):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    show(TEXT)
    assert capsys.readouterr().out == shown
