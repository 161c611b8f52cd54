"""The engine: requests that come and go at any time get the answers that they get alone, and nothing is compiled."""

import dataclasses
import time

import jax
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference import memory, programs
from qwen_moe_jax.inference.engine import Engine
from qwen_moe_jax.inference.memory import slots_that_fit
from qwen_moe_jax.inference.request import Request
from qwen_moe_jax.inference.session import stream
from tests.cases import CASES, HYBRID_CASES
from tests.distance import assert_near

VOCABULARY, END = 98, 3
MIXED = {
    **CASES["qwen2_moe-sliding_layer_types"].config,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "mlp_only_layers": [0],
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
}
#: As in test_session: the same sums in another order.
TOLERANCE = 2e-5
SETTINGS = [
    {},
    {"do_sample": True, "temperature": 0.8, "top_k": 20},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"do_sample": True, "top_p": 0.9, "logit_bias": {(1, 2): -3.0, 5: 2.0}, "min_new_tokens": 4},
]


#: What half of the requests begin with.
SYSTEM = np.random.default_rng(9).integers(4, VOCABULARY, 29).tolist()


def make_requests(count: int, seed: int = 0, longest: int = 40, new: int = 24) -> list[Request]:
    numbers = np.random.default_rng(seed)
    return [
        Request(
            token_ids=[
                *(SYSTEM[: 20 + number % 3 * 4] if number % 2 else []),
                *numbers.integers(4, VOCABULARY, numbers.integers(1, longest)).tolist(),
            ],
            config=qmj.GenerationConfig(
                max_new_tokens=int(numbers.integers(1, new)),
                eos_token_id=(END,),
                seed=number,
                **SETTINGS[number % len(SETTINGS)],
            ),
        )
        for number in range(count)
    ]


class Answer:
    """The chunks of one request, joined."""

    def __init__(self, chunks):
        self.chunks = chunks
        self.token_ids = [token for chunk in chunks for token in chunk.token_ids]
        self.log_probs = [log_prob for chunk in chunks for log_prob in chunk.log_probs]
        self.finished, self.error = chunks[-1].finished, chunks[-1].error


def serve(engine: Engine, requests: list[Request], seed: int | None = None) -> list[Answer]:
    """Answers to requests that arrive at random steps; all at once without a seed."""
    numbers, waiting = np.random.default_rng(seed), list(requests)
    order, chunks = [], {}
    while waiting or not engine.idle:
        arriving = len(waiting) if seed is None else int(numbers.integers(0, 3))
        for request in waiting[:arriving]:
            order.append(engine.submit(request))
        del waiting[:arriving]
        for chunk in engine.step():
            chunks.setdefault(chunk.request, []).append(chunk)
    assert engine.load.active_slots == 0 and engine.load.free_slots == engine.slots
    return [Answer(chunks[number]) for number in order]


def by_session(model, requests: list[Request]) -> list[Answer]:
    """Answers of a batch of the requests, in a session."""
    found = [[] for _ in requests]
    for chunk in stream(model, [one.token_ids for one in requests], [one.config for one in requests]):
        found[chunk.index].append(chunk)
    return [Answer(chunks) for chunks in found]


@pytest.fixture(scope="module")
def model() -> qmj.CausalLM:
    return qmj.CausalLM(qmj.ModelConfig.from_pretrained(MIXED), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Blocks of 8 tokens, so that short texts have some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "BLOCK_SIZE", 8)
        yield


@pytest.fixture(scope="module")
def engine(model, small_blocks) -> Engine:
    """Four slots, and keys and values for 144 tokens of theirs together."""
    engine = Engine(model, slots=4, max_length=96, cache_tokens=144, prefix_states=3, prefill_chunk=16, decode_steps=4)
    reported = []
    engine.compile(lambda *report: reported.append(report))
    total = len(reported) - 1
    assert [done for _, done, _ in reported] == list(range(total + 1)) and reported[-1][2] == total
    return engine


@pytest.fixture
def nothing_compiled(engine):
    before = programs.compilations()
    yield
    assert programs.compilations() == before


