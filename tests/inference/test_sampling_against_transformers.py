"""Every sampling option gives the logits that transformers' own processors give, alone and together."""

import jax
import numpy as np
import pytest

from qwen_moe_jax.huggingface.generation_config import generation_config_from_hub
from qwen_moe_jax.inference.sampling import advance, process_logits
from qwen_moe_jax.inference.settings import initial_state, sampling_settings
from tests.cases import VOCABULARY
from tests.referee import torch, transformers

STOP = [3, 11]
PROMPT = [5, 9, 9, 20, 31]
GENERATED = [31, 7, 9, 40]
#: Generation fields by name: alone, at their edges, and several at once.
OPTIONS = {
    "temperature": dict(do_sample=True, top_k=0, temperature=0.7),
    "temperature_high": dict(do_sample=True, top_k=0, temperature=3.0),
    "top_k": dict(do_sample=True, top_k=7),
    "top_k_one": dict(do_sample=True, top_k=1),
    "top_k_default": dict(do_sample=True),
    "top_k_beyond_vocabulary": dict(do_sample=True, top_k=1000),
    "top_p": dict(do_sample=True, top_k=0, top_p=0.8),
    "top_p_zero": dict(do_sample=True, top_k=0, top_p=0.0),
    "min_p": dict(do_sample=True, top_k=0, min_p=0.05),
    "min_p_one": dict(do_sample=True, top_k=0, min_p=1.0),
    "repetition_penalty": dict(repetition_penalty=1.3),
    "repetition_reward": dict(repetition_penalty=0.6),
    "sequence_bias_of_tokens": dict(sequence_bias=[[[4], 2.5], [[9], -1.5], [[50], -float("inf")]]),
    "sequence_bias_completed": dict(sequence_bias=[[[40, 8], 4.0], [[9, 40, 8], -1.0], [[7, 40, 6], 9.0]]),
    "sequence_bias_longer_than_the_text": dict(sequence_bias=[[[1] * 12, 5.0], [[40, 12], 1.0]]),
    "sequence_bias_reaching_into_the_prompt": dict(sequence_bias=[[[20, 31, *GENERATED, 17], 5.0]]),
    "bad_words_ids": dict(bad_words_ids=[[12], [9, 40, 13], [40, 14], [7, 40], [31, 9, 15]]),
    "bad_words_ids_that_end_the_text": dict(bad_words_ids=[[3], [40, 3], [18]], eos_token_id=STOP),
    "min_new_tokens": dict(min_new_tokens=9, eos_token_id=STOP),
    "min_new_tokens_reached": dict(min_new_tokens=4, eos_token_id=STOP),
    "min_new_tokens_without_an_end": dict(min_new_tokens=9),
    "min_length": dict(min_length=12, eos_token_id=STOP),
    "min_length_reached": dict(min_length=9, eos_token_id=STOP),
    "min_length_replaced": dict(min_length=12, min_new_tokens=2, eos_token_id=STOP),
    "no_repeat_ngram_size_after_a_new_token": dict(no_repeat_ngram_size=2),
    "no_repeat_ngram_size_one": dict(no_repeat_ngram_size=1),
    "no_repeat_ngram_size_longer_than_the_text": dict(no_repeat_ngram_size=12),
    "suppress_tokens": dict(suppress_tokens=[2, 8, 40, 40]),
    "begin_suppress_tokens_later": dict(begin_suppress_tokens=[2, 8]),
    "forced_bos_token_id_later": dict(forced_bos_token_id=6),
    "forced_eos_token_id": dict(forced_eos_token_id=[3, 7], max_length=10),
    "forced_eos_token_id_alone": dict(forced_eos_token_id=3, max_length=10, min_length=12, eos_token_id=STOP),
    "forced_eos_token_id_later": dict(forced_eos_token_id=3, max_length=11),
    "exponential_decay": dict(exponential_decay_length_penalty=[1, 1.3], eos_token_id=STOP),
    "exponential_decay_not_begun": dict(exponential_decay_length_penalty=[4, 1.3], eos_token_id=STOP),
    "exponential_decay_of_a_masked_end": dict(
        exponential_decay_length_penalty=[1, 1.3], eos_token_id=STOP, min_new_tokens=9
    ),
    "typical_p": dict(do_sample=True, top_k=0, typical_p=0.6),
    "typical_p_small": dict(do_sample=True, top_k=0, typical_p=0.01),
    "typical_p_of_what_is_left": dict(do_sample=True, top_k=20, top_p=0.9, typical_p=0.9),
    "epsilon_cutoff": dict(do_sample=True, top_k=0, epsilon_cutoff=0.02),
    "epsilon_cutoff_above_all": dict(do_sample=True, top_k=0, epsilon_cutoff=0.99),
    "eta_cutoff": dict(do_sample=True, top_k=0, eta_cutoff=0.05),
    "eta_cutoff_of_what_is_left": dict(do_sample=True, top_k=9, eta_cutoff=0.3),
    "greedy_leaves_warpers_out": dict(temperature=0.3, top_k=4, top_p=0.5, min_p=0.2, repetition_penalty=1.1),
    "qwen": dict(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05, eos_token_id=STOP),
    "everything": dict(
        do_sample=True,
        temperature=1.4,
        top_k=30,
        top_p=0.9,
        min_p=0.02,
        repetition_penalty=1.2,
        sequence_bias=[[[9], 3.0], [[40, 22], 2.0]],
        bad_words_ids=[[6], [40, 23], [3]],
        min_new_tokens=6,
        eos_token_id=STOP,
    ),
    "everything_else": dict(
        do_sample=True,
        temperature=1.2,
        top_k=40,
        top_p=0.95,
        typical_p=0.95,
        epsilon_cutoff=0.001,
        eta_cutoff=0.002,
        no_repeat_ngram_size=2,
        suppress_tokens=[6, 22],
        begin_suppress_tokens=[7],
        exponential_decay_length_penalty=[1, 1.5],
        min_length=8,
        forced_eos_token_id=3,
        max_length=13,
        eos_token_id=STOP,
    ),
}


