"""A config is short, typed, overridable, and refuses with a message that helps."""

import dataclasses
import datetime
import errno
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_moe_jax.config import SHARDING_RULES, ExecutionConfig, LoraConfig, ShardingRules
from qwen_moe_jax.config.docs import field_docs
from qwen_moe_jax.errors import ConfigError
from train.config import (
    SECTIONS,
    TRAINER_DEFAULTS,
    SourceConfig,
    build_config,
    describe_keys,
    differences,
    load_config,
    split_overrides,
    to_toml,
)
from train.config.renamed import API_ONLY, RENAMED
from train.main import main

TABLES = {"model": {"model_type": "qwen3_moe", "hidden_size": 64, "rope_theta": 1e4, "norm_topk_prob": True}}


def build(tables=None, *overrides):
    return build_config({**TABLES, **(tables or {})}, list(overrides), source="some.toml")


@pytest.mark.parametrize(
    ("tables", "parts"),
    [
        ({"optimiser": {}}, ["some.toml: optimiser: unknown section", "did you mean 'optimizer'"]),
        ({"optimizer": {"learing_rate": 1.0}}, ["optimizer.learing_rate: unknown key", "did you mean 'learning_rate'"]),
        ({"run": {"max_steps": "many"}}, ["some.toml: run.max_steps: found 'many' (text), expected an integer."]),
        ({"run": {"max_steps": 2.5}}, ["run.max_steps", "2.5 (number)", "expected an integer"]),
        ({"run": {"max_steps": True}}, ["run.max_steps", "True (true or false)", "expected an integer"]),
        ({"mesh": {"simulated": 1}}, ["mesh.simulated", "expected true or false"]),
        ({"run": 3}, ["run: found 3 (integer), expected a section, [run]"]),
        ({"lora": []}, ["lora: found [] (list), expected a section, [lora]"]),
        ({"model": 3}, ["model: found 3 (integer), expected a section, [model]"]),
        ({"model": {}}, ["neither a [model] table nor run.model_name_or_path"]),
        ({"run": {"model_name_or_path": "hub"}}, ["both a [model] table and run.model_name_or_path"]),
        ({"model": {"vocab_size": 5}}, ["model.vocab_size", "data.vocab_size is 4096"]),
        (
            {"run": {"max_steps": 10}, "optimizer": {"schedule": "wsd", "decay_steps": 10}},
            ["optimizer.decay_steps", "run.max_steps less the steps of the warm-up (9)"],
        ),
        ({"data": {"batch_size": 12}, "mesh": {"data": 2, "expert": 4}}, ["data.batch_size", "multiple of 8"]),
        ({"mesh": {"data": 0}}, ["mesh.data: found 0, expected a positive integer"]),
        ({"data": {"vocab_size": 100}}, ["data.vocab_size", "at least 259"]),
        ({"data": {"format": "json"}}, ["some.toml: data.format: found 'json'", "did you mean 'jsonl'"]),
        ({"data": {"format": "jsonl"}}, ["data.path: found ''", "read as jsonl"]),
        ({"data": {"format": "tokens", "path": "x"}}, ["data.format", "name it in data.tokenizer"]),
        (
            {"data": {"sources": 3}},
            ["some.toml: data.sources: found 3 (integer), expected a list of tables", "each headed [[data.sources]]"],
        ),
        ({"data": {"sources": [{}, {"wait": 1}]}}, ["data.sources[1].wait: unknown key", "mean 'weight'"]),
        ({"data": {"sources": [{"weight": "2"}]}}, ["data.sources[0].weight: found '2' (text), expected a number"]),
        ({"data": {"sources": [{"weight": 0}]}}, ["data.sources[0].weight: found 0.0", "above 0"]),
        ({"data": {"sources": [{"format": "txt"}]}}, ["data.sources[0].format: found 'txt'", "did you mean 'text'"]),
        (
            {"data": {"sources": [{}, {"format": "tokens", "path": "x"}]}},
            ["data.sources[1].format", "name it in data.tokenizer"],
        ),
        ({"data": {"sources": [{}], "path": "x"}}, ["data.path: found 'x'", "one of path and sources"]),
        ({"execution": {"capacity_facter": 1.0}}, ["execution.capacity_facter", "did you mean 'capacity_factor'"]),
        ({"execution": {"group_size": "128"}}, ["execution.group_size", "'128' (text)", "expected an integer"]),
        ({"execution": {"group_size": 0}}, ["execution.group_size: found 0, expected a positive integer"]),
        ({"execution": {"buffer_factor": math.inf}}, ["execution.buffer_factor: found inf", "a number of at least 1"]),
        ({"execution": {"dtype": "int8"}}, ["execution.dtype: found 'int8'", "'float32', 'bfloat16', 'float16'"]),
        ({"execution": {"dtype": "bfloat"}}, ["execution.dtype: found 'bfloat'", "'float32', 'bfloat16', 'float16'"]),
        ({"sharding": {"rules": "expert+fdsp"}}, ["sharding.rules: found 'expert+fdsp'", "mean 'expert+fsdp'", "fsdp"]),
        ({"sharding": {"rules": ["fsdp"]}}, ["sharding.rules: found ['fsdp'], expected one of expert+fsdp, fsdp"]),
        ({"sharding": {"embed": ["pipeline"]}}, ["sharding.embed[0]: found 'pipeline'", "data", "fsdp", "tensor"]),
        ({"loss": {"load_balancing_type": "global"}}, ["loss.load_balancing_type", "mean 'global_batch'", "sequence"]),
        ({"loss": {"router_aux_loss_coef": "some"}}, ["loss.router_aux_loss_coef", "'some' (text)", "a number"]),
        ({"loss": {"router_z_loss_coef": -1.0}}, ["loss.router_z_loss_coef", "-1.0", "0 or more"]),
        ({"loss": {"z_loss_coef": -1.0}}, ["loss.z_loss_coef", "-1.0", "0 or more"]),
        ({"optimizer": {"schedule": "cosin"}}, ["optimizer.schedule", "'cosin'", "did you mean 'cosine'", "wsd"]),
        ({"optimizer": {"schedule": "wsd"}}, ["optimizer.decay_steps", "found None", "with schedule wsd"]),
        ({"optimizer": {"decay_steps": 10}}, ["optimizer.decay_steps", "found 10", "cosine"]),
        ({"optimizer": {"schedule": "wsd", "decay_steps": 470}}, ["optimizer.decay_steps", "470", "(460)"]),
        ({"optimizer": {"mu_dtype": "float16"}}, ["optimizer.mu_dtype: found 'float16'", "float32 or bfloat16"]),
        ({"optimizer": {"learning_rate": math.inf}}, ["optimizer.learning_rate: found inf", "above 0"]),
        (
            {"optimizer": {"learning_rate": 1e-4, "final_learning_rate": 3e-4}},
            ["optimizer.final_learning_rate: found 0.0003", "from 0 to optimizer.learning_rate"],
        ),
        ({"optimizer": {"weight_decay": -0.1}}, ["optimizer.weight_decay: found -0.1", "0 or more"]),
        ({"optimizer": {"beta1": 9.5}}, ["optimizer.beta1: found 9.5", "at least 0 and less than 1"]),
        ({"optimizer": {"beta2": math.nan}}, ["optimizer.beta2: found nan", "at least 0 and less than 1"]),
        ({"loss": {"mtp_coef": math.inf}}, ["loss.mtp_coef: found inf", "0 or more"]),
        ({"run": {"seed": -1}}, ["run.seed: found -1", "from 0 to 2**32 - 1"]),
        ({"optimizer": {"frozen": "gate"}}, ["optimizer.frozen", "'gate' (text)", "expected a list of text"]),
        ({"optimizer": {"frozen": [1]}}, ["optimizer.frozen[0]: found 1 (integer), expected text"]),
        ({"run": {"gradient_accumulation_steps": 0}}, ["run.gradient_accumulation_steps", "positive integer"]),
        (
            {"run": {"gradient_accumulation_steps": 3}},
            ["run.gradient_accumulation_steps", "found 3", "a divisor of 16"],
        ),
        ({"run": {"nonfinite": "stopp"}}, ["run.nonfinite", "did you mean 'stop'?"]),
        ({"run": {"max_skipped": -1}}, ["run.max_skipped", "-1", "0 or more"]),
        ({"run": {"seed": datetime.date(2026, 1, 1)}}, ["run.seed: found '2026-01-01' (text), expected an integer"]),
        (
            {"loss": {"router_bias_update_rate": 0.001}},
            ["loss.router_bias_update_rate", "0.001", "Set run.export to false"],
        ),
        ({"lora": {"r": 0}}, ["lora.r: found 0, expected a positive integer", "without adapters"]),
        ({"lora": {"r": 2}, "optimizer": {"frozen": ["a"]}}, ["optimizer.frozen: found ('a',)", "with a [lora] table"]),
    ],
)
def test_a_wrong_config_is_refused_by_naming_the_key_what_was_found_and_what_was_expected(tables, parts):
    with pytest.raises(ConfigError) as refusal:
        build(tables)
    for part in parts:
        assert part in str(refusal.value)
    assert str(refusal.value).startswith("some.toml: ") and "\n" not in str(refusal.value)
    assert "?." not in str(refusal.value)


