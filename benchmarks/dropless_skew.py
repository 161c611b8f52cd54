"""Dropless under skewed routings: exactness against `dense`, rounds, compiled memory and time, on 1 and 8 devices.

    python benchmarks/dropless_skew.py

The routings are forced (`moe.workloads`): balanced, Zipf (exponent 1.2), every token to one expert first, every token
to the experts of one of eight devices. All run the same compiled program, so its memory is the same; further rounds
take longer.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

import qwen_moe_jax as qmj
from qwen_moe_jax.config import MoEConfig
from qwen_moe_jax.moe.block import SparseMoeBlock
from qwen_moe_jax.moe.dispatch import get_dispatcher
from qwen_moe_jax.moe.router import Routing
from qwen_moe_jax.moe.workloads import workload
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.sharding.explicit import with_explicit_axes
from qwen_moe_jax.sharding.rules import BATCH

B, T, D, F, E, A = 8, 256, 256, 128, 32, 4
SKEWS = ("balanced", "zipf", "hot_expert", "hot_device")
SETTINGS = {
    "1 device": ({}, "all_gather", "dropless"),
    "expert=8, all_gather": ({"expert": 8}, "all_gather", "dropless"),
    "expert=8, all_to_all": ({"expert": 8}, "all_to_all", "dropless"),
}


def experts_of(skew: str) -> np.ndarray:
    """The experts of every token, int32 [B, T, A], all different."""
    return workload(skew, (B, T), num_experts=E, chosen=A, devices=8)


@functools.cache
def compiled(name: str, buffer_factor: float | None):
    """The experts and the compiled gradient of a setting, or of "dense"."""
    axes, exchange, dispatch = SETTINGS.get(name, ({}, "all_gather", "dense"))
    mesh = qmj.make_mesh(**axes)
    make = ParameterFactory(mesh=mesh, dtype="float32", initializer_range=0.05, rngs=nnx.Rngs(0))
    moe = MoEConfig(num_experts=E, num_experts_per_tok=A, moe_intermediate_size=F, norm_topk_prob=True)
    experts = SparseMoeBlock(D, moe, make=make).experts
    execution = qmj.ExecutionConfig(
        dtype="float32", dispatch=dispatch, exchange=exchange, buffer_factor=buffer_factor, grouped_matmul="blocks"
    )
    dispatcher = get_dispatcher(dispatch)

    def inside(experts, hidden_BTD, weights_BTA, experts_BTA):
        routing = Routing(
            experts_BTA=experts_BTA,
            weights_BTA=weights_BTA,
            probs_BTE=jnp.zeros((B, T, E), out_sharding=P(BATCH, None, None)),
            token_mask_BT=jnp.ones((B, T), bool, out_sharding=P(BATCH, None)),
        )
        rows, plan = dispatcher.dispatch(hidden_BTD, routing, execution)
        return dispatcher.combine(experts(rows, "blocks"), plan)

    def objective(experts, hidden_BTD, weights_BTA, experts_BTA):
        tokens = P(BATCH, None, None)
        run = with_explicit_axes(inside, mesh, [tokens, tokens, tokens])
        combined_BTD, drops = run(experts, hidden_BTD, weights_BTA, experts_BTA)
        return jnp.sum(jnp.sin(combined_BTD)), (combined_BTD, drops.rounds)

    gradient = jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True))
    shapes = np.zeros((B, T, D), np.float32), np.zeros((B, T, A), np.float32), np.zeros((B, T, A), np.int32)
    return experts, gradient.lower(experts, *shapes).compile()


def relative(found, wanted) -> float:
    """Relative L2 distance."""
    return float(np.linalg.norm(np.asarray(found) - np.asarray(wanted)) / np.linalg.norm(np.asarray(wanted)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each, of which the median is shown")
    parser.add_argument("--buffer-factor", type=float, help="of ExecutionConfig; its own choice if not given")
    arguments = parser.parse_args()
    rng = np.random.default_rng(1)
    hidden_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
    weights_BTA = rng.random((B, T, A)).astype(np.float32)
    print(f"float32, tokens {B * T}, D {D}, F {F}, E {E}, A {A}; forward and backward of dispatch, experts, combine")
    print(f"{'setting':22} {'routing':16} rounds  forward error  gradient error  temporaries  time ÷ balanced")
    for name in SETTINGS:
        balanced = None
        for skew in SKEWS:
            inputs = hidden_BTD, weights_BTA, experts_of(skew)
            dense_experts, dense = compiled("dense", None)
            (_, (wanted_BTD, _)), wanted = dense(dense_experts, *inputs)
            experts, program = compiled(name, arguments.buffer_factor)
            (_, (found_BTD, rounds)), found = program(experts, *inputs)
            errors = [relative(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)]
            seconds = []
            for _ in range(arguments.repeats):
                start = time.perf_counter()
                jax.block_until_ready(program(experts, *inputs))
                seconds.append(time.perf_counter() - start)
            median = statistics.median(seconds)
            balanced = balanced or median
            megabytes = program.memory_analysis().temp_size_in_bytes / 1e6
            print(
                f"{name:22} {skew:16} {int(rounds):6}  {relative(found_BTD, wanted_BTD):13.1e}  {max(errors):14.1e}"
                f"  {megabytes:8.1f} MB  {median / balanced:15.2f}"
            )


if __name__ == "__main__":
    qmj.make_mesh(expert=8)  # offers eight simulated devices before anything else asks for one
    main()