def random_logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, VOCABULARY), scale=3).astype(np.float32)


def processed_by_transformers(model, fields: dict, text: list[int], prompt_length: int, logits_V: np.ndarray):
    """Through the list of processors that `generate` itself builds."""
    config = transformers.GenerationConfig(**{"eos_token_id": None, "pad_token_id": 0} | fields)
    config.update(**config._get_default_generation_params(), defaults_only=True)
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device="cpu")
    text = torch.tensor([text])
    model._prepare_generated_length(
        generation_config=config,
        has_default_max_length="max_length" not in fields,
        has_default_min_length="min_length" not in fields,
        model_input_name="input_ids",
        inputs_tensor=text[:, :prompt_length],
        input_ids_length=prompt_length,
    )
    mask = torch.ones(1, prompt_length, dtype=torch.long)
    processors = model._get_logits_processor(config, prompt_length, device="cpu", model_kwargs={"attention_mask": mask})
    return processors(text, torch.tensor(logits_V)[None])[0].numpy()


def state_after(settings, prompts, generated_BT):
    state = initial_state(settings, prompts, max_length=64)
    for token_B in np.asarray(generated_BT, np.int32).T:
        state = advance(state, token_B, np.ones(len(prompts), bool))
    return state


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_gives_transformers_logits(references, name):
    logits_BV = random_logits(1)
    config = generation_config_from_hub(OPTIONS[name])
    settings = sampling_settings([config], VOCABULARY)
    state = state_after(settings, [PROMPT], [GENERATED])
    found_BV = jax.jit(process_logits)(logits_BV, settings, state)
    model = references["qwen3-plain"].model
    expected_V = processed_by_transformers(model, OPTIONS[name], PROMPT + GENERATED, len(PROMPT), logits_BV[0])
    np.testing.assert_allclose(found_BV[0], expected_V, rtol=1e-6, atol=1e-6)
    # Else nothing was compared: these are the options that are to change nothing here.
    unchanged = {
        "top_k_beyond_vocabulary",
        "min_new_tokens_reached",
        "min_new_tokens_without_an_end",
        "min_length_reached",
        "min_length_replaced",
        "no_repeat_ngram_size_after_a_new_token",
        "no_repeat_ngram_size_longer_than_the_text",
        "begin_suppress_tokens_later",
        "forced_bos_token_id_later",
        "forced_eos_token_id_later",
        "exponential_decay_not_begun",
    }
    assert np.array_equal(expected_V, logits_BV[0]) == (name in unchanged)