def test_all_problems_are_reported_at_once_each_on_its_line():
    """Names, types, ranges, and what sections say of each other, of every section; in the file and in overrides."""
    tables = {
        "runn": {},
        "mesh": {"expert": 3},
        "data": {"batch_size": 16, "seq_len": 1, "sources": [{"weight": 0}, {"path": 3}]},
        "optimizer": {"learning_rate": "a", "schedule": "wsd", "beta1": True},
        "run": {"folder": "runs/x", "profile": "3"},
    }
    with pytest.raises(ConfigError) as refusal:
        build(tables, "--run.max_steps=many", "--model.rope_theta=many", "--execution.routing=balanced")
    lines = str(refusal.value).splitlines()
    assert sorted(re.split(r": (?=found|this key|set in|unknown)", line)[0] for line in lines) == [
        "--execution.routing",
        "--model.rope_theta",
        "--run.max_steps",
        "some.toml: data.batch_size",
        "some.toml: data.seq_len",
        "some.toml: data.sources[0].weight",
        "some.toml: data.sources[1].path",
        "some.toml: optimizer.beta1",
        "some.toml: optimizer.decay_steps",
        "some.toml: optimizer.learning_rate",
        "some.toml: run.folder",
        "some.toml: run.profile",
        "some.toml: runn",
    ]


