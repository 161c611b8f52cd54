"""The compiled programs of the engine: reading a chunk of every prompt, and decoding token after token.

`prefill` runs a chunk of every prompt through the model and into the cache, `first` chooses the first new tokens,
`decode` adds token after token on the device, until its chunk is full or every row has stopped. Shapes are rounded up
(rows, slots of the cache, chunks), so that requests of all lengths share a few compilations.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import DTypeLike, ModelConfig
from qwen_moe_jax.config.checks import dtype_name
from qwen_moe_jax.inference import speculative
from qwen_moe_jax.inference.expert_loads import dropped_of_rows
from qwen_moe_jax.inference.kept_programs import KeptProgram
from qwen_moe_jax.inference.request import MOST_TOP_LOGPROBS
from qwen_moe_jax.inference.sampling import advance, choose, log_probabilities, process_logits
from qwen_moe_jax.inference.settings import SamplingSettings, SamplingState
from qwen_moe_jax.inference.speculative import Drafts, packed_experts, propose, read_with_states
from qwen_moe_jax.model.cache import (
    Blocks,
    Cache,
    RecurrentState,
    abstract_cache,
    abstract_mtp_cache,
    empty_cache,
    keep_tokens,
    recurrent_states,
    with_steps,
)
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.moe.replay import packed_dtype
from qwen_moe_jax.rounding import next_power_of_two, round_up
from qwen_moe_jax.sharding.rules import BATCH, batch_shards

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
        drafts: the next-token head's, in speculative decoding; None without.
    """

    token_B: jax.Array
    left_B: jax.Array
    sampling: SamplingState
    drafts: Drafts | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepLimits:
    """What an `Engine` adds to a call of `decode`.

    Attributes:
        limit_B: int32; tokens of each row in this call at most.
        allowed_BW: uint32; packed masks of the tokens that may be chosen first (bit i of word w is token 32 w + i).
        masked: bool []; whether any row has a mask; without, none is looked at.
        top: bool []; whether the most probable tokens at each new one are asked for.
    """

    limit_B: jax.Array
    allowed_BW: jax.Array
    masked: jax.Array
    top: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOutput:
    """New tokens, for the host.

    Attributes:
        token_BC, log_prob_BC: int32 and float32; the new tokens of each row.
        count_B: int32; how many they are.
        alive_B: bool; whether the row goes on.
        stopped_B: bool; whether it ended with a stop token.
        passes_B: int32; the forward passes that these tokens took.
        experts_BCLA: where the routing is recorded, in `moe.replay.packed_dtype`; the experts of the token before each
            of them, which was read to choose it; L counts the sparse layers.
        top_BCK, top_log_prob_BCK: int32 and float32; with `StepLimits`, the `MOST_TOP_LOGPROBS` most probable tokens
            at each, where they were asked for.
        dropped_B: int32; with `StepLimits`, where the routing is recorded; choices that did not reach their expert.
    """

    token_BC: jax.Array
    log_prob_BC: jax.Array
    count_B: jax.Array
    alive_B: jax.Array
    stopped_B: jax.Array
    passes_B: jax.Array
    experts_BCLA: jax.Array | None = None
    top_BCK: jax.Array | None = None
    top_log_prob_BCK: jax.Array | None = None
    dropped_B: jax.Array | None = None


def _prefill(
    model: CausalLM,
    cache: Cache,
    tokens_BT: jax.Array,
    count_B: jax.Array,
    logits_BV: jax.Array | None,
    *,
    return_routing: bool = False,
) -> tuple[Cache, jax.Array, jax.Array | None]:
    """Reads a chunk of every prompt. Rows without tokens in it keep the logits they had.

    The last of the results are the tokens' experts [B, T, L_sparse, A], packed, where they are asked for.
    """
    new_BV, cache, experts_BTLA, _ = _next_logits(model, tokens_BT, count_B, cache, return_routing)
    new_BV = new_BV if logits_BV is None else jnp.where(count_B[:, None] > 0, new_BV, logits_BV)
    return cache, new_BV, experts_BTLA


prefill = KeptProgram(
    jax.jit(_prefill, donate_argnames=("cache", "logits_BV"), static_argnames="return_routing"),
    "prefill",
    ["return_routing"],
)


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


def _first(logits_BV: jax.Array, state: DecodeState, settings: SamplingSettings) -> tuple[DecodeState, DecodeOutput]:
    """Chooses the first tokens."""
    alive_B = state.left_B > 0
    state, log_prob_B = _choose(logits_BV, state, settings, alive_B, logits_BV)
    count_B = alive_B.astype(jnp.int32)
    chosen = _Chosen(
        token_BC=state.token_B[:, None], log_prob_BC=log_prob_B[:, None], count_B=count_B, passes_B=count_B
    )
    return state, _output(state, settings, chosen)


