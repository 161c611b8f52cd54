"""The sparse block, forward and backward, beside transformers and the hardware: `python benchmarks/moe_block.py`.

One process measures every method once a round, in an order shuffled anew each round, so that noise hits all alike; the
table shows medians. A method is the whole block (router, dispatch, experts, combination, and our counts), from hidden
states to hidden states; "forward+backward" adds the gradients of the input and of all weights. Its *limit* is what its
own framework needs for the useful FLOPs alone: three plain matmuls of all rows with a single expert.

Every method sees the same input and weights and runs its own router. What comes out of the routers is decided
beforehand ("balanced", or "zipf": an expert's popularity is one over its rank): the first coordinates of every token
are the wanted logits, and the router's matrix selects them. Before anything is timed, all methods that drop nothing
must agree in float32, in result and gradients. Capacity drops the same in training and evaluation here (factor 1.25);
what it drops it does not compute, so the share stands beside its times.

torch's threads spin for some milliseconds after a call, on the cores that the next method needs: a pause precedes each
measurement. How they wait is left to torch, or to OMP_WAIT_POLICY where it is set. Both frameworks use all cores, one
at a time, and are otherwise as the environment sets them, which is printed.

On a GPU, with the shapes of Qwen3-30B-A3B:

    python benchmarks/moe_block.py --dtype bfloat16 --tokens 16384 --hidden 2048 --ffn 768 --experts 128 --active 8
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import os
import pathlib
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

import qwen_moe_jax as qmj
from qwen_moe_jax.config import ExecutionConfig, ModelConfig
from qwen_moe_jax.config.resolve import resolve
from qwen_moe_jax.moe.block import SparseMoeBlock
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.sharding.explicit import with_explicit_axes
from qwen_moe_jax.sharding.rules import BATCH

PASSES = ("forward", "forward+backward")
DTYPES = ("float32", "bfloat16")
ROUTINGS = ("balanced", "zipf")
FAMILIES = ("limit", "dropless", "capacity", "dense", "torch", "scaling")
SIZES = ("tokens", "hidden", "ffn", "experts", "active")
SCALED_EXPERTS = (16, 32, 64, 128)

#: Names that other rows are divided by.
JAX_LIMIT, TORCH_LIMIT, GROUPED_MM = "JAX, limit", "torch, limit", "transformers, grouped_mm"
EAGER = "transformers, eager"

#: Relative L2 distance that methods without drops may have from each other in float32.
TOLERANCE = 1e-4
#: Beginnings of environment variables that change times: compilers, threads, memory.
TELLING = ("XLA_", "JAX_", "OMP_", "KMP_", "MKL_", "MALLOC_", "GLIBC_", "LD_PRELOAD")
#: Longer than the threads of either framework spin.
PAUSE_SECONDS = 0.03


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What is computed."""

    dtype: str
    routing: str
    tokens: int
    hidden: int
    ffn: int
    experts: int
    active: int

    @property
    def any_routing(self) -> "Subject":
        """The same for whatever does not depend on the routing: weights, programs and limits."""
        return dataclasses.replace(self, routing="any")

    @property
    def rows(self) -> int:
        """Assignments of a token to an expert."""
        return self.tokens * self.active

    @property
    def useful_flops(self) -> float:
        """Of a forward pass through the experts that were chosen."""
        return 6.0 * self.rows * self.hidden * self.ffn

    @property
    def hub(self) -> dict[str, Any]:
        """The config.json, for transformers and for us."""
        return dict(
            model_type="qwen3_moe",
            vocab_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            hidden_size=self.hidden,
            moe_intermediate_size=self.ffn,
            num_experts=self.experts,
            num_experts_per_tok=self.active,
            norm_topk_prob=True,
            initializer_range=self.hidden**-0.5,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a block computes, as float32 NumPy: the result, and the gradients of its inner product with a cotangent."""

    result_TD: np.ndarray
    of_hidden_TD: np.ndarray
    of_router_ED: np.ndarray
    of_gate_up: np.ndarray
    of_down: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Something to be timed.

    Attributes:
        run: for each of `PASSES`, a call that returns when the work is done.
        flops: useful ones of a forward pass; a backward pass has twice as many.
        limit: the name of the method that bounds this one; None for a limit.
        answer: what it computes; None where it need not be what the others compute.
        dropped: the share of assignments that reach no expert.
    """

    run: Mapping[str, Callable[[], Any]]
    flops: float
    limit: str | None = None
    answer: Callable[[], Answer] | None = None
    dropped: float = 0.0


#: A row of the table: what is computed, and the name of the method.
Row = tuple[Subject, str]
#: What compiles a method and brings its arrays to the device.
Builders = dict[Row, Callable[[], Method]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """NumPy: tokens, the cotangent of the result, and the experts that the routers must find."""

    hidden_TD: np.ndarray
    cotangent_TD: np.ndarray
    experts_TA: np.ndarray

    def check(self, found_TA: np.ndarray, name: str) -> None:
        """Raises unless a router found them."""
        if not np.array_equal(np.sort(found_TA, axis=1), np.sort(self.experts_TA, axis=1)):
            raise AssertionError(f"{name}: the router did not choose the wanted experts.")


@functools.cache
def inputs_of(subject: Subject) -> Inputs:
    """Tokens that carry their logits in their first coordinates."""
    rng = np.random.default_rng(0)
    hidden_TD = rng.standard_normal((subject.tokens, subject.hidden), np.float32)
    experts_TA = wanted_experts(subject, rng)
    logits_TE = 0.5 * rng.standard_normal((subject.tokens, subject.experts), np.float32)
    # Eighths below 8 are exact in bfloat16, so that it routes as float32 does.
    np.put_along_axis(logits_TE, experts_TA, 7.875 - np.arange(subject.active, dtype=np.float32) / 8, axis=1)
    hidden_TD[:, : subject.experts] = logits_TE
    return Inputs(
        hidden_TD=hidden_TD,
        cotangent_TD=rng.standard_normal(hidden_TD.shape, np.float32),
        experts_TA=experts_TA,
    )


def wanted_experts(subject: Subject, rng: np.random.Generator) -> np.ndarray:
    """Distinct experts for every token, int [T, A], the strongest first."""
    if subject.routing == "balanced":
        in_turn_TA = np.arange(subject.rows).reshape(subject.tokens, subject.active) % subject.experts
        return rng.permutation(in_turn_TA)  # of the tokens: as in a text, neighbours may want the same
    popularity_E = rng.permutation(1 / np.arange(1, subject.experts + 1))
    # The A largest of log-probabilities with Gumbel noise are a draw of A without replacement.
    keys_TE = np.log(popularity_E) + rng.gumbel(size=(subject.tokens, subject.experts))
    return np.argsort(-keys_TE, axis=1)[:, : subject.active]


def all_builders(subject: Subject, families: Collection[str], torch_too: bool) -> Builders:
    """All rows of a subject, as far as their families are wanted."""
    builders = jax_limits(subject.any_routing) if "limit" in families else {}
    builders |= {row: build for row, build in our_builders(subject).items() if row[1].split()[0] in families}
    return builders | (torch_builders(subject) if torch_too and "torch" in families else {})


def scaled_builders(subject: Subject) -> Builders:
    """Dropless with few and with many experts; what a token costs stays the same."""
    builders: Builders = {}
    for experts in SCALED_EXPERTS:
        if subject.active <= experts <= subject.hidden:
            row = dataclasses.replace(subject, experts=experts), "dropless"
            builders[row] = our_builders(row[0])[row]
    return builders


# JAX


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


# torch


def why_no_torch() -> str | None:
    """What keeps us from measuring torch, or None."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        return f"without torch's rows: {' and '.join(absent)} not installed"
    import torch

    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return "without torch's rows: JAX uses a GPU that torch does not see"
    return None


def torch_builders(subject: Subject) -> Builders:
    """transformers' block with its implementations of the experts, and their limit."""
    import torch

    torch.set_num_threads(os.cpu_count())
    return {
        (subject.any_routing, TORCH_LIMIT): functools.partial(torch_plain_expert, subject),
        (subject, GROUPED_MM): functools.partial(transformers_method, subject, "grouped_mm"),
        (subject, EAGER): functools.partial(transformers_method, subject, "eager"),
    }


def to_torch(subject: Subject, array: np.ndarray):
    """A tensor where JAX computes, in the subject's dtype."""
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    return torch.tensor(np.asarray(array, np.float32), device=device).to(getattr(torch, subject.dtype))


@functools.cache
def torch_weights(subject: Subject) -> dict[str, Any]:
    """Our block's weights, under transformers' names."""
    block = our_block(subject)
    gate_up = [np.asarray(block.experts.gate_proj[...]), np.asarray(block.experts.up_proj[...])]
    return {
        "gate.weight": to_torch(subject, np.asarray(block.gate.weight[...])),
        "experts.gate_up_proj": to_torch(subject, np.concatenate(gate_up, axis=1)),
        "experts.down_proj": to_torch(subject, np.asarray(block.experts.down_proj[...])),
    }


def transformers_method(subject: Subject, implementation: str) -> Method:
    """Their block, with the weights of ours."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**subject.hub, experts_implementation=implementation))
    block.load_state_dict(torch_weights(subject.any_routing), assign=True)
    inputs = inputs_of(subject)
    hidden_BTD = to_torch(subject, inputs.hidden_TD[None]).requires_grad_()
    cotangent_BTD = to_torch(subject, inputs.cotangent_TD[None])
    asked = [hidden_BTD, block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj]

    def both():
        mixed_BTD = block(hidden_BTD)
        return mixed_BTD, torch.autograd.grad(mixed_BTD, asked, cotangent_BTD)

    def answer() -> Answer:
        mixed_BTD, (of_hidden_BTD, *of_weights) = both()
        found = [mixed_BTD[0].detach(), of_hidden_BTD[0], *of_weights]
        names = [field.name for field in dataclasses.fields(Answer)]
        return Answer(**{name: tensor.float().cpu().numpy() for name, tensor in zip(names, found, strict=True)})

    with torch.no_grad():
        inputs.check(block.gate(hidden_BTD)[2].cpu().numpy(), implementation)
    check_implementation(block, hidden_BTD, implementation)
    return Method(
        run=torch_passes(lambda: block(hidden_BTD), both),
        flops=subject.useful_flops,
        limit=TORCH_LIMIT,
        answer=answer,
    )


def check_implementation(block, hidden_BTD, implementation: str) -> None:
    """Raises unless torch's grouped matmul is called where it should be, and only there."""
    import torch
    from torch.overrides import TorchFunctionMode

    called = set()

    class Listener(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            called.add(function.__name__)
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Listener():
        block(hidden_BTD)
    if any("grouped_mm" in name for name in called) != (implementation == "grouped_mm"):
        raise AssertionError(f"transformers does not compute its experts by {implementation!r}.")


def torch_plain_expert(subject: Subject) -> Method:
    """As `plain_expert`."""
    import torch
    from torch.nn.functional import linear, silu

    rng = np.random.default_rng(0)

    def drawn(rows: int, columns: int):
        return to_torch(subject, rng.standard_normal((rows, columns)) * columns**-0.5).requires_grad_()

    x_RD, down_DF = drawn(subject.rows, subject.hidden), drawn(subject.hidden, subject.ffn)
    gate_FD, up_FD = drawn(subject.ffn, subject.hidden), drawn(subject.ffn, subject.hidden)

    def forward():
        return linear(silu(linear(x_RD, gate_FD)) * linear(x_RD, up_FD), down_DF)

    def both():
        result = forward()
        return torch.autograd.grad(result, [x_RD, gate_FD, up_FD, down_DF], result.detach())

    return Method(run=torch_passes(forward, both), flops=subject.useful_flops)


def torch_passes(forward: Callable[[], Any], both: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """The passes of a `Method`; forward alone keeps nothing for a backward pass."""
    import torch

    def finished(run: Callable[[], Any], gradients: bool) -> None:
        with torch.set_grad_enabled(gradients):
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return {
        "forward": functools.partial(finished, forward, False),
        "forward+backward": functools.partial(finished, both, True),
    }


# Measuring


def check_agreement(subject: Subject, torch_too: bool) -> str:
    """Raises unless all methods without drops compute the same in float32, on 2048 tokens at most."""
    subject = dataclasses.replace(subject, dtype="float32", tokens=min(subject.tokens, 2048))
    builders = all_builders(subject, ("dropless", "dense", "torch"), torch_too)
    methods = {name: build() for (_, name), build in builders.items()}
    answers = {name: dataclasses.asdict(method.answer()) for name, method in methods.items() if method.answer}
    reference = EAGER if torch_too else "dense"
    wanted = answers.pop(reference)
    distances = {
        (name, part): float(np.linalg.norm(found - wanted[part]) / np.linalg.norm(wanted[part]))
        for name, answer in answers.items()
        for part, found in answer.items()
    }
    (name, part), worst = max(distances.items(), key=lambda item: item[1])
    if not worst <= TOLERANCE:
        raise AssertionError(f"{subject.routing}: {part} of {name} is {worst:.1e} from that of {reference}.")
    others = "; ".join(answers)
    return f"{subject.routing}: in float32, {others}: as {reference}, to {worst:.0e}, gradients included"


def build_warm(builders: Builders) -> tuple[dict[Row, Method], list[str]]:
    """The methods, compiled and warm, and which are missing and why: too little memory for one ends no others."""
    methods, missing = {}, []
    for (subject, name), build in builders.items():
        try:
            method = build()
            for run in method.run.values():
                run()
            methods[subject, name] = method
        except RuntimeError as error:  # as the errors of both frameworks are
            missing.append(f"{subject.dtype}, {subject.routing}: without {name}: {str(error).strip().splitlines()[0]}")
    return methods, missing


def measure(methods: Mapping[Row, Method], rounds: int) -> dict[Row, dict[str, list[float]]]:
    """Milliseconds of both passes of every method, once a round."""
    found = {row: {kind: [] for kind in PASSES} for row in methods}
    order, rng = list(itertools.product(methods, PASSES)), random.Random(0)
    for _ in range(rounds):
        rng.shuffle(order)
        for row, kind in order:
            time.sleep(PAUSE_SECONDS)
            start = time.perf_counter()
            methods[row].run[kind]()
            found[row][kind].append(1e3 * (time.perf_counter() - start))
    return found


# Telling


def methods_table(methods: Mapping[Row, Method], medians: Mapping[Row, Mapping[str, float]]) -> str:
    """Milliseconds of every method, their ratio to the limit and to transformers' default, and useful TFLOP/s."""
    header = ["dtype", "routing", "method", "dropped"]
    for kind in PASSES:
        header += [f"{kind}, ms", "/ limit", "/ grouped_mm", "TFLOP/s"]

    def ratio(took: float, to: Row, kind: str) -> str:
        return f"{took / medians[to][kind]:.2f}" if to in medians else ""

    def cells(subject: Subject, name: str) -> Iterator[str]:
        method = methods[subject, name]
        yield from (subject.dtype, subject.routing, name, f"{method.dropped:.1%}" if method.dropped else "")
        for kind, forwards in zip(PASSES, (1, 3), strict=True):
            took = medians[subject, name][kind]
            yield f"{took:.1f}"
            yield ratio(took, (subject.any_routing, method.limit), kind)
            yield ratio(took, (subject, GROUPED_MM), kind)
            yield f"{forwards * method.flops / took / 1e9:.3g}"

    return markdown_table(header, (cells(*row) for row in methods))


def scaling_table(medians: Mapping[Row, Mapping[str, float]]) -> str:
    """Dropless with more and more experts and the same FLOPs: milliseconds, and their ratio to the fewest experts."""

    def cells(dtype: str, kind: str) -> Iterator[str]:
        times = [passes[kind] for (subject, _), passes in medians.items() if subject.dtype == dtype]
        yield from (dtype, kind)
        yield from (f"{took:.1f} ({took / times[0]:.2f})" for took in times)

    dtypes = dict.fromkeys(subject.dtype for subject, _ in medians)
    experts = dict.fromkeys(f"{subject.experts} experts" for subject, _ in medians)
    rows = (cells(dtype, kind) for dtype, kind in itertools.product(dtypes, PASSES))
    return markdown_table(["dtype", "pass", *(f"{name}, ms" for name in experts)], rows)


def markdown_table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table that reads as plain text too."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def circumstances() -> list[str]:
    """When, where, with what, and whatever else may have touched the numbers."""
    packages = ("jax", "jaxlib", "flax", "torch", "transformers")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages if importlib.util.find_spec(name)]
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(TELLING)]
    return [
        f"{datetime.date.today()}, {device_name()}",
        f"Python {platform.python_version()}, {', '.join(versions)}",
        *(f"environment: {setting}" for setting in settings),
    ]


def device_name() -> str:
    """What computes."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    info = pathlib.Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{model[1] if model else platform.processor()}, {os.cpu_count()} cores"


def spread(milliseconds: Mapping[Row, Mapping[str, Sequence[float]]]) -> float:
    """How far from its median a measurement typically lies, relative to it."""
    series = [times for passes in milliseconds.values() for times in passes.values()]
    return statistics.median(abs(took / statistics.median(times) - 1) for times in series for took in times)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=ROUTINGS)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=FAMILIES)
    for name, size in zip(SIZES, (2048, 512, 256, 32, 4), strict=True):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--markdown", metavar="FILE", type=pathlib.Path, help="write what is printed there, too")
    arguments = parser.parse_args()
    if not arguments.active <= arguments.experts <= arguments.hidden:
        parser.error("active <= experts <= hidden must hold: a token has a coordinate for every expert's logit")
    return arguments


def main() -> None:
    """Checks, measures, prints."""
    arguments = parse_arguments()
    sizes = {name: getattr(arguments, name) for name in SIZES}
    no_torch = why_no_torch()
    kinds = itertools.product(arguments.dtype, arguments.routing)
    subjects = [Subject(dtype=dtype, routing=routing, **sizes) for dtype, routing in kinds]
    agreed = [check_agreement(subject, not no_torch) for subject in subjects[: len(arguments.routing)]]

    rows: Builders = {}
    scaled: Builders = {}
    for subject in subjects:
        rows |= all_builders(subject, arguments.only, not no_torch)
        if "scaling" in arguments.only and subject.routing == arguments.routing[0]:
            scaled |= scaled_builders(subject)
    methods, missing = build_warm(rows | scaled)
    milliseconds = measure(methods, arguments.rounds)
    medians = {row: {kind: statistics.median(milliseconds[row][kind]) for kind in PASSES} for row in methods}

    told = circumstances() + [", ".join(f"{name} {size}" for name, size in sizes.items())]
    told += [
        f"medians of {arguments.rounds} rounds; a measurement is typically {spread(milliseconds):.0%} off its median"
    ]
    told += agreed + missing + ([no_torch] if no_torch else [])
    text = "\n".join(f"- {line}" for line in told)
    if measured := {row: methods[row] for row in rows if row in methods}:
        text += "\n\n" + methods_table(measured, medians)
    if measured := {row: medians[row] for row in scaled if row in methods}:
        text += f"\n\nDropless, {arguments.routing[0]}, with more experts:\n\n" + scaling_table(measured)
    print(text)
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(f"# The sparse block\n\n{text}\n")


if __name__ == "__main__":
    main()
