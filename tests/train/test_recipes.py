"""Every file in configs/train is a run: it loads, and its program can be put together on the mesh that it names."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_moe_jax.units import format_bytes
from train.config import load_config

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs" / "train").glob("*.toml"))

#: Prints, for each recipe, the bytes per device of weights, moments and gradients; nothing is allocated.
ASSEMBLE = """
import json, sys
import qwen_moe_jax as qmj
from train.config import load_config
from train.program import assemble
from train.reporting.start import bytes_per_device

for recipe, source in json.loads(sys.argv[1]):
    config = load_config(recipe)
    mesh = qmj.make_mesh(**config.mesh.sizes)
    program = assemble(config, qmj.ModelConfig.from_pretrained(source), mesh)
    trained = bytes_per_device(program.state.params)
    held = [trained + bytes_per_device(program.fixed), bytes_per_device(program.state.optimizer), trained]
    print(json.dumps([recipe, held]))
"""


def model_of(recipe: Path) -> str | dict:
    """What the run's model config is read from: of a checkpoint, the published file of that name."""
    config = load_config(recipe)
    name = Path(config.run.model_name_or_path).name.lower()
    if name == "hub":  # what another recipe leaves
        [maker] = [
            path
            for path in RECIPES
            if load_config(path).run.output_dir == str(Path(config.run.model_name_or_path).parent)
        ]
        return model_of(maker)
    return str(ROOT / f"configs/models/{name}.json") if name else {**config.model, "vocab_size": config.data.vocab_size}


@pytest.fixture(scope="module")
def held() -> dict[str, list[int]]:
    """What a device holds of each recipe. One process has devices for the largest; smaller meshes take some of them."""
    devices = max(load_config(recipe).mesh.devices for recipe in RECIPES)
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("XLA_FLAGS", None)  # may name another number of devices
    words = [sys.executable, "-c", ASSEMBLE, json.dumps([(str(recipe), model_of(recipe)) for recipe in RECIPES])]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {Path(name).name: sizes for name, sizes in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_is_put_together_on_its_mesh_and_tells_the_memory_it_needs(held, recipe):
    assert min(held[recipe.name]) > 0
    comment = re.sub(r"\n# ?", " ", recipe.read_text())
    said = re.search(r"weights ([\d.]+ \w+), moments ([\d.]+ \w+), gradients ([\d.]+ \w+)", comment)
    if load_config(recipe).mesh.simulated:
        return  # nobody plans memory for those
    assert said, "it should say what a device holds: weights …, moments …, gradients …"
    assert list(said.groups()) == [format_bytes(size) for size in held[recipe.name]]
