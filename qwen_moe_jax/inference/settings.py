"""Settings of sampling, one row per request, and the state that goes with them: made on the host, used by `sampling`.

Settings are arrays, so that one compiled program serves every value of them. A setting that no row uses is None:
without penalties there are no counts [B, V], and a batch without sampling is one argmax. Lists are padded to
few lengths. An engine's settings have one structure for all (`fixed_settings`).
"""

import dataclasses
import secrets
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.config import GenerationConfig
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.constraints import Constraints, constraints_of, is_constrained
from qwen_moe_jax.inference.tables import TableSizes, bucket, field_array, token_table

#: Fills windows of tokens before the first token of a text; in a prefix it matches any token.
NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasedSequences:
    """Biases of token sequences: added to the logit of a sequence's last token where the tokens before it came last.

    Attributes:
        prefix_BMW: int32 [B, M, W]; the tokens before, aligned to the end; NO_TOKEN matches any.
        token_BM: int32 [B, M]; the last token; V in unused slots.
        bias_BM: float32 [B, M].
    """

    prefix_BMW: jax.Array
    token_BM: jax.Array
    bias_BM: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Penalties:
    """`repetition_penalty`, `presence_penalty` and `frequency_penalty`, float32 [B] each."""

    repetition_B: jax.Array
    presence_B: jax.Array
    frequency_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cutoffs:
    """`typical_p` (1 for all), `epsilon_cutoff` and `eta_cutoff` (0 for all), float32 [B] each."""

    typical_p_B: jax.Array
    epsilon_B: jax.Array
    eta_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """Settings of sampling. Greedy rows have settings that change no logit.

    Attributes:
        drawn_B: bool [B]; whether the row samples (`do_sample`).
        key_B: Threefry keys [B], of the row's seed alone.
        temperature_B: float32 [B].
        top_k_B: int32 [B], V for all.
        top_p_B: float32 [B], 1 for all.
        min_p_B: float32 [B], 0 for all.
        cutoffs: None where no row has any.
    """

    drawn_B: jax.Array
    key_B: jax.Array
    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    cutoffs: Cutoffs | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Sampling settings of a batch, one row per request. The number of compiled programs is bounded by which fields
    are None and by M, W, S, each of which is 0, 4, 16, 64, …: enough for the row with most entries.

    Attributes:
        biases: of `logit_bias` and `bad_words_ids`; M is 0 where there are none.
        penalties: None where no row has any.
        min_new_tokens_B: int32 [B]; None where no row has a minimum.
        stop_BS: int32 [B, S]; the tokens that end a row's text; V, which is no token, in unused slots.
        constraints: None where no row has any.
        drawing: None where every row takes the most probable token.
        vocab_size: V.
    """

    biases: BiasedSequences
    penalties: Penalties | None
    min_new_tokens_B: jax.Array | None
    stop_BS: jax.Array
    constraints: Constraints | None
    drawing: Drawing | None
    vocab_size: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingState:
    """State of sampling: what the next token depends on besides the logits.

    Attributes:
        prompt_length_B: int32 [B]; tokens of the prompt.
        generated_B: int32 [B]; tokens generated so far.
        recent_BW: int32 [B, W]; the last tokens of prompt and output, NO_TOKEN before the first; as long as the longest
            prefix of `SamplingSettings.biases`.
        prompted_BV: bool [B, V]; which tokens the prompt has. None without penalties.
        counts_BV: int32 [B, V]; how often each token was generated. None without penalties.
        history_BL: int32 [B, L]; tokens of prompt and output, from the left. None without `no_repeat_ngram_size`.
    """

    prompt_length_B: jax.Array
    generated_B: jax.Array
    recent_BW: jax.Array
    prompted_BV: jax.Array | None
    counts_BV: jax.Array | None
    history_BL: jax.Array | None


def sampling_settings(configs: Sequence[GenerationConfig], vocab_size: int) -> SamplingSettings:
    """The settings of a batch; row b is `configs[b]`. A row that samples without a seed gets a random one.

    Raises:
        RequestError: see `require_known_tokens`; the message names the row.
    """
    for row, config in enumerate(configs):
        require_known_tokens(f"request {row}", config, vocab_size)
    waits = any(map(_waits, configs))
    return SamplingSettings(
        biases=_bias_table([_biased_sequences(config) for config in configs], vocab_size),
        penalties=_penalties(configs) if any(map(_is_penalised, configs)) else None,
        min_new_tokens_B=field_array(configs, "min_new_tokens", np.int32) if waits else None,
        stop_BS=token_table([config.eos_token_id for config in configs], vocab_size),
        constraints=constraints_of(configs, vocab_size),
        drawing=_drawing(configs, vocab_size) if any(config.do_sample for config in configs) else None,
        vocab_size=vocab_size,
    )


def fixed_settings(
    configs: Sequence[GenerationConfig], vocab_size: int, sizes: TableSizes, *, is_full: bool
) -> SamplingSettings:
    """`sampling_settings` of a structure that does not depend on the configs: one compiled program serves them all.

    Args:
        configs: of the rows, checked (`require_known_tokens`, `require_fitting`), each with a seed where it samples.
        vocab_size: V.
        sizes: of the tables.
        is_full: with biases, penalties, constraints and cutoffs; without, no config may need them (`needs_full`).
    """
    biases = [_biased_sequences(config) for config in configs] if is_full else [[] for _ in configs]
    size, window = (sizes.biases, sizes.prefix) if is_full else (0, 0)
    return SamplingSettings(
        biases=_bias_table(biases, vocab_size, size, window),
        penalties=_penalties(configs) if is_full else None,
        min_new_tokens_B=field_array(configs, "min_new_tokens", np.int32) if is_full else None,
        stop_BS=token_table([config.eos_token_id for config in configs], vocab_size, sizes.stops),
        constraints=constraints_of(configs, vocab_size, sizes) if is_full else None,
        drawing=_drawing(configs, vocab_size, with_cutoffs=is_full),
        vocab_size=vocab_size,
    )


def needs_full(config: GenerationConfig) -> bool:
    """Whether a request has settings beyond temperature, top_k, top_p, min_p and stop tokens."""
    cut_off = config.do_sample and _cutoffs([config]) is not None
    return bool(
        config.logit_bias
        or config.bad_words_ids
        or cut_off
        or _is_penalised(config)
        or _waits(config)
        or is_constrained(config)
    )


def require_fitting(name: str, config: GenerationConfig, sizes: TableSizes) -> None:
    """Refuses settings with longer lists than the tables hold. `name` is the request's, for the message.

    Raises:
        RequestError: naming the field and both numbers.
    """
    biased = _biased_sequences(config)
    found = {
        "logit_bias and bad_words_ids": (len(biased), sizes.biases, "sequences"),
        "logit_bias and bad_words_ids with the longest sequence": (
            max((len(sequence) for sequence, _ in biased), default=0),
            sizes.prefix + 1,
            "tokens",
        ),
        "eos_token_id": (len(config.eos_token_id), sizes.stops, "tokens"),
        "forced_eos_token_id": (len(config.forced_eos_token_id), sizes.forced, "tokens"),
        "suppress_tokens": (len(config.suppress_tokens), sizes.suppressed, "tokens"),
        "begin_suppress_tokens": (len(config.begin_suppress_tokens), sizes.suppressed, "tokens"),
    }
    for field, (count, most, unit) in found.items():
        if count > most:
            raise RequestError(f"{name}: {field}: found {count} {unit}, expected at most {most}.")


def require_known_tokens(name: str, config: GenerationConfig, vocab_size: int) -> None:
    """Refuses biases, bad words and forced tokens outside the vocabulary. `name` is the request's, for the message.

    Raises:
        RequestError: naming the field and the token.
    """
    biased = tuple(sequence for sequence, _ in config.logit_bias)
    first = () if config.forced_bos_token_id is None else (config.forced_bos_token_id,)
    fields: dict[str, Sequence[int | tuple[int, ...]]] = {
        "logit_bias": biased,
        "bad_words_ids": config.bad_words_ids,
        "forced_bos_token_id": first,
        "forced_eos_token_id": config.forced_eos_token_id,
    }
    for field, sequences in fields.items():
        for token in (token for sequence in sequences for token in _as_tuple(sequence)):
            if token >= vocab_size:
                raise RequestError(
                    f"{name}: {field} holds token {token}, expected token ids from 0 to {vocab_size - 1}."
                )


def initial_state(
    settings: SamplingSettings, prompts: Sequence[Sequence[int]], max_length: int | None = None
) -> SamplingState:
    """The state before the first new token.

    Args:
        settings: of the batch.
        prompts: token ids that each row has read; they may be empty.
        max_length: the largest number of tokens of a row, prompt included; needed with `no_repeat_ngram_size`.
    """
    rows, window = len(prompts), settings.biases.prefix_BMW.shape[-1]
    recent_BW = np.full((rows, window), NO_TOKEN, np.int32)
    for row, prompt in zip(recent_BW, prompts, strict=True):
        last = prompt[max(len(prompt) - window, 0) :]
        row[window - len(last) :] = last
    prompted_BV = counts_BV = None
    if settings.penalties is not None:
        read_BV = np.zeros((rows, settings.vocab_size), bool)
        counts_BV = jnp.asarray(np.zeros((rows, settings.vocab_size), np.int32))
        for row, prompt in zip(read_BV, prompts, strict=True):
            row[np.asarray(prompt, np.int64)] = True
        prompted_BV = jnp.asarray(read_BV)
    history_BL = None
    if settings.constraints is not None and settings.constraints.ngram_size_B is not None:
        if max_length is None:
            raise ValueError("no_repeat_ngram_size needs max_length, the tokens a row may have.")
        history = np.zeros((rows, max_length), np.int32)
        for row, prompt in zip(history, prompts, strict=True):
            row[: len(prompt)] = prompt
        history_BL = jnp.asarray(history)
    return SamplingState(
        prompt_length_B=jnp.asarray(np.array([len(prompt) for prompt in prompts], np.int32)),
        generated_B=jnp.asarray(np.zeros(rows, np.int32)),
        recent_BW=jnp.asarray(recent_BW),
        prompted_BV=prompted_BV,
        counts_BV=counts_BV,
        history_BL=history_BL,
    )


def _as_tuple(sequence: int | tuple[int, ...]) -> tuple[int, ...]:
    return sequence if isinstance(sequence, tuple) else (sequence,)


def _biased_sequences(config: GenerationConfig) -> list[tuple[tuple[int, ...], float]]:
    """Sequences of tokens and what is added to the last one's logit."""
    words = dict.fromkeys(config.bad_words_ids)
    ends = {(token,) for token in config.eos_token_id}
    biases = [(_as_tuple(sequence), bias) for sequence, bias in config.logit_bias]
    return biases + [(word, -np.inf) for word in words if word not in ends]


