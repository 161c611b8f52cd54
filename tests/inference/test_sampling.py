"""Sampling compared with NumPy: every option, frequencies of sampled tokens, independence of rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qwen_moe_jax as qmj
from qwen_moe_jax.inference.sampling import advance, choose, log_probabilities, process_logits
from qwen_moe_jax.inference.settings import initial_state, sampling_settings

V = 32
Config = qmj.GenerationConfig
PLAIN = Config(do_sample=True, top_k=0)


def logits_of(rows: int, seed: int = 0, vocabulary: int = V) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, vocabulary), scale=2).astype(np.float32)


@jax.jit
def step(logits_BV, settings, state):
    """The next tokens, what they were chosen by, and the state after them."""
    processed_BV = process_logits(logits_BV, settings, state)
    token_B = choose(processed_BV, settings, state)
    return token_B, processed_BV, advance(state, token_B, jnp.ones_like(token_B, bool))


def processed(config: Config, logits_V, prompt=(), generated=()) -> np.ndarray:
    """The processed logits [V] of one request after it generated some tokens."""
    settings = sampling_settings([config], len(logits_V))
    state = initial_state(settings, [prompt])
    for token in generated:
        state = advance(state, np.array([token], np.int32), np.array([True]))
    return np.asarray(jax.jit(process_logits)(np.asarray(logits_V, np.float32)[None], settings, state)[0])


# ---- penalties, biases, masks ---------------------------------------------------------------------------------------


def test_presence_counts_once_and_frequency_every_time_and_neither_the_prompt():
    [logits_V] = logits_of(1)
    found_V = processed(Config(presence_penalty=0.7, frequency_penalty=0.4), logits_V, [1, 2, 2], [2, 5, 5, 5])
    expected_V = logits_V.copy()
    expected_V[2] -= 0.7 + 0.4
    expected_V[5] -= 0.7 + 3 * 0.4
    np.testing.assert_allclose(found_V, expected_V, rtol=1e-6, atol=1e-6)


def test_repetition_counts_prompt_and_output_once_and_comes_before_the_other_penalties():
    logits_V = np.linspace(-4, 4, V, dtype=np.float32)
    config = Config(repetition_penalty=1.5, presence_penalty=-0.5, frequency_penalty=1.0)
    found_V = processed(config, logits_V, [0, 30, 30], [30, 4])
    expected_V = logits_V.copy()
    expected_V[0] = logits_V[0] * 1.5
    expected_V[30] = logits_V[30] / 1.5 - 1.0 + 0.5
    expected_V[4] = logits_V[4] * 1.5 - 1.0 + 0.5
    np.testing.assert_allclose(found_V, expected_V, rtol=1e-6, atol=1e-6)


def test_a_word_is_forbidden_or_biased_only_where_it_is_about_to_be_completed():
    [logits_V] = logits_of(1)
    config = Config(bad_words_ids=[[8], [5, 6, 9], [6, 6, 10]], logit_bias={3: 1.5, (6, 4): -2.0, (5, 7): 9.0})
    expected_V = logits_V.copy()
    expected_V[[8, 9]] = -np.inf
    expected_V[3] += 1.5
    expected_V[4] -= 2.0
    for prompt, generated in ([5, 6], []), ([5], [6]), ([], [1, 5, 6]):
        np.testing.assert_allclose(processed(config, logits_V, prompt, generated), expected_V, rtol=1e-6, atol=1e-6)


def test_a_token_that_ends_the_text_waits_for_min_new_tokens_and_cannot_be_a_bad_word():
    [logits_V] = logits_of(1)
    config = Config(eos_token_id=(3, 7), min_new_tokens=2, bad_words_ids=((3,), (9,)))
    early_V, late_V = processed(config, logits_V, [1], [2]), processed(config, logits_V, [1], [2, 2])
    assert np.isneginf(early_V).nonzero()[0].tolist() == [3, 7, 9]
    assert np.isneginf(late_V).nonzero()[0].tolist() == [9]


def test_rows_that_ended_keep_their_state():
    config = dataclasses.replace(PLAIN, presence_penalty=1.0, bad_words_ids=((1, 2),))
    settings = sampling_settings([config, config], V)
    before = initial_state(settings, [[4, 5], [6]])
    after = advance(before, np.array([7, 8], np.int32), np.array([False, True]))
    assert after.generated_B.tolist() == [0, 1]
    assert after.recent_BW[:, -2:].tolist() == [[4, 5], [6, 8]]
    assert after.counts_BV.sum(axis=1).tolist() == [0, 1] and after.counts_BV[1, 8] == 1


@pytest.mark.parametrize("field", [dict(logit_bias={(1, V): 1.0}), dict(bad_words_ids=[[1], [2, V + 5]])])
def test_a_token_outside_the_vocabulary_is_refused_by_name(field):
    with pytest.raises(qmj.RequestError, match=f"request 1: {next(iter(field))} holds token .* 0 to {V - 1}"):
        sampling_settings([Config(), Config(**field)], V)


# ---- top-k, top-p, min-p --------------------------------------------------------------------------------------------

#: Few values, so that many are equal; both zeros; what cannot be chosen.
ODD = st.sampled_from([-np.inf, -80.0, -1.5, -0.0, 0.0, 1e-30, 0.25, 1.0, 1.0, 2.5, 60.0])
LOGITS = st.one_of(
    st.lists(ODD, min_size=12, max_size=12),
    # No subnormal numbers: XLA's programs on a CPU take them for zero, and NumPy does not.
    st.lists(st.floats(-20, 20, width=32, allow_subnormal=False), min_size=12, max_size=12),
).filter(lambda values: max(values) > -np.inf)

PART = st.floats(0, 1, width=32, allow_subnormal=False)


@hypothesis_settings(deadline=None, max_examples=300)
@given(logits=LOGITS, k=st.integers(0, 15), p=PART, m=PART)
def test_tokens_left_to_sample_from(logits, k, p, m):
    logits_V = np.array(logits, np.float32)
    found_V = processed(Config(do_sample=True, top_k=k, top_p=p, min_p=m), logits_V)
    kept_V = np.isfinite(found_V)
    assert kept_V[np.argmax(logits_V)]
    np.testing.assert_array_equal(found_V[kept_V], logits_V[kept_V])
    assert logits_V[kept_V].min() > max(logits_V[~kept_V & np.isfinite(logits_V)], default=-np.inf)

    weight_V = np.exp(logits_V.astype(np.float64) - logits_V.max())
    weight_V[logits_V < np.sort(logits_V)[::-1][min(k or 12, 12) - 1]] = 0
    prob_V = weight_V / weight_V.sum()
    above_V = np.array([prob_V[logits_V > logit].sum() for logit in logits_V])
    # Where float32 sums may fall on either side of a threshold, either answer will do.
    left_V, tolerance = prob_V > 0, 1e-6
    must_V = left_V & ((above_V < p - tolerance) | (p >= 1)) & (weight_V > m + tolerance)
    may_V = left_V & ((above_V < p + tolerance) | (above_V == 0)) & (weight_V > m - tolerance)
    assert kept_V[must_V].all() and not kept_V[~may_V].any()


def test_equal_logits_stay_or_go_together():
    logits_V = np.array([1, 3, 2, 3, 2, 0], np.float32)
    assert np.isfinite(processed(Config(do_sample=True, top_k=3), logits_V)).tolist() == [0, 1, 1, 1, 1, 0]
    assert np.isfinite(processed(Config(do_sample=True, top_k=0, top_p=0.1), logits_V)).tolist() == [0, 1, 0, 1, 0, 0]


def test_a_large_vocabulary_is_truncated_as_by_a_sort():
    logits_BV = logits_of(4, vocabulary=5000)
    configs = [Config(do_sample=True, top_k=k, top_p=p) for k, p in [(50, 1.0), (0, 0.9), (1000, 0.7), (1, 1.0)]]
    settings = sampling_settings(configs, 5000)
    found_BV = np.asarray(step(logits_BV, settings, initial_state(settings, [[]] * 4))[1])
    for logits_V, found_V, config in zip(logits_BV, found_BV, configs, strict=True):
        order = np.argsort(-logits_V)[: config.top_k or None]
        prob = np.exp(logits_V[order].astype(np.float64))
        prob /= prob.sum()
        keep = order[np.cumsum(prob) - prob < config.top_p]
        assert sorted(keep) == np.isfinite(found_V).nonzero()[0].tolist()


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_greedy_takes_the_first_of_the_most_probable_and_needs_no_arrays_over_the_vocabulary():
    logits_BV = np.zeros((3, V), np.float32)
    logits_BV[0, [5, 9]] = logits_BV[1, V - 1] = 4
    settings = sampling_settings([Config()] * 3, V)
    state = initial_state(settings, [[1], [], [2, 3]])
    assert settings.drawing is settings.penalties is state.counts_BV is state.prompted_BV is None
    token_B, processed_BV, _ = step(logits_BV, settings, state)
    assert token_B.dtype == jnp.int32 and token_B.tolist() == [5, V - 1, 0]
    np.testing.assert_array_equal(processed_BV, logits_BV)


@pytest.mark.parametrize(
    "options", [{}, dict(temperature=0.5), dict(temperature=2.0, top_k=9), dict(top_p=0.8), dict(min_p=0.1)], ids=str
)
def test_tokens_are_drawn_as_often_as_they_are_probable(options):
    """Chi-square over 2000 seeds times 20 tokens. The seeds are fixed, so the test always says the same; one right
    sampler in ten thousand would fail at this threshold."""
    rows, steps, vocabulary = 2000, 20, 12
    [logits_V] = logits_of(1, seed=2, vocabulary=vocabulary) / 2.5
    settings = sampling_settings([dataclasses.replace(PLAIN, seed=row, **options) for row in range(rows)], vocabulary)

    @jax.jit
    def draw(settings, state):
        def body(state, _):
            token_B, processed_BV, state = step(jnp.broadcast_to(logits_V, (rows, vocabulary)), settings, state)
            return state, (token_B, processed_BV[0])

        return jax.lax.scan(body, state, length=steps)[1]

    tokens, processed_TV = draw(settings, initial_state(settings, [[]] * rows))
    weight_V = np.exp(np.asarray(processed_TV[0], np.float64))
    expected_V = rows * steps * weight_V / weight_V.sum()
    observed_V = np.bincount(np.asarray(tokens).ravel(), minlength=vocabulary)
    possible_V = expected_V > 0
    assert observed_V[~possible_V].sum() == 0 and expected_V[possible_V].min() > 5
    statistic = ((observed_V - expected_V)[possible_V] ** 2 / expected_V[possible_V]).sum()
    assert statistic < scipy.stats.chi2.isf(1e-4, possible_V.sum() - 1)


def test_successive_tokens_of_one_seed_are_independent():
    """Chi-square over the pairs of neighbours in 64 texts of 400 tokens, against the product of their frequencies."""
    rows, steps, vocabulary = 64, 400, 5
    settings = sampling_settings([dataclasses.replace(PLAIN, seed=row) for row in range(rows)], vocabulary)
    logits_BV = jnp.zeros((rows, vocabulary))

    @jax.jit
    def draw(settings, state):
        return jax.lax.scan(lambda state, _: step(logits_BV, settings, state)[::-2], state, length=steps)[1]

    tokens_TB = np.asarray(draw(settings, initial_state(settings, [[]] * rows)))
    pairs = np.bincount((tokens_TB[:-1] * vocabulary + tokens_TB[1:]).ravel(), minlength=vocabulary**2)
    expected = pairs.sum() / vocabulary**2
    assert ((pairs - expected) ** 2 / expected).sum() < scipy.stats.chi2.isf(1e-4, vocabulary**2 - 1)


# ---- a row does not depend on the others ----------------------------------------------------------------------------

REQUEST = Config(
    do_sample=True,
    temperature=1.3,
    top_k=20,
    top_p=0.9,
    repetition_penalty=1.2,
    frequency_penalty=0.3,
    logit_bias={4: 1.0, (5, 6): 2.0},
    bad_words_ids=((7,), (1, 2)),
    eos_token_id=(3,),
    min_new_tokens=3,
    seed=2**40 + 17,
)
NEIGHBOURS = [
    Config(),
    dataclasses.replace(PLAIN, seed=5),
    Config(do_sample=True, top_k=3, min_p=0.2, seed=6),
    Config(presence_penalty=1.0, bad_words_ids=[list(range(12)), *([token] for token in range(9))]),
    Config(logit_bias=dict.fromkeys(range(30), 0.5), eos_token_id=tuple(range(6)), min_new_tokens=4),
    Config(do_sample=True, typical_p=0.5, epsilon_cutoff=0.01, eta_cutoff=0.1, suppress_tokens=(4, 5), seed=8),
    Config(forced_bos_token_id=1, begin_suppress_tokens=(2,), exponential_decay_length_penalty=(2, 1.5), max_length=9),
]


def write(configs, prompts, which, steps=12) -> tuple[list[int], np.ndarray]:
    """What request `which` of a batch writes, and its processed logits. Every row has the same model: logits that
    depend on its own text alone."""
    settings = sampling_settings(configs, V)
    state = initial_state(settings, prompts)
    table_VV = logits_of(V, seed=7)
    last_B, tokens, seen = np.array([prompt[-1] for prompt in prompts]), [], []
    for _ in range(steps):
        token_B, processed_BV, state = step(table_VV[last_B], settings, state)
        last_B = np.asarray(token_B)
        tokens.append(int(token_B[which]))
        seen.append(np.asarray(processed_BV[which]))
    return tokens, np.stack(seen)


def test_a_seed_gives_the_same_text_in_any_batch():
    alone, logits_TV = write([REQUEST], [[5, 1]], 0)
    assert len(set(alone)) > 4
    for slot in (0, 2, 5):
        configs = [*NEIGHBOURS[:slot], REQUEST, *NEIGHBOURS[slot:]]
        prompts = [[1 + index] * (1 + index) for index in range(len(configs))]
        prompts[slot] = [5, 1]
        tokens, same_TV = write(configs, prompts, slot)
        assert tokens == alone
        np.testing.assert_array_equal(same_TV, logits_TV)  # longer lists, longer words: still bit by bit
    other, _ = write([dataclasses.replace(REQUEST, seed=17)], [[5, 1]], 0)  # the low half of the seed is the same
    assert other != alone


def test_requests_without_a_seed_differ():
    config = dataclasses.replace(PLAIN, temperature=50.0)
    first, second = (write([config] * 2, [[1], [1]], row, steps=30)[0] for row in (0, 1))
    assert first != second and first != write([config] * 2, [[1], [1]], 0, steps=30)[0]


def test_values_cost_no_compilation_and_lists_of_any_length_few():
    rng = np.random.default_rng(0)
    compiled = jax.jit(lambda *arguments: choose(process_logits(*arguments), *arguments[1:]))
    logits_BV = logits_of(2)
    for _ in range(40):
        config = Config(
            do_sample=True,
            temperature=rng.uniform(0.1, 2),
            top_k=int(rng.integers(0, 40)),
            top_p=rng.uniform(),
            min_p=rng.uniform(),
            repetition_penalty=rng.uniform(0.5, 2),
            bad_words_ids=rng.integers(0, V, (rng.integers(1, 17), 3)),
            eos_token_id=rng.integers(0, V, rng.integers(1, 5)),
            min_new_tokens=int(rng.integers(1, 9)),
            seed=int(rng.integers(2**40)),
        )
        settings = sampling_settings([config, Config()], V)
        compiled(logits_BV, settings, initial_state(settings, [[1], [2]]))
    assert compiled._cache_size() == 2  # up to 4 forbidden words, up to 16


@pytest.mark.parametrize("spec", [P("data", "tensor"), P(None, ("data", "tensor"))], ids=str)
def test_logits_sharded_over_devices_give_the_same(spec):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    configs = [REQUEST, *NEIGHBOURS]
    settings = sampling_settings(configs, V)
    state = initial_state(settings, [[1, 2]] * len(configs))
    logits_BV = logits_of(len(configs))
    expected_B, expected_BV, _ = step(logits_BV, settings, state)
    token_B, processed_BV, _ = step(jax.device_put(logits_BV, NamedSharding(mesh, spec)), settings, state)
    np.testing.assert_allclose(processed_BV, expected_BV, rtol=1e-6)
    assert token_B.tolist() == expected_B.tolist()


# ---- log-probabilities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_log_probabilities_are_the_models_own(shape):
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(*shape, V)) * 5).astype(np.float32)
    tokens = rng.integers(0, V, shape)
    found = jax.jit(log_probabilities)(logits, tokens)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.take_along_axis(exact, tokens[..., None], -1)[..., 0], atol=2e-6)
