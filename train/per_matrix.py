"""Optimizers that look at a matrix as a whole, run for every matrix by itself: Muon and Adafactor.

AdamW treats every number alike, so that layers and experts stacked in one array make no difference to it. Muon makes a
matrix's update orthogonal, and Adafactor keeps a second moment of its rows and columns: both are run here for each
layer and expert of a stack, by optax's own transformations of one matrix. Layers follow one another, so that one
layer's matrices are worked on at a time; experts are side by side, and stay on their devices.

Sources: Muon, Liu et al., arXiv 2502.16982; Adafactor, Shazeer and Stern, arXiv 1804.04235.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from train.config import OptimizerConfig
from train.parameters import Params

#: By Muon's authors, the embedding, the head, vectors and what is no matrix of a linear layer are AdamW's.
_NOT_MUONS = frozenset({"embed_tokens", "lm_head", "score", "conv1d"})
#: Muon's updates are scaled to this root mean square, that of AdamW's, so that both take the same learning rate.
_MUON_RMS = 0.2
#: Of Newton and Schulz's iteration, Jordan's and optax's. They are part of the state, in float64 under JAX_ENABLE_X64
#: unless they are an array of float32.
_NEWTON_SCHULZ = np.array([3.4445, -4.7750, 2.0315], np.float32)
#: Adafactor scales an update down to this root mean square.
_ADAFACTOR_RMS = 1.0


class PerMatrixState(NamedTuple):
    """For each parameter, the state of its own optimizer, stacked as its matrices are."""

    states: Any

    def shardings(self, params: Params) -> "PerMatrixState":
        """The sharding of every array: an axis is sharded as the parameter's axis that it belongs to.

        Args:
            params: with shardings; the state's leaves need only shapes.
        """
        like = jax.tree.map(lambda param, state: jax.tree.map(lambda x: _like(x, param), state), params, self.states)
        return PerMatrixState(like)


def muon(
    config: OptimizerConfig, schedule: optax.Schedule, decays: Callable[[str], bool], stack_axes: Mapping[str, int]
) -> optax.GradientTransformation:
    """Muon for the matrices of linear layers and experts, AdamW for the rest.

    Args:
        config: of which beta1 is the momentum's decay.
        schedule: of the learning rate.
        decays: of a path, whether weight decay applies to the parameter.
        stack_axes: by path, the number of a parameter's leading axes that layers and experts are stacked along.
    """

    def transform_of(path: str, ndim: int) -> optax.GradientTransformation:
        decay = config.weight_decay if decays(path) else 0.0
        if not decays(path) or ndim != 2 or _NOT_MUONS & set(path.split(".")):
            moments = {"b1": config.beta1, "b2": config.beta2, "mu_dtype": config.mu_dtype}
            return optax.adamw(schedule, weight_decay=decay, **moments)
        return optax.contrib.muon(
            schedule,
            ns_coeffs=_NEWTON_SCHULZ,
            beta=config.beta1,
            weight_decay=decay,
            mu_dtype=config.mu_dtype,
            consistent_rms=_MUON_RMS,
        )

    return _per_matrix(transform_of, stack_axes)


def adafactor(
    config: OptimizerConfig, schedule: optax.Schedule, decays: Callable[[str], bool], stack_axes: Mapping[str, int]
) -> optax.GradientTransformation:
    """Adafactor without momentum, at the learning rate itself; arguments as `muon`.

    As `optax.adafactor` with multiply_by_parameter_scale=False, but that weight decay is multiplied with the learning
    rate, as AdamW's is.
    """

    def transform_of(path: str, ndim: int) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(_ADAFACTOR_RMS),
            optax.add_decayed_weights(config.weight_decay if decays(path) else 0.0),
            optax.scale_by_learning_rate(schedule),
        )

    return _per_matrix(transform_of, stack_axes)


def _per_matrix(
    transform_of: Callable[[str, int], optax.GradientTransformation], stack_axes: Mapping[str, int]
) -> optax.GradientTransformation:
    """Runs `transform_of(path, axes of one matrix)` for every matrix of every parameter."""

    def for_each(params: Params, function: Callable[[optax.GradientTransformation, int, Any], Any], *others: Any):
        leaves = jax.tree_util.tree_leaves_with_path(params)
        treedef: Any = jax.tree.structure(params)
        columns = [treedef.flatten_up_to(other) for other in others]
        done = []
        for (path, param), *rest in zip(leaves, *columns, strict=True):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            axes = stack_axes[name]
            done.append(function(transform_of(name, param.ndim - axes), axes, (param, *rest)))
        return treedef, done

    def init(params: Params) -> PerMatrixState:
        def begin(transform: optax.GradientTransformation, axes: int, values: Any) -> Any:
            one = transform.init
            for _ in range(axes):
                one = jax.vmap(one)
            return one(*values)

        treedef, states = for_each(params, begin)
        return PerMatrixState(treedef.unflatten(states))

    def update(updates: Params, state: PerMatrixState, params: Params | None = None):
        def step(transform: optax.GradientTransformation, axes: int, values: Any) -> Any:
            def one(values: Any) -> Any:
                param, update, state = values
                return transform.update(update, state, param)

            if axes > 1:
                one = jax.vmap(one)
            return jax.lax.map(one, values) if axes else one(values)

        treedef, done = for_each(params, step, updates, state.states)
        new, states = zip(*done, strict=True)
        return treedef.unflatten(new), PerMatrixState(treedef.unflatten(states))

    return optax.GradientTransformation(init, update)


def _like(x: Any, param: Any) -> NamedSharding:
    """The sharding of an array whose axes are some of a parameter's, in their order, and others, which are whole."""
    spec = (*param.sharding.spec, *(None,) * (param.ndim - len(param.sharding.spec)))
    rest, chosen = list(zip(param.shape, spec, strict=True)), []
    for size in x.shape:
        found = next((number for number, (length, _) in enumerate(rest) if length == size), None)
        chosen.append(None if found is None else rest[found][1])
        rest = rest if found is None else rest[found + 1 :]
    return NamedSharding(param.sharding.mesh, PartitionSpec(*chosen))
