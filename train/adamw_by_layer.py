"""A step of AdamW whose moments are in the memory of the host: a layer's are on the devices at a time.

AdamW treats every number by itself, but for the clipping by the norm of all gradients, which is known before. So the
optimizer is run on slices [1, …] of the stacks [L, …], in a loop that copies a layer's moments from the host and back.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.adamw_cpu import AdamW, moments_of
from train.offload import as_stored, is_offloaded, on_devices
from train.parameters import Params, paths

#: An array of each parameter by its path: the optimizer's masks read paths, so that a flat dict is a tree as any other.
Arrays = dict[str, Any]
#: Of parameters, gradients and both moments on devices: the new parameters and moments.
_Update = Callable[[Arrays, Arrays, Arrays, Arrays], tuple[Arrays, Arrays, Arrays]]


def offloaded(optimizer: optax.GradientTransformation, shardings: optax.OptState) -> bool:
    """Whether `step` should do the update: the optimizer is `AdamW`, and its moments are in the host's memory."""
    return isinstance(optimizer, AdamW) and any(map(is_offloaded, jax.tree.leaves(shardings)))


def step(
    optimizer: optax.GradientTransformation,
    gradients: Params,
    gradient_norm: jax.Array,
    params: Params,
    state: optax.OptState,
    is_step: jax.Array,
    shardings: optax.OptState,
) -> tuple[Params, optax.OptState]:
    """Parameters and the optimizer's state after a step; all as they were where `is_step` is False.

    Args:
        optimizer: an `AdamW`.
        gradients: before clipping, like the parameters.
        gradient_norm: of all of them.
        params: on devices.
        state: of the optimizer before the step, whose moments are in the host's memory, as those that are returned.
        is_step: bool [].
        shardings: of the state.
    """
    assert isinstance(optimizer, AdamW)  # offloaded
    _, *unclipped_state = state  # that of clipping is empty
    counters, clip = tuple(unclipped_state), functools.partial(_clip, optimizer.config.max_grad_norm, gradient_norm)

    def update(params: Arrays, gradients: Arrays, mu: Arrays, nu: Arrays) -> tuple[Arrays, Arrays, Arrays]:
        before = _with_moments(counters, mu, nu)
        updates, after = optimizer.unclipped.update(jax.tree.map(clip, gradients), before, params)
        new = optax.apply_updates(params, updates), moments_of(after).mu, moments_of(after).nu
        return jax.tree.map(lambda new, old: jnp.where(is_step, new, old), new, (params, mu, nu))

    names = paths(params)
    structure: Any = jax.tree.structure(params)
    old, stored = moments_of(state), moments_of(shardings)
    columns = [dict(zip(names, jax.tree.leaves(tree), strict=True)) for tree in (params, gradients, old.mu, old.nu)]
    kept_as = dict(zip(names, jax.tree.leaves(stored.mu), strict=True))
    found: tuple[Arrays, Arrays, Arrays] = ({}, {}, {})
    for layers, group in _groups(optimizer, columns[0], kept_as).items():
        arrays = [{name: column[name] for name in group} for column in columns]
        new = _over_layers(update, layers, {name: kept_as[name] for name in group}, *arrays)
        for column, part in zip(found, new, strict=True):
            column.update(part)
    new_params, mu, nu = (structure.unflatten([column[name] for name in names]) for column in found)
    # What is left of the state are counters: those of a step without any array.
    _, after = optimizer.unclipped.update({}, _with_moments(counters, {}, {}), {})
    after = jax.tree.map(lambda new, old: jnp.where(is_step, new, old), after, _with_moments(counters, {}, {}))
    return new_params, (state[0], *_with_moments(after, mu, nu))


def _groups(optimizer: AdamW, params: Arrays, shardings: Arrays) -> dict[int, list[str]]:
    """The paths of stacks by the number of their layers; under 1 those of whole arrays."""
    groups: dict[int, list[str]] = {}
    for name, param in params.items():
        spec = shardings[name].spec
        is_stack = optimizer.stack_axes.get(name, 0) > 0 and not (spec and spec[0])
        groups.setdefault(param.shape[0] if is_stack else 1, []).append(name)
    return groups


def _over_layers(
    update: _Update, layers: int, stored: Arrays, params: Arrays, gradients: Arrays, mu: Arrays, nu: Arrays
) -> tuple[Arrays, Arrays, Arrays]:
    """`update` of arrays of so many layers, one after the other; moments come from the host's memory and go there."""

    def of_slices(params: Arrays, gradients: Arrays, mu: Arrays, nu: Arrays) -> tuple[Arrays, Arrays, Arrays]:
        params, mu, nu = update(params, gradients, on_devices(mu, stored), on_devices(nu, stored))
        return params, as_stored(mu, stored), as_stored(nu, stored)

    if layers == 1:
        return of_slices(params, gradients, mu, nu)

    def one(layer: jax.Array, arrays: tuple[Arrays, Arrays, Arrays]) -> tuple[Arrays, Arrays, Arrays]:
        def of_layer(tree: Arrays) -> Arrays:
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, layer, 1), tree)

        params, mu, nu = arrays
        new = of_slices(of_layer(params), of_layer(gradients), of_layer(mu), of_layer(nu))
        return jax.tree.map(lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, layer, 0), arrays, new)

    return jax.lax.fori_loop(0, layers, one, (params, mu, nu))


def _clip(largest: float, norm: jax.Array, gradient: jax.Array) -> jax.Array:
    """As `optax.clip_by_global_norm`."""
    return jax.lax.select(norm < largest, gradient, (gradient / norm.astype(gradient.dtype)) * largest)


def _with_moments(state: Any, mu: Any, nu: Any) -> Any:
    moments = moments_of(state)
    return jax.tree.map(
        lambda part: part._replace(mu=mu, nu=nu) if part is moments else part,
        state,
        is_leaf=lambda part: part is moments,
    )
