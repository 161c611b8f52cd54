"""This package's ways of `moe_block.py`, and what plain matmuls of JAX take."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from moe_block_subject import JAX_LIMIT, Answer, Builders, Method, Subject, inputs_of

import qwen_moe_jax as qmj
from qwen_moe_jax.config import ExecutionConfig, ModelConfig
from qwen_moe_jax.config.resolve import resolve
from qwen_moe_jax.moe.block import SparseMoeBlock
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.sharding.explicit import with_explicit_axes
from qwen_moe_jax.sharding.rules import BATCH


def our_builders(subject: Subject) -> Builders:
    """The ways this package has."""
    by_einsum = ExecutionConfig(dispatch="capacity", capacity_by="einsum")
    choice = resolve(
        by_einsum, ModelConfig.from_pretrained(subject.hub).moe, expert_shards=1, platform="cpu", training=True
    ).group_size
    executions = {
        "dropless": ExecutionConfig(dispatch="dropless"),
        "capacity by index": ExecutionConfig(dispatch="capacity", capacity_by="index"),
    }
    for size in sorted({choice, 128, 512}):
        name = f"capacity by einsum, groups of {size}" + (" (its choice)" if size == choice else "")
        executions[name] = dataclasses.replace(by_einsum, group_size=size)
    executions["dense"] = ExecutionConfig(dispatch="dense")
    return {(subject, name): functools.partial(our_method, subject, one) for name, one in executions.items()}


@functools.cache
def mesh() -> jax.sharding.Mesh:
    """One device."""
    return qmj.make_mesh(devices=jax.local_devices()[:1])


@functools.cache
def our_block(subject: Subject) -> SparseMoeBlock:
    """The block with experts drawn at random, and a router that selects a token's first coordinates."""
    config = ModelConfig.from_pretrained(subject.hub)
    scale, rngs = config.initializer_range, nnx.Rngs(0)
    make = ParameterFactory(mesh=mesh(), dtype=subject.dtype, initializer_range=scale, rngs=rngs)
    block = SparseMoeBlock(config.hidden_size, config.moe, act=config.hidden_act, make=make)
    router = block.gate.weight[...]
    block.gate.weight[...] = jax.device_put(jnp.eye(*router.shape, dtype=router.dtype), router.sharding)
    return block


@functools.cache
def our_programs(subject: Subject, execution: ExecutionConfig) -> tuple[Callable, Callable]:
    """forward(block, hidden, real) and both(block, hidden, real, cotangent): weights are arguments, as in a model."""

    def run(block, hidden_BTD, token_mask_BT):
        mixed_BTD, *counts = block(hidden_BTD, token_mask_BT, execution)
        return mixed_BTD, counts

    run = with_explicit_axes(run, mesh(), [P(BATCH, None, None), P(BATCH, None)])

    def forward(block, hidden_BTD, token_mask_BT):
        with exactly(subject):
            return run(block, hidden_BTD, token_mask_BT)

    def both(block, hidden_BTD, token_mask_BT, cotangent_BTD):
        with exactly(subject):
            mixed_BTD, pull, counts = jax.vjp(lambda *args: run(*args, token_mask_BT), block, hidden_BTD, has_aux=True)
            return mixed_BTD, pull(cotangent_BTD), counts

    return jax.jit(forward), jax.jit(both)