def _bias_table(
    rows: Sequence[list[tuple[tuple[int, ...], float]]],
    vocab_size: int,
    num_slots: int | None = None,
    window: int | None = None,
) -> BiasedSequences:
    if num_slots is None:
        num_slots = bucket(max(map(len, rows), default=0))
    if window is None:
        window = bucket(max((len(sequence) - 1 for row in rows for sequence, _ in row), default=0))
    prefix_BMW = np.full((len(rows), num_slots, window), NO_TOKEN, np.int32)
    token_BM = np.full((len(rows), num_slots), vocab_size, np.int32)
    bias_BM = np.zeros((len(rows), num_slots), np.float32)
    for b, row in enumerate(rows):
        for m, (sequence, bias) in enumerate(row):
            *prefix, token_BM[b, m] = sequence
            prefix_BMW[b, m, window - len(prefix) :] = prefix
            bias_BM[b, m] = bias
    return BiasedSequences(
        prefix_BMW=jnp.asarray(prefix_BMW), token_BM=jnp.asarray(token_BM), bias_BM=jnp.asarray(bias_BM)
    )


def _waits(config: GenerationConfig) -> bool:
    return bool(config.min_new_tokens and config.eos_token_id)


def _is_penalised(config: GenerationConfig) -> bool:
    return (config.repetition_penalty, config.presence_penalty, config.frequency_penalty) != (1, 0, 0)