def test_what_only_follows_from_a_wrong_key_is_not_reported():
    """With 500 steps, the default in place of `many`, a decay of 470 after a warm-up of 40 would be too long."""
    with pytest.raises(ConfigError) as refusal:
        build({"run": {"max_steps": "many"}, "optimizer": {"schedule": "wsd", "decay_steps": 470}})
    assert str(refusal.value) == "some.toml: run.max_steps: found 'many' (text), expected an integer."


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_is_refused_with_its_new_name_in_a_file_and_on_the_command_line(old, new):
    section, *middle, key = old.split(".")
    table = {middle[0]: [{key: "x"}]} if middle else {key: "x"}
    for tables, overrides in [({section: table}, [])] + ([] if middle else [({}, [f"--{old}=x"])]):
        with pytest.raises(ConfigError, match=rf"this key is named {re.escape(new)} now\.$"):
            build(tables, *overrides)
    owner = SourceConfig if middle else SECTIONS[section]
    names = [field.name for field in dataclasses.fields(owner)]
    assert new.split(".")[-1] in names and key not in names


@pytest.mark.parametrize(("key", "instead"), API_ONLY.items())
def test_a_key_of_the_python_api_is_refused_with_what_to_write_instead(key, instead):
    section, _, field = key.partition(".")
    with pytest.raises(ConfigError, match=rf"some.toml: {key}: set in Python only: write {re.escape(instead)} instead"):
        build({section: {field: 1}})
    assert field in [other.name for other in dataclasses.fields(SECTIONS[section])]
    assert f"--{key} " not in describe_keys()


