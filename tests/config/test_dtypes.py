"""A dtype is anything that `jnp.dtype` takes, wherever the package takes one; it is kept as its name."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.main import main
from qwen_moe_jax.config import DTYPES
from qwen_moe_jax.huggingface.checkpoint import open_checkpoint
from qwen_moe_jax.huggingface.convert import convert
from qwen_moe_jax.inference.abstract_programs import abstract_decode, abstract_prefill
from qwen_moe_jax.inference.harness import Harness
from tests.cases import CASES
from tests.inference.checkpoints import make_checkpoint
from train.config import build_config

ROOT = Path(__file__).parents[2]
BFLOAT16 = [jnp.bfloat16, jnp.bfloat16.dtype, ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16), "bfloat16"]
FLOAT32 = [jnp.float32, jnp.float32.dtype, np.float32, np.dtype("f4"), np.dtype(">f4"), "float32", "f4", "single"]
FLOAT16 = [jnp.float16, np.float16, np.dtype("float16"), "float16", "half", "e"]
GIVEN = [*((x, "bfloat16") for x in BFLOAT16), *((x, "float32") for x in FLOAT32), *((x, "float16") for x in FLOAT16)]
REFUSED = [
    (jnp.int8, "int8"),
    (np.float64, "float64"),
    ("int8", "int8"),
    (float, "float64"),
    (jnp.float8_e4m3fn, "float8"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("dtypes"))


@pytest.fixture(scope="module")
def model(folder):
    return qmj.from_pretrained(folder)


@pytest.mark.parametrize(("given", "name"), GIVEN, ids=str)
def test_configs_take_what_jax_takes_and_keep_its_name(given, name):
    execution = qmj.ExecutionConfig(dtype=given, param_dtype=given, router_dtype=given)
    assert (execution.dtype, execution.param_dtype, execution.router_dtype) == (name, name, name)
    assert execution == qmj.ExecutionConfig(dtype=name, param_dtype=name, router_dtype=name)
    assert hash(execution) == hash(qmj.ExecutionConfig(dtype=name, param_dtype=name, router_dtype=name))
    config = qmj.ModelConfig.from_pretrained(CASES["qwen3_moe-plain"].config)
    assert dataclasses.replace(config, dtype=given).dtype == name
    assert jnp.dtype(given).name == name, "a dtype for JAX as well"


@pytest.mark.parametrize("field", ["dtype", "param_dtype", "router_dtype"])
@pytest.mark.parametrize(("given", "name"), REFUSED, ids=str)
def test_dtypes_that_are_not_supported_are_refused_by_name_with_the_choices(field, given, name):
    with pytest.raises(qmj.ConfigError, match=f"{field}='{name}.*one of 'float32', 'bfloat16', 'float16'"):
        qmj.ExecutionConfig(**{field: given})


@pytest.mark.parametrize("given", ["bf16", "fp32", "", 3, [1], object(), jnp.sin], ids=lambda one: type(one).__name__)
def test_what_is_no_dtype_is_refused_as_it_was_given(given):
    with pytest.raises(TypeError):
        jnp.dtype(given)
    with pytest.raises(qmj.ConfigError, match="dtype=.*expected one of 'float32', 'bfloat16', 'float16'"):
        qmj.ExecutionConfig(dtype=given)


def test_all_wrong_fields_are_named_at_once():
    with pytest.raises(qmj.ConfigError) as refusal:
        qmj.ExecutionConfig(dtype="int8", dispatch="nearest", capacity_factor=0, group_size=-1)
    assert [problem.field for problem in refusal.value.problems] == [
        "dispatch",
        "dtype",
        "capacity_factor",
        "group_size",
    ]


def test_a_model_is_loaded_in_dtypes_given_either_way(folder):
    model = qmj.from_pretrained(folder, dtype=jnp.bfloat16, param_dtype=np.float32)
    assert (model.execution.dtype, model.execution.param_dtype) == ("bfloat16", "float32")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {"float32"}
    model = qmj.CausalLM.from_pretrained(folder, dtype=np.dtype("f2"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {"float16"}
    for name in ("dtype", "param_dtype"):
        with pytest.raises(qmj.ConfigError, match=f"{name}='int8'"):
            qmj.from_pretrained(folder, **{name: jnp.int8})


def test_caches_take_dtypes_given_either_way(model):
    asked = {"max_new_tokens": 4, "tokenizer": None}
    tokens = [[3, 5, 8]]
    by_name = qmj.generate(model, tokens, cache_dtype="float16", **asked)
    assert qmj.generate(model, tokens, cache_dtype=np.float16, **asked) == by_name
    assert [[*one.token_ids] for one in qmj.complete(model, tokens, cache_dtype=jnp.float16, **asked)] == by_name
    qmj.Session(model, 64, cache_dtype=np.float16)
    abstract_decode(model, rows=1, max_length=64, cache_dtype=jnp.bfloat16)
    abstract_prefill(model, rows=1, prompt=8, max_length=64, cache_dtype="bfloat16")
    for call in (
        lambda: qmj.generate(model, tokens, cache_dtype=np.int8, **asked),
        lambda: qmj.complete(model, tokens, cache_dtype=np.int8, **asked),
        lambda: qmj.Session(model, 64, cache_dtype="int8"),
        lambda: abstract_decode(model, rows=1, max_length=64, cache_dtype="int8"),
        lambda: abstract_prefill(model, rows=1, prompt=8, max_length=64, cache_dtype=jnp.int8),
    ):
        with pytest.raises(qmj.ConfigError, match="cache_dtype='int8'"):
            call()


def test_the_evaluation_harness_takes_dtypes_given_either_way(folder):
    for given in (jnp.bfloat16, "bfloat16"):
        assert Harness.from_folder(folder, dtype=given)._model.execution.dtype == "bfloat16"


def test_a_checkpoint_is_converted_to_a_dtype_given_either_way(folder, tmp_path):
    for number, given in enumerate((jnp.bfloat16, "bfloat16")):
        convert(folder, tmp_path / str(number), dtype=given)
        assert {tensor.dtype for tensor in open_checkpoint(tmp_path / str(number)).tensors.values()} == {"bfloat16"}
    with pytest.raises(qmj.ConfigError, match="dtype='int8'"):
        convert(folder, tmp_path / "refused", dtype=np.int8)
    assert not (tmp_path / "refused").exists()


def test_a_command_takes_names_and_refuses_other_dtypes_with_the_choices(folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "half"), "--dtype", "half"]) == 0
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "half").tensors.values()} == {"float16"}
    commands = {
        "convert": [str(folder), str(tmp_path / "refused")],
        "generate": [str(folder)],
        "plan": [str(folder), "--target", "cpu:1"],
    }
    for command, words in commands.items():
        with pytest.raises(SystemExit):
            main([command, *words, "--dtype", "int8"])
        refusal = "argument --dtype: found 'int8', expected one of float32, bfloat16, float16"
        assert refusal in capsys.readouterr().err


def test_a_run_takes_what_jax_takes_and_keeps_its_name():
    tables = {"execution": {"dtype": "half"}, "optimizer": {"mu_dtype": "f4"}}
    config = build_config({"model": {"model_type": "qwen3"}, **tables}, ["--execution.router_dtype=f4"], "a test")
    assert (config.execution.dtype, config.execution.router_dtype) == ("float16", "float32")
    assert config.optimizer.mu_dtype == "float32"


def test_names_are_read_without_numpy():
    code = (
        "import sys, qwen_moe_jax as qmj\n"
        f"for name in {DTYPES}: assert qmj.ExecutionConfig(dtype=name).dtype == name\n"
        "print(sorted({'numpy', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_public_function_takes_a_dtype_as_text_only():
    """Of the rooms that users call: arguments with `dtype` in their names are annotated with `DTypeLike`."""
    found = []
    for room in ("config", "huggingface", "inference"):
        for path in sorted((ROOT / "qwen_moe_jax" / room).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    for argument in [*node.args.args, *node.args.kwonlyargs]:
                        if argument.arg.endswith("dtype") and argument.annotation is not None:
                            found.append((f"{path.name}:{node.name}", ast.unparse(argument.annotation)))
    assert found and not [one for one in found if one[1].startswith("str")]