def _penalties(configs: Sequence[GenerationConfig]) -> Penalties:
    return Penalties(
        repetition_B=field_array(configs, "repetition_penalty", np.float32),
        presence_B=field_array(configs, "presence_penalty", np.float32),
        frequency_B=field_array(configs, "frequency_penalty", np.float32),
    )


def _drawing(configs: Sequence[GenerationConfig], vocab_size: int, with_cutoffs: bool | None = None) -> Drawing:
    still = GenerationConfig(top_k=0)  # changes no logit
    active = [config if config.do_sample else still for config in configs]
    top_k = [min(config.top_k or vocab_size, vocab_size) for config in active]
    seeds = [secrets.randbits(64) if config.seed is None else config.seed for config in configs]
    halves = np.array([(seed >> 32, seed & 0xFFFF_FFFF) for seed in seeds], np.uint32)
    return Drawing(
        drawn_B=field_array(configs, "do_sample", bool),
        # Threefry by name: under vmap it gives each row what it would get alone, which other generators do not.
        key_B=jax.random.wrap_key_data(jnp.asarray(halves), impl="threefry2x32"),
        temperature_B=field_array(active, "temperature", np.float32),
        top_k_B=jnp.asarray(np.array(top_k, np.int32)),
        top_p_B=field_array(active, "top_p", np.float32),
        min_p_B=field_array(active, "min_p", np.float32),
        cutoffs=None if with_cutoffs is False else _cutoffs(active, always=with_cutoffs is True),
    )


def _cutoffs(active: Sequence[GenerationConfig], *, always: bool = False) -> Cutoffs | None:
    # transformers ignores the others, too.
    epsilons = [0.0 if config.epsilon_cutoff == 1 else config.epsilon_cutoff for config in active]
    etas = [0.0 if config.eta_cutoff == 1 else config.eta_cutoff for config in active]
    if not always and not any(epsilons) and not any(etas) and all(config.typical_p == 1 for config in active):
        return None
    return Cutoffs(
        typical_p_B=field_array(active, "typical_p", np.float32),
        epsilon_B=jnp.asarray(np.array(epsilons, np.float32)),
        eta_B=jnp.asarray(np.array(etas, np.float32)),
    )
