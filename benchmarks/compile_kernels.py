"""What a layer's kernels compile to on accelerators that are not here: `python benchmarks/compile_kernels.py`.

Compiles one SwiGLU block of Qwen3-30B-A3B's experts for 8192 tokens, by `grouped_matmul` and by `jax.lax.ragged_dot`,
and its attention for one row of 4096 tokens, in blocks and by splash, and prints what XLA says of each program. Nothing
runs, so there are no times. The extras `plan` and `plan-gpu` bring the compilers for TPUs and for NVIDIA GPUs; a target
whose compiler is missing is named and left out. `python benchmarks/compile_kernels.py attention` compiles attention
alone, `experts` the experts, `rule` the gated delta rule of Qwen3.5-35B-A3B for a row as long, and
`rule:tpu:v6e:2x2:64` for another TPU and number of value heads.
"""

import functools
import math
import re
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.attention_kernels.blockwise import Blocks, attend_in_blocks
from qwen_moe_jax.attention_kernels.delta_rule import chunk_gated_delta_rule, chunk_size_for
from qwen_moe_jax.attention_kernels.delta_rule_tpu import pallas_gated_delta_rule
from qwen_moe_jax.attention_kernels.splash import LANES, attend_by_splash
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.moe.kernels import nvidia, tpu
from qwen_moe_jax.moe.kernels.grouped_matmul import buffer_rows, grouped_matmul
from qwen_moe_jax.plan.hlo import Module
from qwen_moe_jax.plan.targets import parse_target
from qwen_moe_jax.rounding import ceil_div

D, F, E, A, TOKENS = 2048, 768, 128, 8, 8192  # Qwen3-30B-A3B
ROWS = TOKENS * A
USEFUL = 3 * 2 * ROWS * D * F  # three matmuls forward; backward, each has two more
T, N, K, H = 4096, 32, 4, 128  # attention
USEFUL_ATTENTION = 2 * 2 * N * H * T * (T + 1) // 2  # two products forward, of the keys a query sees; backward, four

Matmul = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def lax_ragged_dot(rows_RI: jax.Array, weights_EOI: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """What JAX has for it."""
    return jax.lax.ragged_dot(rows_RI, jnp.swapaxes(weights_EOI, 1, 2), sizes_E, preferred_element_type=rows_RI.dtype)


def forward(matmul: Matmul, rows_RD, gate_EFD, up_EFD, down_EDF, sizes_E):
    """One SwiGLU block."""
    hidden_RF = jax.nn.silu(matmul(rows_RD, gate_EFD, sizes_E)) * matmul(rows_RD, up_EFD, sizes_E)
    return matmul(hidden_RF, down_EDF, sizes_E)


def forward_backward(matmul: Matmul, rows_RD, gate_EFD, up_EFD, down_EDF, sizes_E, gradient_RD):
    """One SwiGLU block, and the gradients of its rows and weights."""

    def block(*arrays):
        return forward(matmul, *arrays, sizes_E)

    out_RD, pull = jax.vjp(block, rows_RD, gate_EFD, up_EFD, down_EDF)
    return out_RD, pull(gradient_RD)


def compile_for(device: jax.Device, platform: str, function: Callable, matmul: Matmul) -> jax.stages.Compiled:
    """The block's program for a device that is not here."""
    mesh, array = alone(device)
    rows_RD, sizes_E = array(buffer_rows(ROWS), D), array(E, dtype=jnp.int32)
    arrays = [rows_RD, array(E, F, D), array(E, F, D), array(E, D, F), sizes_E]
    if function is forward_backward:
        arrays.append(rows_RD)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # from which Pallas learns the GPU's kind
        traced = jax.jit(function, static_argnums=0).trace(matmul, *arrays)
        return traced.lower(lowering_platforms=(platform,)).compile()


def alone(device: jax.Device) -> tuple[jax.sharding.Mesh, Callable[..., jax.ShapeDtypeStruct]]:
    """A mesh of one device, and what describes an array on it."""
    mesh = jax.sharding.Mesh(np.array([device]), "x")

    def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, P()))

    return mesh, array