def test_requests_at_random_times_get_the_answers_that_they_get_alone_and_nothing_is_compiled(model, engine):
    """Greedy and sampled, with penalties, biases and constraints together with requests without, in four slots.

    Beginnings that others had are not read again, and requests are put back into the queue for want of blocks.
    """
    requests = make_requests(24)
    before, loads = programs.compilations(), engine.expert_loads()
    passes = engine.load.read_tokens + engine.load.decoded_tokens
    answers = serve(engine, requests, seed=1)
    assert programs.compilations() == before
    assert {answer.finished for answer in answers} == {"stop", "length"}
    for number, expected in enumerate(by_session(model, requests)):
        assert answers[number].token_ids == expected.token_ids, number
        assert_near(answers[number].log_probs, expected.log_probs, TOLERANCE, f"request {number}")
    load, new = engine.load, engine.expert_loads()
    assert new.layers == (1,) and new.dropped == 0
    chosen = (load.read_tokens + load.decoded_tokens - passes) * model.config.moe.num_experts_per_tok
    assert (new.tokens_LE - loads.tokens_LE).sum() == chosen and new.tokens_LE.min() > 0
    assert load.prefix_hit_tokens == sum(answer.chunks[0].cached_tokens for answer in answers) > 0
    assert load.preempted > 0 and load.used_blocks == 0 < load.kept_blocks <= load.blocks == 144 // 8


def test_those_who_decode_wait_for_one_chunk_of_a_prompt_at_most(engine, nothing_compiled):
    """A prompt of six chunks arrives, two of them short for a copy of the ring: the other goes on at every step."""
    short, long = make_requests(1)[0], make_requests(1, seed=2)[0]
    config = qmj.GenerationConfig(max_new_tokens=60)
    first = engine.submit(dataclasses.replace(short, token_ids=[5, 6], config=config))
    engine.step()
    second = engine.submit(dataclasses.replace(long, token_ids=list(range(4, 84)), config=config))
    for _ in range(5):
        assert [chunk.request for chunk in engine.step()] == [first]
    assert [chunk.request for chunk in engine.step()] == [first, second]
    engine.cancel(first)
    engine.cancel(second)
    assert engine.step() == [] and engine.idle


def test_a_cancelled_or_late_request_gives_its_slot_to_the_next(engine, nothing_compiled):
    config = qmj.GenerationConfig(max_new_tokens=80)
    request = Request(token_ids=[7], config=config)
    numbers = [engine.submit(request) for _ in range(4)]
    waiting, late = engine.submit(request), engine.submit(dataclasses.replace(request, deadline=time.monotonic() - 1))
    [last, *chunks] = engine.step()
    assert (last.request, last.finished, last.token_ids) == (late, "deadline", ())
    assert [chunk.request for chunk in chunks] == numbers and engine.load.waiting == 1
    engine.cancel(numbers[1])
    assert {chunk.request for chunk in engine.step()} == {numbers[0], numbers[2], numbers[3], waiting}
    assert engine.load.waiting == 0 and engine.load.active_slots == 4
    for number in [*numbers, waiting]:
        engine.cancel(number)
    assert engine.step() == [] and engine.load.free_slots == 4


def test_log_probs_of_prompts_and_of_the_most_probable_tokens_are_those_of_the_full_forward(model, engine):
    [request] = make_requests(1, seed=5)
    request = dataclasses.replace(request, top_logprobs=3, prompt_logprobs=2)
    [answer] = serve(engine, [request])
    text = [*request.token_ids, *answer.token_ids]
    log_probs_TV = np.asarray(nnx.log_softmax(model([text]).logits))[0]
    first = len(request.token_ids) - 1
    prompt = answer.chunks[0].prompt_logprobs
    expected = log_probs_TV[np.arange(first), request.token_ids[1:]]
    assert_near(prompt.log_probs, expected, TOLERANCE, "prompt")
    for top, row_V in zip(prompt.top, log_probs_TV[:first], strict=True):
        assert [token for token, _ in top] == np.argsort(-row_V)[:2].tolist()
    tops = [top for chunk in answer.chunks for top in chunk.top_logprobs]
    for top, row_V in zip(tops, log_probs_TV[first:-1], strict=True):
        assert [token for token, _ in top] == np.argsort(-row_V)[:3].tolist()
        assert_near([value for _, value in top], np.sort(row_V)[::-1][:3], TOLERANCE, "top")
    assert all(chunk.prompt_logprobs is None for chunk in answer.chunks[1:])


