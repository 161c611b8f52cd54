"""A config is short, typed, overridable, and refuses with a message that helps."""

import dataclasses
import subprocess
import sys

import pytest

from qwen_moe_jax.errors import ConfigError
from train.config import SECTIONS, SourceConfig, build_config, differences, load_config, split_overrides, to_toml

TABLES = {"model": {"model_type": "qwen3_moe", "hidden_size": 64, "rope_theta": 1e4, "norm_topk_prob": True}}


def build(tables=None, *overrides):
    return build_config({**TABLES, **(tables or {})}, list(overrides), source="some.toml")


@pytest.mark.parametrize(
    ("tables", "parts"),
    [
        ({"optimiser": {}}, ["some.toml", "[optimiser]", "did you mean 'optimizer'"]),
        ({"optimizer": {"learing_rate": 1.0}}, ["optimizer.learing_rate", "did you mean 'learning_rate'"]),
        ({"run": {"steps": "many"}}, ["some.toml: run.steps", "'many' (string)", "expected integer"]),
        ({"run": {"steps": 2.5}}, ["run.steps", "2.5", "expected integer"]),
        ({"run": {"steps": True}}, ["run.steps", "True (true or false)", "expected integer"]),
        ({"mesh": {"simulated": 1}}, ["mesh.simulated", "expected true or false"]),
        ({"run": 3}, ["run should be a section"]),
        ({"model": {}}, ["neither a [model] table nor run.init_from"]),
        ({"run": {"init_from": "hub"}}, ["both a [model] table and run.init_from"]),
        ({"model": {"vocab_size": 5}}, ["model.vocab_size", "data.vocab_size is 4096"]),
        ({"run": {"steps": 10}, "optimizer": {"warmup_steps": 10}}, ["optimizer.warmup_steps", "run.steps (10)"]),
        ({"data": {"batch_size": 12}, "mesh": {"data": 2, "expert": 4}}, ["data.batch_size", "multiple of 8"]),
        ({"mesh": {"data": 0}}, ["mesh.data", "at least 1"]),
        ({"data": {"vocab_size": 100}}, ["data.vocab_size", "at least 259"]),
        ({"data": {"format": "json"}}, ["some.toml: data.format: found 'json'", "did you mean 'jsonl'"]),
        ({"data": {"format": "jsonl"}}, ["data.folder: found none", "read as jsonl"]),
        ({"data": {"format": "tokens", "folder": "x"}}, ["data.format", "name it in data.tokenizer"]),
        ({"data": {"sources": 3}}, ["some.toml: data.sources: found 3 (integer), expected tables", "[[data.sources]]"]),
        ({"data": {"sources": [{}, {"wait": 1}]}}, ["data.sources, number 2: unknown key 'wait'", "mean 'weight'"]),
        ({"data": {"sources": [{"weight": "2"}]}}, ["data.sources, number 1: weight: found '2'", "expected number"]),
        ({"data": {"sources": [{"weight": 0}]}}, ["data.sources, number 1: weight: found 0.0", "above 0"]),
        ({"data": {"sources": [{"format": "txt"}]}}, ["number 1: format: found 'txt'", "did you mean 'text'"]),
        (
            {"data": {"sources": [{}], "folder": "x"}},
            ["data.folder: found together with data.sources", "one of the two"],
        ),
        ({"execution": {"capacity_facter": 1.0}}, ["execution.capacity_facter", "did you mean 'capacity_factor'"]),
        ({"execution": {"group_size": "128"}}, ["execution.group_size", "'128' (string)", "expected integer"]),
        ({"loss": {"balance": "global"}}, ["loss.balance", "'global'", "did you mean 'global_batch'", "sequence"]),
        ({"loss": {"balance_coef": "some"}}, ["loss.balance_coef", "'some' (string)", "expected number"]),
        ({"loss": {"router_z_coef": -1.0}}, ["loss.router_z_coef", "-1.0", "0 or more"]),
        ({"loss": {"z_coef": -1.0}}, ["loss.z_coef", "-1.0", "0 or more"]),
        ({"optimizer": {"schedule": "cosin"}}, ["optimizer.schedule", "'cosin'", "did you mean 'cosine'", "wsd"]),
        ({"optimizer": {"schedule": "wsd"}}, ["optimizer.decay_steps", "found None", "which needs it"]),
        ({"optimizer": {"decay_steps": 10}}, ["optimizer.decay_steps", "found 10", "'cosine'"]),
        ({"optimizer": {"schedule": "wsd", "decay_steps": 470}}, ["optimizer.decay_steps", "470", "(460)"]),
        ({"optimizer": {"moment_dtype": "float16"}}, ["optimizer.moment_dtype", "did you mean 'bfloat16'"]),
        ({"optimizer": {"frozen": "gate"}}, ["optimizer.frozen", "'gate' (string)", "expected list of strings"]),
        ({"optimizer": {"frozen": [1]}}, ["optimizer.frozen", "expected list of strings"]),
        ({"run": {"accumulation_steps": 0}}, ["run.accumulation_steps", "at least 1"]),
        ({"run": {"accumulation_steps": 3}}, ["run.accumulation_steps", "found 3", "a divisor of 16"]),
        ({"run": {"nonfinite": "stopp"}}, ["run.nonfinite", "did you mean 'stop'"]),
        ({"run": {"max_skipped": -1}}, ["run.max_skipped", "-1", "0 or more"]),
        ({"loss": {"balancing_bias_rate": 0.001}}, ["loss.balancing_bias_rate", "0.001", "Set run.export to false"]),
    ],
)
def test_a_wrong_config_is_refused_by_naming_the_key_what_was_found_and_what_was_expected(tables, parts):
    with pytest.raises(ConfigError) as refusal:
        build(tables)
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("--run.stepz=3", ["--run.stepz", "did you mean 'steps'"]),
        ("--runn.steps=3", ["--runn.steps", "did you mean 'run'"]),
        ("--run.steps=three", ["--run.steps", "'three'", "expected integer"]),
        ("--model.hiden_size=3", ["--model.hiden_size", "did you mean 'hidden_size'"]),
        ("--model.hidden_size=3.5", ["--model.hidden_size", "3.5", "expected integer", "64"]),
    ],
)
def test_a_wrong_override_is_refused_by_naming_the_option(override, parts):
    with pytest.raises(ConfigError) as refusal:
        build({}, override)
    for part in parts:
        assert part in str(refusal.value)


