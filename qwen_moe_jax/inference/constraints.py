"""Constraints on generated tokens: transformers' logits processors of lengths, repeated n-grams and forced tokens.

In transformers' order, after biases and penalties and before sampling:

1. `no_repeat_ngram_size`: a token that would complete an n-gram of prompt and output again is masked;
2. `min_length`: tokens that end the text are masked until prompt and output have this many tokens;
3. `forced_bos_token_id` is the only token left after a prompt of one token;
4. `forced_eos_token_id` is the only token left before the last position;
5. `exponential_decay_length_penalty` raises the logits of tokens that end the text;
6. `suppress_tokens` are masked, and `begin_suppress_tokens` at the start of the output.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.config import GenerationConfig
from qwen_moe_jax.inference.tables import TableSizes, add_rows, field_array, token_mask, token_table

#: A row without a forced first token.
NOT_FORCED = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraints:
    """Constraints of a batch. A row without one has the value that changes no logit.

    Attributes:
        ngram_size_B: int32 [B]; 0 allows repetition. None where every row does.
        min_length_B: int32 [B]; of prompt and output.
        forced_first_B: int32 [B]; NOT_FORCED for none.
        forced_last_BM: int32 [B, M]; V in unused slots.
        max_new_tokens_B: int32 [B]; 0 where `max_length_B` counts.
        max_length_B: int32 [B]; of prompt and output; 0 for none.
        decay_start_B: int32 [B]; new tokens before the penalty begins.
        decay_rate_B: float32 [B]; the logarithm of the penalty's factor; 0 for none.
        suppressed_BM, suppressed_first_BM: int32 [B, M]; V in unused slots.
    """

    ngram_size_B: jax.Array | None
    min_length_B: jax.Array
    forced_first_B: jax.Array
    forced_last_BM: jax.Array
    max_new_tokens_B: jax.Array
    max_length_B: jax.Array
    decay_start_B: jax.Array
    decay_rate_B: jax.Array
    suppressed_BM: jax.Array
    suppressed_first_BM: jax.Array


def is_constrained(config: GenerationConfig) -> bool:
    """Whether a request has any of these constraints."""
    ends = config.eos_token_id and (config.min_length or config.exponential_decay_length_penalty)
    masked = config.suppress_tokens or config.begin_suppress_tokens or config.no_repeat_ngram_size
    return bool(ends or masked or config.forced_eos_token_id or config.forced_bos_token_id is not None)


def constraints_of(
    configs: Sequence[GenerationConfig], vocab_size: int, sizes: TableSizes | None = None
) -> Constraints | None:
    """The constraints of a batch; None where no row has any and no `sizes` are given, which fix their structure."""
    if sizes is None and not any(map(is_constrained, configs)):
        return None
    forced, suppressed = (None, None) if sizes is None else (sizes.forced, sizes.suppressed)
    decays = [config.exponential_decay_length_penalty or (0, 1.0) for config in configs]
    first = [NOT_FORCED if config.forced_bos_token_id is None else config.forced_bos_token_id for config in configs]
    bans_ngrams = sizes is not None or any(config.no_repeat_ngram_size for config in configs)
    return Constraints(
        ngram_size_B=field_array(configs, "no_repeat_ngram_size", np.int32) if bans_ngrams else None,
        min_length_B=field_array(configs, "min_length", np.int32),
        forced_first_B=jnp.asarray(np.array(first, np.int32)),
        forced_last_BM=token_table([config.forced_eos_token_id for config in configs], vocab_size, forced),
        max_new_tokens_B=jnp.asarray(np.array([config.max_new_tokens or 0 for config in configs], np.int32)),
        max_length_B=jnp.asarray(np.array([config.max_length or 0 for config in configs], np.int32)),
        decay_start_B=jnp.asarray(np.array([start for start, _ in decays], np.int32)),
        decay_rate_B=jnp.asarray(np.array([math.log(factor) for _, factor in decays], np.float32)),
        suppressed_BM=token_table([config.suppress_tokens for config in configs], vocab_size, suppressed),
        suppressed_first_BM=token_table([config.begin_suppress_tokens for config in configs], vocab_size, suppressed),
    )


def constrain(
    logits_BV: jax.Array,
    constraints: Constraints,
    stop_BS: jax.Array,
    *,
    prompt_length_B: jax.Array,
    generated_B: jax.Array,
    history_BL: jax.Array | None,
) -> jax.Array:
    """Applies the constraints, float32 [B, V].

    Args:
        logits_BV: float32, after biases and penalties.
        constraints: of the B rows.
        stop_BS: int32; the tokens that end a row's text.
        prompt_length_B, generated_B: int32; tokens of the prompt, and generated so far.
        history_BL: int32; tokens of prompt and output; needed with `ngram_size_B`.
    """
    length_B = prompt_length_B + generated_B
    if constraints.ngram_size_B is not None and history_BL is not None:
        logits_BV = _mask_repeated_ngrams(logits_BV, constraints.ngram_size_B, history_BL, length_B)
    too_short_B = length_B < constraints.min_length_B
    logits_BV = add_rows(logits_BV, stop_BS, _masked_where(too_short_B))
    first_B1 = constraints.forced_first_B[:, None]
    logits_BV = _force(logits_BV, first_B1, (length_B == 1) & (first_B1[:, 0] != NOT_FORCED))
    before_last_B = jnp.where(
        constraints.max_new_tokens_B > 0,
        generated_B == constraints.max_new_tokens_B - 1,
        length_B == constraints.max_length_B - 1,
    )
    last_BM = constraints.forced_last_BM
    if last_BM.shape[1]:
        has_last_B = jnp.any(last_BM < logits_BV.shape[1], axis=1)
        logits_BV = _force(logits_BV, last_BM, before_last_B & has_last_B)
    if stop_BS.shape[1]:
        logits_BV = _decay(logits_BV, constraints, stop_BS, generated_B)
    logits_BV = add_rows(logits_BV, constraints.suppressed_BM, jnp.float32(-jnp.inf))
    # As transformers counts: a forced first token is not the start of the output.
    start_B = jnp.where((prompt_length_B > 1) | (constraints.forced_first_B == NOT_FORCED), 0, 1)
    return add_rows(logits_BV, constraints.suppressed_first_BM, _masked_where(generated_B == start_B))


def _masked_where(masked_B: jax.Array) -> jax.Array:
    """What masks a row's tokens when added to their logits, [B, 1]."""
    return jnp.where(masked_B, -jnp.inf, 0.0)[:, None]


