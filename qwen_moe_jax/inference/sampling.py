"""Sampling: transformers' logits processors, with separate settings and a separate seed for every row of a batch.

Logits [B, V] are changed in transformers' order (`GenerationMixin._get_logits_processor` of 5.23):

1. `logit_bias` is added. `bad_words_ids` are a bias of -inf: transformers applies them after the penalties, which
   do not change it;
2. `repetition_penalty`, for the tokens of prompt and output;
3. `frequency_penalty` and `presence_penalty`, for those of the output. transformers has neither: their order is
   vLLM's (`apply_penalties`), after the repetition penalty and before anything is masked or scaled;
4. tokens that end the text are masked until there are `min_new_tokens`;
5. the constraints on lengths, n-grams and forced tokens (`inference.constraints`);
6. in sampling: `temperature`, then `top_k`, `top_p`, `min_p`, `typical_p`, `epsilon_cutoff` and `eta_cutoff`, each
   applied to the tokens that are left.

Settings are arrays, so that one compiled program serves every value of them. A setting that no row uses is None:
without penalties there are no counts [B, V], and a batch without sampling is one argmax. Lists are padded to
few lengths.

Nothing is sorted. A threshold on logits is found bit by bit, in 32 sums over V; that is 20 times faster than XLA's sort
of 150 000 logits on a CPU, and a vocabulary that is sharded over devices is not gathered.
"""

