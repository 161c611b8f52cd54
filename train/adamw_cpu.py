"""A step of AdamW on a single CPU: each array's parameters and moments change in place, in one pass.

XLA writes parameters and moments by a loop each, the clipped gradient by another, and copies what it may not overwrite.
The C function is that of `qwen_moe_jax.nn.kernels.functions.adamw`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qwen_moe_jax.nn.kernels import cpu
from train.config import OptimizerConfig
from train.parameters import Params

#: optax's.
EPSILON = 1e-8


class AdamW(optax.GradientTransformation):
    """optax's chain of clipping and AdamW, with what a step in place needs besides.

    Attributes:
        config: its settings.
        schedule: of the learning rate.
        decays: of a tree of arrays, whether weight decay applies to each.
        moves: of a tree of arrays, whether the optimizer moves each.
        unclipped: the chain without clipping, which treats every number by itself.
        stack_axes: by path, how many leading axes layers and experts are stacked along; paths that it does not have
            are no stacks.
    """

    config: OptimizerConfig
    schedule: optax.Schedule
    decays: Callable[[Params], Any]
    moves: Callable[[Params], Any]
    unclipped: optax.GradientTransformation
    stack_axes: Mapping[str, int]


def in_place(optimizer: optax.GradientTransformation, shardings: Params, params: Params) -> Any:
    """A tree of bools, shaped as `params`: whether `step` should move the array; the others are optax's.

    Args:
        optimizer: `AdamW`, or another one, none of whose arrays it moves.
        shardings: of the parameters; on several devices, and on accelerators, it moves none either.
        params: the arrays.
    """
    if not isinstance(optimizer, AdamW) or not _on_one_cpu(shardings) or cpu.target("adamw", "float32") is None:
        return jax.tree.map(lambda _: False, params)
    floats = jnp.dtype(optimizer.config.mu_dtype or jnp.float32) == jnp.float32

    def is_stepped(param: jax.Array, moves: bool) -> bool:
        large = param.size >= cpu.WORTH_A_CALL and param.size % cpu.LANES == 0
        return floats and moves and large and param.dtype == jnp.float32

    return jax.tree.map(is_stepped, params, optimizer.moves(params))


def step(
    optimizer: optax.GradientTransformation,
    gradients: Params,
    gradient_norm: jax.Array,
    params: Params,
    state: optax.OptState,
    is_step: jax.Array,
    chosen: Any,
) -> tuple[Params, optax.OptState]:
    """Parameters and the optimizer's state after a step; all as they were where `is_step` is False.

    Args:
        optimizer: an `AdamW`.
        gradients: before clipping, like the parameters.
        gradient_norm: of all of them.
        params: the arrays, float32 where chosen.
        state: of the optimizer before the step.
        is_step: bool [].
        chosen: `in_place` of the parameters.
    """
    assert isinstance(optimizer, AdamW)  # in_place
    # XLA leaves out what is not used of this: the updates of the chosen arrays.
    updates, new_state = optimizer.update(gradients, state, params)
    new = optax.apply_updates(params, updates), new_state
    new_params, new_state = jax.tree.map(lambda new, old: jnp.where(is_step, new, old), new, (params, state))
    old, rest = moments_of(state), moments_of(new_state)
    stepped = functools.partial(_stepped, *_numbers(optimizer, gradient_norm, old.count, is_step))
    trees = chosen, optimizer.decays(params), gradients, params, old.mu, old.nu, new_params, rest.mu, rest.nu
    leaves = [
        stepped(decays, *arrays) if is_chosen else tuple(others)
        for is_chosen, decays, *arrays, others in (
            (*row[:6], row[6:]) for row in zip(*map(jax.tree.leaves, trees), strict=True)
        )
    ]
    structure = jax.tree.structure(params)
    new_params, mu, nu = (jax.tree.unflatten(structure, column) for column in zip(*leaves, strict=True))
    moments = rest._replace(mu=mu, nu=nu)
    return new_params, jax.tree.map(lambda part: moments if part is rest else part, new_state, is_leaf=_is_moments)


def _numbers(
    optimizer: AdamW, gradient_norm: jax.Array, count: jax.Array, is_step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the C function needs for arrays without and with weight decay."""
    config = optimizer.config
    clip = jnp.where(gradient_norm < config.max_grad_norm, 1.0, config.max_grad_norm / gradient_norm)
    decays = config.beta1, config.beta2
    corrections = [1 / (1 - decay ** (count + 1).astype(jnp.float32)) for decay in decays]
    of_moments = decays[0], 1 - decays[0], decays[1], 1 - decays[1]
    without, with_decay = (
        (clip, *of_moments, *corrections, EPSILON, weight_decay, optimizer.schedule(count), is_step)
        for weight_decay in (0.0, config.weight_decay)
    )
    return _joined(without), _joined(with_decay)


def _joined(numbers: tuple) -> jax.Array:
    return jnp.stack([jnp.asarray(number, jnp.float32) for number in numbers])


def _stepped(
    without: jax.Array, with_decay: jax.Array, decays: bool, gradient: jax.Array, *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """One array of parameters and its two moments after the step."""
    name = cpu.target("adamw", "float32")
    assert name is not None  # in_place
    call = jax.ffi.ffi_call(name, [jax.typeof(x) for x in arrays], input_output_aliases={2: 0, 3: 1, 4: 2})
    return tuple(call(with_decay if decays else without, gradient, *arrays))


def _is_moments(part: Any) -> bool:
    return isinstance(part, optax.ScaleByAdamState)


def moments_of(state: optax.OptState) -> optax.ScaleByAdamState:
    """The part of AdamW's state that holds the moments, in a tree of its arrays or of their shardings."""
    [found] = [part for part in jax.tree.leaves(state, is_leaf=_is_moments) if _is_moments(part)]
    return found


def _on_one_cpu(shardings: Params) -> bool:
    mesh = jax.tree.leaves(shardings)[0].mesh
    return mesh.size == 1 and isinstance(mesh, jax.sharding.Mesh) and mesh.devices.flat[0].platform == "cpu"
