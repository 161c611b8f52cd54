"""lm-eval's requests without lm-eval: tokens, truncation and limits are those of its adapter for transformers."""

import dataclasses
import json

import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.errors import CheckpointError, ConfigError, RequestError
from qwen_moe_jax.inference.harness import Harness, cut_at
from tests.inference.checkpoints import make_checkpoint
from tests.inference.tokenizer_kinds import byte_fallback

PROMPT = "The quick brown fox"


@dataclasses.dataclass
class Request:
    args: tuple


def requests(*args: tuple) -> list[Request]:
    return [Request(one) for one in args]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("harness") / "tiny")


@pytest.fixture(scope="module")
def harness(folder):
    return Harness.from_folder(folder)


@pytest.fixture(scope="module")
def model(folder):
    return qmj.from_pretrained(folder)


def ids(harness: Harness, text: str) -> list[int]:
    return harness._tokenizer.encode(text).ids


def likelihood(model, context: list[int], tokens: list[int]) -> tuple[float, bool]:
    [found] = qmj.score(model, [tokens], contexts=[context])
    return pytest.approx(found.log_likelihood, rel=1e-5), found.greedy


def test_continuations_are_scored_after_their_contexts(harness, model):
    pairs = [(PROMPT, " jumps over"), ("def add(a", ", b):"), (PROMPT, " here")]
    expected = [
        likelihood(model, ids(harness, one), ids(harness, one + two)[len(ids(harness, one)) :]) for one, two in pairs
    ]
    assert harness.loglikelihood(requests(*pairs)) == expected


def test_spaces_between_belong_to_the_continuation(harness):
    found = harness.loglikelihood(requests((PROMPT, " jumps"), (PROMPT + " ", "jumps")))
    assert found[0] == found[1]


def test_without_context_the_prefix_token_comes_first(harness, model):
    end = harness._tokenizer.token_to_id("<|im_end|>")
    expected = likelihood(model, [end], ids(harness, PROMPT))
    assert harness.loglikelihood(requests(("", PROMPT), ("", "<|im_end|>" + PROMPT))) == [expected, expected]


def test_greedy_continuations_are_reported(harness):
    [text] = harness.generate_until(requests((PROMPT, {"until": [], "max_gen_toks": 3})))
    tokens = qmj.generate(harness._model, [ids(harness, PROMPT)], max_new_tokens=3)[0]
    context, whole = ids(harness, PROMPT), ids(harness, PROMPT + text)
    [(_, greedy)] = harness.loglikelihood(requests((PROMPT, text)))
    assert greedy == (whole[len(context) :] == tokens)


def test_long_contexts_are_truncated_on_the_left(folder, model, caplog):
    harness = Harness.from_folder(folder, max_length=4)
    context, whole = ids(harness, PROMPT), ids(harness, PROMPT + " jumps")
    tokens = whole[len(context) :]
    assert len(whole) > 5 > len(tokens)
    expected = likelihood(model, whole[-5 : -len(tokens)], tokens)
    assert harness.loglikelihood(requests((PROMPT, " jumps"))) == [expected]
    assert "1 of 1 requests are longer than max_length=4: truncated." in caplog.text
    with pytest.raises(RequestError, match="request 0 continues for .* tokens, max_length=4"):
        harness.loglikelihood(requests((".", PROMPT * 2)))


def test_rolling_likelihood_counts_every_token_once(folder, model):
    """As lm-eval's get_rolling_token_windows: full windows, the last of which reaches back."""
    harness = Harness.from_folder(folder, max_length=8)
    text = PROMPT * 3
    tokens, end = ids(harness, text), harness._tokenizer.token_to_id("<|im_end|>")
    windows = [([end], tokens[:8])]
    for start in range(8, len(tokens), 8):
        stop = min(start + 8, len(tokens))
        windows.append((tokens[stop - 9 : start], tokens[start:stop]))
    assert len(windows) > 2 and len(tokens) % 8
    scores = qmj.score(model, [new for _, new in windows], contexts=[old for old, _ in windows])
    short, _ = harness.loglikelihood(requests(("", "dog")))[0]
    found = harness.loglikelihood_rolling(requests((text,), ("",), ("dog",)))
    assert found == pytest.approx([sum(one.log_likelihood for one in scores), 0.0, short], rel=1e-5)


def test_generation_ends_at_the_first_stop_string(harness):
    settings = {"until": [], "do_sample": False, "max_gen_toks": 20}
    contexts = (PROMPT, "def add(a, b):", "")
    free = harness.generate_until(requests(*((context, settings) for context in contexts)))
    expected = harness._tokenizer.decode(qmj.generate(harness._model, [ids(harness, PROMPT)], max_new_tokens=20)[0])
    assert free[0] == expected
    stops = [free[0][5:7], free[0][9:11]]
    found = harness.generate_until(requests((PROMPT, {**settings, "until": stops}), (contexts[1], settings)))
    assert found == [cut_at(free[0], stops), free[1]]
    assert found[0] == free[0][: free[0].index(stops[0])]


