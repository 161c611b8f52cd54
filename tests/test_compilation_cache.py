"""The compilation cache of the commands."""

import os
import subprocess
import sys

import jax
import pytest

from qwen_moe_jax import compilation_cache
from qwen_moe_jax.compilation_cache import cache_folder, use_compilation_cache

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)

PROGRAM = """
import jax
from qwen_moe_jax.compilation_cache import use_compilation_cache
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
use_compilation_cache()
jax.jit(lambda x: x * 2 + 1)(3.0)
print(sum(name.endswith("cache_hits") for name in found), sum(name.endswith("cache_misses") for name in found))
"""


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """A cache folder of the test's own; JAX's settings are put back at the end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_second_start_reads_what_the_first_compiled(own_folder):
    def start() -> list[int]:
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return [int(word) for word in done.stdout.split()]

    hits, misses = start()
    assert hits == 0 and misses >= 1
    assert start() == [misses, 0]


def test_the_cache_is_bounded_and_in_the_users_cache_folder(own_folder):
    folder = use_compilation_cache()
    assert folder == cache_folder() and folder.is_relative_to(own_folder / "qwen_moe_jax")
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_compilation_cache_max_size == compilation_cache.MAX_SIZE


@pytest.mark.parametrize("value", ["", "/somewhere/else"])
def test_a_users_own_setting_is_left_alone(monkeypatch, value):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", value)
    assert use_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir == before


def test_without_a_folder_to_write_to_there_is_no_cache(monkeypatch, own_folder):
    (own_folder / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_folder / "file"))
    assert use_compilation_cache() is None


def test_processors_of_other_instructions_have_folders_of_their_own(monkeypatch):
    here = cache_folder()
    monkeypatch.setattr(compilation_cache, "_processor", lambda: "another")
    assert cache_folder() != here
