"""What a sparse block sends on accelerators that are not here: `python benchmarks/compile_block.py`.

Compiles a block of Qwen3-30B-A3B's shapes on expert=4, 2048 tokens a device, forward and with gradients, by each way
of dispatch, and prints the collectives that XLA put into the program, with their bytes per device, and the temporaries.
Nothing runs, so there are no times. Targets and their compilers are those of `compile_kernels.py`.
"""

import collections
import re

import compile_kernels
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import AttentionConfig, ExecutionConfig, LayerKind, ModelConfig, MoEConfig
from qwen_moe_jax.config.resolve import resolve
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.moe.block import SparseMoeBlock
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.plan.targets import parse_target
from qwen_moe_jax.sharding.explicit import with_explicit_axes
from qwen_moe_jax.sharding.mesh import AXES
from qwen_moe_jax.sharding.rules import BATCH

WAYS, TOKENS, BUFFER = 4, 2048, 1.25
CONFIG = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=32,
    hidden_size=compile_kernels.D,
    intermediate_size=64,
    layers=(LayerKind(mlp="sparse"),),
    attention=AttentionConfig(num_attention_heads=2, num_key_value_heads=2, head_dim=8),
    moe=MoEConfig(
        num_experts=compile_kernels.E,
        num_experts_per_tok=compile_kernels.A,
        moe_intermediate_size=compile_kernels.F,
        norm_topk_prob=True,
    ),
)
METHODS = {
    "capacity by einsum": dict(dispatch="capacity", capacity_by="einsum"),
    "capacity by index": dict(dispatch="capacity", capacity_by="index"),
    "dropless, gather": dict(dispatch="dropless", exchange="all_gather", buffer_factor=BUFFER),
    "dropless, all-to-all": dict(dispatch="dropless", exchange="all_to_all", buffer_factor=BUFFER),
    "dropless, ragged": dict(dispatch="dropless", exchange="ragged_all_to_all", buffer_factor=BUFFER),
}
KINDS = "ragged-all-to-all|all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
SMALL = 2**20
"""Bytes below which a collective is not worth a word: the router's matrix, counts, indices."""


def collectives(text: str) -> dict[str, int]:
    """How often each collective stands in a program, with the MiB that each moves per device."""
    found: collections.Counter[str] = collections.Counter()
    for line in text.splitlines():
        if match := re.search(rf"= (.+?) ({KINDS})(?:-start)?\(", line):
            arrays = re.findall(r"\b[a-z]+(\d+)\[([\d,]*)\]", match[1])
            sizes = [int(bits) // 8 * int(np.prod([int(n) for n in dims.split(",") if n])) for bits, dims in arrays]
            if max(sizes) >= SMALL:  # a started collective has its operand and its result in one tuple
                found[f"{match[2]} of {max(sizes) / 2**20:.0f} MiB"] += 1
    return dict(found)


def report(target: str, devices: list[jax.Device]) -> None:
    """Compiles every method for four of these devices and prints a line for each."""
    mesh = Mesh(np.array(devices[:WAYS]).reshape(1, 1, WAYS, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    make = ParameterFactory(mesh=mesh, dtype="bfloat16", initializer_range=0.02, rngs=None)
    block = SparseMoeBlock(CONFIG.hidden_size, CONFIG.moe, act=CONFIG.hidden_act, make=make)
    spread = NamedSharding(mesh, P(BATCH))
    hidden_BTD = jax.ShapeDtypeStruct((WAYS, TOKENS, compile_kernels.D), jnp.bfloat16, sharding=spread)
    token_mask_BT = jax.ShapeDtypeStruct((WAYS, TOKENS), bool, sharding=spread)
    print(f"\n{target}, jax {jax.__version__}: expert={WAYS}, {TOKENS} tokens a device, bfloat16")
    for name, settings in METHODS.items():
        execution = resolve(
            ExecutionConfig(dtype="bfloat16", **settings),
            CONFIG.moe,
            expert_shards=mesh.shape["expert"],
            platform=mesh.devices.flat[0].platform,
            training=True,
        )

        def forward(block, hidden_BTD, token_mask_BT, execution=execution):
            run = with_explicit_axes(
                lambda *arguments: SparseMoeBlock.__call__(*arguments, execution)[0],
                mesh,
                [P(BATCH, None, None), P(BATCH, None)],
            )
            return run(block, hidden_BTD, token_mask_BT)

        def loss(block, hidden_BTD, token_mask_BT, forward=forward):
            return (forward(block, hidden_BTD, token_mask_BT).astype(jnp.float32) ** 2).sum()

        for passes, program in (("forward", forward), ("forward + backward", jax.grad(loss, (0, 1)))):
            compiled = jax.jit(program).lower(block, hidden_BTD, token_mask_BT).compile()
            sent = ", ".join(f"{count} {what}" for what, count in collectives(compiled.as_text()).items())
            temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
            print(f"  {name:22}{passes:20}{temporaries:6.0f} MiB temporaries; {sent}", flush=True)


def main() -> None:
    """Both targets, as far as their compilers are here."""
    for name, target in (("v5p", "tpu:v5p:2x2x1"), ("H200", f"gpu:h200:{WAYS}")):
        try:
            devices = parse_target(target).devices()
        except ConfigError as error:
            print(f"\n{name}: left out; {error}")
        else:
            report(name, devices)


if __name__ == "__main__":
    main()