def test_a_field_of_the_python_api_is_set_on_a_loaded_config():
    config = build()
    balanced = dataclasses.replace(config, execution=dataclasses.replace(config.execution, routing="balanced"))
    assert balanced.execution.routing == "balanced" and "routing" not in to_toml(balanced)


def test_sections_are_the_package_s_config_classes_over_one_preset():
    config = build({"execution": {"group_size": 64}, "lora": {"r": 4}})
    assert config.execution == ExecutionConfig(**TRAINER_DEFAULTS["execution"], group_size=64)
    assert config.lora == LoraConfig(r=4) and build().lora is None
    assert build({"lora": {}}).lora == LoraConfig()
    assert build().execution == ExecutionConfig(**TRAINER_DEFAULTS["execution"])
    for rules, table in SHARDING_RULES.items():
        assert build({"sharding": {"rules": rules}}).execution.sharding == table
    rows = build({"sharding": {"rules": "expert+tensor", "embed": ["expert"]}}).execution.sharding
    assert rows == ShardingRules(embed=("expert",), expert_embed=())
    of_file = {"sharding": {"embed": ["expert"], "expert_embed": []}}
    assert build(of_file, "--sharding.rules=fsdp").execution.sharding == SHARDING_RULES["fsdp"], "all of the file's go"
    rows = build(of_file, "--sharding.rules=fsdp", '--sharding.expert_embed=["context"]').execution.sharding
    assert rows == ShardingRules(embed=("fsdp",), expert_embed=("context",))


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("--run.max_stepz=3", ["--run.max_stepz: unknown key", "did you mean 'max_steps'"]),
        ("--runn.max_steps=3", ["--runn.max_steps: unknown section", "did you mean 'run'"]),
        ("--run.max_steps=three", ["--run.max_steps", "'three'", "expected an integer"]),
        ("--model.hiden_size=3", ["--model.hiden_size", "did you mean 'hidden_size'"]),
        ("--model.hidden_size=3.5", ["--model.hidden_size", "3.5", "expected an integer", "64"]),
        ("--run.output_dir=caf\udce9", ["--run.output_dir: found 'caf\\udce9', expected text in UTF-8"]),
    ],
)
def test_a_wrong_override_is_refused_by_naming_the_option(override, parts):
    with pytest.raises(ConfigError) as refusal:
        build({}, override)
    for part in parts:
        assert part in str(refusal.value)


def test_overrides_have_the_type_of_their_key():
    config = build(
        {"run": {"max_steps": 500}},
        "--run.max_steps=70",
        "--optimizer.learning_rate=1",
        "--optimizer.weight_decay=1e-2",
        "--mesh.simulated=true",
        "--run.output_dir=42",
        "--run.sample_prompt=a = b",
        "--model.rope_theta=500000",
        "--model.norm_topk_prob=false",
    )
    assert config.run.max_steps == 70
    assert config.optimizer.learning_rate == 1.0 and type(config.optimizer.learning_rate) is float
    assert config.optimizer.weight_decay == 0.01
    assert config.mesh.simulated is True
    assert config.run.output_dir == "42"
    assert config.run.sample_prompt == "a = b"
    assert config.model["rope_theta"] == 500000.0 and type(config.model["rope_theta"]) is float
    assert config.model["norm_topk_prob"] is False


def test_the_length_in_epochs_becomes_steps_once_the_rows_are_known():
    for epochs, rows, steps in [(2, 50, 7), (0.3, 160, 3), (0.1 + 0.2, 160, 3), (1e-9, 160, 1)]:
        config = build({"run": {"num_train_epochs": epochs}})
        assert config.run.max_steps is None and config.run.num_train_epochs == epochs
        assert config.with_steps_of(rows).run.steps == steps, epochs
    assert build().with_steps_of(10).run.steps == build().run.steps == 500
    with pytest.raises(ConfigError, match="optimizer.decay_steps=6 .*run.max_steps less the steps"):
        schedule = {"schedule": "wsd", "decay_steps": 6, "warmup_steps": 2}
        build({"run": {"num_train_epochs": 1}, "optimizer": schedule}).with_steps_of(112)


