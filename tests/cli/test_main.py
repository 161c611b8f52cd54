"""The command line: help without JAX, refusals as one message."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_moe_jax.cli.arguments import MESH_AXES, format_ranges, mesh_sizes, number_ranges
from qwen_moe_jax.cli.main import COMMANDS, main
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.sharding.mesh import AXES


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_answers_without_jax(words):
    """JAX takes a second to import: help should not wait for it."""
    program = (
        "import sys; from qwen_moe_jax.cli.main import main\n"
        f"try: main({words})\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(sorted({'jax', 'flax', 'numpy', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: {' '.join(['qwen-moe-jax', *words[:-1]])}")
    assert done.stdout.endswith("[]\n")


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "qwen_moe_jax", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("qwen_moe_jax ")


def test_refusal_of_the_package_is_one_message(monkeypatch, capsys, tmp_path):
    def refuse(_):
        raise ConfigError("found this, expected that.")

    monkeypatch.setattr(COMMANDS["route"], "run", refuse)
    assert main(["route", str(tmp_path), "--prompt", "x"]) == 2
    assert capsys.readouterr() == ("", "qwen-moe-jax route: error: found this, expected that.\n")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--layers", "3-1"], "argument --layers: found '3-1' in '3-1', expected numbers from 0 and rising ranges"),
        (["--layers", "0,,2"], "argument --layers: found '' in '0,,2'"),
        (["--layers", "-1"], "argument --layers"),
        (["--mesh", "expert=2,pipeline=2"], "found 'pipeline=2' in 'expert=2,pipeline=2', expected AXIS=SIZE"),
        (["--mesh", "expert=0"], "found 'expert=0'"),
        (["--mesh", "expert"], "found 'expert'"),
        (["--mesh", "data=2,data=2"], "each axis once"),
        (["--dispatch", "nearest"], "invalid choice: 'nearest'"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_found_and_expected(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        main(["route", str(tmp_path), "--prompt", "x", *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers_an_unknown_option_with_the_nearest_one(capsys, command):
    """Before anything else: its value would be taken for the folder, and the message would be about that."""
    option = next(word for word in ("--mesh", "--dtype", "--json", "--help") if word in _options_of(command))
    with pytest.raises(SystemExit) as end:
        main([command, f"{option}x", "hello"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert f"error: unknown option {option}x; did you mean '{option}'? qwen-moe-jax {command} --help lists" in error


def _options_of(command):
    parser = argparse.ArgumentParser()
    COMMANDS[command].add_arguments(parser)
    return parser.format_help()


def test_an_unknown_command_or_choice_is_answered_with_the_nearest_one(capsys, tmp_path):
    route = ["route", str(tmp_path), "--prompt", "x"]
    for words, nearest in [(["genrate"], "generate"), ([*route, "--dispatch", "dens"], "dense")]:
        with pytest.raises(SystemExit):
            main(words)
        error = capsys.readouterr().err
        assert f"invalid choice: {words[-1]!r}" in error and error.endswith(f"; did you mean {nearest!r}?\n")


def test_a_word_too_many_is_refused_by_the_command_that_it_was_given_to(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate", str(tmp_path), "hello"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "error: found 'hello' too many; expected FOLDER and options." in error
    assert error.startswith("usage: qwen-moe-jax generate ")


def test_options_after_the_folder_of_eval_are_lm_eval_s(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(COMMANDS["eval"], "run", lambda arguments: seen.append(arguments.words))
    assert main(["eval", str(tmp_path), "--tasks", "arc_easy", "--limt", "3"]) == 0
    assert seen == [["--tasks", "arc_easy", "--limt", "3"]]


def test_values_that_look_like_options_are_still_values(capsys, tmp_path):
    """A sentence that begins with a dash, a negative number, and all after `--`, as argparse takes them."""
    seen = []
    for words in (["--prompt", "- a list"], ["--prompt", "-1"], ["--prompt=--x"]):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(COMMANDS["route"], "run", lambda arguments: seen.append(arguments.prompt))
            assert main(["route", str(tmp_path), *words]) == 0
    assert seen == ["- a list", "-1", "--x"]


def test_folder_that_is_none(capsys):
    with pytest.raises(SystemExit):
        main(["route", "here/or/there", "--prompt", "x"])
    assert "here/or/there: no such folder, and no name on the Hub (owner/model) either" in capsys.readouterr().err


def test_mesh_axes_are_those_of_the_mesh():
    assert MESH_AXES == AXES
    assert mesh_sizes("expert=8, data=2") == {"expert": 8, "data": 2}


@pytest.mark.parametrize(
    "text, numbers, back",
    [("0", (0,), "0"), ("0,3-5", (0, 3, 4, 5), "0,3-5"), ("5,3-4,4, 0-1", (0, 1, 3, 4, 5), "0-1,3-5")],
)
def test_ranges_are_read_and_written(text, numbers, back):
    assert number_ranges(text) == numbers
    assert format_ranges(numbers) == back


def test_other_signs_than_digits_are_no_number():
    with pytest.raises(argparse.ArgumentTypeError):
        number_ranges("²")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux that is always full")
def test_output_to_a_full_disk_ends_with_one_line():
    command = [sys.executable, "-m", "qwen_moe_jax", "inspect", "examples/tiny_model.json"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 74
    assert re.fullmatch(r"qwen-moe-jax inspect: error: cannot write: No space left on device.*\.\n", result.stderr)
