"""Greedy generation gives transformers' tokens: ragged prompts, stop tokens, windows, strings."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tokenizers

import qwen_moe_jax as qmj
from tests.cases import CASES, FAMILIES, VOCABULARY
from tests.referee import Reference, torch

NEW_TOKENS = 10
# Where the best two tokens are closer than this, float32 rounding could choose either and the texts would part.
SMALLEST_MARGIN = 1e-3

NAMES = [
    *(f"{family}-plain" for family in FAMILIES),
    "mixtral-sliding_without_gate",  # prompts longer than the window, and growing past it
    "qwen2_moe-sliding",
    "qwen3_moe-mlp_only_and_sparse_step",
    "qwen3-yarn_max_default",
]


def make_prompts() -> list[list[int]]:
    numbers = np.random.default_rng(5)
    return [numbers.integers(1, VOCABULARY, length).tolist() for length in (7, 1, 12, 4)]


def greedy(model, prompts: list[list[int]], stop: tuple[int, ...] = ()) -> list[list[int]]:
    """transformers' greedy continuation of each prompt alone, up to and with the first stop token."""
    results = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=list(stop) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        best = torch.stack(output.scores)[:, 0].topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > SMALLEST_MARGIN, "choose other prompts: these hang on rounding"
        results.append(output.sequences[0, len(prompt) :].tolist())
    return results


@pytest.mark.parametrize("name", NAMES)
def test_ragged_prompts_continue_as_each_does_alone_in_transformers(references, name):
    reference = references[name]
    prompts = make_prompts()
    expected = greedy(reference.model, prompts)
    model = qmj.from_pretrained(reference.folder, dtype="float32")
    found = qmj.generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_token_id=())
    assert found == expected


def test_dynamic_rope_is_not_stretched_by_room_kept_for_new_tokens(tmp_path):
    """It stretches with the text, here always shorter than max_position_embeddings, not with a padded buffer."""
    case = CASES["qwen2-dynamic_within_maximum"]
    settings = {**case.settings, "max_position_embeddings": 8 + NEW_TOKENS}
    reference = Reference(dataclasses.replace(case, settings=settings), tmp_path)
    prompts = [prompt[:7] for prompt in make_prompts()]
    model = qmj.from_pretrained(reference.folder, dtype="float32")
    found = qmj.generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_token_id=())
    assert found == greedy(reference.model, prompts)


def test_left_padded_batch_of_transformers_gives_the_same(references):
    """The one comparison with transformers' own batching, so that prompts alone are known to be a fair reference."""
    reference = references["qwen3_moe-plain"]
    prompts = make_prompts()
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = reference.model.generate(
        tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert output[:, width:].tolist() == greedy(reference.model, prompts)


def test_generation_ends_with_the_first_stop_token(references):
    """Stop tokens taken from what is generated: one row ends early, others run on."""
    reference = references["qwen2-plain"]
    prompts = make_prompts()
    free = greedy(reference.model, prompts)
    stop = (free[0][3], free[2][5])
    expected = greedy(reference.model, prompts, stop)
    assert len({len(tokens) for tokens in expected}) > 1
    model = qmj.from_pretrained(reference.folder, dtype="float32")
    found = qmj.generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_token_id=stop)
    assert found == expected


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_stop_tokens_default_to_the_checkpoints_own(references, tmp_path, place):
    """generation_config.json speaks first, config.json where there is none; an empty tuple stops at nothing."""
    reference = references["qwen2-plain"]
    folder = tmp_path / "checkpoint"
    shutil.copytree(reference.folder, folder)
    prompts = make_prompts()[:1]
    [free] = greedy(reference.model, prompts)
    config = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").unlink(missing_ok=True)
    if place == "config.json":
        config["eos_token_id"] = free[3]
    else:
        config["eos_token_id"] = free[6]
        (folder / place).write_text(json.dumps({"eos_token_id": [free[3], 96]}))
    (folder / "config.json").write_text(json.dumps(config))

    model = qmj.from_pretrained(folder, dtype="float32")
    expected = free[: free.index(free[3]) + 1]
    assert qmj.generate(model, prompts, max_new_tokens=NEW_TOKENS) == [expected]
    assert qmj.generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_token_id=()) == [free]


def word_tokenizer() -> tokenizers.Tokenizer:
    words = tokenizers.models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_strings_go_in_and_come_out_through_the_tokenizer(references):
    reference = references["qwen3-plain"]
    tokenizer = word_tokenizer()
    prompts = make_prompts()
    expected = [tokenizer.decode(tokens) for tokens in greedy(reference.model, prompts)]
    model = qmj.from_pretrained(reference.folder, dtype="float32")
    found = qmj.generate(
        model,
        [tokenizer.decode(prompt) for prompt in prompts],
        max_new_tokens=NEW_TOKENS,
        eos_token_id=(),
        tokenizer=tokenizer,
    )
    assert found == expected


def test_generation_does_not_depend_on_a_training_mode_left_on(references):
    """In training mode most assignments would be dropped here: other text, and nothing would say so."""
    reference = references["mixtral-plain"]
    execution = qmj.ExecutionConfig(capacity_factor=0.25)
    model = qmj.from_pretrained(reference.folder, dtype="float32", execution=execution)
    prompts = make_prompts()
    model.train()
    found = qmj.generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_token_id=())
    assert found == greedy(reference.model, prompts)