import dataclasses
import secrets
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.config import GenerationConfig
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.constraints import Constraints, constrain, constraints_of
from qwen_moe_jax.inference.tables import add_rows, bucket, field_array, token_table

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
    """State of sampling: what the next token depends on, apart from the logits.

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


# ---- on the host: settings and initial state ------------------------------------------------------------------------


def sampling_settings(configs: Sequence[GenerationConfig], vocab_size: int) -> SamplingSettings:
    """The settings of a batch; row b is `configs[b]`. A row that samples without a seed gets a random one.

    Raises:
        RequestError: see `require_known_tokens`; the message names the row.
    """
    for row, config in enumerate(configs):
        require_known_tokens(f"request {row}", config, vocab_size)
    waits = any(config.min_new_tokens and config.eos_token_id for config in configs)
    return SamplingSettings(
        biases=_bias_table([_biased_sequences(config) for config in configs], vocab_size),
        penalties=_penalties(configs) if any(map(_is_penalised, configs)) else None,
        min_new_tokens_B=field_array(configs, "min_new_tokens", np.int32) if waits else None,
        stop_BS=token_table([config.eos_token_id for config in configs], vocab_size),
        constraints=constraints_of(configs, vocab_size),
        drawing=_drawing(configs, vocab_size) if any(config.do_sample for config in configs) else None,
        vocab_size=vocab_size,
    )


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


def _bias_table(rows: Sequence[list[tuple[tuple[int, ...], float]]], vocab_size: int) -> BiasedSequences:
    num_slots = bucket(max(map(len, rows), default=0))
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


def _is_penalised(config: GenerationConfig) -> bool:
    return (config.repetition_penalty, config.presence_penalty, config.frequency_penalty) != (1, 0, 0)


def _penalties(configs: Sequence[GenerationConfig]) -> Penalties:
    return Penalties(
        repetition_B=field_array(configs, "repetition_penalty", np.float32),
        presence_B=field_array(configs, "presence_penalty", np.float32),
        frequency_B=field_array(configs, "frequency_penalty", np.float32),
    )


def _drawing(configs: Sequence[GenerationConfig], vocab_size: int) -> Drawing:
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
        cutoffs=_cutoffs(active),
    )


def _cutoffs(active: Sequence[GenerationConfig]) -> Cutoffs | None:
    # transformers ignores the others, too.
    epsilons = [0.0 if config.epsilon_cutoff == 1 else config.epsilon_cutoff for config in active]
    etas = [0.0 if config.eta_cutoff == 1 else config.eta_cutoff for config in active]
    if not any(epsilons) and not any(etas) and all(config.typical_p == 1 for config in active):
        return None
    return Cutoffs(
        typical_p_B=field_array(active, "typical_p", np.float32),
        epsilon_B=jnp.asarray(np.array(epsilons, np.float32)),
        eta_B=jnp.asarray(np.array(etas, np.float32)),
    )


# ---- on the device: one token for every row -------------------------------------------------------------------------


def process_logits(logits_BV: jax.Array, settings: SamplingSettings, state: SamplingState) -> jax.Array:
    """Logits after the processors, from which the next tokens are chosen.

    Args:
        logits_BV: the model's, float32 [B, V].
        settings: of the B rows.
        state: of the B rows.

    Returns:
        float32 [B, V]; -inf for what cannot be chosen.
    """
    logits_BV = _add_biases(logits_BV, settings.biases, state.recent_BW)
    if settings.penalties is not None:
        logits_BV = _penalise(logits_BV, settings.penalties, state)
    if settings.min_new_tokens_B is not None:
        waits_B = state.generated_B < settings.min_new_tokens_B
        logits_BV = add_rows(logits_BV, settings.stop_BS, jnp.where(waits_B, -jnp.inf, 0.0)[:, None])
    if settings.constraints is not None:
        logits_BV = constrain(
            logits_BV,
            settings.constraints,
            settings.stop_BS,
            prompt_length_B=state.prompt_length_B,
            generated_B=state.generated_B,
            history_BL=state.history_BL,
        )
    if settings.drawing is not None:
        logits_BV = _truncate(logits_BV / settings.drawing.temperature_B[:, None], settings.drawing)
        if settings.drawing.cutoffs is not None:
            logits_BV = _cut_off(logits_BV, settings.drawing.cutoffs)
    return logits_BV


def choose(processed_BV: jax.Array, settings: SamplingSettings, state: SamplingState) -> jax.Array:
    """The next tokens: sampled where the row asks for it, else the most probable ones.

    A row's random numbers come from its seed and from how many tokens it has generated. They do not
    depend on its index, on the size of the batch, or on the settings of other rows.

    Args:
        processed_BV: float32 [B, V], from `process_logits`.
        settings: of the B rows.
        state: of the B rows.

    Returns:
        int32 [B]. Among equals the first is taken.
    """
    if settings.drawing is None:
        return _argmax(processed_BV)
    key_B = jax.vmap(jax.random.fold_in)(settings.drawing.key_B, state.generated_B)
    # The largest of logits with Gumbel noise is a draw from their softmax.
    gumbel_BV = jax.vmap(lambda key: jax.random.gumbel(key, processed_BV.shape[1:], jnp.float32))(key_B)
    return _argmax(processed_BV + jnp.where(settings.drawing.drawn_B[:, None], gumbel_BV, 0))


def advance(state: SamplingState, token_B: jax.Array, alive_B: jax.Array) -> SamplingState:
    """The state after tokens int32 [B] were chosen, in the rows that are alive, bool [B]; others keep theirs."""
    counts_BV = state.counts_BV
    if counts_BV is not None:
        counts_BV = add_rows(counts_BV, token_B[:, None], alive_B[:, None].astype(jnp.int32))
    history_BL = state.history_BL
    if history_BL is not None:
        is_next_BL = jnp.arange(history_BL.shape[1]) == (state.prompt_length_B + state.generated_B)[:, None]
        history_BL = jnp.where(is_next_BL & alive_B[:, None], token_B[:, None], history_BL)
    shifted_BW = jnp.concatenate([state.recent_BW, token_B[:, None]], axis=1)[:, 1:]
    return dataclasses.replace(
        state,
        generated_B=state.generated_B + alive_B,
        recent_BW=jnp.where(alive_B[:, None], shifted_BW, state.recent_BW),
        counts_BV=counts_BV,
        history_BL=history_BL,
    )


def log_probabilities(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """Log-probabilities of tokens under the model's own distribution, before any processor.

    Args:
        logits_BV: the model's, float32 [..., V], before `process_logits`.
        token_B: int32 [...].

    Returns:
        float32 [...], in nats.
    """
    chosen_B = jnp.take_along_axis(logits_BV, token_B[..., None], axis=-1)[..., 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def _argmax(values_BV: jax.Array) -> jax.Array:
    """`jnp.argmax` of the last axis as two plain reductions: 5 times faster on a CPU, where XLA's own is scalar."""
    vocab_size = values_BV.shape[-1]
    best_BV = values_BV == jnp.max(values_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(best_BV, jnp.arange(vocab_size, dtype=jnp.int32), vocab_size - 1), axis=-1)


def _add_biases(logits_BV: jax.Array, biases: BiasedSequences, recent_BW: jax.Array) -> jax.Array:
    seen_BMW = (biases.prefix_BMW == NO_TOKEN) | (biases.prefix_BMW == recent_BW[:, None])
    return add_rows(logits_BV, biases.token_BM, jnp.where(jnp.all(seen_BMW, axis=-1), biases.bias_BM, 0))


def _penalise(logits_BV: jax.Array, penalties: Penalties, state: SamplingState) -> jax.Array:
    factor_B1 = penalties.repetition_B[:, None]
    repeated_BV = jnp.where(logits_BV < 0, logits_BV * factor_B1, logits_BV / factor_B1)
    generated_BV = state.counts_BV > 0
    logits_BV = jnp.where(state.prompted_BV | generated_BV, repeated_BV, logits_BV)
    logits_BV = logits_BV - penalties.frequency_B[:, None] * state.counts_BV
    return logits_BV - penalties.presence_B[:, None] * generated_BV