class Alternating:
    """A mask that allows even and odd tokens in turn, and raises after so many."""

    def __init__(self, most: int = 100):
        self.taken, self.most = [], most

    def allowed(self) -> np.ndarray:
        bits = np.arange(128) % 2 == len(self.taken) % 2
        bits[END] = False
        return (
            np.packbits(bits.reshape(-1, 8)[:, ::-1], axis=1)
            .reshape(-1, 4)[:, ::-1]
            .copy()
            .view(">u4")
            .astype(np.uint32)
            .ravel()
        )

    def accept(self, token: int) -> None:
        self.taken.append(token)
        if len(self.taken) > self.most:
            raise ValueError("too many")


def test_a_mask_is_asked_before_every_token_and_the_others_decode_as_without(engine, nothing_compiled):
    [request] = make_requests(1, seed=8)
    config = qmj.GenerationConfig(max_new_tokens=12, do_sample=True, seed=3)
    masked = dataclasses.replace(request, mask=(mask := Alternating()), config=config)
    failing = dataclasses.replace(masked, mask=Alternating(most=4))
    found, broken, other = serve(engine, [masked, failing, dataclasses.replace(request, config=config)])
    assert [token % 2 for token in found.token_ids] == [0, 1] * 6 and mask.taken == found.token_ids[:-1]
    assert broken.finished == "error" and "too many" in str(broken.error) and len(broken.token_ids) == 5
    assert other.token_ids == serve(engine, [dataclasses.replace(request, config=config)])[0].token_ids


def test_logits_that_are_not_finite_end_their_request_alone_and_leave_nothing_behind(engine, nothing_compiled):
    """A token whose embedding is NaN: the slot is used again by the next request."""
    model, bad = engine._model, 97
    requests = [one for one in make_requests(6, seed=11) if bad not in one.token_ids]
    expected = serve(engine, requests)
    table = model.model.embed_tokens.weight
    before = table.get_value()
    table.set_value(before.at[bad].set(np.nan))
    try:
        broken = Request(token_ids=[5, bad, 6], config=qmj.GenerationConfig(max_new_tokens=9))
        shared = dataclasses.replace(broken, token_ids=[*SYSTEM, bad, 6])
        assert serve(engine, [shared])[0].finished == "error"
        answers = serve(engine, [requests[0], broken, *requests[1:]])
    finally:
        table.set_value(before)
    failed = answers.pop(1)
    assert failed.finished == "error" and failed.token_ids == [] and "not finite" in str(failed.error)
    for answer, one in zip(answers, expected, strict=True):
        assert answer.token_ids == one.token_ids or bad in one.token_ids


def test_an_exception_in_a_step_loses_no_request(engine, monkeypatch, nothing_compiled):
    requests = make_requests(5, seed=12)
    expected = serve(engine, requests)
    calls, decode = [], engine._arrays.decode

    def interrupted(*arguments, **options):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode(*arguments, **options)

    monkeypatch.setattr(engine._arrays, "decode", interrupted)
    numbers, chunks = [engine.submit(request) for request in requests], {}
    while not engine.idle:
        try:
            for chunk in engine.step():
                chunks.setdefault(chunk.request, []).append(chunk)
        except KeyboardInterrupt:
            assert engine.load.active_slots == 0 and engine.load.waiting == len(engine._requests)
    assert [Answer(chunks[number]).token_ids for number in numbers] == [answer.token_ids for answer in expected]


