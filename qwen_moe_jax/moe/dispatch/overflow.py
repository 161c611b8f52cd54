"""The rounds after the first, for rows beyond a buffer of fixed size: a loop, forward and backward.

How many there are is known on the device only, so this is a `lax.while_loop` with a gradient of its own: the backward
pass is a loop over the same rounds, which computes each anew and adds to the gradients in place. Whatever the routing,
memory is that of one round; without an overflow neither loop runs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwen_moe_jax.moe.dispatch.rows import Assignments

#: Name of the loops' scope, by which a plan knows them in a compiled program.
SCOPE = "overflow_rounds"

Serve = Callable[[jax.Array, Assignments, Any], jax.Array]


def serve_overflow(serve: Serve, rounds: jax.Array, tokens: Assignments, weights: Any) -> tuple[Any, jax.Array]:
    """Runs rounds 1 to `rounds - 1`, inside a shard_map.

    Args:
        serve: (round, tokens, weights) → [T, D], the weighted sums of what that round serves. It holds no tracers.
        rounds: int32 []; the same on all devices, whose collectives must meet.
        tokens: of this device.
        weights: a pytree of the experts' arrays; integers in it have no gradient.

    Returns:
        The weights, to be used by the first round, and the sums over all further rounds, [T, D]. Through the returned
        weights the first round's gradient is what the backward loop adds to: no second copy is needed.
    """
    leaves, treedef = jax.tree.flatten(weights)
    trained = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    fixed = [leaf for leaf, is_trained in zip(leaves, trained, strict=True) if not is_trained]

    def serve_leaves(turn, experts_TA, fixed, x_TD, weights_TA, arrays):
        rest, differentiable = iter(fixed), iter(arrays)
        merged = [next(differentiable if is_trained else rest) for is_trained in trained]
        tokens = Assignments(x_TD=x_TD, experts_TA=experts_TA, weights_TA=weights_TA)
        return serve(turn, tokens, jax.tree.unflatten(treedef, merged))

    arrays = [leaf for leaf, is_trained in zip(leaves, trained, strict=True) if is_trained]
    integers = rounds, tokens.experts_TA, fixed
    arrays, served_TD = _rounds(serve_leaves, integers, tokens.x_TD, tokens.weights_TA, arrays)
    rest, differentiable = iter(fixed), iter(arrays)
    merged = [next(differentiable if is_trained else rest) for is_trained in trained]
    return jax.tree.unflatten(treedef, merged), served_TD


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounds(serve, integers, x_TD, weights_TA, arrays):
    rounds, experts_TA, fixed = integers

    def add(state):
        turn, sum_TD = state
        served_TD = serve(turn, experts_TA, fixed, x_TD, weights_TA, arrays)
        return turn + 1, sum_TD + jax.lax.optimization_barrier(served_TD).astype(sum_TD.dtype)

    start = jnp.int32(1), jnp.zeros(x_TD.shape, jnp.result_type(x_TD, weights_TA))
    with jax.named_scope(SCOPE):
        return arrays, jax.lax.while_loop(lambda state: state[0] < rounds, add, start)[1]


def _rounds_forward(serve, integers, x_TD, weights_TA, arrays):
    return _rounds(serve, integers, x_TD, weights_TA, arrays), (integers, x_TD, weights_TA, arrays)


def _rounds_backward(serve, saved, gradients):
    (rounds, experts_TA, fixed), x_TD, weights_TA, arrays = saved
    of_arrays, of_served_TD = gradients

    def add(state):
        turn, sums = state
        served_TD, pull = jax.vjp(lambda *inputs: serve(turn, experts_TA, fixed, *inputs), x_TD, weights_TA, arrays)
        # XLA would move the reductions over the mesh out of the loop, to its end: there they run in every step, over
        # sums of zeros where no round was needed. It does not move them past a barrier.
        parts = jax.lax.optimization_barrier(pull(of_served_TD.astype(served_TD.dtype)))
        return turn + 1, jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, parts)

    # Tokens' gradients are small: float32 costs nothing. Those of weights are kept in their own dtype.
    tokens = (jnp.zeros(x.shape, jnp.float32) for x in (x_TD, weights_TA))
    start = jnp.int32(1), (*tokens, of_arrays)
    with jax.named_scope(SCOPE):
        of_x_TD, of_weights_TA, of_arrays = jax.lax.while_loop(lambda state: state[0] < rounds, add, start)[1]
    return None, of_x_TD.astype(x_TD.dtype), of_weights_TA.astype(weights_TA.dtype), of_arrays


_rounds.defvjp(_rounds_forward, _rounds_backward)