def _force(logits_BV: jax.Array, token_BM: jax.Array, forced_B: jax.Array) -> jax.Array:
    """Leaves a row only these tokens, with logit 0."""
    forced_BV = jnp.where(token_mask(token_BM, logits_BV.shape[1]), 0.0, -jnp.inf)
    return jnp.where(forced_B[:, None], forced_BV, logits_BV)


def _decay(logits_BV: jax.Array, constraints: Constraints, stop_BS: jax.Array, generated_B: jax.Array) -> jax.Array:
    """Adds |logit| · (factor^n - 1) to tokens that end the text, n counting from the start of the penalty."""
    late_B = jnp.maximum(generated_B - constraints.decay_start_B, 0)
    growth_B1 = jnp.expm1(constraints.decay_rate_B * late_B)[:, None]
    is_stop_BV = token_mask(stop_BS, logits_BV.shape[1]) & jnp.isfinite(logits_BV) & (growth_B1 != 0)
    return jnp.where(is_stop_BV, logits_BV + jnp.abs(logits_BV) * growth_B1, logits_BV)


def _mask_repeated_ngrams(
    logits_BV: jax.Array, size_B: jax.Array, history_BL: jax.Array, length_B: jax.Array
) -> jax.Array:
    """Masks every token that followed the last n - 1 tokens before."""
    index_L = jnp.arange(history_BL.shape[1], dtype=jnp.int32)
    # Position p repeats an n-gram if the n - 1 tokens before p are the last n - 1 tokens of the text.
    repeats_BL = (size_B[:, None] > 0) & (index_L < length_B[:, None]) & (index_L >= size_B[:, None] - 1)

    def compare(distance: jax.Array, repeats_BL: jax.Array) -> jax.Array:
        before_BL = jnp.roll(history_BL, distance, axis=1)
        end_B1 = jnp.maximum(length_B - distance, 0)[:, None]
        same_BL = before_BL == jnp.take_along_axis(history_BL, end_B1, axis=1)
        return repeats_BL & (same_BL | (distance >= size_B[:, None]))

    repeats_BL = jax.lax.fori_loop(1, jnp.max(size_B), compare, repeats_BL)
    token_BL = jnp.where(repeats_BL, history_BL, logits_BV.shape[1])
    return add_rows(logits_BV, token_BL, jnp.float32(-jnp.inf))