def our_method(subject: Subject, execution: ExecutionConfig) -> Method:
    """Our block under an execution."""
    block, inputs = our_block(subject.any_routing), inputs_of(subject)
    chosen = resolve(execution, block.moe, expert_shards=1, platform="cpu", training=True)
    forward, both = our_programs(subject.any_routing, chosen)
    hidden_BTD = jnp.asarray(inputs.hidden_TD[None], subject.dtype)
    cotangent_BTD = jnp.asarray(inputs.cotangent_TD[None], subject.dtype)
    token_mask_BT = jnp.ones(hidden_BTD.shape[:2], bool)

    def answer() -> Answer:
        mixed_BTD, (of_block, of_hidden_BTD), _ = both(block, hidden_BTD, token_mask_BT, cotangent_BTD)
        gate_up = [np.asarray(of_block.experts.gate_proj[...]), np.asarray(of_block.experts.up_proj[...])]
        return Answer(
            result_TD=np.asarray(mixed_BTD[0]),
            of_hidden_TD=np.asarray(of_hidden_BTD[0]),
            of_router_ED=np.asarray(of_block.gate.weight[...]),
            of_gate_up=np.concatenate(gate_up, axis=1),
            of_down=np.asarray(of_block.experts.down_proj[...]),
        )

    _, (stats, trace) = forward(block, hidden_BTD, token_mask_BT)
    inputs.check(np.asarray(trace.experts[0]), chosen.dispatch)
    return Method(
        run={
            "forward": lambda: jax.block_until_ready(forward(block, hidden_BTD, token_mask_BT)),
            "forward+backward": lambda: jax.block_until_ready(both(block, hidden_BTD, token_mask_BT, cotangent_BTD)),
        },
        flops=subject.useful_flops,
        limit=JAX_LIMIT,
        answer=None if chosen.dispatch == "capacity" else answer,
        dropped=float(jnp.sum(stats.dropped_per_expert)) / subject.rows,
    )


def exactly(subject: Subject) -> contextlib.AbstractContextManager:
    """float32 means float32 on accelerators too, as in the models."""
    return jax.default_matmul_precision("highest" if subject.dtype == "float32" else None)


def jax_limits(subject: Subject) -> Builders:
    """What the matmuls alone cost; and the device's ceiling, one large square matmul."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    wide, narrow = (subject.ffn, subject.hidden), (subject.hidden, subject.ffn)
    one_expert = [(subject.rows, subject.hidden), wide, wide, narrow]
    squares = [(side, side), (side, side)]
    return {
        (subject, f"JAX, square matmul of {side}"): functools.partial(
            jax_plain, subject, matmul, squares, 2.0 * side**3
        ),
        (subject, JAX_LIMIT): functools.partial(jax_plain, subject, plain_expert, one_expert, subject.useful_flops),
    }


def jax_plain(subject: Subject, function: Callable, shapes: Sequence[tuple[int, int]], flops: float) -> Method:
    """A function of matrices, with the gradients of all of them; its result is its cotangent."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    matrices = [jax.random.normal(key, shape, subject.dtype) for key, shape in zip(keys, shapes, strict=True)]
    matrices = [matrix * matrix.shape[1] ** -0.5 for matrix in matrices]

    @jax.jit
    def forward(*matrices):
        with exactly(subject):
            return function(*matrices)

    @jax.jit
    def both(*matrices):
        with exactly(subject):
            result, pull = jax.vjp(function, *matrices)
            return result, pull(result)

    return Method(
        run={
            "forward": lambda: jax.block_until_ready(forward(*matrices)),
            "forward+backward": lambda: jax.block_until_ready(both(*matrices)),
        },
        flops=flops,
    )


def plain_expert(x_RD: jax.Array, gate_FD: jax.Array, up_FD: jax.Array, down_DF: jax.Array) -> jax.Array:
    """All rows through one expert."""
    return matmul(jax.nn.silu(matmul(x_RD, gate_FD)) * matmul(x_RD, up_FD), down_DF)


@jax.custom_vjp
def matmul(x_RI: jax.Array, weight_OI: jax.Array) -> jax.Array:
    """`x @ weight.T` as fast as JAX has it: on CPUs, bfloat16 is fast only where float32 comes out."""
    return _contract(x_RI, weight_OI, 1, 1)


def _contract(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32).astype(left.dtype)


matmul.defvjp(
    lambda x_RI, weight_OI: (matmul(x_RI, weight_OI), (x_RI, weight_OI)),
    lambda saved, of_y_RO: (_contract(of_y_RO, saved[1], 1, 0), _contract(of_y_RO, saved[0], 0, 0)),
)
