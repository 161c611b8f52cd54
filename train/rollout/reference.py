"""Log-probabilities of a rollout that are computed once: those of the reference, and those at a temperature."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from train.config import TrainConfig
from train.initial import initial_params
from train.parameters import Params
from train.program import Program
from train.rollout.batch import RolloutBatch

#: All parameters and a batch on the devices → the batch with these log-probabilities.
Scorer = Callable[[Params, RolloutBatch], RolloutBatch]


def scorer(
    config: TrainConfig, program: Program, sharding: NamedSharding, params: Params, *, first_step: int
) -> Scorer:
    """What adds the reference's log-probabilities to a batch, where there is one.

    At a temperature other than 1 it also replaces those of the sampler, which are of the undivided logits.

    Args:
        config: of the run.
        program: of the run.
        sharding: of a batch's arrays.
        params: all parameters, of which a copy is kept as reference where the run has no adapters and just begins.
        first_step: finished steps; after some, the reference is loaded or drawn as at the run's first start.
    """
    grpo = config.grpo
    assert grpo is not None
    policy = _log_probs(program.eval_graph, grpo.temperature, sharding, replay=grpo.routing_replay)
    reference, base = None, None
    if grpo.beta:
        reference = _log_probs(
            program.eval_graph, grpo.temperature, sharding, replay=False, adapters=config.lora is None
        )
        if keeps_copy(config):
            base = initial_params(config, program.model) if first_step else jax.tree.map(jnp.copy, params)

    def score(params: Params, batch: RolloutBatch) -> RolloutBatch:
        if grpo.temperature != 1:
            batch = dataclasses.replace(batch, log_probs_BT=policy(params, batch))
        if reference is not None:
            log_probs_BT = reference(params if base is None else base, batch)
            batch = dataclasses.replace(batch, reference_log_probs_BT=log_probs_BT)
        return batch

    return score


def keeps_copy(config: TrainConfig) -> bool:
    """Whether the reference is a copy of the model: it is used, and is not the base under adapters."""
    return config.grpo is not None and bool(config.grpo.beta) and config.lora is None


def _log_probs(
    graph: nnx.GraphDef, temperature: float, sharding: NamedSharding, *, replay: bool, adapters: bool = True
) -> Callable[[Params, RolloutBatch], jax.Array]:
    """The jitted log-probabilities of a batch's targets, float32 [B, T], in eval mode."""

    @functools.partial(jax.jit, out_shardings=sharding)
    def log_probs(params: Params, batch: RolloutBatch) -> jax.Array:
        model = nnx.merge(graph, params if adapters else without_adapters(params))
        out = model.token_losses(
            batch.tokens_BT,
            batch.targets_BT,
            segment_ids=batch.segment_ids_BT,
            positions=batch.positions_BT,
            replay=batch.experts_LBTA if replay else None,
            temperature=temperature,
        )
        return -out.losses

    return log_probs


def without_adapters(params: Params) -> Params:
    """The parameters with low-rank adapters that add nothing: the base."""

    def zeroed(path: Any, array: jax.Array) -> jax.Array:
        is_second = jax.tree_util.keystr(path, simple=True, separator=".").endswith(".lora_B")
        return jnp.zeros_like(array) if is_second else array

    return jax.tree_util.tree_map_with_path(zeroed, params)
