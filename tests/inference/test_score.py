"""Log-likelihoods and perplexities are transformers', for any lengths, in any batch, on any mesh."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference import score as scoring
from qwen_moe_jax.inference.score import full_batch, padded_length, sliding_windows
from tests.cases import CASES, VOCABULARY
from tests.distance import assert_near

FAMILIES = ("qwen3_moe-plain", "mixtral-sliding_without_gate", "qwen2-plain")
TOLERANCE = 1e-5


def texts(*lengths: int, seed: int = 0) -> list[list[int]]:
    numbers = np.random.default_rng(seed)
    return [numbers.integers(1, VOCABULARY, length).tolist() for length in lengths]


def tiny(mesh=None, execution=qmj.ExecutionConfig(), **settings) -> qmj.CausalLM:
    config = qmj.ModelConfig.from_pretrained({**CASES["qwen3_moe-plain"].config, "initializer_range": 0.4, **settings})
    return qmj.CausalLM(config, rngs=nnx.Rngs(0), mesh=mesh, execution=execution)


@pytest.fixture(scope="module")
def model():
    return tiny()


def of_transformers(model, tokens: list[int], first: int = 1) -> np.ndarray:
    """Log-probabilities of the tokens from `first` on: minus torch's cross-entropy."""
    from tests.referee import torch

    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, first - 1 : -1]
        return -torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[first:]), reduction="none").numpy()


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3_next-plain"])
def test_log_likelihoods_are_those_of_transformers(references, name):
    reference = references[name]
    model = qmj.from_pretrained(reference.folder, dtype="float32")
    sequences = texts(12, 2, 30, 7)
    for tokens, found in zip(sequences, qmj.score(model, sequences), strict=True):
        expected = of_transformers(reference.model, tokens)
        assert_near(found.token_log_probs, expected, TOLERANCE, f"{len(tokens)} tokens")
        assert found.log_likelihood == pytest.approx(expected.sum(dtype=np.float64), rel=TOLERANCE)
        assert found.num_tokens == len(tokens) - 1
        assert found.token_log_probs.dtype == np.float32


@pytest.mark.parametrize("name", FAMILIES[:2])
def test_after_a_context_only_the_sequence_is_scored(references, name):
    reference = references[name]
    model = qmj.from_pretrained(reference.folder, dtype="float32")
    contexts, sequences = texts(5, 1, 20), texts(4, 9, 1, seed=1)
    scores = qmj.score(model, sequences, contexts=contexts)
    for context, tokens, found in zip(contexts, sequences, scores, strict=True):
        expected = of_transformers(reference.model, context + tokens, first=len(context))
        assert_near(found.token_log_probs, expected, TOLERANCE, f"{len(tokens)} tokens after {len(context)}")


def documented_loop(model, tokens: list[int], window: int, stride: int) -> float:
    """transformers' documentation, "Perplexity of fixed-length models".

    One thing is mended: the loss of a window is the mean over the labels that the shift leaves, and is weighted by
    their number. The documentation subtracts one from it in every window, which is right in the first alone.
    """
    from tests.referee import torch

    encoded = torch.tensor([tokens])
    nll_sum, n_tokens, prev_end_loc = 0.0, 0, 0
    for begin_loc in range(0, len(tokens), stride):
        end_loc = min(begin_loc + window, len(tokens))
        trg_len = end_loc - prev_end_loc
        input_ids = encoded[:, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            loss = model(input_ids, labels=target_ids, use_cache=False, output_router_logits=False).loss
        num_loss_tokens = (target_ids[:, 1:] != -100).sum().item()
        nll_sum += loss.item() * num_loss_tokens
        n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == len(tokens):
            break
    assert n_tokens == len(tokens) - 1
    return math.exp(nll_sum / n_tokens)


@pytest.mark.parametrize("length, window, stride", [(90, 32, 8), (90, 33, 32), (50, 64, 10), (65, 64, 1)])
@pytest.mark.parametrize("name", FAMILIES[:2])
def test_perplexity_is_that_of_the_documented_loop(references, name, length, window, stride):
    reference = references[name]
    model = qmj.from_pretrained(reference.folder, dtype="float32")
    [tokens] = texts(length)
    found = qmj.perplexity(model, tokens, window=window, stride=stride, num_bytes=1000)
    expected = documented_loop(reference.model, tokens, window, stride)
    assert found.perplexity == pytest.approx(expected, rel=TOLERANCE)
    assert found.nats_per_token == pytest.approx(math.log(expected), rel=TOLERANCE)
    assert found.num_tokens == length - 1
    assert found.bits_per_byte == pytest.approx(math.log2(expected) * (length - 1) / 1000, rel=TOLERANCE)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert_near(one.token_log_probs, other.token_log_probs, TOLERANCE, "token_log_probs")
        assert one.greedy == other.greedy


def test_ragged_batch_gives_what_each_sequence_gives_alone(model):
    sequences = texts(9, 70, 2, 130, 33)
    assert_same(qmj.score(model, sequences), [qmj.score(model, [tokens])[0] for tokens in sequences])


@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 2, "tensor": 2}, {"fsdp": 4}], ids=str)
def test_mesh_gives_what_one_device_gives(sizes):
    sequences = texts(9, 70, 2, 33, 5)
    sharded = tiny(qmj.make_mesh(**sizes), vocab_size=98)
    alone = tiny(vocab_size=98)
    nnx.update(alone, jax.device_get(nnx.state(sharded)))
    assert_same(qmj.score(sharded, sequences), qmj.score(alone, sequences))


