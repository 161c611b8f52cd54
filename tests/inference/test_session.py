"""Sessions and batches: transformers' tokens on any mesh and in any batch; sessions compute only new tokens."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference import programs
from qwen_moe_jax.inference.request import Chunk
from qwen_moe_jax.inference.session import Session, stream
from tests.cases import CASES, FAMILIES
from tests.distance import assert_near

NEW_TOKENS = 64
# Where the best two logits, which reach 5, are closer than this, rounding of 1e-5 could choose either. One token in a
# thousand is as close as 1e-3.
SMALLEST_MARGIN = 1e-4
# Log-probabilities are computed with the cache in other chunks, and with other rows, than in a full forward: the same
# float32 sums in another order, some 3e-7 a layer.
TOLERANCE = 1e-5
VOCABULARY = 98  # COMMON's, made to divide over tensor=2
MESH = dict(data=2, expert=2, tensor=2)
#: Of the prompts of a batch: three chunks of 8.
LENGTHS = (22, 19, 7, 12, 4, 1, 9, 2)

SLIDING = {  # a case with a ring for every family
    "qwen2": "qwen2-sliding",
    "qwen2_moe": "qwen2_moe-sliding",
    "qwen3": "qwen3-sliding",
    "qwen3_moe": "qwen3_moe-sliding_everywhere",
    "mixtral": "mixtral-sliding_without_gate",
}
ON_MESH = ("qwen3_moe-plain", "mixtral-sliding_without_gate")


def make_prompts(lengths: Sequence[int], seed: int = 0, vocab_size: int = VOCABULARY) -> list[list[int]]:
    numbers = np.random.default_rng(seed)
    return [numbers.integers(1, vocab_size, length).tolist() for length in lengths]


PREFILL_BUCKETS = programs.PREFILL_BUCKETS  # for users; the tests have others


@pytest.fixture(scope="module", autouse=True)
def short_chunks():
    """Prompts are prefilled in chunks of 4 and 8 tokens, and ring buffers are as much shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "PREFILL_BUCKETS", (4, 8))
        yield


# ---- against transformers -------------------------------------------------------------------------------------------


def greedy(model, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
    """transformers' greedy continuations of a left-padded batch, and how close a choice was at the closest."""
    from tests.referee import torch

    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        use_cache=True,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    best = torch.stack(output.scores).topk(2).values
    return output.sequences[:, width:].tolist(), float((best[..., 0] - best[..., 1]).min())


@pytest.fixture(scope="module")
def expected(references, tmp_path_factory):
    """By case: the checkpoint, the prompts and transformers' tokens. The vocabulary divides over the mesh."""
    from tests.referee import Reference

    folder, answers = tmp_path_factory.mktemp("checkpoints"), {}

    def answer(name: str):
        if name not in answers:
            case = CASES[name]
            settings = {**case.settings, "vocab_size": VOCABULARY}
            reference = Reference(dataclasses.replace(case, settings=settings), folder)
            for seed in range(20):  # the first prompts whose texts do not hang on rounding; the same ones on every run
                prompts = make_prompts(LENGTHS, seed)
                texts, margin = greedy(reference.model, prompts)
                if margin > SMALLEST_MARGIN:
                    break
            else:
                raise AssertionError(f"{name}: all prompts hang on rounding")
            answers[name] = reference.folder, prompts, texts
        return answers[name]

    return answer


@pytest.mark.parametrize(
    "name, axes",
    [
        *((f"{family}-plain", {}) for family in FAMILIES),
        *((name, {}) for name in SLIDING.values()),
        *((name, MESH) for name in ON_MESH),
    ],
    ids=lambda value: value if isinstance(value, str) else "_".join(map(str, value)) or "one_device",
)
def test_64_greedy_tokens_of_8_ragged_prompts_are_those_of_transformers(expected, name, axes):
    """Prompts are prefilled in three chunks; rings of 5 + 8 - 1 slots are passed several times."""
    folder, prompts, texts = expected(name)
    model = qmj.from_pretrained(folder, dtype="float32", mesh=qmj.make_mesh(**axes))
    assert qmj.generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_token_id=()) == texts


# ---- a model of our own: rings and full layers, dense and sparse ----------------------------------------------------

