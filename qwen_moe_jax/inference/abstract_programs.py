"""The programs of a session with abstract arguments: what a planner compiles for hardware that is not there."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from qwen_moe_jax.config import DTypeLike, GenerationConfig
from qwen_moe_jax.inference.programs import DecodeState, decode, padded_cache, prefill, prefill_length
from qwen_moe_jax.inference.settings import initial_state, sampling_settings
from qwen_moe_jax.model.cache import Cache
from qwen_moe_jax.model.causal_lm import CausalLM


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