def test_greedy_scores_are_those_of_greedy_generation(model):
    prompts = texts(4, 9)
    continuations = qmj.generate(model, prompts, max_new_tokens=5, eos_token_id=())
    assert [one.greedy for one in qmj.score(model, continuations, contexts=prompts)] == [True, True]
    continuations[1][3] ^= 1
    assert [one.greedy for one in qmj.score(model, continuations, contexts=prompts)] == [True, False]


def test_training_mode_left_on_changes_nothing():
    model = tiny(execution=qmj.ExecutionConfig(capacity_factor=0.25))
    sequences = texts(20, 30)
    expected = qmj.score(model, sequences)
    model.train()
    assert_same(qmj.score(model, sequences), expected)
    assert not model.deterministic


def test_arrays_and_empty_lists_of_sequences(model):
    [tokens] = texts(8)
    assert_same(qmj.score(model, [np.array(tokens, np.uint16)]), qmj.score(model, [tokens]))
    assert_same(qmj.score(model, np.array([tokens])), qmj.score(model, [tokens]))
    assert qmj.score(model, []) == []


def test_few_programs_for_many_lengths(model, monkeypatch):
    """At most one for each padded length, and one more for the last batch, which has fewer rows."""
    monkeypatch.setattr(scoring, "MAX_ROWS", 4)
    lengths = np.random.default_rng(3).integers(2, 200, 30).tolist()
    before, steps = scoring._predicted._cache_size(), []
    sequences = texts(*lengths)
    qmj.score(model, sequences, progress=lambda done, total: steps.append((done, total)))
    assert scoring._predicted._cache_size() - before <= len({padded_length(length - 1) for length in lengths}) + 1 == 5
    assert steps == [(min(done, 30), 30) for done in range(4, 33, 4)]
    before = scoring._predicted._cache_size()
    qmj.score(model, texts(*lengths, seed=1))
    assert scoring._predicted._cache_size() == before


def test_padded_lengths_are_few_and_near():
    found = [padded_length(length) for length in range(1, 4097)]
    assert sorted(set(found)) == [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    assert all(length <= padded <= max(64, 1.5 * length) for length, padded in enumerate(found, start=1))


def test_batches_keep_to_the_budget(model, monkeypatch):
    """Logits, or attention scores where these are more; one row however long it is."""
    monkeypatch.setattr(scoring, "BUDGET", 2**20)
    widest = {length: max(VOCABULARY, 4 * length) for length in (16, 64, 128, 256, 1024)}
    rows = {length: full_batch(model, length) for length in widest}
    assert rows == {16: 64, 64: 64, 128: 16, 256: 4, 1024: 1}
    assert all(rows[length] * length * widest[length] <= 2**20 for length in (16, 64, 128, 256))


def test_windows_score_every_token_once():
    assert sliding_windows(10, 6, 3) == [(0, 1, 6), (3, 6, 9), (6, 9, 10)]
    for num_tokens, window, stride in [(2, 9, 8), (100, 7, 6), (100, 7, 1), (101, 100, 50), (97, 32, 13)]:
        windows = sliding_windows(num_tokens, window, stride)
        assert [token for _, first, end in windows for token in range(first, end)] == list(range(1, num_tokens))
        assert all(end - start <= window for start, _, end in windows)
        assert all(first - start >= window - stride for start, first, _ in windows[1:])


GOOD = [1, 2, 3]
REFUSED = {
    "empty": ([GOOD, []], None, "sequence 1 is empty"),
    "one token": ([GOOD, [4]], None, "sequence 1 has one token, expected at least 2"),
    "past the vocabulary": ([GOOD, [1, VOCABULARY]], None, f"sequence 1 holds {VOCABULARY}, .* 0 to {VOCABULARY - 1}"),
    "negative": ([[1, -1]], None, "sequence 0 holds -1"),
    "fractions": ([[1.0, 2.0]], None, "sequence 0 is float64"),
    "text": (["def", "add"], None, "sequence 0 is <U3"),
    "nested": ([[[1, 2], [3]]], None, "sequence 0 is nested"),
    "empty continuation": ([GOOD, []], [GOOD, GOOD], "sequence 1 is empty"),
    "empty context": ([GOOD, GOOD], [GOOD, []], "context 1 is empty"),
    "context past the vocabulary": ([GOOD], [[VOCABULARY]], f"context 0 holds {VOCABULARY}"),
    "too few contexts": ([GOOD, GOOD], [GOOD], "there are 1 contexts for 2 sequences"),
}


@pytest.mark.parametrize("sequences, contexts, message", REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_sequence_before_anything_runs(model, monkeypatch, sequences, contexts, message):
    monkeypatch.setattr(scoring, "_predicted", None)
    with pytest.raises(RequestError, match=message):
        qmj.score(model, sequences, contexts=contexts)


@pytest.mark.parametrize(
    "tokens, window, stride, message",
    [
        ([1], 4, 2, "the text has 1 token"),
        ([], 4, 2, "the text is empty"),
        (GOOD, 1, 1, "window=1"),
        (GOOD, 4, 4, "stride=4, expected 1 to 3"),
        (GOOD, 4, 0, "stride=0"),
        ([1, 2, VOCABULARY], 4, 2, f"the text holds {VOCABULARY}"),
    ],
)
def test_refusals_of_perplexity(model, tokens, window, stride, message):
    with pytest.raises(RequestError, match=message):
        qmj.perplexity(model, tokens, window=window, stride=stride)


def test_an_abstract_model_is_refused():
    config = qmj.ModelConfig.from_pretrained(CASES["qwen3-plain"].config)
    with pytest.raises(RequestError, match="without weights"):
        qmj.score(qmj.CausalLM(config, rngs=None), [GOOD])


def test_perplexity_that_no_float_can_hold():
    assert scoring.Perplexity(log_likelihood=-1e4, num_tokens=10).perplexity == math.inf