def compile_attention(device: jax.Device, attend: Callable, blocks: Blocks, backward: bool) -> jax.stages.Compiled:
    """One row's attention, and the gradients of queries, keys and values."""

    def run(q, k, v, ids, gradient):
        if not backward:
            return attend(q, k, v, ids, blocks)
        out, pull = jax.vjp(lambda *inputs: attend(*inputs, ids, blocks), q, k, v)
        return out, pull(gradient)

    _, array = alone(device)
    q, k, ids = array(1, T, N, H), array(1, T, K, H), array(1, T, dtype=jnp.int32)
    return jax.jit(run).lower(q, k, k, ids, q).compile()


def flops(compiled: jax.stages.Compiled) -> tuple[float, bool]:
    """The program's FLOPs, and whether its kernels are in it.

    XLA counts for TPUs, kernels by their own word. For GPUs it does not: there, the matmuls that the program spells
    out.
    """
    if analysis := compiled.cost_analysis():
        return analysis["flops"], True
    text = compiled.as_text()
    shapes = {name: dimensions(shape) for name, shape in re.findall(r"%?([\w.-]+) = \w+\[([\d,]*)\]", text)}
    dots = r"= \w+\[([\d,]*)\]\S* dot\(%?([\w.-]+), .*?lhs_contracting_dims=\{([\d,]*)\}"
    return sum(
        2 * math.prod(dimensions(shape)) * math.prod(shapes[left][axis] for axis in dimensions(summed))
        for shape, left, summed in re.findall(dots, text)
    ), False


def dimensions(text: str) -> list[int]:
    """The numbers of "1,2,3"."""
    return [int(number) for number in text.split(",") if number]


def kernels(compiled: jax.stages.Compiled) -> int:
    """How many times the program calls a Pallas kernel."""
    return len(re.findall(r'custom_call_target="(?:tpu_custom_call|__gpu\$xla\.gpu\.triton)"', compiled.as_text()))


def tile_rows(row_tile: int, from_own_start: bool) -> float:
    """Rows that the kernels multiply for each real one, if every token chooses its experts evenly at random.

    A tile is multiplied whole. It starts where its expert's rows do, or is one of those that cut the rows evenly.
    """
    rng = np.random.default_rng(0)
    chosen_TA = np.argsort(rng.random((TOKENS, E)), axis=1)[:, :A]
    sizes_E = np.bincount(chosen_TA.ravel(), minlength=E)
    ends_E = np.cumsum(sizes_E)
    starts_E = np.zeros(E, int) if from_own_start else ends_E - sizes_E
    stops_E = sizes_E if from_own_start else ends_E
    tiles = ceil_div(stops_E, row_tile) - starts_E // row_tile
    return tiles.sum() * row_tile / ROWS


#: Title, platform, target, backend, and rows multiplied for each real one.
TARGETS = (
    ("TPU v5p", "tpu", "tpu:v5p:2x2x1", "megablox", tile_rows(tpu._row_tile(buffer_rows(ROWS), E), False)),
    ("H200", "cuda", "gpu:h200:1", "triton", tile_rows(nvidia._row_tile(buffer_rows(ROWS), E), True)),
)


def attention() -> None:
    """Prints the table of attention. XLA counts a loop's body once; `plan.hlo` as often as it runs, kernels too."""
    print(f"jax {jax.__version__}; bfloat16, {T} tokens, heads {N} / {K} of {H}, blocks of 512 at most")
    try:
        device = parse_target("tpu:v5p:2x2x1").devices()[0]
    except ConfigError as error:
        print(f"\nTPU v5p: left out; {error}")
        return
    print("\nTPU v5p\n")
    print("| method | pass | kernels | FLOPs / useful | GB read and written | temporaries, MiB | XLA's FLOPs, GB |")
    print("|---|---|---|---|---|---|---|")
    methods = {
        "attend_in_blocks": (attend_in_blocks, Blocks.of(T, 512, None)),
        "attend_by_splash": (attend_by_splash, Blocks.of(T, 512, None, LANES)),
    }
    for method, (attend, blocks) in methods.items():
        for name, backward, useful in (("forward", False, 1), ("forward + backward", True, 3)):
            compiled = compile_attention(device, attend, blocks, backward)
            module, told = Module(compiled.as_text()), compiled.cost_analysis()
            ratio, gigabytes = module.matmul_flops() / (useful * USEFUL_ATTENTION), module.memory_bytes() / 1e9
            temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
            print(
                f"| {method} | {name} | {kernels(compiled)} | {ratio:.2f} | {gigabytes:.2f} | {temporaries:.0f} | "
                f"{told['flops']:.2g}, {told['bytes accessed'] / 1e9:.2f} |",
                flush=True,
            )


