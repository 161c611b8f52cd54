"""Whole runs with low-rank adapters: what they keep, where they go on, what they hand out."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint.experimental import v1 as ocp

import qwen_moe_jax as qmj
from tests.distance import assert_near
from tests.subject import hub_arrays
from tests.train.test_program import assembled
from tests.train.test_run import CONFIG, metrics, start
from train.config import build_config
from train.parameters import paths

pytestmark = pytest.mark.usefixtures("programs_compiled_once")

ROOT = Path(__file__).parents[2]

BASE = CONFIG.replace("data = 2\nexpert = 2", "expert = 2") + 'nonfinite = "stop"\n'
MODEL, REST = BASE.split("[mesh]")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(the config of a run with adapters, the folder it begins with, its own folder)."""
    qmj.make_mesh(expert=8)  # before a run starts fewer devices than others here need
    place = tmp_path_factory.mktemp("lora")
    (place / "base.toml").write_text(BASE)
    code, _, complaint = start(place / "base.toml", place / "base", "--run.max_steps=2", "--optimizer.warmup_steps=1")
    assert code == 0, complaint
    base, config = place / "base" / "hub", place / "lora.toml"
    lora = '[lora]\nr = 2\nlora_alpha = 4\ntarget_modules = ["q_proj", "experts"]\n'
    config.write_text("[mesh]" + REST.replace("[run]", f'{lora}\n[run]\nmodel_name_or_path = "{base}"'))
    code, output, complaint = start(config, place / "run")
    assert code == 0, complaint
    return config, base, place / "run", output


def test_a_run_trains_adapters_alone_and_says_how_many(runs):
    _, _, folder, output = runs
    heldout = [record["heldout_loss"] for record in metrics(folder) if "heldout_loss" in record]
    assert heldout[-1] < heldout[0]
    [start_of] = [record["start"] for record in metrics(folder) if "start" in record]
    per_layer = 2 * (32 + 32) + 4 * 3 * 2 * (32 + 16)  # q_proj, and three matrices of four experts
    assert start_of["trained_parameters"] == 2 * per_layer
    assert f"active per token, {2 * per_layer:,} trained; " in output
    assert start_of["gradient_bytes"] < start_of["weight_bytes"] / 4


def test_its_checkpoints_hold_no_weights(runs):
    _, _, folder, _ = runs
    with ocp.training.Checkpointer(folder / "checkpoints") as checkpoints:
        names = checkpoints.metadata(12).metadata
    kept = {name for name in names if name.startswith("params.")}
    assert kept and all(name.endswith(("lora_A", "lora_B")) for name in kept)
    moments = {name for name in names if ".mu." in name or ".nu." in name}
    assert len(moments) == 2 * len(kept)


def test_the_adapter_on_its_base_is_the_exported_model_whose_other_weights_are_the_bases(runs):
    _, base, folder, _ = runs
    tokens = np.arange(24).reshape(2, 12)
    unmerged = qmj.from_pretrained(base, adapter=folder / "adapter")
    merged = qmj.from_pretrained(folder / "hub")
    assert_near(merged(tokens).logits, unmerged(tokens).logits, 1e-5, "logits")
    before = dict(hub_arrays(qmj.from_pretrained(base)))
    for name, tensor in hub_arrays(merged):
        same = bool((tensor == before[name]).all())
        assert same != (".q_proj." in name or ".experts." in name), name


def test_a_stopped_run_goes_on_to_bit_equal_adapters(runs, tmp_path):
    config, _, whole, _ = runs
    folder = tmp_path / "stopped"
    shutil.copytree(whole, folder)  # as it was just before step 12 was saved:
    shutil.rmtree(folder / "checkpoints" / "12")
    shutil.rmtree(folder / "hub")
    shutil.rmtree(folder / "adapter")
    (folder / "result.json").unlink()
    code, output, complaint = start(config, folder, "--run.export=false")
    assert code == 0, complaint
    assert "going on from the checkpoint of step 8" in output
    file = "adapter/adapter_model.safetensors"
    assert (folder / file).read_bytes() == (whole / file).read_bytes()
    assert not (folder / "hub").exists()


def test_a_program_describes_float32_adapters_with_fixed_weights_of_another_dtype():
    program = assembled(
        lora={"r": 2, "target_modules": ["experts"]}, execution={"dtype": "bfloat16", "param_dtype": "bfloat16"}
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(program.state.params)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(program.fixed)} == {"bfloat16"}
    assert all(path.endswith(("lora_A", "lora_B")) for path in paths(program.state.params))
    for leaf in jax.tree.leaves(program.state.params):
        assert leaf.sharding.spec[:2] == (None, "expert"), "adapters of experts lie with their experts"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"r": -1}}, "lora.r: found -1"),
        (
            {"lora": {"r": 2}, "optimizer": {"frozen": ["gate"]}},
            "optimizer.frozen: found .*expected none with a .lora. table",
        ),
        ({"lora": {"r": 2, "target_modules": ["expert"]}}, "found 'expert'.*did you mean 'experts'"),
    ],
    ids=["rank", "frozen", "target"],
)
def test_what_adapters_cannot_be_is_refused(sections, message):
    with pytest.raises(qmj.ConfigError, match=message):
        assembled(**sections)


def test_the_table_of_adapters_reads_as_it_is_written():
    tables = {"model": {"model_type": "qwen3"}, "lora": {"r": 8, "target_modules": ["q_proj", "experts"]}}
    settings = build_config(tables, ["--lora.lora_alpha=16"], source="a test").lora
    assert (settings.r, settings.lora_alpha, settings.target_modules) == (8, 16.0, ("q_proj", "experts"))


def test_a_run_trains_adapters_over_int4_and_exports_them_over_the_floats(runs, tmp_path):
    """QLoRA: `hub/` is the base in float32 with the adapter added, not the rounded weights."""
    config, base, _, _ = runs
    settings = "--execution.weights=int4", "--execution.weights_group_size=16", "--run.max_steps=2"
    code, output, complaint = start(config, tmp_path / "run", *settings)
    assert code == 0, complaint
    assert "; weights int4\n" in output
    [start_of] = [record["start"] for record in metrics(tmp_path / "run") if "start" in record]
    assert start_of["trained_parameters"] == 2 * (2 * (32 + 32) + 4 * 3 * 2 * (32 + 16))
    merged = qmj.from_pretrained(base, adapter=tmp_path / "run" / "adapter")
    qmj.merge_lora(merged)
    exported = dict(hub_arrays(qmj.from_pretrained(tmp_path / "run" / "hub")))
    for name, array in hub_arrays(merged):
        assert_near(exported[name], array, 1e-6, name)


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"execution": {"weights": "int4"}}, "execution.weights.*without a .lora. table"),
        ({"execution": {"weights": "int3"}}, "execution.weights.*int8"),
    ],
)
def test_integers_without_adapters_are_refused(tables, expected):
    with pytest.raises(qmj.ConfigError, match=expected):
        build_config({"model": {"model_type": "qwen3"}} | tables, [], source="a test")