def test_requests_that_can_never_be_served_are_refused_with_the_numbers(engine):
    config = qmj.GenerationConfig()
    refused = {
        "the prompt is empty": Request(token_ids=[], config=config),
        "has 96 tokens, and a request has 96 in total": Request(token_ids=[1] * 96, config=config),
        "found 20 tokens, expected at most 16": Request(
            token_ids=[1], config=qmj.GenerationConfig(eos_token_id=range(20))
        ),
        "top_logprobs=21: expected between 0 and 20": Request(token_ids=[1], config=config, top_logprobs=21),
        "no adapter of that name": Request(token_ids=[1], config=config, adapter="x"),
        "holds token 98": Request(token_ids=[1], config=qmj.GenerationConfig(logit_bias={98: 1.0})),
    }
    for message, request in refused.items():
        with pytest.raises(RequestError, match=message):
            engine.submit(request)
    assert engine.idle


def test_memory_is_what_the_formula_says(model, engine):
    """Blocks of the tokens, rings of slots and copies: keys and values, K heads of H float32 numbers each."""
    attention = model.config.attention
    token = 2 * attention.num_key_value_heads * attention.head_dim * 4
    ring = attention.sliding_window + 16 - 1
    parts = engine.memory()
    sizes = [size for _, size in parts]
    blocks, rings, copies = 8 * (144 // 8 + 1) * token, 4 * ring * token, (3 * ring + 8) * token
    numbers = 4 + 4 * 12, 3 + 3 * 12  # int32: lengths and tables, which are counted with copies alone
    assert sizes[1:4] == [blocks, rings, copies + 4 * numbers[1]]
    cache = engine._arrays._cache
    assert sum(x.nbytes for x in jax.tree.leaves(cache)) == blocks + rings + 4 * numbers[0]
    options = dict(cache_tokens=144, prefix_states=3, prefill_chunk=16)
    assert slots_that_fit(model, 96, sum(sizes), **options) == 4
    assert slots_that_fit(model, 96, sum(sizes) - 1, **options) == 3
    with pytest.raises(RequestError, match="on a device, expected at least the sum of weights .*; in all"):
        slots_that_fit(model, 96, 1000)


def test_a_hybrid_goes_on_from_copies_of_its_states():
    """Turns of a conversation, and another text that leaves the first: what is read again begins at a copy."""
    settings = {**HYBRID_CASES["qwen3_5_text-plain"].config, "vocab_size": VOCABULARY, "initializer_range": 0.1}
    config = qmj.ModelConfig.from_pretrained({**settings, "num_hidden_layers": 2, "full_attention_interval": 2})
    model = qmj.CausalLM(config, rngs=0, execution=qmj.ExecutionConfig(dtype="float32"))
    sizes = dict(slots=3, max_length=96, prefix_states=4, prefill_chunk=16, decode_steps=4)
    engine = Engine(model, **sizes)
    numbers = np.random.default_rng(3).integers(4, VOCABULARY, 80).tolist()
    config = qmj.GenerationConfig(max_new_tokens=6)
    texts = [numbers[:50], [*numbers[:30], 5, 6, 7, 8], [*numbers[:30], 9, 10], [*numbers[:50], 11, 12, *numbers[60:]]]
    requests = [Request(token_ids=text, config=config) for text in texts]
    answers = [serve(engine, [request])[0] for request in requests]
    # Copies after 16 tokens, 32 and 48; the second text leaves after 30, three full blocks: a copy is made there.
    assert [answer.chunks[0].cached_tokens for answer in answers[:3]] == [0, 16, 24]
    for answer, expected in zip(answers, by_session(model, requests), strict=True):
        assert answer.token_ids == expected.token_ids
        assert_near(answer.log_probs, expected.log_probs, TOLERANCE, "hybrid")
    [first, *others] = serve(engine, [Request(token_ids=numbers[20:60], config=config)] * 2)
    assert others[0].token_ids == first.token_ids and others[0].chunks[0].cached_tokens > 0, "one reads for both"
    # In a slot that nobody had, a state waits until others have read and decoded.
    engine = Engine(model, **sizes)
    serve(engine, requests[:1])
    other = Request(token_ids=numbers[::-1][:60], config=config)
    short = Request(token_ids=[7], config=dataclasses.replace(config, max_new_tokens=40))
    assert serve(engine, [short, other, requests[3]])[2].token_ids == answers[3].token_ids
    assert engine.load.prefix_hit_tokens == 48