def test_the_command_line_s_length_replaces_the_file_s_whichever_key_it_has():
    config = build({"run": {"max_steps": 20}}, "--run.num_train_epochs=1.5")
    assert config.run.max_steps is None and config.run.num_train_epochs == 1.5
    config = build({"run": {"num_train_epochs": 3}}, "--run.max_steps=9")
    assert config.run.max_steps == 9 and config.run.num_train_epochs is None
    for overrides in ([], ["--run.max_steps=9", "--run.num_train_epochs=3"]):
        with pytest.raises(ConfigError, match="run.max_steps: found 9, expected none with run.num_train_epochs"):
            build({"run": {"max_steps": 9, "num_train_epochs": 3}}, *overrides)


def test_overrides_may_stand_anywhere_on_the_command_line():
    words = ["--run.max_steps", "-5", "a.toml", "--mesh.expert=4", "--fresh", "--run.sample_prompt", "--x"]
    overrides, others = split_overrides(words)
    assert overrides == ["--run.max_steps=-5", "--mesh.expert=4", "--run.sample_prompt=--x"]
    assert others == ["a.toml", "--fresh"]
    assert split_overrides(["--data.tokenizer", ""]) == (["--data.tokenizer="], [])
    with pytest.raises(ConfigError, match="--run.max_steps: found no value, expected one after it"):
        split_overrides(["a.toml", "--run.max_steps"])


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
        '[[data.sources]]\npath = "books"\npattern = "*.txt"\nweight = 3\n'
        '[[data.sources]]\npath = "chats.jsonl"\nformat = "jsonl"\n'
    )
    config = load_config(file)
    books = SourceConfig(path="books", pattern="*.txt", weight=3.0)
    assert config.data.mixture == (books, SourceConfig(path="chats.jsonl", format="jsonl"))
    file.write_text(to_toml(config), encoding="utf-8")
    assert load_config(file) == config
    overridden = build({}, '--data.sources=[{path = "books", pattern = "*.txt", weight = 3}]')
    assert overridden.data.mixture == (books,)


def test_one_source_needs_no_tables():
    [source] = build({"data": {"path": "a.jsonl", "format": "jsonl"}}).data.mixture
    assert source == SourceConfig(path="a.jsonl", format="jsonl")


def test_a_named_tokenizer_lets_the_model_have_a_larger_vocabulary():
    config = build({"model": {**TABLES["model"], "vocab_size": 151936}, "data": {"tokenizer": "some/model"}})
    assert config.model["vocab_size"] == 151936


def test_keys_that_are_left_out_stay_so_and_can_be_given_in_every_way(tmp_path):
    config = build(
        {"execution": {"router_dtype": "float32"}}, "--execution.group_size=64", "--loss.router_aux_loss_coef=1"
    )
    assert (config.execution.router_dtype, config.execution.group_size, config.loss.router_aux_loss_coef) == (
        "float32",
        64,
        1.0,
    )
    assert config.execution.exchange is None and build().loss.router_aux_loss_coef is None
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


def test_text_without_end_is_written_as_inf(tmp_path):
    config = build({}, "--data.megabytes=inf")
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load_config(file).data.megabytes == float("inf")


def test_differences_name_the_keys_that_changed():
    old, new = build(), build({}, "--optimizer.beta1=0.8", "--model.hidden_size=32", "--mesh.data=4")
    assert differences(old, new, ("model", "optimizer")) == ["model.hidden_size: 64 → 32", "optimizer.beta1: 0.9 → 0.8"]


