"""The compiled programs of an engine's slots: `programs.decode_tokens`, reading prompts, setting and clearing slots."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.inference import programs
from qwen_moe_jax.inference.expert_loads import Counters, chosen_by, dropped_of_rows
from qwen_moe_jax.inference.programs import DecodeOutput, DecodeState, StepLimits, top_log_probs
from qwen_moe_jax.inference.sampling import log_probabilities
from qwen_moe_jax.inference.settings import SamplingSettings, SamplingState
from qwen_moe_jax.inference.speculative import packed_experts
from qwen_moe_jax.model.base import Model, ReadOut, router_output
from qwen_moe_jax.model.cache import Cache
from qwen_moe_jax.model.cache_rows import clear, copy_rows, put_first, put_rows, take_first, take_rows
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.model.decoder import DecoderOutput
from qwen_moe_jax.model.inputs import ModelInputs, checked_inputs
from qwen_moe_jax.model.output import ModelOutput
from qwen_moe_jax.sharding.rules import BATCH


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CacheOnly(ReadOut):
    """Reads nothing out: the head is not run."""

    def __call__(self, model: Model, out: DecoderOutput, inputs: ModelInputs) -> ModelOutput:
        """See `ReadOut`."""
        return ModelOutput(logits=None, router=router_output(out), cache=out.cache)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOutput:
    """Log-probabilities of a chunk of a prompt.

    Attributes:
        log_prob_RT: float32; of the token after each one.
        top_RTK, top_log_prob_RTK: int32 and float32; the most probable tokens there.
    """

    log_prob_RT: jax.Array
    top_RTK: jax.Array
    top_log_prob_RTK: jax.Array


def decode_slots(
    model: CausalLM,
    cache: Cache,
    state: DecodeState,
    counters: Counters | None,
    settings: SamplingSettings,
    limits: StepLimits,
    rows_R: jax.Array | None = None,
    *,
    steps: int,
) -> tuple[Cache, DecodeState, Counters | None, DecodeOutput]:
    """`programs.decode_tokens` of all slots, or of those in a few rows.

    Args:
        model: in eval mode.
        cache, state: of all slots; they are donated.
        counters: of the experts' tokens; None where there are no experts.
        settings: of all slots.
        limits: of the rows.
        rows_R: int32; which rows (`model.cache_rows`); None is all, in their order. What is no row has a limit of 0.
        steps: tokens that the output has space for.

    Returns:
        Cache, state and counters with the new tokens in them, and the tokens of the rows.
    """
    own, own_state = cache, state
    if rows_R is not None:
        own_state, settings, lengths_R, table_RM = take_first(
            (state, settings, cache.lengths_B, cache.table_BM), rows_R, model.mesh
        )
        # One that is no row reads no other's text.
        own = take_rows(cache, rows_R, jnp.where(limits.limit_B > 0, lengths_R, 0), model.mesh, table_RM)
    own, own_state, output = programs.decode_tokens(
        model, own, own_state, settings, limits, steps=steps, return_routing=counters is not None
    )
    if counters is not None:
        is_token_RC = jnp.arange(steps, dtype=jnp.int32) < output.count_B[:, None]
        chosen_LE = chosen_by(output.experts_BCLA, is_token_RC, counters.tokens_2LE.shape[-1])
        counters = counters.plus(chosen_LE, jnp.sum(output.dropped_B, dtype=jnp.int32))
    output = dataclasses.replace(output, experts_BCLA=None, dropped_B=None)
    if rows_R is None:
        return own, own_state, counters, output
    cache = put_rows(cache, own, rows_R, model.mesh)
    return cache, put_first(state, own_state, rows_R, model.mesh), counters, output


def read_chunk(
    model: CausalLM,
    cache: Cache,
    counters: Counters | None,
    tokens_RT: jax.Array,
    count_R: jax.Array,
    rows_R: jax.Array,
    lengths_R: jax.Array,
    table_RM: jax.Array,
    targets_RT: jax.Array | None = None,
) -> tuple[Cache, Counters | None, PromptOutput | None]:
    """Reads a chunk of the prompts in a few rows of the cache.

    Args:
        model: in eval mode.
        cache: of all slots; it is donated.
        counters: of the experts' tokens; None where there are no experts.
        tokens_RT, count_R: int32; the chunks, and the tokens in each.
        rows_R, lengths_R: int32; which rows (`model.cache_rows`), and the tokens that they have already.
        table_RM: int32; their blocks.
        targets_RT: int32; the token after each one, where log-probabilities are asked for.
    """
    part = take_rows(cache, rows_R, lengths_R, model.mesh, table_RM)
    mask_RT = jnp.arange(tokens_RT.shape[1], dtype=jnp.int32) < count_R[:, None]
    with_routing = counters is not None
    if targets_RT is None:
        read_out = _CacheOnly(output_router_logits=with_routing)
        out = model.run(checked_inputs(tokens_RT, mask_RT), read_out, cache=part)
    else:
        out = model(tokens_RT, mask_RT, cache=part, output_router_logits=with_routing)
    if counters is not None:
        chosen_LE = chosen_by(packed_experts(out.router), mask_RT, counters.tokens_2LE.shape[-1])
        counters = counters.plus(chosen_LE, jnp.sum(dropped_of_rows(out.router), dtype=jnp.int32))
    cache = put_rows(cache, out.cache, rows_R, model.mesh)
    if targets_RT is None:
        return cache, counters, None
    top_RTK, top_log_prob_RTK = top_log_probs(out.logits)
    output = PromptOutput(
        log_prob_RT=log_probabilities(out.logits, targets_RT), top_RTK=top_RTK, top_log_prob_RTK=top_log_prob_RTK
    )
    return cache, counters, output


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotUpdate:
    """New states of some slots.

    Attributes:
        changed_B: bool; of which.
        lengths_B, token_B, left_B, prompt_length_B, generated_B: int32; see `Cache`, `DecodeState`, `SamplingState`.
    """

    changed_B: jax.Array
    lengths_B: jax.Array
    token_B: jax.Array
    left_B: jax.Array
    prompt_length_B: jax.Array
    generated_B: jax.Array


def update_slots(state: DecodeState, lengths_B: jax.Array, update: SlotUpdate) -> tuple[DecodeState, jax.Array]:
    """Sets the slots that begin, go on after a pause, or end; those that do not change are kept."""

    def new(field: str, old_B: jax.Array) -> jax.Array:
        return jnp.where(update.changed_B, getattr(update, field), old_B)

    sampling = dataclasses.replace(
        state.sampling,
        prompt_length_B=new("prompt_length_B", state.sampling.prompt_length_B),
        generated_B=new("generated_B", state.sampling.generated_B),
    )
    state = dataclasses.replace(
        state, token_B=new("token_B", state.token_B), left_B=new("left_B", state.left_B), sampling=sampling
    )
    return state, new("lengths_B", lengths_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """What penalties, biases and constraints look at: the part of a `SamplingState` that most requests do not need."""

    recent_BW: jax.Array
    prompted_BV: jax.Array
    counts_BV: jax.Array
    history_BL: jax.Array

    @staticmethod
    def of(state: SamplingState) -> "Texts":
        """That part of a state."""
        return Texts(**{field.name: getattr(state, field.name) for field in dataclasses.fields(Texts)})

    def added_to(self, state: SamplingState) -> SamplingState:
        """A state with it."""
        return dataclasses.replace(state, **{name: getattr(self, name) for name in vars(self)})


def set_text(texts: Texts, slot: jax.Array, text_L: jax.Array, length: jax.Array, prompt: jax.Array) -> Texts:
    """The texts with another one in a slot.

    Args:
        texts: of all slots; donated.
        slot: int32 [].
        text_L: int32; prompt and output, from the left.
        length, prompt: int32 []; tokens of the text, and of the prompt.
    """
    rows, vocab_size = texts.counts_BV.shape
    window = texts.recent_BW.shape[1]
    index_L, is_row_B1 = (
        jnp.arange(text_L.shape[0], dtype=jnp.int32),
        (jnp.arange(rows, dtype=jnp.int32) == slot)[:, None],
    )

    def counted(is_part_L: jax.Array) -> jax.Array:
        return jnp.zeros(vocab_size, jnp.int32).at[jnp.where(is_part_L, text_L, vocab_size)].add(1, mode="drop")

    last_W = length - window + jnp.arange(window, dtype=jnp.int32)
    recent_W = jnp.where(last_W < 0, -1, text_L[jnp.maximum(last_W, 0)])
    return Texts(
        recent_BW=jnp.where(is_row_B1, recent_W, texts.recent_BW),
        prompted_BV=jnp.where(is_row_B1, counted(index_L < prompt) > 0, texts.prompted_BV),
        counts_BV=jnp.where(is_row_B1, counted((index_L >= prompt) & (index_L < length)), texts.counts_BV),
        history_BL=jnp.where(is_row_B1, text_L, texts.history_BL),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotPrograms:
    """The programs of the engines with one kind of cache, compiled; see the functions of the same names.

    Results have the shardings of the next call's arguments: with those that the compiler would choose, a program would
    be compiled again.
    """

    decode: Callable
    read_chunk: Callable
    update_slots: Callable
    set_text: Callable
    clear: Callable
    save_states: Callable
    restore_states: Callable


@functools.cache
def slot_programs(abstract: Cache, copies: Cache | None) -> SlotPrograms:
    """The programs for a cache like this abstract one, and for copies of states in another."""
    sharding = abstract.lengths_B.sharding
    assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
    mesh = sharding.mesh
    cache = jax.tree.map(lambda x: x.sharding, abstract)
    row, everywhere = NamedSharding(mesh, P(BATCH)), NamedSharding(mesh, P())
    copy = functools.partial(copy_rows, mesh=mesh)
    found = SlotPrograms(
        decode=jax.jit(
            decode_slots,
            donate_argnames=("cache", "state"),
            static_argnames="steps",
            out_shardings=(cache, row, everywhere, everywhere),
        ),
        read_chunk=jax.jit(read_chunk, donate_argnames="cache", out_shardings=(cache, everywhere, everywhere)),
        update_slots=jax.jit(update_slots, donate_argnames=("state", "lengths_B"), out_shardings=row),
        set_text=jax.jit(set_text, donate_argnames="texts", out_shardings=row),
        clear=jax.jit(functools.partial(clear, mesh=mesh), donate_argnames="cache", out_shardings=cache),
        save_states=jax.jit(copy, donate_argnames="target", out_shardings=jax.tree.map(lambda x: x.sharding, copies)),
        restore_states=jax.jit(copy, donate_argnames="target", out_shardings=cache),
    )
    programs.compiled += [getattr(found, field.name) for field in dataclasses.fields(found)]
    return found