def test_overrides_have_the_type_of_their_key():
    config = build(
        {"run": {"steps": 500}},
        "--run.steps=70",
        "--optimizer.learning_rate=1",
        "--optimizer.weight_decay=1e-2",
        "--mesh.simulated=true",
        "--run.folder=42",
        "--run.sample_prompt=a = b",
        "--model.rope_theta=500000",
        "--model.norm_topk_prob=false",
    )
    assert config.run.steps == 70
    assert config.optimizer.learning_rate == 1.0 and type(config.optimizer.learning_rate) is float
    assert config.optimizer.weight_decay == 0.01
    assert config.mesh.simulated is True
    assert config.run.folder == "42"
    assert config.run.sample_prompt == "a = b"
    assert config.model["rope_theta"] == 500000.0 and type(config.model["rope_theta"]) is float
    assert config.model["norm_topk_prob"] is False


def test_overrides_may_stand_anywhere_on_the_command_line():
    words = ["--run.steps", "-5", "a.toml", "--mesh.expert=4", "--fresh", "--run.sample_prompt", "--x"]
    overrides, others = split_overrides(words)
    assert overrides == ["--run.steps=-5", "--mesh.expert=4", "--run.sample_prompt=--x"]
    assert others == ["a.toml", "--fresh"]
    with pytest.raises(ConfigError, match="--run.steps: a value should follow"):
        split_overrides(["a.toml", "--run.steps"])


