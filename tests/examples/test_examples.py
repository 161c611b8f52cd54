"""Every example runs on a laptop, needs no network, is short, and prints what it promises."""

import importlib.util
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
#: A pattern that the output of each script has.
PRINTED = {
    "brackets": r"wrote 4,000 records to runs/brackets/texts.jsonl\nwrote 1,000 records to",
    "generate": r"\(the same\)",
    "train_with_optax": r"step  60  loss [0-2]\.",
    "fine_tune_lora": r"step 60  loss 0\.\d+\n.*\n.*\nmerged, the model continues the same way",
    "look_at_routing": r"factor 2\.0: \d+ of 68 assignments",
    "own_dispatcher": r"dropless: .* by \d\.\de-0[5-8]\n *strongest: .* by \d\.\de\+00",
    "own_moe_block": r"step 100  loss 0\.[0-3]",
    "shard_and_plan": r"differ by \d\.\de-0[5-8] at most",
}


def load(name):
    spec = importlib.util.spec_from_file_location(f"examples.{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_runs_and_prints_what_it_promises(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load(name).main()
    printed = capsys.readouterr().out
    assert re.search(PRINTED[name], printed), printed


def test_every_script_is_short_and_run_here():
    scripts = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == {*PRINTED, "make_notebook"}
    for path in scripts.values():
        assert len(path.read_text(encoding="utf-8").splitlines()) < 80, path.name


def test_the_notebook_is_made_from_its_script():
    nbformat = pytest.importorskip("nbformat")
    make = load("make_notebook")
    kept = nbformat.read(make.NOTEBOOK, as_version=4)
    made = make.notebook_of(make.SCRIPT.read_text(encoding="utf-8"), run=False)
    assert [cell.source for cell in kept.cells] == [cell.source for cell in made.cells]
