"""Sessions and batches of hybrids: recurrent states in ragged batches, chunked prompts, decoding and sessions."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.inference import programs
from qwen_moe_jax.inference.embed import Embedder
from qwen_moe_jax.inference.session import Session
from qwen_moe_jax.inference.settings import initial_state, sampling_settings
from qwen_moe_jax.model.cache import abstract_cache, recurrent_states
from tests.cases import HYBRID_CASES
from tests.distance import assert_near
from tests.inference import test_session
from tests.inference.test_decode_program import made
from tests.inference.test_session import (
    GREEDY,
    TOLERANCE,
    answers_of,
    assert_as_if_new,
    assert_same,
    full_log_probs,
    make_prompts,
    run,
    say,
)

short_chunks, tokens_read = test_session.short_chunks, test_session.tokens_read
MAX_LENGTH = 128
LENGTHS = (22, 19, 7, 12, 4, 1, 9, 2)


@pytest.fixture(scope="module")
def model() -> qmj.CausalLM:
    settings = {**HYBRID_CASES["qwen3_5_moe_text-plain"].config, "initializer_range": 0.1, "vocab_size": 98}
    config = qmj.ModelConfig.from_pretrained({**settings, "max_position_embeddings": 256})
    return qmj.CausalLM(config, rngs=nnx.Rngs(0), execution=qmj.ExecutionConfig(dtype="float32"))


def test_a_ragged_batch_gives_what_each_prompt_gives_alone_and_what_the_full_forward_says(model):
    """Prompts of one to three chunks, and texts that end at different lengths: padding leaves no trace in a state."""
    prompts = make_prompts(LENGTHS, seed=1)
    configs = [dataclasses.replace(GREEDY, max_new_tokens=5 + 4 * row) for row in range(8)]
    answers = run(model, prompts, configs)
    for row, expected in enumerate(full_log_probs(model, prompts, answers)):
        assert_near(answers[row].log_probs, expected, TOLERANCE, f"row {row}")
    for row in (0, 5, 7):
        assert_same(answers[row], run(model, [prompts[row]], [configs[row]])[0], f"row {row} alone")


def test_a_turn_goes_on_from_the_state_or_a_copy_of_it_and_generates_what_a_new_session_does(model, tokens_read):
    """A state cannot go back: what was read is read again from the last copy before the point where texts part."""
    session = Session(model, MAX_LENGTH)
    first, second, third = make_prompts((21, 9, 3), seed=2)
    answer = assert_as_if_new(model, session, first, "first turn")
    whole = first + answer
    tokens_read.clear()

    answer = assert_as_if_new(model, session, whole + second, "goes on after the answer")
    assert tokens_read[0] == 1 + 9  # the answer's last token was chosen, and not read yet
    prompt, whole = whole + second, whole + second + answer
    tokens_read.clear()

    answer = assert_as_if_new(model, session, whole[:-6] + third, "departs within the answer: from the prompt's end")
    assert tokens_read[0] == len(whole) - 6 + 3 - len(prompt)
    prompt, whole = whole[:-6] + third, whole[:-6] + third + answer
    tokens_read.clear()

    # The last prompt was read in two chunks, of 8 tokens and of what was left.
    departing = [*prompt[:-1], (prompt[-1] + 1) % 97, *third]
    assert_as_if_new(model, session, departing, "departs from the prompt's last chunk: from before it")
    assert tokens_read[0] <= 8 + 1 + 3
    tokens_read.clear()

    assert_as_if_new(model, session, departing[:4] + third, "departs at the beginning: from the start")
    assert tokens_read[0] == 4 + 3
    tokens_read.clear()

    assert_as_if_new(model, session, departing[:4] + third, "the same again: its last token is read for its logits")
    assert tokens_read[0] == 4 + 3  # the one chunk was read from the start


def test_rows_of_a_session_read_again_whatever_departs_also_after_an_abandoned_answer(model):
    """The session of a batch keeps no copies; an iterator left at its first chunk has advanced the other rows, too."""
    prompts, others = make_prompts((9, 12), seed=3), make_prompts((5, 7), seed=4)
    session = Session(model, MAX_LENGTH, rows=2)
    configs = [GREEDY] * 2
    chunks = session.run(prompts, configs, lambda chunk: False)
    heard = [list(next(chunks).token_ids) for _ in range(2)]
    heard[0] += next(chunks).token_ids  # of 32 tokens that both rows decoded, the first row's
    chunks.close()
    turns = [prompt + tokens + other for prompt, tokens, other in zip(prompts, heard, others, strict=True)]
    found = answers_of(session.run(turns, configs, lambda chunk: False), 2)
    for row, (answer, expected) in enumerate(zip(found, run(model, turns, configs), strict=True)):
        assert_same(answer, expected, f"row {row}")


def test_an_interrupted_session_generates_what_a_new_session_does(model, monkeypatch):
    session = Session(model, MAX_LENGTH)
    first, second = make_prompts((21, 9), seed=8)
    whole = first + say(session, first).token_ids
    decode = programs.decode

    def interrupted(*arguments):
        decode(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(programs, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            say(session, whole + second)
    assert_as_if_new(model, session, whole + second, "after an interruption")


@pytest.mark.parametrize(("dtype", "by_xla"), [("float32", False), ("bfloat16", True)])
def test_decoding_updates_the_states_in_place(dtype, by_xla, monkeypatch):
    """The program writes into the arrays that it was given, and makes no copy of the states of all layers."""
    if by_xla:
        monkeypatch.setattr("qwen_moe_jax.model.linear_attention.steps_in_place", lambda *_: False)
    else:
        pytest.importorskip("llvmlite")
    layers, heads, size, batch = 24, 8, 16, 4
    settings = dict(num_hidden_layers=layers, linear_num_value_heads=heads, linear_num_key_heads=heads)
    settings |= dict(linear_key_head_dim=size, linear_value_head_dim=size)
    config = qmj.ModelConfig.from_pretrained({**HYBRID_CASES["qwen3_5_text-plain"].config, **settings})
    model = qmj.CausalLM(config, rngs=None, execution=qmj.ExecutionConfig(dtype=dtype))
    cache = abstract_cache(config, model.mesh, batch=batch, max_length=64, max_write=8, dtype=dtype)
    sampling = sampling_settings([qmj.GenerationConfig()] * batch, config.vocab_size)
    numbers_B = np.ones(batch, np.int32)
    state = programs.DecodeState(token_B=numbers_B, left_B=numbers_B, sampling=initial_state(sampling, [[]] * batch))
    program = programs.decode.lower(model, cache, state, sampling).compile()
    shape = (layers // 4, batch, heads, size, size)
    assert [kept.state_LBNHH.shape for kept in recurrent_states(cache)] == [shape] * 3  # three positions of a period
    written = made(program.as_text(), at_least=np.prod(shape))
    states = [line for line in written if f"f32[{','.join(map(str, shape))}]" in line]
    if by_xla:
        assert len(states) == 3 and all("dynamic-update-slice" in line for line in states), states
    else:
        assert not states and program.as_text().count('custom_call_target="qwen_moe_jax_delta_rule_float32"') == 3
    given = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(cache))
    assert program.memory_analysis().alias_size_in_bytes >= given


def test_an_embedding_is_that_of_a_text_by_itself(model):
    """In one batch with a longer one, whose row is not padded."""
    long, short = make_prompts((40, 11), seed=9)
    embedder = Embedder(model, max_length=64)
    np.testing.assert_allclose(embedder.embed([long, short])[1], embedder.embed([short])[0], rtol=1e-5, atol=1e-6)
