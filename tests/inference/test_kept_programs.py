"""Compiled programs that the next start of a command reads: without tracing, and only where nothing has changed."""

import dataclasses

import jax
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.compilation_cache import use_compilation_cache
from qwen_moe_jax.inference import programs
from qwen_moe_jax.inference.kept_programs import KeptProgram
from tests.cases import CASES
from tests.test_compilation_cache import SETTINGS

PROMPTS = [[5, 6, 7], [8]]
KEPT = programs.prefill, programs.first, programs.decode


@pytest.fixture(scope="module")
def model():
    config = qmj.ModelConfig.from_pretrained(CASES["qwen3_moe-plain"].config)
    return qmj.CausalLM(config, rngs=nnx.Rngs(0))


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A cache of the test's own; JAX's settings are put back at the end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    start_again()
    yield use_compilation_cache()
    start_again()
    for name, value in before.items():
        jax.config.update(name, value)


def start_again():
    """Forgets what was read or compiled in this process."""
    for program in KEPT:
        program._programs.clear()


def answer(model):
    return qmj.generate(model, PROMPTS, max_new_tokens=6, eos_token_id=())


def test_a_second_start_traces_nothing_and_a_changed_model_or_file_is_compiled_anew(model, folder, monkeypatch):
    expected = answer(model)
    files = sorted((folder / "programs").iterdir())
    assert sorted(file.name.split("-")[0] for file in files) == ["decode", "first", "prefill"]

    start_again()
    with monkeypatch.context() as patch:
        for program in KEPT:
            patch.setattr(program, "_jitted", None)  # to call or to lower it would be an AttributeError
        assert answer(model) == expected

    # The same shapes, another meaning.
    config = dataclasses.replace(model.config, rms_norm_eps=0.5)
    other = qmj.CausalLM(config, rngs=nnx.Rngs(0))
    found = answer(other)
    assert len(list((folder / "programs").iterdir())) >= len(files) + 2  # choosing a first token is the same
    assert found != expected

    start_again()
    jax.clear_caches()
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    assert answer(model) == expected
    assert [file.name for file in files if file.stat().st_size == 100] == []


def test_a_key_of_random_numbers_is_an_argument_as_others(folder):
    program, key = KeptProgram(jax.jit(jax.random.bits), "draw", []), jax.random.key(3)
    assert program(key) == jax.random.bits(key)


def test_without_the_commands_cache_nothing_is_kept(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answer(model)
    assert not list(tmp_path.iterdir())
