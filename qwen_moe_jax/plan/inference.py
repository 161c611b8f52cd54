"""Steps to plan: the engine's prefill and decode programs, and a plain forward pass."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import ExecutionConfig, ModelConfig
from qwen_moe_jax.inference.abstract_programs import AbstractProgram, abstract_decode, abstract_prefill
from qwen_moe_jax.model.cache import Cache, RecurrentState, recurrent_states
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.plan.compile import Step
from qwen_moe_jax.plan.flops import extend_flops_per_token
from qwen_moe_jax.plan.result import Purpose
from qwen_moe_jax.plan.work import check_rows, work_of
from qwen_moe_jax.sharding.rules import BATCH


def prefill_step(config: ModelConfig, name: str, mesh: Mesh, execution: ExecutionConfig, **sizes: Any) -> Step:
    """The prefill of the prompts' last chunk.

    Args:
        config: of the model, which is abstract.
        name: of it, for people.
        mesh: of the target.
        execution: how it is run.
        sizes: rows, prompt and max_length, as `abstract_prefill`.
    """
    model = CausalLM(config, rngs=None, mesh=mesh, execution=execution)
    described = abstract_prefill(model, **sizes)
    before = max(sizes["prompt"] - described.length, 0)
    tokens, head = described.rows * described.length, 2 * config.vocab_size * config.hidden_size
    flops = tokens * (extend_flops_per_token(config, before, described.length) - head)
    return _engine_step(model, name, "prefill", described, flops + described.rows * head)  # the last token's logits


def decode_step(config: ModelConfig, name: str, mesh: Mesh, execution: ExecutionConfig, **sizes: Any) -> Step:
    """One token for every row, with the cache full. Arguments as `prefill_step`, without prompt."""
    return decode_step_of(CausalLM(config, rngs=None, mesh=mesh, execution=execution), name, **sizes)


def decode_step_of(model: CausalLM, name: str, **sizes: Any) -> Step:
    """`decode_step` of an abstract model in eval mode, which may have adapters."""
    described = abstract_decode(model, **sizes)
    flops = described.rows * extend_flops_per_token(model.config, described.max_length - 1, 1)
    step = _engine_step(model, name, "decode", described, flops)
    return dataclasses.replace(step, open_loop_times=1)  # the loop over tokens


def forward_step(
    config: ModelConfig, name: str, mesh: Mesh, execution: ExecutionConfig, *, rows: int, length: int
) -> Step:
    """Logits of `rows` sequences of `length` tokens, without a cache.

    Raises:
        ShardingError: the rows do not divide over the mesh.
    """
    check_rows(rows, mesh.shape)
    model = CausalLM(config, rngs=None, mesh=mesh, execution=execution)
    tokens_BT = jax.ShapeDtypeStruct((rows, length), np.int32, sharding=NamedSharding(mesh, P(BATCH, None)))
    return Step(
        function=jax.jit(lambda model, tokens_BT: model(tokens_BT).logits),
        arguments=(model, tokens_BT),
        groups={"parameters": model, "batch": tokens_BT},
        config=config,
        name=name,
        work=work_of(model, "forward", rows=rows, tokens_per_row=length),
        model_flops=rows * length * extend_flops_per_token(config, 0, length),
    )


def _engine_step(model: CausalLM, name: str, purpose: Purpose, described: AbstractProgram, model_flops: float) -> Step:
    _, _, *rest = described.arguments
    return Step(
        function=described.program,
        arguments=described.arguments,
        groups={"parameters": model, **_cache_groups(described.cache), "requests": rest},
        config=model.config,
        name=name,
        work=work_of(
            model, purpose, rows=described.rows, tokens_per_row=described.length, context=described.max_length
        ),
        model_flops=model_flops,
    )


def _cache_groups(cache: Cache) -> dict[str, Any]:
    """The arrays of a cache by what grows with its length and, in hybrids, what does not."""
    states = recurrent_states(cache)
    if not states:
        return {"cache": cache}
    kept = [stored for period in cache.segments for stored in period if not isinstance(stored, RecurrentState)]
    return {"cache": (kept, cache.lengths_B), "recurrent state": states}
