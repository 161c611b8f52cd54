"""The optimizer: clipping, warm-up and decay, weight decay on matrices only; and which parameters are frozen."""

import operator
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import optax

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.linear_rows import published_name
from qwen_moe_jax.huggingface.tensors import hub_parameters
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.suggest import similar
from train.adamw_cpu import AdamW
from train.config import OptimizerConfig
from train.per_matrix import adafactor, muon


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: 0 up to `learning_rate`, then down to `lowest_learning_rate` at step `steps`.

    "cosine" and "linear" decay right after the warm-up; "wsd" (warm-up, stable, decay: arXiv 2404.06395) stays constant
    until `decay_steps` before the end, and then decays linearly.
    """
    top, bottom, warmup = config.learning_rate, config.lowest_learning_rate, config.warmup_of(steps)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0, peak_value=top, warmup_steps=warmup, decay_steps=steps, end_value=bottom
        )
    decay = steps - warmup if config.schedule == "linear" else config.decay_steps
    descent = optax.linear_schedule(top, bottom, transition_steps=decay, transition_begin=steps - warmup - decay)
    return optax.join_schedules([optax.linear_schedule(0.0, top, warmup), descent], [warmup])


def schedule_notes(config: OptimizerConfig, steps: int) -> list[str]:
    """What the start of a run says about a warm-up that was shortened; nothing otherwise."""
    warmup = config.warmup_of(steps)
    if warmup == config.warmup_steps:
        return []
    return [
        f"the warm-up takes {warmup} steps, not {config.warmup_steps} (optimizer.warmup_steps), since the run has only "
        f"{steps} (run.max_steps)"
    ]


def make_optimizer(
    config: OptimizerConfig, steps: int, stack_axes: Mapping[str, int] | None = None
) -> optax.GradientTransformation:
    """The optax chain for the trained parameters.

    Args:
        config: its settings.
        steps: of the whole run, for the schedule.
        stack_axes: `stack_axes` of the model; AdamW reads it where its moments are in the memory of the host.
    """
    schedule = make_schedule(config, steps)
    if config.type == "adamw":
        main = optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            # The second moment stays in the parameters' dtype: in bfloat16 it could not decay, since a change by the
            # factor beta2 is less than its rounding.
            mu_dtype=config.mu_dtype,
            weight_decay=config.weight_decay,
            mask=decays,
        )
    else:
        of_type = {"muon": muon, "adafactor": adafactor}[config.type]
        main = of_type(config, schedule, _has_decay, stack_axes or {})
    parts = main, optax.masked(optax.set_to_zero(), moves_by_itself)
    chain = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), *parts)
    if config.type != "adamw":
        return chain
    optimizer = AdamW(chain.init, chain.update)
    optimizer.unclipped, optimizer.stack_axes = optax.chain(*parts), stack_axes or {}
    optimizer.config, optimizer.schedule, optimizer.decays = config, schedule, decays
    optimizer.moves = lambda params: jax.tree.map(operator.not_, moves_by_itself(params))
    return optimizer


def stack_axes(model: Model) -> dict[str, int]:
    """By path, how many leading axes of each parameter layers and experts are stacked along: 0, 1 or 2."""
    return {parameter.path: parameter.names.ndim for parameter in hub_parameters(model)}


def frozen_paths(patterns: Collection[str], model: Model) -> frozenset[str]:
    """The paths of the parameters whose names match one of these regular expressions.

    A name is that of the family's files. Where those have rows of several of the model's matrices in one, as
    Qwen3-Next's in_proj_qkvz, the model's own names, in_proj_qkv and in_proj_z, match as well.

    Args:
        patterns: each is searched for in names as "model.layers.3.mlp.gate.weight".
        model: whose parameters they are.

    Raises:
        ConfigError: a pattern is no regular expression, matches nothing, or some layers only of an array that holds
            several.
    """
    parameters = hub_parameters(model)
    names_of = {
        parameter.path: [(name, published_name(name, model.config)) for name in parameter.names.flat]
        for parameter in parameters
    }
    known = sorted({name for names in names_of.values() for both in names for name in both})
    frozen = set()
    for pattern in patterns:
        try:
            matches = re.compile(pattern).search
        except re.error as error:
            raise ConfigError(f"optimizer.frozen: {pattern!r} is no regular expression: {error}.") from None
        found = False
        for parameter in parameters:
            names = names_of[parameter.path]
            hits = [any(map(matches, both)) for both in names]
            if any(hits) and not all(hits):
                raise ConfigError(
                    f"optimizer.frozen: {pattern!r} matches {names[hits.index(True)][0]} and not "
                    f"{names[hits.index(False)][0]}. Layers of a kind are one array here, and so are their experts: "
                    "freeze all of them or none."
                )
            if any(hits):
                found = True
                frozen.add(parameter.path)
        if not found:
            near = similar(pattern, known, cutoff=0.3)
            raise ConfigError(
                f"optimizer.frozen: {pattern!r} matches no parameter. Near it are {', '.join(near or known[:3])}."
            )
    return frozenset(frozen)


def decays(params: Any) -> Any:
    """A tree of bools, shaped as `params`: whether weight decay applies to the array.

    It does not apply to norm scales, biases and the decay rates of linear layers (A_log). They are recognised by name,
    not by rank: layers of one kind are stacked, so that a norm's scale is [L,D] and looks like a matrix.
    """

    return _by_name(_has_decay, params)


def _has_decay(path: str) -> bool:
    return not any("norm" in name or name.endswith("bias") or name == "A_log" for name in path.split("."))


def moves_by_itself(params: Any) -> Any:
    """A tree of bools, shaped as `params`: whether the array is a router's balancing bias.

    Those are updated by a rule in the train step (`train/step.py`), not by the optimizer.
    """
    return _by_name(lambda path: path.split(".")[-1] == "e_score_correction_bias", params)


def _by_name(function: Callable[[str], Any], params: Any) -> Any:
    """`function` of each array's path, as a tree shaped as `params`."""

    def of_leaf(path: tuple[Any, ...], _: Any) -> Any:
        return function(jax.tree_util.keystr(path, simple=True, separator="."))

    return jax.tree_util.tree_map_with_path(of_leaf, params)