MIXED = {
    **CASES["qwen2_moe-sliding_layer_types"].config,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],  # a ring of 5 + 8 - 1 slots
    "mlp_only_layers": [0],
    "max_position_embeddings": 256,
    "initializer_range": 0.4,  # sure enough of itself to prefer some tokens
}
NEVER = 97  # as a stop token; programs are the same then where one is waited for and where none is
GREEDY = qmj.GenerationConfig(max_new_tokens=48, eos_token_id=(NEVER,), logit_bias={NEVER: -100.0})
DRAWN = dataclasses.replace(GREEDY, do_sample=True, temperature=0.8, top_k=0)
#: The first token comes at once, to save waiting, and then as many as the host looks at together.
SIZES = [1, programs.DECODE_STEPS, 48 - 1 - programs.DECODE_STEPS]
#: Of sessions: as much as the batch's, so that they share its programs.
MAX_LENGTH = 128


@pytest.fixture(scope="module")
def model() -> qmj.CausalLM:
    return qmj.CausalLM(qmj.ModelConfig.from_pretrained(MIXED), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def small() -> qmj.CausalLM:
    """One dense layer that sees everything, and 64 positions."""
    settings = {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "initializer_range": 0.4}
    return qmj.CausalLM(qmj.ModelConfig.from_pretrained({**CASES["qwen2-plain"].config, **settings}), rngs=nnx.Rngs(0))


@dataclasses.dataclass
class Answer:
    """One request's chunks, and all of them together."""

    chunks: list[Chunk] = dataclasses.field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def log_probs(self) -> list[float]:
        return [log_prob for chunk in self.chunks for log_prob in chunk.log_probs]

    @property
    def sizes(self) -> list[int]:
        return [len(chunk.token_ids) for chunk in self.chunks]


def answers_of(chunks, count: int) -> list[Answer]:
    answers = [Answer() for _ in range(count)]
    for chunk in chunks:
        answers[chunk.index].chunks.append(chunk)
    return answers


def run(model, prompts, configs, **options) -> list[Answer]:
    return answers_of(stream(model, prompts, configs, **options), len(prompts))


def assert_same(found: Answer, expected: Answer, what: str) -> None:
    assert found.token_ids == expected.token_ids, what
    assert_near(found.log_probs, expected.log_probs, TOLERANCE, what)


def full_log_probs(model, prompts: list[list[int]], answers: list[Answer]) -> list[np.ndarray]:
    """Of the answers' tokens, by the full forward of prompts and answers; always of one shape, for one compilation."""
    texts = [prompt + answer.token_ids for prompt, answer in zip(prompts, answers, strict=True)]
    tokens_BT, segments_BT = np.zeros((2, 8, MAX_LENGTH), np.int32)
    for row, text in enumerate(texts):
        tokens_BT[row, : len(text)], segments_BT[row, : len(text)] = text, 1
    log_probs_BTV = np.asarray(jax.nn.log_softmax(model(tokens_BT, segments_BT).logits))
    return [
        log_probs_BTV[row, np.arange(len(prompt), len(text)) - 1, text[len(prompt) :]]
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]


@pytest.fixture(scope="module")
def batch(model):
    """Eight ragged requests, drawn and greedy ones next to each other, and what came of them."""
    prompts = make_prompts(LENGTHS, seed=1)
    configs = [GREEDY if row % 2 else dataclasses.replace(DRAWN, seed=row) for row in range(8)]
    return prompts, configs, run(model, prompts, configs)


def test_log_probs_are_those_of_the_full_forward(model, batch):
    """The model's own, whatever the tokens were chosen by: a bias, a temperature."""
    prompts, configs, answers = batch
    for row, expected in enumerate(full_log_probs(model, prompts, answers)):
        assert len(expected) == 48
        assert_near(answers[row].log_probs, expected, TOLERANCE, f"row {row}: {configs[row]}")


def test_a_request_does_not_depend_on_its_neighbours_or_its_row(model, batch):
    """The other way round in the same batch, and a drawn and a greedy request alone: same tokens, same numbers."""
    prompts, configs, answers = batch
    turned = run(model, prompts[::-1], configs[::-1])
    for row, answer in enumerate(turned[::-1]):
        assert_same(answer, answers[row], f"prompt {row} in row {7 - row}")
    for row in (0, 1):
        [alone] = run(model, [prompts[row]], [configs[row]])
        assert_same(alone, answers[row], f"prompt {row} alone")


def test_another_seed_draws_another_text_and_the_same_the_same(model, batch):
    prompts, configs, answers = batch
    others = [dataclasses.replace(configs[0], seed=seed) for seed in (1, 2, 0, 0)]
    found = run(model, [prompts[0]] * 4 + prompts[4:], others + configs[4:])
    assert found[2].token_ids == found[3].token_ids == answers[0].token_ids
    assert len({tuple(answer.token_ids) for answer in found[:4]}) == 3


def new_at(answers: list[Answer], index: int) -> tuple[int, int]:
    """A row, and the token it has at an index and nowhere before."""
    for row, answer in enumerate(answers):
        if len(tokens := answer.token_ids) > index and tokens[index] not in tokens[:index]:
            return row, tokens[index]
    raise AssertionError(f"no text has a token at {index} for the first time: choose other prompts")


def test_texts_come_in_chunks_the_last_of_which_is_finished(batch):
    _, _, answers = batch
    for answer in answers:
        assert answer.sizes == SIZES
        assert [len(chunk.log_probs) for chunk in answer.chunks] == SIZES
        assert [chunk.finished for chunk in answer.chunks] == [None, None, "length"]


@pytest.mark.parametrize("index", [0, 10, programs.DECODE_STEPS - 1, programs.DECODE_STEPS, programs.DECODE_STEPS + 1])
def test_a_stop_token_ends_its_request_at_any_position_of_a_chunk(model, batch, index):
    """As the first token of all, inside a chunk, next to its border and on both sides of it; the others go on."""
    prompts, configs, answers = batch
    row, token = new_at(answers, index)
    changed = list(configs)
    changed[row] = dataclasses.replace(configs[row], eos_token_id=(NEVER, token))
    found = run(model, prompts, changed)
    for other, (answer, expected) in enumerate(zip(found, answers, strict=True)):
        if other != row:
            assert_same(answer, expected, f"row {other}")
            assert answer.sizes == SIZES
    assert found[row].token_ids == answers[row].token_ids[: index + 1]
    assert [chunk.finished for chunk in found[row].chunks][-1] == "stop"
    assert all(chunk.token_ids for chunk in found[row].chunks), "the last chunk of a request is not empty"


def test_enough_ends_one_request_and_the_others_go_on(model, batch):
    prompts, configs, answers = batch
    row, seen = 3, []

    def enough(chunk: Chunk) -> bool:
        seen.append(chunk)
        return chunk.index == row and len(chunk.token_ids) > 1

    session = Session(model, MAX_LENGTH, rows=8)
    found = answers_of(session.run(prompts, configs, enough), 8)
    assert len(seen) == sum(len(answer.chunks) for answer in found), "it is asked of every chunk"
    assert found[row].token_ids == answers[row].token_ids[:33]
    assert [chunk.finished for chunk in found[row].chunks] == [None, "stop"]
    read = [len(prompt) + len(answer.token_ids) - 1 for prompt, answer in zip(prompts, found, strict=True)]
    np.testing.assert_array_equal(session._cache.lengths_B, read, "the row that ended is not computed any more")
    for other, (answer, expected) in enumerate(zip(found, answers, strict=True)):
        if other != row:
            assert_same(answer, expected, f"row {other}")


@pytest.mark.parametrize("budget", [1, 2, programs.DECODE_STEPS + 1])
def test_a_request_has_as_many_tokens_as_it_may(model, batch, budget):
    """One row of eight has fewer: no step of the decoding, one, and just its first chunk."""
    prompts, configs, answers = batch
    row = 3
    changed = list(configs)
    changed[row] = dataclasses.replace(configs[row], max_new_tokens=budget)
    found = run(model, prompts, changed)
    assert found[row].token_ids == answers[row].token_ids[:budget]
    assert found[row].chunks[-1].finished == "length"
    assert found[row].sizes == [size for size in (1, budget - 1) if size]


def test_a_batch_of_single_tokens_needs_no_decoding(model, batch, monkeypatch):
    prompts, configs, answers = batch
    monkeypatch.setattr(programs, "decode", None)
    configs = [dataclasses.replace(config, max_new_tokens=1) for config in configs]
    found = answers_of(Session(model, MAX_LENGTH, rows=8).run(prompts, configs, lambda chunk: False), 8)
    assert [answer.token_ids for answer in found] == [answer.token_ids[:1] for answer in answers]
    assert [[chunk.finished for chunk in answer.chunks] for answer in found] == [["length"]] * 8


def test_no_requests_are_served_at_once(model):
    assert list(stream(model, [], [])) == []


# ---- sessions -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens_read(monkeypatch) -> list[int]:
    """Grows by the number of a prompt's tokens that reach the model, prompt by prompt."""
    read, prefill = [], programs.prefill

    def counted(model, cache, tokens_BT, count_B, logits_BV):
        if logits_BV is None:
            read.append(0)
        read[-1] += int(count_B.sum())
        return prefill(model, cache, tokens_BT, count_B, logits_BV)

    monkeypatch.setattr(programs, "prefill", counted)
    return read


def say(session: Session, tokens: list[int], **settings) -> Answer:
    config = dataclasses.replace(GREEDY, **{"max_new_tokens": 12, **settings})
    return answers_of(session.generate(tokens, config), 1)[0]


def assert_as_if_new(model, session: Session, tokens: list[int], what: str) -> list[int]:
    answer = say(session, tokens)
    assert_near(answer.log_probs, full_log_probs(model, [tokens], [answer])[0], TOLERANCE, what)
    assert_same(answer, say(Session(model, MAX_LENGTH), tokens), what)
    return answer.token_ids


def test_a_turn_prefills_only_new_tokens_and_generates_what_a_new_session_does(model, tokens_read):
    """The conversation goes on, is shortened a little, diverges from what was generated, and is shortened much.

    A ring of 5 + 8 - 1 slots forgets what is more than a chunk back: only then all is computed again.
    """
    session = Session(model, MAX_LENGTH)
    first, second, third, fourth = make_prompts((21, 9, 3, 2), seed=2)
    answer = assert_as_if_new(model, session, first, "first turn")
    assert tokens_read[0] == 21
    whole = first + answer
    tokens_read.clear()

    # The answer's last token was chosen, and not read yet.
    answer = assert_as_if_new(model, session, whole + second, "second turn")
    assert tokens_read == [1 + 9, len(whole) + 9]
    whole += second + answer
    tokens_read.clear()

    # All but the last token of what was read is in the cache: back by 7 is what a ring still has …
    cut = whole[: len(whole) - 1 - 7]
    answer = assert_as_if_new(model, session, cut + third, "shortened by less than a chunk")
    assert tokens_read == [3, len(cut) + 3]
    whole = cut + third + answer
    tokens_read.clear()

    # … and by 8 it may have none.
    cut = whole[: len(whole) - 1 - 8]
    answer = assert_as_if_new(model, session, cut + fourth, "shortened by a chunk")
    assert tokens_read == [len(cut) + 2] * 2
    tokens_read.clear()

    assert_as_if_new(model, session, cut + fourth, "the same again: its last token is read for its logits")
    assert tokens_read == [len(cut) + 2] * 2  # the answer of 12 follows it
    assert_as_if_new(model, session, make_prompts((30,), seed=3)[0], "another conversation")


def test_layers_of_full_attention_keep_every_token(small, tokens_read):
    session = Session(small, 64)
    [first, second] = make_prompts((30, 3), seed=4)
    say(session, first)
    tokens_read.clear()
    cut = say(session, first[:10] + second)
    assert tokens_read == [3]
    assert_same(cut, say(Session(small, 64), first[:10] + second), "cut back by 31")


@pytest.mark.parametrize("chunks", [1, 2], ids=["after_the_first_token", "after_a_chunk"])
def test_an_answer_whose_iterator_is_abandoned_leaves_the_session_usable(model, tokens_read, chunks):
    """Ctrl-C in a chat: the generator is left, and the last token that it gave was not read."""
    session = Session(model, MAX_LENGTH)
    [first, second] = make_prompts((21, 9), seed=5)
    heard = []
    for _, chunk in zip(range(chunks), session.generate(first, GREEDY), strict=False):
        heard += chunk.token_ids
    tokens_read.clear()
    assert_as_if_new(model, session, first + heard + second, "after an interruption")
    assert tokens_read[0] == 1 + len(second)


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_an_interrupted_session_generates_what_a_new_session_does(model, monkeypatch, program):
    """Ctrl-C while the device works: the cache that went in is gone, and what came out was not kept."""
    session = Session(model, MAX_LENGTH)
    first, second, third = make_prompts((21, 19, 9), seed=8)
    whole = first + say(session, first).token_ids
    run_program = getattr(programs, program)

    def interrupted(*arguments):
        run_program(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(programs, program, interrupted)
        with pytest.raises(KeyboardInterrupt):
            say(session, whole + second)
    whole += assert_as_if_new(model, session, whole, "after an interruption")
    assert_as_if_new(model, session, whole + third, "one turn later")


def test_a_session_refuses_a_prompt_that_fills_its_cache(small):
    session = Session(small, 60)
    assert session.max_length == 64, "lengths of caches are powers of two"
    with pytest.raises(RequestError, match="64 tokens, and the cache holds 64 in total: .*larger max_length"):
        say(session, [1] * 64)
    for tokens, message in (([], "the prompt is empty"), ([3, 98], "holds 98, expected token ids from 0 to 97")):
        with pytest.raises(RequestError, match=message):
            say(session, tokens)
    answer = say(session, [1] * 60, max_new_tokens=30)
    assert len(answer.token_ids) == 4, "as many as the cache has slots for"
    assert answer.chunks[-1].finished == "length"


def test_without_a_limit_a_text_ends_at_the_last_position(small):
    unlimited = dataclasses.replace(GREEDY, max_new_tokens=None)
    [answer] = run(small, [[1] * 50], [unlimited])
    assert len(answer.token_ids) == 64 - 50 and answer.chunks[-1].finished == "length"
    with pytest.raises(RequestError, match="prompt 1 has 64 tokens, and the model has 64 positions"):
        run(small, [[1] * 50, [1] * 64], [unlimited] * 2)


def test_lengths_do_not_change_under_a_program_that_reads_them(model, monkeypatch):
    """JAX may use an array of the host without a copy, and read it later. Whether it does depends on the address."""
    given = []

    def noted(model, cache, tokens_BT, count_B, logits_BV):
        given.append((cache.lengths_B, np.array(cache.lengths_B), count_B, np.array(count_B)))
        return cache, np.zeros((len(count_B), VOCABULARY), np.float32), None

    monkeypatch.setattr(programs, "prefill", noted)
    for _ in range(20):
        Session(model, 60, rows=8)._read(make_prompts(LENGTHS))
    for lengths_B, lengths_then_B, count_B, count_then_B in given:
        np.testing.assert_array_equal(lengths_B, lengths_then_B)
        np.testing.assert_array_equal(count_B, count_then_B)


# ---- compilations ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> list[float]:
    """Grows by one number with everything that XLA compiles in this process."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(listen)


def test_100_requests_of_random_lengths_share_a_few_compilations(small, compiled, monkeypatch):
    """As many as there are shapes, and none for a request whose shapes were there before."""
    monkeypatch.setattr(programs, "PREFILL_BUCKETS", PREFILL_BUCKETS)
    numbers = np.random.default_rng(6)
    requests = []
    for _ in range(100):
        lengths = numbers.integers(1, 100, numbers.integers(1, 3))
        requests.append((make_prompts(lengths, seed=7), int(numbers.integers(1, 29))))

    before, all_before = programs.compilations(), len(compiled)
    answers = [qmj.generate(small, prompts, max_new_tokens=count) for prompts, count in requests]
    found, all_found = programs.compilations() - before, len(compiled) - all_before

    rows, cache_lengths = {1, 2}, {64, 128}
    assert {len(prompts) for prompts, _ in requests} == rows
    assert max(max(map(len, prompts)) + count for prompts, count in requests) <= max(cache_lengths)
    # No prompt needs a second chunk: none is longer than 128, the longest but one.
    chunks = [length for length in PREFILL_BUCKETS if length <= max(cache_lengths)]
    prefills, firsts, decodes = len(rows) * len(cache_lengths) * len(chunks), len(rows), len(rows) * len(cache_lengths)
    assert found <= prefills + firsts + decodes
    # The engine does not count what makes an empty cache, for every number of rows and cache length, nor what runs
    # between its programs: some five operations on one number a row.
    assert all_found <= found + len(rows) * len(cache_lengths) + 8 * len(rows)

    before, all_before = programs.compilations(), len(compiled)
    again = [qmj.generate(small, prompts, max_new_tokens=count) for prompts, count in requests]
    assert again == answers
    assert (programs.compilations(), len(compiled)) == (before, all_before)


def test_on_a_mesh_a_second_request_compiles_nothing(expected, compiled):
    """Results of one program have the layout of the next one's inputs: none is compiled for a second layout."""
    folder, prompts, texts = expected(ON_MESH[0])
    model = qmj.from_pretrained(folder, dtype="float32", mesh=qmj.make_mesh(**MESH))
    assert qmj.generate(model, prompts, max_new_tokens=NEW_TOKENS, eos_token_id=()) == texts
    before = len(compiled)
    assert qmj.generate(model, prompts[::-1], max_new_tokens=NEW_TOKENS, eos_token_id=()) == texts[::-1]
    assert len(compiled) == before
