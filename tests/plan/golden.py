"""Shardings of published models on reference meshes, as text that is compared in review: `tests/plan/golden/*.txt`.

`python -m tests.plan.golden --write` writes them anew; without `--write` it says which of them differ.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"
MODELS = Path(__file__).parents[2] / "configs" / "models"

#: Published config → meshes.
PLACED = {
    "mixtral-8x22b-instruct-v0.1": [dict(fsdp=16, expert=8)],
    "mixtral-8x7b-v0.1": [dict(fsdp=2, expert=4)],
    "qwen1.5-moe-a2.7b-chat": [dict(data=2, expert=4)],
    "qwen2-57b-a14b": [dict(fsdp=16, expert=8)],
    "qwen3-0.6b": [dict(fsdp=8)],
    "qwen3-8b": [dict(fsdp=4, tensor=2)],
    "qwen3-235b-a22b": [dict(fsdp=32, expert=8), dict(fsdp=16, expert=8, tensor=2)],
    "qwen3-30b-a3b": [dict(expert=8), dict(fsdp=8, expert=8)],
    "qwen3-next-80b-a3b-instruct": [dict(fsdp=8, expert=8)],
    "qwen3.5-27b": [dict(fsdp=8)],
    "qwen3.5-397b-a17b": [dict(fsdp=16, expert=8, tensor=2)],
}

#: Of the steps that are compiled: a mixture small enough for seconds, whose widths divide all meshes.
TINY = {
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 128,
}
#: A hybrid of the same sizes: three linear layers, which are scanned, and a full one.
TINY_HYBRID = {
    **TINY,
    "model_type": "qwen3_next",
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "shared_expert_intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
#: Model, mesh and execution.
STEPS = {
    "step-data2-expert4-capacity": (TINY, dict(data=2, expert=4), dict(dispatch="capacity", group_size=64)),
    "step-fsdp2-expert4-dropless": (TINY, dict(fsdp=2, expert=4), dict(dispatch="dropless", exchange="all_to_all")),
    "step-hybrid-expert4-tensor2-dropless": (
        TINY_HYBRID,
        dict(expert=4, tensor=2),
        dict(dispatch="dropless", exchange="all_to_all"),
    ),
}
ROWS, LENGTH = 8, 64
#: Of an engine, behind a cache whose slots `context` shards; purpose, model and tokens of a row.
CACHED = {
    "decode-context4-tensor2": ("decode", TINY, 1),
    "prefill-hybrid-context4-tensor2": ("prefill", TINY_HYBRID, 32),
}
CACHED_MESH, CACHED_ROWS, SLOTS = dict(context=4, tensor=2), 4, 64


def placed(model: str, mesh: dict[str, int]) -> str:
    """A line for every parameter: path, shape, dtype, logical axes, partition, bytes a device."""
    import jax
    from flax import nnx

    from qwen_moe_jax.config import ModelConfig
    from qwen_moe_jax.model.causal_lm import CausalLM
    from qwen_moe_jax.plan.compile import group_of

    described = CausalLM(ModelConfig.from_pretrained(MODELS / f"{model}.json"), rngs=None, mesh=abstract_mesh(mesh))
    group = group_of("parameters", described)
    params = jax.tree.leaves(described, is_leaf=lambda node: isinstance(node, nnx.Variable))
    lines = [
        f"{array.name}  {list(array.shape)} {array.dtype}  {','.join(param.axes)}  {spec(array.spec)}  {array.bytes:,}"
        for array, param in zip(group.arrays, params, strict=True)
    ]
    return "\n".join([*lines, f"in all, bytes a device: {group.bytes:,}"]) + "\n"


def spec(dimensions: tuple[tuple[str, ...], ...]) -> str:
    return "P(" + ", ".join("·" if not axes else "×".join(axes) for axes in dimensions) + ")"


def abstract_mesh(sizes: dict[str, int]):
    """A mesh of devices that are not here: only shardings are asked for, and nothing is compiled."""
    import math

    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from qwen_moe_jax.sharding.mesh import AXES

    shape = [sizes.get(axis, 1) for axis in AXES]
    if math.prod(shape) <= len(jax.devices()):
        devices = np.array(jax.devices()[: math.prod(shape)])
    else:
        devices = np.array([_Nowhere(number) for number in range(math.prod(shape))])
    return Mesh(devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


class _Nowhere:
    """As much of a device as a sharding asks for."""

    platform = device_kind = "nowhere"
    process_index = 0

    def __init__(self, number: int):
        self.id = number

    def __repr__(self) -> str:
        return f"nowhere:{self.id}"


def cached_step(name: str):
    """One of `CACHED`, to be compiled."""
    import qwen_moe_jax as qmj
    from qwen_moe_jax.config import INFERENCE_SHARDING
    from qwen_moe_jax.plan.inference import decode_step, prefill_step

    purpose, config, length = CACHED[name]
    execution = qmj.ExecutionConfig(sharding=INFERENCE_SHARDING)
    model = qmj.ModelConfig.from_pretrained(config), "tiny", qmj.make_mesh(**CACHED_MESH), execution
    if purpose == "decode":
        return decode_step(*model, rows=CACHED_ROWS, max_length=SLOTS)
    return prefill_step(*model, rows=CACHED_ROWS, prompt=length, max_length=SLOTS)


@functools.cache
def compiled(name: str):
    """The plan of one of `STEPS` or `CACHED`."""
    if name in CACHED:
        import qwen_moe_jax as qmj
        from qwen_moe_jax.plan.compile import plan_step
        from qwen_moe_jax.plan.targets import parse_target

        return plan_step(cached_step(name), parse_target("cpu:8"), qmj.make_mesh(**CACHED_MESH))

    from train.config import build_config
    from train.plan import plan_training

    model, mesh, execution = STEPS[name]
    tables = {"model": model, "mesh": mesh, "execution": execution}
    tables["data"] = {"vocab_size": model["vocab_size"], "seq_len": LENGTH, "batch_size": ROWS}
    return plan_training(build_config(tables, [], name), "cpu:8")


def sent(name: str) -> str:
    """A line for every collective of a compiled step."""
    lines = [
        f"{one.kind}  {'×'.join(one.axes)}  {one.dtype}{list(one.shape)}  {one.bytes:,} × {one.count}"
        + ("  in layers" if one.in_layers else "")
        for one in compiled(name).collectives
    ]
    return "\n".join(sorted(lines)) + "\n"


def cases() -> dict[str, Callable[[], str]]:
    """File name → its content."""
    found: dict[str, Callable[[], str]] = {}
    for model, meshes in PLACED.items():
        for mesh in meshes:
            name = "-".join([model, *(f"{axis}{size}" for axis, size in mesh.items())])
            found[name] = lambda model=model, mesh=mesh: placed(model, mesh)
    for name in (*STEPS, *CACHED):
        found[name] = lambda name=name: sent(name)
    return found


def main(words: list[str]) -> int:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    differ = 0
    FOLDER.mkdir(exist_ok=True)
    for name, make in cases().items():
        path, text = FOLDER / f"{name}.txt", make()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        differ += 1
        if "--write" in words:
            path.write_text(text, encoding="utf-8")
        print(f"{'wrote' if '--write' in words else 'differs:'} {path.name}")
    return 0 if "--write" in words else min(differ, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
