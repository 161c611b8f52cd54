"""Which training steps fit on pods, by arithmetic alone: `python benchmarks/plan_drafts.py CHIP …`.

For each chip (v5p, v6e, h200), model and length of a row, a line of a table: the first remat of dots, experts and full
under which the step may fit, with memory of a device and bytes that it sends in a step, as `plan.draft` estimates them.
Nothing is compiled, but the extras `plan` and `plan-gpu` have to name the devices. `benchmarks/plan_table.py` compiles.
"""

import dataclasses
import sys
from pathlib import Path

from qwen_moe_jax.plan.compile import chip_for, group_of, target_mesh, target_of
from qwen_moe_jax.plan.draft import Draft, Outline, draft_of
from qwen_moe_jax.plan.targets import parse_target
from train.config import load_config
from train.plan import planned_model, training_step
from train.program import assemble

RECIPES = Path(__file__).parents[1] / "configs" / "train"

#: Chip → devices → target.
TARGETS = {
    "v5p": {64: "tpu:v5p:4x4x4", 128: "tpu:v5p:4x4x8", 256: "tpu:v5p:4x8x8"},
    "v6e": {64: "tpu:v6e:8x8", 128: "tpu:v6e:8x16", 256: "tpu:v6e:16x16"},
    "h200": {64: "gpu:h200:64", 128: "gpu:h200:128", 256: "gpu:h200:256"},
}
LENGTHS = {"4k": 4096, "32k": 32768, "128k": 131072}
REMATS = "dots", "experts", "full"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and its devices.

    Attributes:
        recipe: a file of configs/train.
        source: the model's name on the Hub.
        devices: how many train it.
        expert: devices of the `expert` axis; the rest are `fsdp`, or `context` for rows longer than 4,096.
    """

    recipe: str
    source: str
    devices: int
    expert: int


MODELS = {
    "30b": Model("qwen3-30b-a3b-sft.toml", "Qwen/Qwen3-30B-A3B", 64, 8),
    "35b": Model("qwen3.5-35b-a3b-sft.toml", "Qwen/Qwen3.5-35B-A3B", 64, 8),
    "57b": Model("qwen3-30b-a3b-sft.toml", "Qwen/Qwen2-57B-A14B", 128, 8),
    "8x22b": Model("qwen3-30b-a3b-sft.toml", "mistralai/Mixtral-8x22B-Instruct-v0.1", 128, 8),
    "235b": Model("qwen3-235b-a22b.toml", "Qwen/Qwen3-235B-A22B", 256, 32),
}


def words_of(model: Model, length: int) -> list[str]:
    """The changes of the recipe: a row a device, or one on eight devices that share its positions."""
    context = 1 if length == LENGTHS["4k"] else 8
    rules = ["--sharding.rules=expert+fsdp+context"] if context > 1 else []
    return [
        f"--run.model_name_or_path={model.source}",
        f"--data.seq_len={length}",
        f"--data.batch_size={model.devices // context}",
        f"--mesh.fsdp={model.devices // model.expert // context}",
        f"--mesh.expert={model.expert}",
        f"--mesh.context={context}",
        "--run.max_steps=1000",
        *rules,
    ]


def draft(model: Model, length: int, target: str, remat: str) -> Draft:
    """The estimate of one step."""
    words = [*words_of(model, length), f"--execution.remat={remat}"]
    config, request = load_config(RECIPES / model.recipe, words), parse_target(target)
    model_config, name = planned_model(config)
    mesh = target_mesh(request, config.mesh.sizes)
    step = training_step(config, assemble(config, model_config, mesh), name)
    groups = tuple(group_of(group, tree) for group, tree in step.groups.items())
    outline = Outline(config=step.config, work=step.work, flops=step.model_flops, groups=groups)
    chip = chip_for(request, mesh.devices.flatten().tolist(), step.work.dtype, None)
    assert chip is not None
    return draft_of(outline, dict(mesh.shape), target_of(request, mesh, chip), chip.networks)


def main(*chips: str) -> None:
    """Prints the table."""
    print("| step | remat | memory of a device | sent |\n|---|---|---|---|")
    for chip in chips:
        for name, model in MODELS.items():
            for label, length in LENGTHS.items():
                drafts = {remat: draft(model, length, TARGETS[chip][model.devices], remat) for remat in REMATS}
                remat = next((remat for remat, found in drafts.items() if found.fits), "")
                found = drafts[remat or REMATS[-1]]
                used = f"{found.total / 1e9:.0f} of {(found.available or 0) / 1e9:.0f} GB"
                print(
                    f"| {name}-{label}-{chip} | {remat or 'none fits'} | {used} | {found.sent / 1e9:.0f} GB |",
                    flush=True,
                )


if __name__ == "__main__":
    main(*sys.argv[1:])
