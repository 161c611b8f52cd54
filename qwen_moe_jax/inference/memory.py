"""What an engine needs of a device's memory, as sums that can be printed, and how many slots fit."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qwen_moe_jax.config import DTypeLike
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference import programs
from qwen_moe_jax.inference.blocks import BLOCK_SIZE
from qwen_moe_jax.model.cache import Blocks, Cache, KeyValues, PagedKeyValues, RecurrentState
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.model.lora import matrices
from qwen_moe_jax.rounding import ceil_div, round_up
from qwen_moe_jax.sharding.rules import CONTEXT, batch_shards
from qwen_moe_jax.units import format_bytes

#: Tokens of prompts that are read between two decoding steps, by each of the devices that share the batch.
PREFILL_CHUNK = 512
#: Tokens of a chunk of which log-probabilities are computed: the logits of all of them are in memory.
LOG_PROB_CHUNK = 128
#: Arrays as large as the logits that a program holds at once, in float32: logits, their processed form, random numbers.
_LOGITS_AT_ONCE = 3


def has_row_states(model: CausalLM) -> bool:
    """Whether layers keep more of a text than keys and values in blocks: a ring or a recurrent state."""
    return any(kind.mixer != "full" for kind in model.config.layers)


def blocks_for(model: CausalLM, slots: int, max_length: int, cache_tokens: int | None) -> Blocks:
    """The blocks of an engine: for so many tokens (None: `max_length` a slot), and for one request on each shard."""
    shards, size = batch_shards(model.mesh), round_up(BLOCK_SIZE, model.mesh.shape[CONTEXT])
    tokens = slots * max_length if cache_tokens is None else cache_tokens
    each = max(ceil_div(ceil_div(tokens, shards), size), ceil_div(max_length, size))
    return Blocks(count=shards * (each + 1), size=size)


def engine_memory(
    model: CausalLM,
    *,
    slots: int,
    max_length: int,
    cache_tokens: int | None = None,
    cache_dtype: DTypeLike | None = None,
    prefix_states: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> list[tuple[str, int]]:
    """Bytes on one device by what they are for; arguments as `Engine`, and the model may be abstract.

    All are exact but the last, the working memory of the largest program, which is an estimate.
    """
    config, shards = model.config, batch_shards(model.mesh)
    slots = round_up(slots, shards)
    chunk = min(prefill_chunk, programs.prefill_length(max_length, config))
    blocks = blocks_for(model, slots, max_length, cache_tokens)
    cache = programs.abstract_slots(model, slots, max_length, chunk, cache_dtype, blocks)
    parts = [*loaded(model), *_cache_parts(cache, slots, blocks)]
    copies = round_up(slots if prefix_states is None else prefix_states, shards)
    if copies and has_row_states(model):
        least = Blocks(count=shards, size=blocks.size)
        kept = programs.abstract_slots(model, copies, max_length, chunk, cache_dtype, least)
        parts.append((f"copies of {copies} states for shared beginnings", _bytes(kept)))
    own, vocab_size = slots // shards, config.vocab_size
    parts.append(("penalties' tables", own * (5 * vocab_size + 4 * max_length)))
    logits = max(own, min(chunk, LOG_PROB_CHUNK)) * vocab_size * 4 * _LOGITS_AT_ONCE
    routed = config.moe.num_experts_per_tok * config.moe.moe_intermediate_size if config.moe else 0
    width = max(config.intermediate_size or 0, routed)
    activations = max(chunk, own) * (8 * config.hidden_size + 3 * width) * jnp.dtype(model.execution.dtype).itemsize
    return [*parts, ("working memory (estimate)", logits + activations)]


def loaded(model: CausalLM) -> list[tuple[str, int]]:
    """Bytes on one device of a model's weights, and of its low-rank adapters, where it has any."""
    adapted = [one.lora for one in matrices(model) if one.lora is not None]
    weights = [("weights", _bytes(model) - _bytes(adapted))]
    return [*weights, ("adapters", _bytes([[one.lora_A, one.lora_B] for one in adapted]))] if adapted else weights


def slots_that_fit(model: CausalLM, max_length: int, available: int, **options: Any) -> int:
    """The largest number of slots of an engine in so many bytes of each device.

    Args:
        model: may be abstract.
        max_length: of the engine.
        available: bytes.
        options: of `engine_memory`, but for slots.

    Raises:
        RequestError: not even one slot on each device that shares the batch fits; with the sums.
    """
    shards = batch_shards(model.mesh)

    def fits(slots: int) -> bool:
        return sum(size for _, size in engine_memory(model, slots=slots, max_length=max_length, **options)) <= available

    if not fits(shards):
        sums = format_memory(engine_memory(model, slots=shards, max_length=max_length, **options))
        raise RequestError(
            f"found {format_bytes(available)} on a device, expected at least the sum of {'; '.join(sums)}."
        )
    most = 1
    while fits(2 * most * shards) and most < 2**20:
        most *= 2
    step = most
    while step := step // 2:
        most += step if fits((most + step) * shards) else 0
    return most * shards


def format_memory(parts: Sequence[tuple[str, int]]) -> list[str]:
    """The sums for people, a line each."""
    return [f"{name} {format_bytes(size)}" for name, size in [*parts, ("in all", sum(size for _, size in parts))]]


def _cache_parts(cache: Cache, slots: int, blocks: Blocks) -> list[tuple[str, int]]:
    stored = [kept for period in cache.segments for kept in period]
    kinds: dict[str, Any] = {
        f"{blocks.count} blocks of {blocks.size} tokens": PagedKeyValues,
        f"rings of sliding layers, {slots} slots": KeyValues,
        f"states of linear layers, {slots} slots": RecurrentState,
    }
    parts = [(name, _bytes([kept for kept in stored if isinstance(kept, kind)])) for name, kind in kinds.items()]
    return [(name, size) for name, size in parts if size]


def _bytes(tree: Any) -> int:
    """Bytes of (abstract) arrays on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
