"""The compiled programs of the engine: reading a chunk of every prompt, and decoding token after token.

`prefill` runs a chunk of every prompt through the model and into the cache, `first` chooses the first new tokens,
`decode` adds token after token on the device, until its chunk is full or every row has stopped. Shapes are rounded up
(rows, slots of the cache, chunks), so that requests of all lengths share a few compilations.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.config import DTypeLike, GenerationConfig, ModelConfig
from qwen_moe_jax.config.checks import dtype_name
from qwen_moe_jax.inference.sampling import (
    SamplingSettings,
    SamplingState,
    advance,
    choose,
    initial_state,
    log_probabilities,
    process_logits,
    sampling_settings,
)
from qwen_moe_jax.model.cache import Cache, RecurrentState, abstract_cache, recurrent_states
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.rounding import next_power_of_two, round_up
from qwen_moe_jax.sharding.rules import BATCH

#: Lengths of the chunks in which prompts are read: the shortest that holds what is left, or the longest.
PREFILL_BUCKETS = (8, 32, 128, 512)
#: Tokens that are decoded before the host reads them.
DECODE_STEPS = 32
#: Slots of a cache: powers of two from the first number to the second, from there on multiples of the second.
CACHE_BUCKETS = (64, 4096)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """The state of every row between two tokens.

    Attributes:
        token_B: int32; the token that was chosen last, which the model has not read yet.
        left_B: int32; tokens the row may still generate; 0 for one that has ended.
        sampling: the state of the sampler.
    """

    token_B: jax.Array
    left_B: jax.Array
    sampling: SamplingState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOutput:
    """New tokens, for the host.

    Attributes:
        token_BC, log_prob_BC: int32 and float32; the new tokens of each row.
        count_B: int32; how many they are.
        alive_B: bool; whether the row goes on.
        stopped_B: bool; whether it ended with a stop token.
    """

    token_BC: jax.Array
    log_prob_BC: jax.Array
    count_B: jax.Array
    alive_B: jax.Array
    stopped_B: jax.Array


@jax.jit(donate_argnames=("cache", "logits_BV"))
def prefill(
    model: CausalLM, cache: Cache, tokens_BT: jax.Array, count_B: jax.Array, logits_BV: jax.Array | None
) -> tuple[Cache, jax.Array]:
    """Reads a chunk of every prompt. Rows without tokens in it keep the logits they had."""
    new_BV, cache = _next_logits(model, tokens_BT, count_B, cache)
    return cache, new_BV if logits_BV is None else jnp.where(count_B[:, None] > 0, new_BV, logits_BV)


@jax.jit
def copy_states(cache: Cache) -> list[RecurrentState]:
    """Copies of what the linear layers keep: unlike keys and values, it has no part for each token to go back to."""
    return jax.tree.map(jnp.copy, recurrent_states(cache))


@jax.jit(donate_argnames="cache")
def restore_states(cache: Cache, states: list[RecurrentState]) -> Cache:
    """The cache with copies of these `copy_states` in its linear layers."""
    waiting = iter(jax.tree.map(jnp.copy, states))
    segments = tuple(
        tuple(next(waiting) if isinstance(stored, RecurrentState) else stored for stored in period)
        for period in cache.segments
    )
    return dataclasses.replace(cache, segments=segments)


@jax.jit
def first(logits_BV: jax.Array, state: DecodeState, settings: SamplingSettings) -> tuple[DecodeState, DecodeOutput]:
    """Chooses the first tokens."""
    alive_B = state.left_B > 0
    state, log_prob_B = _choose(logits_BV, state, settings)
    count_B = alive_B.astype(jnp.int32)
    return state, _output(state, settings, state.token_B[:, None], log_prob_B[:, None], count_B)


@jax.jit(donate_argnames=("cache", "state"))
def decode(
    model: CausalLM, cache: Cache, state: DecodeState, settings: SamplingSettings
) -> tuple[Cache, DecodeState, DecodeOutput]:
    """Reads the last token and chooses the next, up to `DECODE_STEPS` times, as long as any row goes on."""
    rows = state.token_B.shape[0]

    def going(carry) -> jax.Array:
        step, _, state, *_ = carry
        return (step < DECODE_STEPS) & jnp.any(state.left_B > 0)

    def step(carry):
        step, cache, state, token_BC, log_prob_BC, count_B = carry
        alive_B = state.left_B > 0
        logits_BV, cache = _next_logits(model, state.token_B[:, None], alive_B.astype(jnp.int32), cache)
        state, log_prob_B = _choose(logits_BV, state, settings)
        token_BC = token_BC.at[:, step].set(state.token_B)
        log_prob_BC = log_prob_BC.at[:, step].set(log_prob_B)
        return step + 1, cache, state, token_BC, log_prob_BC, count_B + alive_B

    start = (
        jnp.int32(0),
        cache,
        state,
        jnp.zeros((rows, DECODE_STEPS), jnp.int32),
        jnp.zeros((rows, DECODE_STEPS), jnp.float32),
        jnp.zeros(rows, jnp.int32),
    )
    _, cache, state, token_BC, log_prob_BC, count_B = jax.lax.while_loop(going, step, start)
    return cache, state, _output(state, settings, token_BC, log_prob_BC, count_B)


def _next_logits(model: CausalLM, tokens_BT: jax.Array, count_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Reads the first `count_B` tokens of each row; logits [B, V] of its last one, and the cache with them in it."""
    token_mask_BT = jnp.arange(tokens_BT.shape[1]) < count_B[:, None]
    out = model(tokens_BT, token_mask_BT, cache=cache, logits_at=count_B - 1)
    return out.logits[:, 0], out.cache


