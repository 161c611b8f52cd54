"""The gated delta rule in chunks on TPUs, by a Pallas kernel whose state never leaves the core's vector memory.

As in `delta_rule.py`, whose formulas these are; there, XLA writes each of some fifty small arrays of a chunk to the
chip's memory and reads it back. Here a step of the kernel's grid is one chunk of a key head and of its value heads,
four at most, and chunks follow one another in the grid's last axis, so that the state waits for the next of them where
it is. The backward kernel goes through the chunks in reverse, computes each again from the state before it, and
differentiates it there and then: it is JAX's own gradient of the same function.

Letters of this file are those of `delta_rule.py`: n chunks of a row, C tokens of a chunk, K key heads, G value heads
of a step, N value heads, H size of a key head, P size of a value head.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_moe_jax.attention_kernels.blockwise import ATTENDED
from qwen_moe_jax.attention_kernels.delta_rule import EPSILON, chunk_runs
from qwen_moe_jax.attention_kernels.runs import runs_of

#: Tokens of a chunk, and the multiple that head sizes must be of: rows and columns of a TPU's matrix unit.
LANES = 128

#: Rows of a vector register of float32.
SUBLANES = 8

#: Value heads of a step of the grid, at most: the backward kernel of eight asks for more vector memory than XLA gives a
#: kernel on a v5p.
TOGETHER = 4


class _Inputs(NamedTuple):
    """What the rule reads of tokens, as the kernels take it."""

    q: jax.Array  # [B, T, K * H]
    k: jax.Array  # [B, T, K * H]
    v: jax.Array  # [B, T, N * P]
    g: jax.Array  # float32 [B, groups, n, G, C]
    beta: jax.Array  # float32 [B, groups, n, G, C]


class _Chunk(NamedTuple):
    """One chunk of one key head and G value heads, float32."""

    states: tuple[jax.Array, ...]  # G of [H, P]
    q: jax.Array  # [C, H]
    k: jax.Array  # [C, H]
    values: tuple[jax.Array, ...]  # G of [C, P]
    decays: tuple[jax.Array, ...]  # G of [1, C]
    betas: tuple[jax.Array, ...]  # G of [1, C]


class _Sizes(NamedTuple):
    """What an instance of the kernels is made for."""

    groups: int  # of value heads, each a step of the grid
    shared: int  # value heads of a group, which share a key head
    key_size: int
    value_size: int
    groups_of_key: int  # groups that share a key head
    interpret: bool


def pallas_gated_delta_rule(
    q_BTKH: jax.Array,
    k_BTKH: jax.Array,
    v_BTNP: jax.Array,
    g_BTN: jax.Array,
    beta_BTN: jax.Array,
    segment_ids_BT: jax.Array,
    initial_state_BNHP: jax.Array | None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`chunk_gated_delta_rule` by a kernel for TPUs, in chunks of `LANES` tokens.

    Arguments and results are the same, and so is what the backward pass keeps. A row shorter than a chunk costs as
    much as one.

    Args:
        q_BTKH: queries, not yet normalised, bfloat16 or float32; on a TPU, H and P must be multiples of `LANES`.
        k_BTKH: keys, likewise.
        v_BTNP: values.
        g_BTN: logarithm of the decay, at most 0.
        beta_BTN: how much of the difference is written, between 0 and 1.
        segment_ids_BT: int32; 0 is padding.
        initial_state_BNHP: float32; None is zeros.
        interpret: run the kernels as ordinary operations, to test them where there is no TPU.
    """
    batch, tokens, key_heads, key_size = k_BTKH.shape
    heads, value_size = v_BTNP.shape[2:]
    if initial_state_BNHP is None:
        initial_state_BNHP = jnp.zeros((batch, heads, key_size, value_size), jnp.float32)
    if tokens == 0:
        return v_BTNP, initial_state_BNHP
    shared = next(size for size in range(TOGETHER, 0, -1) if heads // key_heads % size == 0)
    groups = heads // shared

    def rows(x_BTN: jax.Array) -> jax.Array:
        x_BTN = jnp.pad(x_BTN.astype(jnp.float32), ((0, 0), (0, -tokens % LANES), (0, 0)))
        return x_BTN.reshape(batch, -1, LANES, groups, shared).transpose(0, 3, 1, 4, 2)

    q, k, v = (x.reshape(batch, tokens, -1) for x in (q_BTKH, k_BTKH, v_BTNP))
    sizes = _Sizes(groups, shared, key_size, value_size, groups // key_heads, interpret)
    inputs = _Inputs(q, k, v, rows(g_BTN), rows(beta_BTN))
    out, state_BNHP = _rule(inputs, _runs(segment_ids_BT), initial_state_BNHP.astype(jnp.float32), sizes)
    return out.reshape(v_BTNP.shape), state_BNHP


def _runs(segment_ids_BT: jax.Array) -> jax.Array:
    """What a chunk's tokens belong to, float32 [B, n, 4, C]: run, and 1 or 0 whether the state reaches them.

    That is: whether the state before the chunk reaches a token, whether what a token writes reaches the state after
    the chunk, and whether the state before reaches the state after.
    """
    run_nBC, before_nB, after_nB = chunk_runs(runs_of(segment_ids_BT), LANES)
    goes_on, stays = run_nBC == before_nB[..., None], run_nBC == after_nB[..., None]
    whole = jnp.broadcast_to((before_nB == after_nB)[..., None], run_nBC.shape)
    return jnp.stack([run_nBC, goes_on, stays, whole], axis=2).astype(jnp.float32).swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rule(inputs: _Inputs, runs: jax.Array, state_BNHP: jax.Array, sizes: _Sizes) -> tuple[jax.Array, jax.Array]:
    """Results [B, T, N * P] in the dtype of the values, and the final state."""
    out, state_BNHP = _run_forward(inputs, runs, state_BNHP, sizes, keep_states=False)
    return out, state_BNHP


def _forward(inputs: _Inputs, runs: jax.Array, state_BNHP: jax.Array, sizes: _Sizes):
    out, state_BNHP, states = _run_forward(inputs, runs, state_BNHP, sizes, keep_states=True)
    # As in `delta_rule.py`: where results of attention are saved, the states before the chunks are, too.
    return (checkpoint_name(out, ATTENDED), state_BNHP), (inputs, runs, checkpoint_name(states, ATTENDED))


def _backward(sizes: _Sizes, saved, gradients):
    inputs, runs, states = saved
    of_out, of_state_BNHP = gradients
    of_q, of_k, *others, of_state_BNHP = _run_backward(inputs, runs, states, of_out, of_state_BNHP, sizes)
    of_q, of_k = (_sum_of_groups(x, of, sizes) for x, of in ((inputs.q, of_q), (inputs.k, of_k)))
    return _Inputs(of_q, of_k, *others), None, of_state_BNHP


def _sum_of_groups(x: jax.Array, of_x: jax.Array, sizes: _Sizes) -> jax.Array:
    """The gradient of queries or keys [B, T, K * H], of those that the groups of value heads pass on."""
    if sizes.groups_of_key == 1:
        return of_x
    parts = of_x.reshape(*x.shape[:2], -1, sizes.groups_of_key, sizes.key_size)
    return jnp.sum(parts, axis=3).astype(x.dtype).reshape(x.shape)


_rule.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames=("sizes", "keep_states"))  # JAX never drops a kernel, but this it does
def _run_forward(inputs: _Inputs, runs: jax.Array, state_BNHP: jax.Array, sizes: _Sizes, keep_states: bool):
    """Results, the final state, and the states [B, n, N, H, P] before each chunk if they are to be kept."""
    specs = _Specs(sizes, runs.shape[1], reverse=False)
    states = jax.ShapeDtypeStruct((*runs.shape[:2], *state_BNHP.shape[1:]), jnp.float32)
    returned = 3 if keep_states else 2
    return _call(
        functools.partial(_forward_kernel, sizes),
        specs,
        [specs.runs, *specs.inputs, specs.state],
        [specs.values, specs.state, specs.states][:returned],
        [*map(_shape_of, (inputs.v, state_BNHP)), states][:returned],
        flops=_chunk_flops(sizes),
    )(runs, *inputs, state_BNHP)


def _run_backward(inputs: _Inputs, runs: jax.Array, states: jax.Array, of_out, of_state_BNHP, sizes: _Sizes):
    """The gradients of the inputs and of the initial state; queries' and keys' of each group of value heads."""
    keys = _shape_of(inputs.q)
    if sizes.groups_of_key > 1:
        keys = jax.ShapeDtypeStruct((*keys.shape[:2], keys.shape[2] * sizes.groups_of_key), jnp.float32)
    specs = _Specs(sizes, runs.shape[1], reverse=True)
    return _call(
        functools.partial(_backward_kernel, sizes),
        specs,
        [specs.runs, *specs.inputs, specs.states, specs.values, specs.state],
        [specs.of_keys, specs.of_keys, *specs.inputs[2:], specs.state],
        [keys, keys, *map(_shape_of, (*inputs[2:], of_state_BNHP))],
        flops=_chunk_flops(sizes) + _gradient_flops(sizes),
    )(runs, *inputs, states, of_out, of_state_BNHP)


def _shape_of(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


class _Specs:
    """Which block of an array a step of the grid [B, groups, n] reads or writes."""

    def __init__(self, sizes: _Sizes, chunks: int, reverse: bool):
        def at(chunk):
            return chunks - 1 - chunk if reverse else chunk

        def key_of(group):
            return group if groups_of_key == 1 else jax.lax.div(group, jnp.int32(groups_of_key))

        shared, key_size, value_size, groups_of_key = sizes[1:5]
        self.sizes = sizes
        keys = pl.BlockSpec((1, LANES, key_size), lambda b, k, n: (b, at(n), key_of(k)))
        self.of_keys = pl.BlockSpec((1, LANES, key_size), lambda b, k, n: (b, at(n), k))
        heads = pl.BlockSpec((1, 1, 1, shared, LANES), lambda b, k, n: (b, k, at(n), 0, 0))
        self.values = pl.BlockSpec((1, LANES, shared * value_size), lambda b, k, n: (b, at(n), k))
        self.inputs = keys, keys, self.values, heads, heads
        self.runs = pl.BlockSpec((1, 1, 4, LANES), lambda b, k, n: (b, at(n), 0, 0))
        self.state = pl.BlockSpec((1, shared, key_size, value_size), lambda b, k, n: (b, k, 0, 0))
        self.states = pl.BlockSpec((1, 1, shared, key_size, value_size), lambda b, k, n: (b, at(n), k, 0, 0))


def _call(kernel, specs: _Specs, in_specs: list, out_specs: list, out_shape: list, flops: int):
    """`pallas_call` over the grid [B, groups, n], with the state of a group's value heads carried along n."""
    sizes = specs.sizes

    def run(runs: jax.Array, *arrays: jax.Array) -> Any:
        grid = runs.shape[0], sizes.groups, runs.shape[1]
        steps = grid[0] * grid[1] * grid[2]
        moved = sum(x.size * x.dtype.itemsize for x in (runs, *arrays, *out_shape))
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=[pltpu.VMEM((sizes.shared, sizes.key_size, sizes.value_size), jnp.float32)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=steps * flops, transcendentals=steps * sizes.shared * LANES**2, bytes_accessed=moved
            ),
            interpret=sizes.interpret,
            name="gated_delta_rule",
        )(runs, *arrays)

    return run


def _forward_kernel(sizes: _Sizes, runs, q, k, v, g, beta, start, out, final, *others) -> None:
    """A step of the forward grid; `others` are the states to keep, if they are, and the carried state."""
    *kept, carried = others
    index, value_size = pl.program_id(2), sizes.value_size

    @pl.when(index == 0)
    def _():
        carried[...] = start[0]

    for states in kept:
        states[0, 0] = carried[...]
    chunk = _read(sizes, q, k, v, g, beta, carried)
    results, after = _one_chunk(chunk, runs[0, 0])
    for head, (result, state) in enumerate(zip(results, after, strict=True)):
        out[0, :, head * value_size : (head + 1) * value_size] = result.astype(out.dtype)
        carried[head] = state

    @pl.when(index == pl.num_programs(2) - 1)
    def _():
        final[0] = carried[...]


def _backward_kernel(
    sizes: _Sizes, runs, q, k, v, g, beta, states, of_out, of_final, of_q, of_k, of_v, of_g, of_beta, of_start, carried
) -> None:
    """A step of the backward grid, whose chunks come last to first; the gradient of the state is carried."""
    index, value_size = pl.program_id(2), sizes.value_size

    @pl.when(index == 0)
    def _():
        carried[...] = of_final[0]

    chunk, real = _read(sizes, q, k, v, g, beta, states[0, 0]), _column(runs[0, 0, 0:1]) >= 0
    of_results = tuple(jnp.where(real, x, 0) for x in _by_head(of_out, sizes))
    pull = jax.vjp(functools.partial(_one_chunk, runs=runs[0, 0]), chunk)[1]
    [found] = pull((of_results, tuple(carried[head] for head in range(sizes.shared))))
    of_q[0], of_k[0] = found.q.astype(of_q.dtype), found.k.astype(of_k.dtype)
    for head in range(sizes.shared):
        of_v[0, :, head * value_size : (head + 1) * value_size] = found.values[head].astype(of_v.dtype)
        of_g[0, 0, 0, head : head + 1] = found.decays[head]
        of_beta[0, 0, 0, head : head + 1] = found.betas[head]
        carried[head] = found.states[head]

    @pl.when(index == pl.num_programs(2) - 1)
    def _():
        of_start[0] = carried[...]


def _read(sizes: _Sizes, q, k, v, g, beta, states) -> _Chunk:
    """A step's chunk. Behind the end of a row, and where there is padding, it may hold anything."""
    heads = range(sizes.shared)
    return _Chunk(
        tuple(states[head] for head in heads),
        q[0].astype(jnp.float32),
        k[0].astype(jnp.float32),
        tuple(_by_head(v, sizes)),
        tuple(g[0, 0, 0, head : head + 1] for head in heads),
        tuple(beta[0, 0, 0, head : head + 1] for head in heads),
    )


def _by_head(v, sizes: _Sizes) -> list[jax.Array]:
    """Values [C, P] of each value head in float32, of a block [1, C, G * P]."""
    size = sizes.value_size
    return [v[0, :, head * size : (head + 1) * size].astype(jnp.float32) for head in range(sizes.shared)]


def _one_chunk(chunk: _Chunk, runs: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Results [C, P] of each value head, and the states after the chunk: `delta_rule._one_chunk` for one key head.

    What is done for each of the value heads is done for all of them before the next thing is: their products do not
    wait for one another.
    """
    run_1C, whole_1C = runs[0:1], runs[3:4]
    run_C1, goes_on_C1, stays_C1 = (_column(runs[row : row + 1]) for row in range(3))
    real_C1, real_1C = run_C1 >= 0, run_1C >= 0
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in range(2))
    up_to, before = row >= column, row > column
    same = up_to & (run_C1 == run_1C) & real_C1

    q, k = (_normalised(jnp.where(real_C1, x, 0)) for x in (chunk.q, chunk.k))
    q = q * q.shape[-1] ** -0.5
    values = [jnp.where(real_C1, v, 0) for v in chunk.values]
    decays = [jnp.where(real_1C, g, 0) for g in chunk.decays]
    betas = [_column(jnp.where(real_1C, beta, 0)) for beta in chunk.betas]

    # Masks come after the exponentials: sums of g are never positive, so that none of them overflows.
    until = [jnp.where(up_to, g, 0) for g in decays]
    between = [_matmul(x, before.astype(jnp.float32)) for x in until]
    decay = [jnp.where(same, jnp.exp(x), 0) for x in between]
    from_start = [goes_on_C1 * jnp.exp(_sum(x)) for x in until]
    to_end = [stays_C1 * jnp.exp(_sum(jnp.where(row < column, g, 0))) for g in decays]
    whole = [jnp.max(whole_1C) * jnp.exp(_sum(g)) for g in decays]

    k_by_k, q_by_k = _matmul_right(k, k), _matmul_right(q, k)
    lower = [jnp.where(before, beta * k_by_k * d, 0) for beta, d in zip(betas, decay, strict=True)]
    held = [e * _matmul(k, state) for e, state in zip(from_start, chunk.states, strict=True)]
    right = [beta * (v - x) for beta, v, x in zip(betas, values, held, strict=True)]
    written = _solve(tuple(lower), tuple(right))
    read = [e * _matmul(q, state) for e, state in zip(from_start, chunk.states, strict=True)]
    results = tuple(x + _matmul(q_by_k * d, w) for x, d, w in zip(read, decay, written, strict=True))
    kept = [_matmul_left(k, f * w) for f, w in zip(to_end, written, strict=True)]
    return results, tuple(w * state + x for w, state, x in zip(whole, chunk.states, kept, strict=True))


def _normalised(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(_sum(x * x) + EPSILON)


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True)


def _column(x_1C: jax.Array) -> jax.Array:
    """[1, C] as [C, 1]."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (x_1C.shape[1],) * 2, axis) for axis in range(2))
    return _sum(jnp.where(row == column, x_1C, 0))


@jax.custom_vjp
def _solve(lower: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The solutions x of (I + lower) x = right, exact to rounding; see `triangular.py`."""
    return _solve_forward(lower, right)[0]


def _solve_forward(lower: tuple[jax.Array, ...], right: tuple[jax.Array, ...]):
    inverses = _inverses(lower)
    solutions = tuple(_matmul(inverse, x) for inverse, x in zip(inverses, right, strict=True))
    return solutions, (inverses, solutions)


def _solve_backward(saved, of_solutions):
    inverses, solutions = saved
    of_right = tuple(_matmul_left(inverse, x) for inverse, x in zip(inverses, of_solutions, strict=True))
    row, column = (jax.lax.broadcasted_iota(jnp.int32, inverses[0].shape, axis) for axis in range(2))
    of_lower = (_matmul_right(x, solution) for x, solution in zip(of_right, solutions, strict=True))
    return tuple(jnp.where(row > column, -x, 0) for x in of_lower), of_right


_solve.defvjp(_solve_forward, _solve_backward)


def _inverses(lower: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The inverses of I + lower: blocks of the diagonal are merged to blocks of twice the size, see `triangular.py`.

    All blocks of a size are merged in two products of whole matrices. Blocks of one row of blocks are none of another's
    columns, so that the rows of all blocks are added up before them, and the result is what each takes its columns of.
    """
    row, column = (jax.lax.broadcasted_iota(jnp.int32, lower[0].shape, axis) for axis in range(2))
    inverses = [jnp.where(row == column, 1.0, 0.0) for _ in lower]
    for level in range(LANES.bit_length() - 1):
        block = 1 << level
        below = ((row >> level) & 1 == 1) & (row >> level == (column >> level) + 1)
        corners = [jnp.where(below, x, 0) for x in lower]
        if level:
            parts = [_matmul(_rows_of_blocks(x, block), corner) for x, corner in zip(inverses, corners, strict=True)]
            parts = [_matmul(part, inverse) for part, inverse in zip(parts, inverses, strict=True)]
            repeated = (jnp.concatenate([part] * (LANES // part.shape[0])) for part in parts)
            corners = [jnp.where(below, x, 0) for x in repeated]
        inverses = [inverse - corner for inverse, corner in zip(inverses, corners, strict=True)]
    return tuple(inverses)


def _rows_of_blocks(x_CC: jax.Array, block: int) -> jax.Array:
    """The sum of the lower blocks' rows of each pair of blocks, or where these are less than a register's, of all."""
    step = 2 * block if block >= SUBLANES else SUBLANES
    rows = max(block, SUBLANES)
    parts = [x_CC[end - rows : end] for end in range(step, LANES + 1, step)]
    while len(parts) > 1:
        parts = [parts[i] + parts[i + 1] for i in range(0, len(parts), 2)]
    return parts[0]


def _chunk_flops(sizes: _Sizes) -> int:
    """FLOPs of the products of a chunk of one key head, zeros included."""
    by_keys, by_values = LANES**2 * sizes.key_size, LANES**2 * sizes.value_size
    state, square = LANES * sizes.key_size * sizes.value_size, LANES**3
    merges = sum(2 * max(1 << level, SUBLANES) for level in range(1, LANES.bit_length() - 1)) * LANES**2
    return 2 * (2 * by_keys + sizes.shared * (3 * state + 2 * by_values + square + merges))


def _gradient_flops(sizes: _Sizes) -> int:
    """FLOPs of the products that the gradient of a chunk has besides those of the chunk."""
    by_keys, by_values = LANES**2 * sizes.key_size, LANES**2 * sizes.value_size
    state, square = LANES * sizes.key_size * sizes.value_size, LANES**3
    return 2 * (4 * by_keys + sizes.shared * (6 * state + 4 * by_values + square))


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x @ y` in float32. Gradients of the three products are products again, and no transposed copies."""
    return _dot(x, y, 1, 0)


@jax.custom_vjp
def _matmul_right(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x @ y.T`."""
    return _dot(x, y, 1, 1)


@jax.custom_vjp
def _matmul_left(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x.T @ y`."""
    return _dot(x, y, 0, 0)


_matmul.defvjp(
    lambda x, y: (_dot(x, y, 1, 0), (x, y)),
    lambda saved, of_z: (_dot(of_z, saved[1], 1, 1), _dot(saved[0], of_z, 0, 0)),
)
_matmul_right.defvjp(
    lambda x, y: (_dot(x, y, 1, 1), (x, y)),
    lambda saved, of_z: (_dot(of_z, saved[1], 1, 0), _dot(of_z, saved[0], 0, 0)),
)
_matmul_left.defvjp(
    lambda x, y: (_dot(x, y, 0, 0), (x, y)),
    lambda saved, of_z: (_dot(saved[1], of_z, 1, 1), _dot(saved[0], of_z, 1, 0)),
)