first = KeptProgram(jax.jit(_first), "first", [])


def decode_tokens(
    model: CausalLM,
    cache: Cache,
    state: DecodeState,
    settings: SamplingSettings,
    limits: StepLimits | None = None,
    *,
    steps: int = DECODE_STEPS,
    return_routing: bool = False,
) -> tuple[Cache, DecodeState, DecodeOutput]:
    """Reads the last token and chooses the next, up to `steps` times, as long as any row goes on.

    In speculative decoding, a pass reads the last token and those proposed after it, and chooses as many as were right
    and one more. With `limits`, a row stops at its own number of tokens, or where its logits are not finite: its last
    log-probability is NaN then.
    """
    size = 1 if state.drafts is None else state.drafts.token_BT.shape[1]
    limit_B = jnp.full_like(state.left_B, steps) if limits is None else limits.limit_B

    def going(carry) -> jax.Array:
        _, state, chosen = carry
        goes_B = (state.left_B > 0) & (chosen.count_B < limit_B)
        return (jnp.max(chosen.count_B) <= steps - size) & jnp.any(goes_B)

    def step(carry):
        cache, state, chosen = carry
        goes_B = (state.left_B > 0) & (chosen.count_B < limit_B)
        read_B = jnp.where(goes_B, jnp.minimum(state.left_B, size), 0)
        tokens, drafts = [state.token_B], state.drafts
        if drafts is None:
            logits_BV, cache, read_BTLA, dropped_B = _next_logits(
                model, state.token_B[:, None], read_B, cache, return_routing
            )
            if chosen.dropped_B is not None:
                chosen = dataclasses.replace(chosen, dropped_B=chosen.dropped_B + dropped_B)
            logits_BTV = logits_BV[:, None]
        else:
            proposed, head_cache = propose(model, drafts, state.left_B, settings, state.sampling)
            tokens, lengths_B = [*tokens, *proposed], cache.lengths_B
            logits_BTV, hidden_BTD, cache, read_BTLA = read_with_states(
                model, jnp.stack(tokens, axis=1), read_B, with_steps(cache, size), return_routing=return_routing
            )
        chosen, before_B, decoded = chosen.with_pass(goes_B), chosen.count_B, []
        for position in range(size):
            logits_BV = logits_BTV[:, position]
            allowed_BV = _allowed(logits_BV, limits, chosen.count_B == 0)
            state, log_prob_B = _choose(allowed_BV, state, settings, goes_B, logits_BV)
            if limits is not None:
                state = dataclasses.replace(state, left_B=jnp.where(goes_B & jnp.isnan(log_prob_B), 0, state.left_B))
            read_BLA = None if read_BTLA is None else read_BTLA[:, position]
            chosen = chosen.with_tokens(state.token_B, log_prob_B, goes_B, read_BLA, _top_tokens(logits_BV, limits))
            decoded.append(state.token_B)
            if position + 1 < size:
                goes_B &= (state.left_B > 0) & (state.token_B == tokens[position + 1])
        if drafts is not None:
            count_B = chosen.count_B - before_B
            cache = keep_tokens(cache, lengths_B, count_B)
            drafts = Drafts(
                cache=head_cache,
                token_BT=jnp.stack(decoded, axis=1),
                hidden_BTD=hidden_BTD,
                count_B=jnp.where(count_B > 0, count_B, drafts.count_B),
            )
            state = dataclasses.replace(state, drafts=drafts)
        return cache, state, chosen

    chosen = _no_tokens(model, state.token_B.shape[0], steps, limits, return_routing)
    cache, state, chosen = jax.lax.while_loop(going, step, (cache, state, chosen))
    return cache, state, _output(state, settings, chosen)