def _choose(logits_BV: jax.Array, state: DecodeState, settings: SamplingSettings) -> tuple[DecodeState, jax.Array]:
    """The next token of every row that goes on, and its log-probability [B]; rows that ended stay as they are."""
    alive_B = state.left_B > 0
    token_B = choose(process_logits(logits_BV, settings, state.sampling), settings, state.sampling)
    token_B = jnp.where(alive_B, token_B, state.token_B)
    stopped_B = jnp.any(token_B[:, None] == settings.stop_BS, axis=1)
    state = dataclasses.replace(
        state,
        token_B=token_B,
        left_B=jnp.where(alive_B & ~stopped_B, state.left_B - 1, 0),
        sampling=advance(state.sampling, token_B, alive_B),
    )
    return state, log_probabilities(logits_BV, token_B)


def _output(
    state: DecodeState, settings: SamplingSettings, token_BC: jax.Array, log_prob_BC: jax.Array, count_B: jax.Array
) -> DecodeOutput:
    return DecodeOutput(
        token_BC=token_BC,
        log_prob_BC=log_prob_BC,
        count_B=count_B,
        alive_B=state.left_B > 0,
        stopped_B=jnp.any(state.token_B[:, None] == settings.stop_BS, axis=1),
    )


def compilations() -> int:
    """How many programs the engine has compiled in this process."""
    return sum(program._cache_size() for program in (prefill, first, decode))  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractProgram:
    """One of the engine's programs with abstract arguments: a planner compiles the program that a session runs.

    Attributes:
        program: jitted.
        arguments: its own, as `jax.ShapeDtypeStruct`s.
        cache: the one among them that holds keys and values.
        rows, length, max_length: rounded up: requests, new tokens of each, the largest number of tokens of a row.
    """

    program: Callable
    arguments: tuple
    cache: Cache
    rows: int
    length: int
    max_length: int


def abstract_prefill(
    model: CausalLM, *, rows: int, prompt: int, max_length: int, cache_dtype: DTypeLike | None = None
) -> AbstractProgram:
    """The program that reads a chunk of every prompt, of the length that prompts of this length need.

    Args:
        model: in eval mode; it may be abstract.
        rows, prompt, max_length: requests, tokens of each, the largest number of tokens of a row.
        cache_dtype: as `Session`.
    """
    rows, max_length, cache = padded_cache(model, rows, max_length, cache_dtype)
    length = prefill_length(prompt, model.config)
    tokens_BT, count_B = jax.ShapeDtypeStruct((rows, length), np.int32), jax.ShapeDtypeStruct((rows,), np.int32)
    arguments = (model, cache, tokens_BT, count_B, None)
    return AbstractProgram(
        program=prefill, arguments=arguments, cache=cache, rows=rows, length=length, max_length=max_length
    )


def abstract_decode(
    model: CausalLM, *, rows: int, max_length: int, cache_dtype: DTypeLike | None = None
) -> AbstractProgram:
    """The program that decodes up to `DECODE_STEPS` tokens, the most probable ones, one for every row in each round.

    Arguments as `abstract_prefill`.
    """
    rows, max_length, cache = padded_cache(model, rows, max_length, cache_dtype)
    settings = sampling_settings([GenerationConfig()] * rows, model.config.vocab_size)
    numbers_B: Any = np.zeros(rows, np.int32)
    state = DecodeState(token_B=numbers_B, left_B=numbers_B, sampling=initial_state(settings, [[]] * rows))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, settings))
    return AbstractProgram(
        program=decode, arguments=(model, cache, *shapes), cache=cache, rows=rows, length=1, max_length=max_length
    )


def padded_cache(model: CausalLM, rows: int, max_length: int, cache_dtype: DTypeLike | None) -> tuple[int, int, Cache]:
    """Rows and tokens of a row as they are rounded up, and the abstract cache for them."""
    num_shards = math.prod(model.mesh.shape[axis] for axis in BATCH)
    rows, max_length = round_up(next_power_of_two(rows), num_shards), _cache_length(max_length)
    dtype = model.execution.dtype if cache_dtype is None else dtype_name("cache_dtype", cache_dtype)
    longest = prefill_length(max_length, model.config)
    cache = abstract_cache(model.config, model.mesh, batch=rows, max_length=max_length, max_write=longest, dtype=dtype)
    return rows, max_length, cache


def prefill_length(left: int, config: ModelConfig) -> int:
    """Tokens of the shortest chunk that holds what is left of the prompts, or of the longest chunk.

    Beyond the pretrained length, the base of a dynamic rope is that of a whole prompt: it is read in one chunk.
    """
    longest = round_up(left, PREFILL_BUCKETS[-1]) if has_growing_base(config, left) else PREFILL_BUCKETS[-1]
    return next((length for length in PREFILL_BUCKETS if length >= left), longest)


def has_growing_base(config: ModelConfig, length: int) -> bool:
    """Whether rotations in a text of this length depend on its length: under a dynamic rope, as `model.rotary` says."""
    return config.rope.rope_type == "dynamic" and length > config.max_position_embeddings


def _cache_length(length: int) -> int:
    smallest, step = CACHE_BUCKETS
    return max(smallest, next_power_of_two(length)) if length <= step else round_up(length, step)