def test_a_resolved_config_reads_back_equal(tmp_path):
    model = {**TABLES["model"], "rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "mlp_only_layers": [0, 2]}
    config = build({"model": model, "run": {"sample_prompt": 'say "é"\n\t\\ \x00'}})
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load_config(file) == config


def test_a_mixture_is_written_as_tables_or_on_the_command_line_and_reads_back_equal(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(
        '[model]\nmodel_type = "qwen3_moe"\n[data]\ntokenizer = "some/model"\nmegabytes = inf\n'
        '[[data.sources]]\nfolder = "books"\npattern = "*.txt"\nweight = 3\n'
        '[[data.sources]]\nfolder = "chats.jsonl"\nformat = "jsonl"\n'
    )
    config = load_config(file)
    books = SourceConfig(folder="books", pattern="*.txt", weight=3.0)
    assert config.data.mixture == (books, SourceConfig(folder="chats.jsonl", format="jsonl"))
    file.write_text(to_toml(config), encoding="utf-8")
    assert load_config(file) == config
    overridden = build({}, '--data.sources=[{folder = "books", pattern = "*.txt", weight = 3}]')
    assert overridden.data.mixture == (books,)


def test_one_source_needs_no_tables():
    [source] = build({"data": {"folder": "a.jsonl", "format": "jsonl"}}).data.mixture
    assert source == SourceConfig(folder="a.jsonl", format="jsonl")


def test_a_named_tokenizer_lets_the_model_have_a_larger_vocabulary():
    config = build({"model": {**TABLES["model"], "vocab_size": 151936}, "data": {"tokenizer": "some/model"}})
    assert config.model["vocab_size"] == 151936


def test_keys_that_are_left_out_stay_so_and_can_be_given_in_every_way(tmp_path):
    config = build({"execution": {"router_dtype": "float32"}}, "--execution.group_size=64", "--loss.balance_coef=1")
    assert (config.execution.router_dtype, config.execution.group_size, config.loss.balance_coef) == (
        "float32",
        64,
        1.0,
    )
    assert config.execution.exchange is None and build().loss.balance_coef is None
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert "exchange" not in file.read_text() and load_config(file) == config


def test_a_list_of_strings_can_be_given_in_every_way_and_reads_back(tmp_path):
    assert build({"optimizer": {"frozen": ["gate", "norm"]}}).optimizer.frozen == ("gate", "norm")
    config = build({}, r"""--optimizer.frozen=['layers\.\d+\.mlp', "embed"]""")
    assert config.optimizer.frozen == (r"layers\.\d+\.mlp", "embed")
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load_config(file) == config


def test_room_without_end_is_written_as_inf(tmp_path):
    config = build({"execution": {"dispatch": "dropless"}}, "--execution.buffer_factor=inf")
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load_config(file).execution.buffer_factor == float("inf")


def test_differences_name_the_keys_that_changed():
    old, new = build(), build({}, "--optimizer.beta1=0.8", "--model.hidden_size=32", "--mesh.data=4")
    assert differences(old, new, ("model", "optimizer")) == ["model.hidden_size: 64 → 32", "optimizer.beta1: 0.9 → 0.8"]


def test_a_missing_or_broken_file_is_refused_by_name(tmp_path):
    (tmp_path / "tiny.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match="no such file.*tiny.toml"):
        load_config(tmp_path / "tny.toml")
    with pytest.raises(ConfigError, match="tiny.toml: this is no TOML"):
        load_config(tmp_path / "tiny.toml")


def test_every_key_has_a_meaning_to_show():
    for section in SECTIONS.values():
        assert all(field.metadata["meaning"] for field in dataclasses.fields(section))


def test_help_answers_without_importing_anything_heavy():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['train', '--help']\n"
        "try:\n    runpy.run_module('train', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'numpy', 'tokenizers', 'rich', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--optimizer.learning_rate NUMBER" in result.stdout


def test_a_refusal_is_one_message_and_exit_code_2():
    command = [sys.executable, "-m", "train", "configs/train/tiny.toml", "--run.stepz", "3"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "did you mean 'steps'" in result.stderr
    assert "Traceback" not in result.stderr
