"""The two command lines with `--search` and `--html`: what they hand out, and what they refuse before compiling."""

import json
from pathlib import Path

import pytest

from qwen_moe_jax.cli.main import main as command
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.plan.output import show_plan, show_search
from qwen_moe_jax.plan.page import plan_page
from qwen_moe_jax.plan.search import search_meshes
from tests.plan import test_search
from tests.plan.samples import plan
from train.main import main as train
from train.plan import paste


def found():
    return search_meshes(
        test_search.target(2), test_search.CHIP.networks, test_search.describe, lambda mesh, _: plan(mesh=mesh)
    )


def test_a_plan_is_printed_and_written(tmp_path, capsys):
    files = {"json_to": str(tmp_path / "plan.json"), "html_to": str(tmp_path / "plan.html")}
    show_plan(plan, "tpu:v5p:4x8x8", **files)
    assert "It fits" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["model"]["name"] == plan().model.name
    assert (tmp_path / "plan.html").read_text(encoding="utf-8") == plan_page(plan())


def test_a_search_shows_the_best_plan_after_the_ranking(tmp_path, capsys):
    search = found()
    show_search(lambda: search, "tpu:v5p:4x8x8", paste, json_to=None, html_to=str(tmp_path / "plan.html"))
    out = capsys.readouterr().out
    assert out.index("Best: --mesh.data") < out.index("It fits")
    assert (tmp_path / "plan.html").read_text(encoding="utf-8") == plan_page(search.best.plan)


def test_standard_output_is_json_alone_where_it_is_asked_for(capsys):
    show_search(found, "tpu:v5p:4x8x8", paste, json_to="-", html_to=None)
    captured = capsys.readouterr()
    assert json.loads(captured.out)["mesh"] and "Best: " in captured.err


def test_a_folder_that_is_not_there_is_said_before_anything_is_compiled(tmp_path):
    with pytest.raises(ConfigError, match="no folder"):
        show_plan(lambda: pytest.fail("compiled"), "cpu:1", json_to=None, html_to=str(tmp_path / "no" / "plan.html"))


def test_a_plan_replaces_a_plan_and_no_other_file(tmp_path):
    files = {"json_to": str(tmp_path / "plan.json"), "html_to": str(tmp_path / "plan.html")}
    for _ in range(2):
        show_plan(plan, "tpu:v5p:4x8x8", **files)
    for name, file in files.items():
        Path(file).write_text('{"model_type": "qwen3"}')
        with pytest.raises(ConfigError, match=f"{file} exists and was not written by this command"):
            show_plan(lambda: pytest.fail("compiled"), "cpu:1", **{"json_to": None, "html_to": None, name: file})


def test_more_tokens_than_the_model_has_positions_are_remarked_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qwen_moe_jax.plan.output.show_plan", lambda make, target, **files: None)  # nothing is compiled
    words = ["plan", "configs/models/qwen3-0.6b.json", "--target", "cpu:1"]
    assert command([*words, "--context", "40960"]) == 0 and capsys.readouterr().err == ""
    assert command([*words, "--context", "40961"]) == 0
    assert (
        "40,961 tokens a row are more than the 40,960 positions that the model was trained" in capsys.readouterr().err
    )


def test_the_words_for_a_mesh_are_read_back():
    from qwen_moe_jax.cli.arguments import mesh_sizes
    from qwen_moe_jax.cli.plan import _paste
    from train.config import load_config, split_overrides

    sizes = {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}
    assert mesh_sizes(_paste(sizes, {})[0].removeprefix("--mesh ")) == {"fsdp": 2, "expert": 4}
    overrides, others = split_overrides(paste(sizes, {})[0].split())
    config = load_config("configs/train/tiny.toml", overrides)
    assert {axis: getattr(config.mesh, axis) for axis in sizes} == sizes and not others


@pytest.mark.parametrize("words", [["--search"], ["--html", "plan.html"]])
def test_what_belongs_to_a_plan_is_refused_without_one(words, capsys):
    assert train(["configs/train/tiny.toml", *words]) == 2
    assert f"{words[0]} has a meaning with --plan only" in capsys.readouterr().err


def test_a_search_takes_no_mesh(capsys):
    words = ["plan", "configs/models/qwen3-0.6b.json", "--target", "cpu:1", "--mesh", "data=1", "--search"]
    assert command(words) == 2
    assert "found both" in capsys.readouterr().err


def test_a_run_s_step_is_searched_with_the_compiler(tmp_path, capsys):
    """One device, one mesh, one compilation of a model of one layer."""
    config = tmp_path / "small.toml"
    config.write_text(
        """
        [model]
        model_type = "qwen3"
        hidden_size = 16
        intermediate_size = 16
        num_hidden_layers = 1
        num_attention_heads = 2
        num_key_value_heads = 2
        head_dim = 8
        [data]
        vocab_size = 512
        batch_size = 2
        seq_len = 16
        """,
        encoding="utf-8",
    )
    page = tmp_path / "plan.html"
    fixed = ["--execution.remat", "none", "--run.gradient_accumulation_steps", "1"]
    words = [str(config), "--plan", "cpu:1", "--search", "--html", str(page), *fixed]
    assert train(words) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    assert "Best: --mesh.data 1 --mesh.fsdp 1 --mesh.expert 1 --mesh.context 1 --mesh.tensor 1" in captured.out
    assert "compiling 1 of 1: one device" in captured.err
    assert "simulated CPU" in page.read_text(encoding="utf-8")
