"""Settings of generation_config.json give the texts of transformers, and prompts of any form are read or refused."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.errors import ConfigError, RequestError
from qwen_moe_jax.huggingface.generation_config import generation_config_from_hub, read_generation_config
from qwen_moe_jax.huggingface.unused_fields import _said
from qwen_moe_jax.inference.generate import complete
from tests.cases import CASES, VOCABULARY
from tests.inference.tokenizer_kinds import KINDS
from tests.referee import torch, transformers

NEW_TOKENS = 10
# Where the best two tokens are closer than this, float32 rounding could choose either.
SMALLEST_MARGIN = 1e-3
STOP = [3, 11]
PROMPTS = [np.random.default_rng(7).integers(1, VOCABULARY, length).tolist() for length in (7, 1, 12)]
#: Fields of a generation_config.json, all greedy: sampled ones are held to transformers' processors.
SETTINGS = {
    "max_length": dict(max_length=16, max_new_tokens=None),
    "max_length_replaced": dict(max_length=3),
    "min_length": dict(min_length=10, eos_token_id=list(range(0, VOCABULARY, 2))),
    "min_length_replaced": dict(min_length=14, min_new_tokens=3, eos_token_id=list(range(0, VOCABULARY, 2))),
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=1),
    "suppress_tokens": dict(suppress_tokens=list(range(0, VOCABULARY, 3))),
    "begin_suppress_tokens": dict(begin_suppress_tokens=list(range(0, VOCABULARY, 3))),
    "forced_bos": dict(forced_bos_token_id=5, begin_suppress_tokens=list(range(0, VOCABULARY, 3))),
    "forced_eos": dict(forced_eos_token_id=STOP, eos_token_id=STOP),
    "forced_eos_at_max_length": dict(forced_eos_token_id=3, max_length=15, max_new_tokens=None),
    "exponential_decay": dict(exponential_decay_length_penalty=[2, 3.0], eos_token_id=STOP),
    "sequence_bias": dict(sequence_bias=[[[4], 5.0], [[4, 9], 20.0]]),
}


@pytest.fixture(scope="module")
def reference(references):
    return references["qwen3_moe-plain"]


@pytest.fixture(scope="module")
def model(reference) -> qmj.CausalLM:
    return qmj.from_pretrained(reference.folder, dtype="float32")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_file_with_a_setting_gives_the_text_that_it_gives_in_transformers(reference, model, tmp_path, name):
    fields = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0} | SETTINGS[name]
    fields = {field: value for field, value in fields.items() if value is not None}
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(reference.folder / "config.json", folder)
    (folder / "generation_config.json").write_text(json.dumps(fields))
    config = read_generation_config(folder, model.config)
    found = qmj.generate(model, PROMPTS, config)
    own = transformers.GenerationConfig.from_pretrained(folder)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        output = reference.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_config=own,
            return_dict_in_generate=True,
            output_scores=True,
        )
        best = torch.stack(output.scores)[:, 0].topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > SMALLEST_MARGIN or name.startswith("forced"), "choose other prompts"
        assert tokens == output.sequences[0, len(prompt) :].tolist()


def test_every_row_has_its_own_settings_on_any_mesh(reference, model):
    fields = [{"max_new_tokens": NEW_TOKENS} | SETTINGS[name] for name in SETTINGS]
    configs = [generation_config_from_hub({k: v for k, v in one.items() if v is not None}) for one in fields]
    prompts = [PROMPTS[row % 3] for row in range(len(configs))]
    alone = [qmj.generate(model, [prompt], config)[0] for prompt, config in zip(prompts, configs, strict=True)]
    assert qmj.generate(model, prompts, configs) == alone
    sharded = qmj.from_pretrained(reference.folder, dtype="float32", mesh=qmj.make_mesh(data=2, expert=2, tensor=2))
    assert qmj.generate(sharded, prompts, configs) == alone


def test_a_prompt_as_long_as_max_length_is_refused_and_names_the_way_out(model):
    with pytest.raises(RequestError, match="prompt 0 has 7 tokens, and max_length=7.*give max_new_tokens"):
        qmj.generate(model, [PROMPTS[0]], max_length=7)


def test_a_forced_token_outside_the_vocabulary_is_refused_by_name(model):
    with pytest.raises(RequestError, match="forced_bos_token_id holds token 500"):
        qmj.generate(model, PROMPTS, forced_bos_token_id=500)


def test_a_given_config_replaces_a_file_that_would_be_refused(reference, tmp_path):
    folder = shutil.copytree(reference.folder, tmp_path / "checkpoint")
    (folder / "generation_config.json").write_text('{"top_k": -1}')
    with pytest.raises(ConfigError, match="top_k=-1"):
        qmj.from_pretrained(folder)
    given = qmj.GenerationConfig(top_k=5, do_sample=True)
    assert qmj.from_pretrained(folder, generation_config=given).generation_config == given


def test_a_prompt_beyond_the_trained_positions_is_reported_once(capsys):
    config = {**CASES["qwen3-plain"].config, "max_position_embeddings": 8}
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(config), rngs=0)
    _said.clear()
    for _ in range(2):
        qmj.generate(model, [[1] * 9, [1] * 8], max_new_tokens=1)
    err = capsys.readouterr().err
    assert err.count("note: ") == 1
    assert "prompt 0 has 9 tokens, more than the 8 positions" in err and "max_position_embeddings" in err


# ---- prompts of any form --------------------------------------------------------------------------------------------


def test_half_of_a_surrogate_pair_fails_its_own_prompt_only():
    tokenizer = KINDS["byte_level"]
    config = {**CASES["qwen3-plain"].config, "vocab_size": tokenizer.get_vocab_size()}
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(config), rngs=0)
    prompts = ["one", "half \ud83d", "three"]
    first, second, third = complete(model, prompts, tokenizer=tokenizer, max_new_tokens=2)
    assert str(second.error) == "prompt 1 is not valid UTF-8, expected a text."
    alone = complete(model, [prompts[0], prompts[2]], tokenizer=tokenizer, max_new_tokens=2)
    assert [first.token_ids, third.token_ids] == [one.token_ids for one in alone]
    with pytest.raises(RequestError, match="^prompt 1 is not valid UTF-8"):
        qmj.generate(model, prompts, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "as_array",
    [
        np.asarray,
        jnp.asarray,
        torch.tensor,
        lambda ids: [np.int32(x) for x in ids],
        lambda ids: list(torch.tensor(ids)),
    ],
    ids=["numpy", "jax", "torch", "numpy_scalars", "torch_scalars"],
)
def test_token_ids_may_be_arrays(model, as_array):
    expected = qmj.generate(model, PROMPTS, max_new_tokens=3)
    assert qmj.generate(model, [as_array(prompt) for prompt in PROMPTS], max_new_tokens=3) == expected
    session = qmj.Session(model, max_length=32)
    chunks = list(session.generate(as_array(PROMPTS[0]), qmj.GenerationConfig(max_new_tokens=3)))
    assert [token for chunk in chunks for token in chunk.token_ids] == expected[0]


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray, torch.tensor], ids=["numpy", "jax", "torch"])
def test_a_batch_may_be_one_array(model, as_array):
    batch = [PROMPTS[0], PROMPTS[0][::-1]]
    assert qmj.generate(model, as_array(batch), max_new_tokens=3) == qmj.generate(model, batch, max_new_tokens=3)


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([5, 6], "prompts is one list of token ids, expected one list for each prompt"),
        (np.array([5, 6]), "prompts is one list of token ids, expected one list for each prompt"),
        ([[1], np.array([1.5])], "prompt 1 holds 1.5, expected token ids"),
        ([torch.tensor([[5, 6]])], "prompt 0 holds [5, 6], expected token ids"),
    ],
)
def test_other_prompts_are_refused_with_what_was_found(model, prompts, message):
    with pytest.raises(RequestError) as failure:
        qmj.generate(model, prompts)
    assert str(failure.value).startswith(message)
