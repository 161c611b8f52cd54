"""`generate` and `complete`: transformers' tokens, stop tokens and strings, settings, refused requests."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.errors import ConfigError, RequestError
from qwen_moe_jax.inference import generate as generating
from qwen_moe_jax.inference import programs
from qwen_moe_jax.inference.generate import complete
from tests.cases import CASES, VOCABULARY
from tests.referee import Reference, torch

NEW_TOKENS = 10
# Where the best two tokens are closer than this, float32 rounding could choose either and the texts would part.
SMALLEST_MARGIN = 1e-3

#: What test_session.py, where every family and its sliding windows are, does not have.
NAMES = ["qwen3_moe-plain", "qwen3_moe-mlp_only_and_sparse_step", "qwen3-yarn_max_default"]


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


def test_dynamic_rope_does_not_depend_on_slots_kept_for_new_tokens(tmp_path):
    """It grows with the text, here always shorter than max_position_embeddings, not with a padded buffer."""
    case = CASES["qwen2-dynamic_within_maximum"]
    settings = {**case.settings, "max_position_embeddings": 8 + NEW_TOKENS}
    reference = Reference(dataclasses.replace(case, settings=settings), tmp_path)
    prompts = [prompt[:7] for prompt in make_prompts()]
    model = qmj.from_pretrained(reference.folder, dtype="float32")
    found = qmj.generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_token_id=())
    assert found == greedy(reference.model, prompts)


def test_beyond_the_maximum_a_dynamic_rope_reads_a_prompt_at_once(references, monkeypatch):
    """Its base is that of the whole prompt, longer than a chunk, in a later turn of a conversation as well."""
    monkeypatch.setattr(programs, "PREFILL_BUCKETS", (4, 8))
    reference = references["qwen3_moe-dynamic_past_maximum"]
    model = qmj.from_pretrained(reference.folder, dtype="float32")
    prompts = [[(7 * i + 5) % 90 + 1 for i in range(length)] for length in (21, 6, 13)]
    expected = []
    for prompt in prompts:
        reference.model(torch.tensor([[1]]))  # else transformers keeps the base of the text before
        expected += greedy(reference.model, [prompt])
    assert qmj.generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_token_id=()) == expected
    session = qmj.Session(model, max_length=64)
    config = qmj.GenerationConfig(max_new_tokens=NEW_TOKENS)
    for index in (2, 0, 1):  # a conversation grows, and begins anew
        chunks = session.generate(prompts[index], config)
        assert [token for chunk in chunks for token in chunk.token_ids] == expected[index]


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


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_stop_tokens_default_to_the_checkpoints_own(references, tmp_path, file):
    """generation_config.json speaks first, config.json where there is none; an empty tuple stops at nothing."""
    reference = references["qwen2-plain"]
    folder = tmp_path / "checkpoint"
    shutil.copytree(reference.folder, folder)
    prompts = make_prompts()[:1]
    [free] = greedy(reference.model, prompts)
    config = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").unlink(missing_ok=True)
    if file == "config.json":
        config["eos_token_id"] = free[3]
    else:
        config["eos_token_id"] = free[6]
        (folder / file).write_text(json.dumps({"eos_token_id": [free[3], 96]}))
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


# ---- settings, and requests that cannot be served: a model of one dense layer ---------------------------------------


def make_small(generation_config: qmj.GenerationConfig | None = None) -> qmj.CausalLM:
    settings = {"num_hidden_layers": 1, "initializer_range": 0.4}
    config = qmj.ModelConfig.from_pretrained({**CASES["qwen2-plain"].config, **settings})
    return qmj.CausalLM(config, rngs=nnx.Rngs(0), generation_config=generation_config)


@pytest.fixture(scope="module")
def small() -> qmj.CausalLM:
    return make_small()


@pytest.fixture
def never_run(monkeypatch):
    """Fails where anything is run."""

    def stream(*_, **__):
        raise AssertionError("the model was run")

    monkeypatch.setattr(generating, "stream", stream)


@pytest.mark.parametrize(
    "bad, message",
    [
        ([], "prompt 1 is empty"),
        ([4, VOCABULARY], "prompt 1 holds 97, expected token ids from 0 to 96"),
        ([-1], "prompt 1 holds -1"),
        ([0.5], "prompt 1 holds 0.5"),
    ],
    ids=["empty", "outside_the_vocabulary", "negative", "no_id"],
)
def test_a_prompt_that_cannot_be_served_stops_no_other(small, bad, message):
    first, second = make_prompts()[:2]
    refused = complete(small, [first, bad, second], max_new_tokens=NEW_TOKENS)
    served = complete(small, [first, second], max_new_tokens=NEW_TOKENS)
    assert message in str(refused[1].error)
    assert refused[1] == generating.Completion(error=refused[1].error), "nothing but the error"
    assert [one.error for one in refused] == [None, refused[1].error, None]
    assert [refused[0].token_ids, refused[2].token_ids] == [one.token_ids for one in served]
    assert [refused[0].finished, refused[2].finished] == ["length", "length"]


def test_where_no_prompt_can_be_served_all_errors_come_back(small):
    first, second = complete(small, [[], [97]])
    assert "prompt 0 is empty" in str(first.error) and "prompt 1 holds 97" in str(second.error)


def test_generate_names_every_prompt_that_it_refuses_and_runs_none(small, never_run):
    with pytest.raises(RequestError, match="prompt 1 is empty.* prompt 3 holds 97"):
        qmj.generate(small, [[1], [], [2, 3], [97]], max_new_tokens=NEW_TOKENS)


def test_arrays_of_jax_numpy_and_torch_are_prompts(small):
    rows = [[1, 2, 3], [4, 5, 6]]
    expected = qmj.generate(small, rows, max_new_tokens=2)
    for make in (jnp.array, np.array, torch.tensor):
        assert qmj.generate(small, make(rows), max_new_tokens=2) == expected
        assert qmj.generate(small, [make(row) for row in rows], max_new_tokens=2) == expected


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(max_tokens=5), "max_tokens=5: there is no such setting of generation; did you mean 'max_new_tokens'?"),
        (dict(temprature=0.5), "did you mean 'temperature'?"),
        (dict(zzz=1), "expected one of eos_token_id, stop_strings, max_new_tokens"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_one_that_was_meant(small, never_run, settings, message):
    with pytest.raises(RequestError) as caught:
        complete(small, [[1]], **settings)
    assert message in str(caught.value)


def test_a_setting_outside_its_range_is_refused(small, never_run):
    with pytest.raises(ConfigError, match="max_new_tokens"):
        complete(small, [[1]], max_new_tokens=0)


def test_invalid_calls_are_refused(small, never_run):
    for function in (qmj.generate, complete):
        with pytest.raises(RequestError, match="texts, but no tokenizer was given"):
            function(small, ["w1 w2"])
        with pytest.raises(RequestError, match="stop strings need a tokenizer"):
            function(small, [[1]], stop_strings=["w1"])
        with pytest.raises(RequestError, match="prompts is one string, expected a list"):
            function(small, "w1 w2", tokenizer=word_tokenizer())
        with pytest.raises(RequestError, match="^prompts is one list of token ids, expected one list for each"):
            function(small, [1, 2, 3])
        with pytest.raises(RequestError, match="^prompts is one list of token ids"):
            function(small, np.array([1, 2, 3]))
        with pytest.raises(RequestError, match=r"prompts is a mapping \(input_ids, attention_mask\), expected a list"):
            function(small, {"input_ids": [[1]], "attention_mask": [[1]]})
        with pytest.raises(RequestError, match="prompts is None, expected a list"):
            function(small)
        with pytest.raises(RequestError, match=r"a prompt is a list of messages, expected a text: load_chat_template"):
            function(small, [[{"role": "user", "content": "Hi"}]], tokenizer=word_tokenizer())
        with pytest.raises(RequestError, match="input_ids is not an argument: here that is prompts"):
            function(small, input_ids=[[1]])
        with pytest.raises(RequestError, match="1 configs for 2 prompts"):
            function(small, [[1], [2]], [qmj.GenerationConfig()])


def test_no_requests_give_no_results(small):
    assert qmj.generate(small, []) == []


def test_every_request_has_a_config_of_its_own_and_settings_replace_those_of_all(small):
    prompt = make_prompts()[0]
    [free] = qmj.generate(small, [prompt], max_new_tokens=NEW_TOKENS)
    configs = [
        qmj.GenerationConfig(max_new_tokens=3),
        qmj.GenerationConfig(max_new_tokens=NEW_TOKENS, eos_token_id=(free[4],)),
        qmj.GenerationConfig(max_new_tokens=7, bad_words_ids=[[free[0]]]),
        qmj.GenerationConfig(max_new_tokens=5),
    ]
    found = complete(small, [prompt] * 4, configs)
    assert found[0].token_ids == tuple(free[:3]) and found[0].finished == "length"
    assert found[1].token_ids == tuple(free[: free.index(free[4]) + 1]) and found[1].finished == "stop"
    assert len(found[2].token_ids) == 7 and free[0] not in found[2].token_ids
    assert found[3].token_ids == tuple(free[:5])
    assert qmj.generate(small, [prompt] * 4, configs, max_new_tokens=1)[3] == free[:1]


def test_a_stop_string_ends_the_text_before_it_and_the_tokens_with_the_one_that_completed_it(small):
    """Over two tokens. The other request, whose text has no such string, goes on."""
    tokenizer, prompts = word_tokenizer(), make_prompts()[:2]
    one, other = complete(small, prompts, tokenizer=tokenizer, max_new_tokens=40)
    stop = tokenizer.decode(one.token_ids[4:6])
    assert stop not in other.text
    ended = next(count for count in range(40) if stop in tokenizer.decode(one.token_ids[:count]))
    found, unchanged = complete(small, prompts, tokenizer=tokenizer, max_new_tokens=40, stop_strings=["none", stop])
    assert found.text == one.text[: one.text.index(stop)]
    assert found.token_ids == one.token_ids[:ended]
    assert found.log_probs == pytest.approx(one.log_probs[:ended], rel=1e-5)
    assert (found.finished, unchanged.finished) == ("stop", "length")
    assert (unchanged.token_ids, unchanged.text) == (other.token_ids, other.text)


def test_token_ids_come_with_a_text_where_there_is_a_tokenizer(small):
    tokenizer, prompts = word_tokenizer(), make_prompts()[:2]
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    from_ids = complete(small, prompts, tokenizer=tokenizer, max_new_tokens=NEW_TOKENS)
    from_texts = complete(small, texts, tokenizer=tokenizer, max_new_tokens=NEW_TOKENS)
    assert from_ids == from_texts
    assert [one.text for one in from_ids] == [tokenizer.decode(one.token_ids) for one in from_ids]
    assert [one.text for one in complete(small, prompts, max_new_tokens=NEW_TOKENS)] == [None, None]
    assert qmj.generate(small, prompts, tokenizer=tokenizer, max_new_tokens=NEW_TOKENS) == [
        list(one.token_ids) for one in from_ids
    ]


def test_max_new_tokens_is_the_models_own_and_64_by_default(small):
    model, prompt = make_small(qmj.GenerationConfig(max_new_tokens=5)), make_prompts()[:1]
    assert list(map(len, qmj.generate(model, prompt))) == [5]
    assert list(map(len, qmj.generate(model, prompt, max_new_tokens=3))) == [3]
    assert list(map(len, qmj.generate(small, prompt, model.generation_config))) == [5]
    assert list(map(len, qmj.generate(small, prompt, qmj.GenerationConfig()))) == [64]
    assert list(map(len, qmj.generate(small, prompt))) == [64]