def compile_rule(device: jax.Device, rule: Callable, value_heads: int, backward: bool) -> jax.stages.Compiled:
    """One row of the gated delta rule by 16 key heads, all heads of 128, and the gradients of its inputs."""

    def run(q, k, v, g, beta, ids):
        if not backward:
            return rule(q, k, v, g, beta, ids, None)[0]
        out, pull = jax.vjp(lambda *inputs: rule(*inputs, ids, None)[0], q, k, v, g, beta)
        return out, pull(out)

    _, array = alone(device)
    keys, values, numbers = array(1, T, 16, 128), array(1, T, value_heads, 128), array(1, T, value_heads)
    decays, ids = array(1, T, value_heads, dtype=jnp.float32), array(1, T, dtype=jnp.int32)
    return jax.jit(run).lower(keys, keys, values, decays, numbers, ids).compile()


def rule(target: str = "tpu:v5p:2x2x1", value_heads: str = "32") -> None:
    """Prints the table of the gated delta rule; of fusions, the time that the compiler estimates at 1.75 GHz."""
    try:
        device = parse_target(target).devices()[0]
    except ConfigError as error:
        print(f"\n{target}: left out; {error}")
        return
    print(f"jax {jax.__version__}; bfloat16, {T} tokens, 16 key and {value_heads} value heads of 128; {target}\n")
    print("| method | pass | kernels | GFLOPs of products | GB read and written | fusions, ms | temporaries, MiB |")
    print("|---|---|---|---|---|---|---|")
    in_chunks = functools.partial(chunk_gated_delta_rule, chunk_size=chunk_size_for("tpu"))
    for method, one in (("chunks", in_chunks), ("pallas", pallas_gated_delta_rule)):
        for name, backward in (("forward", False), ("forward + backward", True)):
            compiled = compile_rule(device, one, int(value_heads), backward)
            module, cycles = Module(compiled.as_text()), 0.0
            for run in module.runs:
                estimate = re.search(r'"estimated_cycles":"(\d{1,14})"', run.instruction.attributes)
                if estimate and not run.fused:
                    cycles += int(estimate[1]) * (run.times or 0)
            print(
                f"| {method} | {name} | {kernels(compiled)} | {module.matmul_flops() / 1e9:.1f} | "
                f"{module.memory_bytes() / 1e9:.2f} | {cycles / 1.75e6:.2f} | "
                f"{compiled.memory_analysis().temp_size_in_bytes / 2**20:.0f} |",
                flush=True,
            )


def experts() -> None:
    """Prints a table of the experts for each target."""
    print(f"jax {jax.__version__}; bfloat16, {ROWS} rows, D {D}, F {F}, E {E}")
    for title, platform, target, backend, tiles in TARGETS:
        try:
            device = parse_target(target).devices()[0]
        except ConfigError as error:
            print(f"\n{title}: left out; {error}")
            continue
        methods = {
            f"grouped_matmul, {backend}": lambda *arrays, backend=backend: grouped_matmul(*arrays, backend),
            "jax.lax.ragged_dot": lax_ragged_dot,
        }
        print(f"\n{title}; in {backend}'s tiles, {tiles:.2f} rows multiplied for each real one\n")
        print("| method | pass | kernels | FLOPs counted / useful | temporaries, MiB |\n|---|---|---|---|---|")
        for method, matmul in methods.items():
            for name, function, useful in (("forward", forward, 1), ("forward + backward", forward_backward, 3)):
                compiled = compile_for(device, platform, function, matmul)
                counted, with_kernels = flops(compiled)
                ratio = f"{counted / (useful * USEFUL):.2f}"
                if kernels(compiled) and not with_kernels:
                    ratio += ", and the kernels'"
                temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
                print(f"| {method} | {name} | {kernels(compiled)} | {ratio} | {temporaries:.0f} |", flush=True)


if __name__ == "__main__":
    for part in sys.argv[1:] or ("experts", "attention", "rule"):
        name, _, settings = part.partition(":")
        target, _, heads = settings.rpartition(":")
        {"experts": experts, "attention": attention, "rule": rule}[name](*filter(None, (target, heads)))
