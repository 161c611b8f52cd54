"""Texts of hybrids: a ragged batch decodes what transformers decodes of each prompt by itself.

One by one, since its own batches go wrong: right padding decays and overwrites a recurrent state there.
"""

import pytest

import qwen_moe_jax as qmj
from tests.inference import test_session
from tests.inference.test_session import LENGTHS, NEW_TOKENS, SMALLEST_MARGIN, greedy, make_prompts
from tests.model.hybrids import COMMON, hybrid

short_chunks = test_session.short_chunks
SETTINGS = {  # three linear layers to a full one of experts; two value heads to a key head, and one
    "qwen3_next": {},
    "qwen3_5_text": {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 2},
}


@pytest.mark.parametrize("family", SETTINGS)
def test_64_greedy_tokens_of_8_ragged_prompts_are_those_of_transformers_one_by_one(family):
    """Prompts are prefilled in one to three chunks."""
    made = hybrid(family, scale=0.1, **SETTINGS[family])
    for seed in range(20):  # the first prompts whose texts do not hang on rounding; the same ones on every run
        prompts = make_prompts(LENGTHS, seed, vocab_size=COMMON["vocab_size"])
        answers = [greedy(made.hub, [prompt]) for prompt in prompts]
        if min(margin for _, margin in answers) > SMALLEST_MARGIN:
            break
    else:
        raise AssertionError("all prompts hang on rounding")
    texts = [text for [text], _ in answers]
    assert len({tuple(text) for text in texts}) == len(prompts)
    assert qmj.generate(made.model, prompts, max_new_tokens=NEW_TOKENS, eos_token_id=()) == texts