def test_a_missing_or_broken_file_is_refused_by_name(tmp_path):
    (tmp_path / "tiny.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match="no such file.*tiny.toml"):
        load_config(tmp_path / "tny.toml")
    with pytest.raises(ConfigError, match="tiny.toml: this is no TOML"):
        load_config(tmp_path / "tiny.toml")


def test_a_file_without_permission_is_refused_by_name(tmp_path, monkeypatch):
    def refuse(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match="tiny.toml: it cannot be read: Permission denied"):
        load_config(tmp_path / "tiny.toml")


def test_a_folder_or_a_models_config_in_place_of_a_toml_file_is_refused_with_what_to_give(tmp_path):
    (tmp_path / "tiny.toml").write_text("")
    with pytest.raises(ConfigError, match=f"{tmp_path} is a folder, expected a TOML file. In that folder: .*tiny.toml"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"To fine-tune the checkpoint in it: run.model_name_or_path = '{tmp_path}'"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"this is no TOML: .* A model's config.json is the \[model\] table of one"):
        load_config(tmp_path / "config.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_a_toml_file_of_any_unicode_encoding_is_read(tmp_path, encoding):
    text = Path("configs/train/tiny.toml").read_text(encoding="utf-8")
    (tmp_path / "tiny.toml").write_bytes(text.encode(encoding))
    assert load_config(tmp_path / "tiny.toml") == load_config("configs/train/tiny.toml")


def test_a_toml_file_of_another_encoding_is_refused_by_its_byte(tmp_path):
    (tmp_path / "tiny.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(ConfigError, match="tiny.toml: found byte 0xe9 at offset 5, expected text in UTF-8"):
        load_config(tmp_path / "tiny.toml")


def test_every_key_has_a_meaning_to_show():
    """`Attributes:` of the config classes are the help and the API reference: none is missing, none is left over."""
    for section in [*SECTIONS.values(), SourceConfig]:
        assert [*field_docs(section)] == [field.name for field in dataclasses.fields(section)]
        assert all(field_docs(section).values())


def test_help_answers_without_importing_anything_heavy():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['train', '--help']\n"
        "try:\n    runpy.run_module('train', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'numpy', 'pydantic', 'tokenizers', 'rich', 'transformers'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--optimizer.learning_rate NUMBER" in result.stdout


def test_the_options_of_the_other_commands_are_keys_here_and_keys_come_before_them(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("train.main._plan", lambda config, *_: seen.append(config))
    words = ["--mesh", "expert=4", "--dispatch", "capacity", "--capacity-factor", "2", "--dtype", "bfloat16"]
    words += ["--sharding", "fsdp", "--mesh.simulated=false", "--data.batch_size=8", "--plan", "cpu:4"]
    assert main(["configs/train/tiny.toml", *words]) == 0
    [config] = seen
    assert config.mesh.sizes == {
        "data": 1,
        "fsdp": 1,
        "expert": 4,
        "context": 1,
        "tensor": 1,
    }  # the file's data=2 is gone
    assert (config.execution.dispatch, config.execution.capacity_factor) == ("capacity", 2.0)
    assert (config.execution.dtype, config.execution.param_dtype) == ("bfloat16", "float32")
    assert config.execution.sharding == SHARDING_RULES["fsdp"]
    assert main(["configs/train/tiny.toml", "--mesh", "expert=4", "--mesh.data=2", "--plan", "cpu:8"]) == 0
    assert seen[1].mesh.sizes["data"] == 2 and seen[1].mesh.sizes["expert"] == 4


@pytest.mark.parametrize(
    "word, question",
    [
        ("--max_steps", "did you mean '--run.max_steps'?"),
        ("--dispach=dense", "did you mean '--dispatch'?"),
        ("--fersh", "did you mean '--fresh'?"),
        ("-mesh", "did you mean '--mesh'?"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_one_among_keys_and_options(capsys, word, question):
    with pytest.raises(SystemExit) as end:
        main(["configs/train/tiny.toml", word, "3"])
    assert end.value.code == 2
    assert f"unknown option {word.partition('=')[0]}; {question}" in capsys.readouterr().err


def test_a_refusal_is_one_message_and_exit_code_2():
    command = [sys.executable, "-m", "train", "configs/train/tiny.toml", "--run.max_stepz", "3"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "did you mean 'max_steps'" in result.stderr
    assert "Traceback" not in result.stderr
