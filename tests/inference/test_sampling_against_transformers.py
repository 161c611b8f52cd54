"""Every sampling option gives the logits that transformers' own processors give, alone and together."""

import jax
import numpy as np
import pytest

from qwen_moe_jax.huggingface.generation_config import generation_config_from_hub
from qwen_moe_jax.inference.sampling import advance, initial_state, process_logits, sampling_settings
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
}


def random_logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, VOCABULARY), scale=3).astype(np.float32)


def processed_by_transformers(model, fields: dict, text: list[int], prompt_length: int, logits_V: np.ndarray):
    """Through the list of processors that `generate` itself builds."""
    config = transformers.GenerationConfig(**{"eos_token_id": None, "pad_token_id": 0} | fields)
    config.update(**config._get_default_generation_params(), defaults_only=True)
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device="cpu")
    text = torch.tensor([text])
    mask = torch.ones(1, prompt_length, dtype=torch.long)
    processors = model._get_logits_processor(config, prompt_length, device="cpu", model_kwargs={"attention_mask": mask})
    return processors(text, torch.tensor(logits_V)[None])[0].numpy()


def state_after(settings, prompts, generated_BT):
    state = initial_state(settings, prompts)
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
    unchanged = {"top_k_beyond_vocabulary", "min_new_tokens_reached", "min_new_tokens_without_an_end"}
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


@pytest.mark.parametrize("name", ["qwen", "everything"])
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
    state = initial_state(settings, [PROMPT])
    process = jax.jit(process_logits)
    for token, raw_BV, score_BV in zip(generated, output.logits, output.scores, strict=True):
        found_BV = process(raw_BV.float().numpy(), settings, state)
        np.testing.assert_allclose(found_BV, score_BV.numpy(), rtol=1e-6, atol=1e-6)
        assert np.isfinite(found_BV[0, token])
        state = advance(state, np.array([token], np.int32), np.array([True]))