def test_every_row_of_a_batch_gets_its_own(references):
    """All the options at once, one a row, over texts of different lengths."""
    model = references["qwen3-plain"].model
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, VOCABULARY, length).tolist() for length in rng.integers(1, 9, len(OPTIONS))]
    generated_BT = np.tile(GENERATED, (len(OPTIONS), 1))
    logits_BV = random_logits(len(OPTIONS), seed=1)
    settings = sampling_settings([generation_config_from_hub(fields) for fields in OPTIONS.values()], VOCABULARY)
    found_BV = jax.jit(process_logits)(logits_BV, settings, state_after(settings, prompts, generated_BT))
    for row, (name, fields) in enumerate(OPTIONS.items()):
        text = prompts[row] + GENERATED
        expected_V = processed_by_transformers(model, fields, text, len(prompts[row]), logits_BV[row])
        np.testing.assert_allclose(found_BV[row], expected_V, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("prompt", [[5], PROMPT])
@pytest.mark.parametrize("generated", [[], [8], [8, 5]])
@pytest.mark.parametrize(
    "fields",
    [
        dict(begin_suppress_tokens=[2, 8]),
        dict(forced_bos_token_id=6),
        dict(forced_bos_token_id=6, begin_suppress_tokens=[2, 8]),
        dict(no_repeat_ngram_size=3, min_length=2, eos_token_id=STOP),
    ],
    ids=str,
)
def test_the_start_of_a_text_is_constrained_as_in_transformers(references, fields, prompt, generated):
    logits_BV = random_logits(1, seed=2)
    settings = sampling_settings([generation_config_from_hub(fields)], VOCABULARY)
    state = state_after(settings, [prompt], [generated])
    found_BV = process_logits(logits_BV, settings, state)
    model = references["qwen3-plain"].model
    expected_V = processed_by_transformers(model, fields, prompt + generated, len(prompt), logits_BV[0])
    np.testing.assert_allclose(found_BV[0], expected_V, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_repeated_ngrams_of_every_length_are_masked_as_in_transformers(references, seed):
    """Over texts of few tokens, which repeat much, of different lengths in one batch."""
    rng = np.random.default_rng(seed)
    rows = [dict(no_repeat_ngram_size=int(size)) for size in rng.integers(0, 6, 12)]
    prompts = [rng.integers(0, 3, length).tolist() for length in rng.integers(1, 30, len(rows))]
    generated_BT = rng.integers(0, 3, (len(rows), 7)).tolist()
    logits_BV = random_logits(len(rows), seed)
    settings = sampling_settings([generation_config_from_hub(fields) for fields in rows], VOCABULARY)
    found_BV = jax.jit(process_logits)(logits_BV, settings, state_after(settings, prompts, generated_BT))
    model = references["qwen3-plain"].model
    for row, fields in enumerate(rows):
        text = prompts[row] + generated_BT[row]
        expected_V = processed_by_transformers(model, fields, text, len(prompts[row]), logits_BV[row])
        np.testing.assert_array_equal(found_BV[row], expected_V)


@pytest.mark.parametrize("name", ["qwen", "everything", "everything_else"])
def test_scores_of_a_generation_are_those_transformers_drew_from(references, name):
    """Step by step over what `generate` wrote, from its own raw logits."""
    model, steps = references["qwen3_moe-plain"].model, 8
    torch.manual_seed(0)
    output = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        generation_config=transformers.GenerationConfig(**OPTIONS[name]),
        max_new_tokens=steps,
        pad_token_id=0,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    generated = output.sequences[0, len(PROMPT) :].tolist()
    assert len(generated) > 2
    settings = sampling_settings([generation_config_from_hub(OPTIONS[name])], VOCABULARY)
    state = initial_state(settings, [PROMPT], max_length=64)
    process = jax.jit(process_logits)
    for token, raw_BV, score_BV in zip(generated, output.logits, output.scores, strict=True):
        found_BV = process(raw_BV.float().numpy(), settings, state)
        np.testing.assert_allclose(found_BV, score_BV.numpy(), rtol=1e-6, atol=1e-6)
        assert np.isfinite(found_BV[0, token])
        state = advance(state, np.array([token], np.int32), np.array([True]))