def _truncate(logits_BV: jax.Array, drawing: Drawing) -> jax.Array:
    """top_k, top_p and min_p: each keeps the logits above a threshold, and with a logit all that equal it.

    transformers does so for top_k and min_p; of equal logits at the edge of top_p it keeps those its sort puts last.
    """
    rank_BV = _ranks(logits_BV)
    # Probabilities, up to the factor that makes the largest 1.
    weight_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))

    def number_above(rank_B: jax.Array) -> jax.Array:
        return jnp.sum(rank_BV >= rank_B[:, None], axis=-1, dtype=jnp.int32)

    top_k_B = _largest(lambda rank_B: number_above(rank_B) >= drawing.top_k_B, drawing.top_k_B < logits_BV.shape[-1])
    weight_BV = jnp.where(rank_BV >= top_k_B[:, None], weight_BV, 0)

    def weight_above(rank_B: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(rank_BV >= rank_B[:, None], weight_BV, 0), axis=-1)

    # A weight that is not quite nothing, so that top_p=0 keeps the most probable token.
    wanted_B = jnp.maximum(drawing.top_p_B * jnp.sum(weight_BV, axis=-1), jnp.finfo(jnp.float32).tiny)
    top_p_B = _largest(lambda rank_B: weight_above(rank_B) >= wanted_B, drawing.top_p_B < 1)

    kept_BV = (rank_BV >= jnp.maximum(top_k_B, top_p_B)[:, None]) & (weight_BV >= drawing.min_p_B[:, None])
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


def _cut_off(logits_BV: jax.Array, cutoffs: Cutoffs) -> jax.Array:
    """typical_p (arXiv 2202.00666), then epsilon_cutoff and eta_cutoff (arXiv 2210.15191)."""
    log_p_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    p_BV = jnp.exp(log_p_BV)
    distance_BV = jnp.abs(log_p_BV + _entropy(log_p_BV)[:, None])
    # The most typical tokens, whose probabilities sum to typical_p.
    rank_BV = _ranks(-distance_BV)

    def mass_above(rank_B: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(rank_BV >= rank_B[:, None], p_BV, 0), axis=-1)

    typical_B = _largest(lambda rank_B: mass_above(rank_B) >= cutoffs.typical_p_B, cutoffs.typical_p_B < 1)
    logits_BV = jnp.where(rank_BV >= typical_B[:, None], logits_BV, -jnp.inf)
    logits_BV = _mask_improbable(logits_BV, jax.nn.log_softmax(logits_BV, axis=-1), cutoffs.epsilon_B)
    log_p_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    eta_B = jnp.minimum(cutoffs.eta_B, jnp.sqrt(cutoffs.eta_B) * jnp.exp(-_entropy(log_p_BV)))
    return _mask_improbable(logits_BV, log_p_BV, eta_B)


def _entropy(log_p_BV: jax.Array) -> jax.Array:
    """In nats, [B]."""
    return -jnp.sum(jnp.where(log_p_BV > -jnp.inf, jnp.exp(log_p_BV) * log_p_BV, 0), axis=-1)


def _mask_improbable(logits_BV: jax.Array, log_p_BV: jax.Array, least_B: jax.Array) -> jax.Array:
    """Masks tokens of a probability below `least_B`, but for the most probable ones."""
    best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    return jnp.where((jnp.exp(log_p_BV) < least_B[:, None]) & (logits_BV < best_B1), -jnp.inf, logits_BV)


def _ranks(values: jax.Array) -> jax.Array:
    """uint32 in the order of float32 values: the bits of negative numbers, stored by magnitude, are inverted."""
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)  # -0.0 equals 0.0
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(holds: Callable[[jax.Array], jax.Array], wanted_B: jax.Array) -> jax.Array:
    """The largest uint32 [B] for which `holds` is true, found bit by bit; 0, at no cost, where none is wanted.

    Args:
        holds: uint32 [B] → bool [B]; true of 0, and of no number above one of which it is false.
        wanted_B: bool [B].
    """

    def step(bit: jax.Array, found_B: jax.Array) -> jax.Array:
        trial_B = found_B | (jnp.uint32(1 << 31) >> bit.astype(jnp.uint32))
        return jnp.where(wanted_B & holds(trial_B), trial_B, found_B)

    steps = jnp.where(jnp.any(wanted_B), 32, 0)
    return jax.lax.fori_loop(0, steps, step, jnp.zeros(wanted_B.shape, jnp.uint32))