def test_requests_with_other_budgets_come_back_in_order(harness):
    settings = [{"until": "\n", "max_gen_toks": 4}, {"until": None, "max_new_tokens": 9}, {"max_tokens": 4}]
    mixed = harness.generate_until(requests(*((PROMPT, one) for one in settings)))
    alone = [harness.generate_until(requests((PROMPT, one)))[0] for one in settings]
    assert mixed == alone


def test_long_prompts_are_truncated_on_the_left(folder, caplog):
    harness = Harness.from_folder(folder, max_length=7)
    assert len(ids(harness, PROMPT)) > 3
    expected = qmj.generate(harness._model, [ids(harness, PROMPT)[-3:]], max_new_tokens=4)[0]
    [found] = harness.generate_until(requests((PROMPT, {"max_gen_toks": 4})))
    assert found == harness._tokenizer.decode(expected)
    assert "1 of 1 requests are longer than max_length=7: truncated." in caplog.text


def test_sampled_texts_differ_between_requests_and_not_between_runs(harness):
    settings = {"temperature": 2.0, "max_gen_toks": 12}
    found = harness.generate_until(requests(*[(PROMPT, settings)] * 3))
    assert len(set(found)) == 3
    assert harness.generate_until(requests(*[(PROMPT, {**settings, "do_sample": True})] * 3)) == found
    greedy = harness.generate_until(
        requests((PROMPT, {**settings, "do_sample": False}), (PROMPT, {"max_gen_toks": 12}))
    )
    assert greedy[0] == greedy[1]


def test_tasks_settings_replace_the_checkpoints(folder, harness):
    """generation_config.json often asks for sampling; lm-eval means greedy where a task says nothing."""
    other = Harness.from_folder(folder)
    replaced = dataclasses.replace(other._model.generation_config, do_sample=True, temperature=2.0)
    other._model.generation_config = replaced
    asked = requests((PROMPT, {"max_gen_toks": 12}))
    assert other.generate_until(asked) == harness.generate_until(asked)


def test_texts_do_not_depend_on_the_batch_size(folder, harness):
    asked = requests(*((PROMPT[:length], {"max_gen_toks": 6}) for length in (19, 4, 9)))
    one_by_one = Harness.from_folder(folder, generated_together=1)
    assert one_by_one.generate_until(asked) == harness.generate_until(asked)
    assert harness.generate_until([]) == []


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"num_beams": 4}, RequestError, r"generation_kwargs has \['num_beams'\]"),
        ({"max_gen_toks": 96}, RequestError, "96 new tokens leave no tokens for a prompt with max_length=96"),
        ({"max_gen_toks": 4, "top_p": 2.0}, ConfigError, "top_p"),
    ],
)
def test_invalid_generation_settings_are_refused(harness, settings, error, message):
    with pytest.raises(error, match=message):
        harness.generate_until(requests((PROMPT, settings)))


def test_the_first_stop_string_in_the_text_counts():
    assert cut_at("one two three", ["three", "two"]) == "one "
    assert cut_at("one two", []) == "one two"
    assert cut_at("one two", ["one"]) == ""


def test_chat_template_is_the_checkpoints_own(harness):
    assert harness.apply_chat_template([{"role": "user", "content": "Hi"}]) == "[user] Hi\n"


def test_prefix_is_the_token_that_begins_a_text(tmp_path):
    """It is not doubled where a text begins with it, and the tokenizer's own is added otherwise."""
    folder = make_checkpoint(tmp_path / "bos", byte_fallback(), bos_token="<s>", eos_token="</s>")
    harness = Harness.from_folder(folder)
    assert harness._encode("stop") == harness._encode("<s>stop")[:1] + harness._encode("stop")[1:]
    assert harness._encode("<s>stop").count(1) == harness._encode("stop").count(1) == 1

    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<begin>"}}))
    with pytest.raises(CheckpointError, match="bos_token is '<begin>', which is no token of tokenizer.json"):
        Harness.from_folder(folder)


def test_checkpoint_without_any_such_token(folder, tmp_path):
    make_checkpoint(tmp_path / "none")
    (tmp_path / "none" / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="found neither bos_token nor eos_token"):
        Harness.from_folder(tmp_path / "none")


def test_mesh_and_names(folder, harness):
    sharded = Harness.from_folder(folder, data=2, expert=2)
    assert dict(sharded._model.mesh.shape) == {"data": 2, "fsdp": 1, "expert": 2, "context": 1, "tensor": 1}
    [(found, _)], [(expected, _)] = (one.loglikelihood(requests((PROMPT, " jumps"))) for one in (sharded, harness))
    assert found == pytest.approx(expected, rel=1e-5)
    assert harness.tokenizer_name.endswith("__tiny")