#: `decode_tokens`, compiled: of a session. An engine compiles it with shardings of its own (`slot_programs`).
DECODE_ARGUMENTS: Any = dict(donate_argnames=("cache", "state"), static_argnames=("return_routing", "steps"))
decode = KeptProgram(jax.jit(decode_tokens, **DECODE_ARGUMENTS), "decode", ["return_routing", "steps"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chosen:
    """The tokens of one call so far: the arrays of `DecodeOutput`, as they are filled."""

    token_BC: jax.Array
    log_prob_BC: jax.Array
    count_B: jax.Array
    passes_B: jax.Array
    experts_BCLA: jax.Array | None = None
    top_BCK: jax.Array | None = None
    top_log_prob_BCK: jax.Array | None = None
    dropped_B: jax.Array | None = None

    def with_pass(self, goes_B: jax.Array) -> "_Chosen":
        """One more forward pass in the rows that go on."""
        return dataclasses.replace(self, passes_B=self.passes_B + goes_B)

    def with_tokens(
        self,
        token_B: jax.Array,
        log_prob_B: jax.Array,
        goes_B: jax.Array,
        read_BLA: jax.Array | None,
        top: tuple[jax.Array, jax.Array] | None,
    ) -> "_Chosen":
        """One more token in the rows that go on, and what belongs to it."""
        is_slot_BC = goes_B[:, None] & (jnp.arange(self.token_BC.shape[1], dtype=jnp.int32) == self.count_B[:, None])
        new: dict[str, jax.Array | None] = {"token_BC": token_B, "log_prob_BC": log_prob_B, "experts_BCLA": read_BLA}
        if top is not None:
            new["top_BCK"], new["top_log_prob_BCK"] = top
        filled = {
            name: jnp.where(is_slot_BC.reshape(*is_slot_BC.shape, *[1] * (x.ndim - 1)), x[:, None], getattr(self, name))
            for name, x in new.items()
            if x is not None
        }
        return dataclasses.replace(self, count_B=self.count_B + goes_B, **filled)


def _no_tokens(model: CausalLM, rows: int, steps: int, limits: StepLimits | None, return_routing: bool) -> _Chosen:
    zeros_B = jnp.zeros(rows, jnp.int32)
    top = None if limits is None else jnp.zeros((rows, steps, MOST_TOP_LOGPROBS), jnp.int32)
    return _Chosen(
        token_BC=jnp.zeros((rows, steps), jnp.int32),
        log_prob_BC=jnp.zeros((rows, steps), jnp.float32),
        count_B=zeros_B,
        passes_B=zeros_B,
        experts_BCLA=_no_experts(model, rows, steps) if return_routing else None,
        top_BCK=top,
        top_log_prob_BCK=None if top is None else top.astype(jnp.float32),
        dropped_B=zeros_B if return_routing and limits is not None else None,
    )


def _allowed(logits_BV: jax.Array, limits: StepLimits | None, first_B: jax.Array) -> jax.Array:
    """The logits, -inf where a row's mask forbids the token; masks are of the first token of a call."""
    if limits is None:
        return logits_BV

    def mask(logits_BV: jax.Array) -> jax.Array:
        bits_BWI = (limits.allowed_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        allowed_BV = bits_BWI.reshape(logits_BV.shape[0], -1)[:, : logits_BV.shape[1]] > 0
        return jnp.where(allowed_BV | ~first_B[:, None], logits_BV, -jnp.inf)

    return jax.lax.cond(limits.masked, mask, lambda logits_BV: logits_BV, logits_BV)


def _top_tokens(logits_BV: jax.Array, limits: StepLimits | None) -> tuple[jax.Array, jax.Array] | None:
    """The most probable tokens and their log-probabilities, [B, K] each, where they are asked for; else zeros."""
    if limits is None:
        return None
    shape = (logits_BV.shape[0], MOST_TOP_LOGPROBS)

    def without(logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    return jax.lax.cond(limits.top, top_log_probs, without, logits_BV)


def top_log_probs(logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The `MOST_TOP_LOGPROBS` most probable tokens int32 [..., K] and their log-probabilities float32, best first.

    Of a smaller vocabulary, the rest are tokens V of log-probability -inf.
    """
    count = min(MOST_TOP_LOGPROBS, logits_BV.shape[-1])
    values_BK, tokens_BK = jax.lax.top_k(logits_BV, count)
    log_probs_BK = values_BK - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    missing = [(0, 0)] * (logits_BV.ndim - 1) + [(0, MOST_TOP_LOGPROBS - count)]
    tokens_BK = jnp.pad(tokens_BK.astype(jnp.int32), missing, constant_values=logits_BV.shape[-1])
    return tokens_BK, jnp.pad(log_probs_BK, missing, constant_values=-jnp.inf)


def _no_experts(model: CausalLM, rows: int, steps: int) -> jax.Array:
    """Zeros in place of the experts of a chunk of decoded tokens, [B, C, L_sparse, A]."""
    config = model.config
    layers = sum(kind.mlp == "sparse" for kind in config.layers)
    shape = (rows, steps, layers, config.moe.num_experts_per_tok)
    return jnp.zeros(shape, packed_dtype(config.moe.num_experts))


def _next_logits(
    model: CausalLM, tokens_BT: jax.Array, count_B: jax.Array, cache: Cache, return_routing: bool
) -> tuple[jax.Array, Cache, jax.Array | None, jax.Array | None]:
    """Reads the first `count_B` tokens of each row; logits [B, V] of its last one, and the cache with them in it.

    Where they are asked for, also the tokens' experts [B, T, L_sparse, A], packed, and the choices that were dropped
    in each row, int32 [B].
    """
    token_mask_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32) < count_B[:, None]
    out = model(tokens_BT, token_mask_BT, cache=cache, logits_at=count_B - 1, output_router_logits=return_routing)
    if not return_routing:
        return out.logits[:, 0], out.cache, None, None
    return out.logits[:, 0], out.cache, packed_experts(out.router), dropped_of_rows(out.router)


def _choose(
    logits_BV: jax.Array, state: DecodeState, settings: SamplingSettings, goes_B: jax.Array, own_BV: jax.Array
) -> tuple[DecodeState, jax.Array]:
    """The next token of every row that goes on, and its log-probability [B]; other rows stay as they are.

    Args:
        logits_BV: to choose from.
        state, settings: of the rows.
        goes_B: bool; which rows go on.
        own_BV: the model's own logits, for the log-probabilities.
    """
    token_B = choose(process_logits(logits_BV, settings, state.sampling), settings, state.sampling)
    token_B = jnp.where(goes_B, token_B, state.token_B)
    stopped_B = jnp.any(token_B[:, None] == settings.stop_BS, axis=1)
    state = dataclasses.replace(
        state,
        token_B=token_B,
        left_B=jnp.where(goes_B, jnp.where(stopped_B, 0, state.left_B - 1), state.left_B),
        sampling=advance(state.sampling, token_B, goes_B),
    )
    return state, log_probabilities(own_BV, token_B)


def _output(state: DecodeState, settings: SamplingSettings, chosen: _Chosen) -> DecodeOutput:
    return DecodeOutput(
        alive_B=state.left_B > 0,
        stopped_B=jnp.any(state.token_B[:, None] == settings.stop_BS, axis=1),
        **{field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)},
    )


#: The programs of this process: those of sessions, and of every engine that `slot_programs` adds.
compiled: list[Any] = [prefill, first, decode, speculative.prefill]


def compilations() -> int:
    """How many programs sessions and engines have compiled in this process."""
    return sum(program._cache_size() for program in compiled)


def padded_cache(model: CausalLM, rows: int, max_length: int, cache_dtype: DTypeLike | None) -> tuple[int, int, Cache]:
    """Rows and tokens of a row as they are rounded up, and the abstract cache for them."""
    rows, max_length = round_up(next_power_of_two(rows), batch_shards(model.mesh)), _cache_length(max_length)
    return rows, max_length, _abstract(abstract_cache, model, rows, max_length, cache_dtype)


def abstract_slots(
    model: CausalLM, slots: int, max_length: int, chunk: int, cache_dtype: DTypeLike | None, blocks: Blocks
) -> Cache:
    """The abstract cache of an `Engine`, for chunks of up to so many tokens."""
    dtype = model.execution.dtype if cache_dtype is None else dtype_name("cache_dtype", cache_dtype)
    return abstract_cache(
        model.config, model.mesh, batch=slots, max_length=max_length, max_write=chunk, dtype=dtype, blocks=blocks
    )


def empty_drafts(model: CausalLM, rows: int, max_length: int, cache_dtype: DTypeLike | None) -> Drafts:
    """The state of the next-token head before the first token, for rows and a length that are rounded up."""
    per_row = NamedSharding(model.mesh, P(BATCH))
    zeros_B = np.zeros(rows, np.int32)
    hidden_BTD = np.zeros((rows, 1, model.config.hidden_size), jnp.dtype(model.execution.dtype))
    return Drafts(
        cache=empty_cache(_abstract(abstract_mtp_cache, model, rows, max_length, cache_dtype)),
        token_BT=jax.device_put(zeros_B[:, None], per_row),
        hidden_BTD=jax.device_put(hidden_BTD, per_row),
        count_B=jax.device_put(zeros_B, per_row),
    )


def _abstract(
    make: Callable[..., Cache], model: CausalLM, rows: int, max_length: int, cache_dtype: DTypeLike | None
) -> Cache:
    dtype = model.execution.dtype if cache_dtype is None else dtype_name("cache_dtype", cache_dtype)
    longest = prefill_length(max_length, model.config)
    return make(model.config, model.mesh, batch=rows, max_length=max_length, max_write=longest, dtype=dtype)


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
