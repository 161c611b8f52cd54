"""What a next-token head proposes changes no text: it is that of plain decoding, in fewer passes of the model."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.inference.session import Session, stream
from tests.cases import CASES, HYBRID_CASES
from tests.subject import on_mesh

#: So few that proposals of a head with random weights are right now and then.
VOCABULARY = 6
PROMPTS = [[1, 2, 3, 4, 5, 0, 1], [3], [5, 5, 1], [0, 2] * 9, [4, 1]]
LENGTHS = (24, 17, 1, 30, 9)
SHORT = {"num_hidden_layers": 2, "full_attention_interval": 2, "vocab_size": VOCABULARY, "initializer_range": 0.4}


@functools.cache
def model_of(name: str) -> qmj.CausalLM:
    """A tiny model with a next-token head: a hybrid, or one of attention alone."""
    if name == "hybrid":
        config = {**HYBRID_CASES["qwen3_5_text-plain"].config, **SHORT, "mtp_num_hidden_layers": 1}
        return qmj.CausalLM(qmj.ModelConfig.from_pretrained(config), rngs=0)
    attention = qmj.ModelConfig.from_pretrained({**CASES["qwen3-plain"].config, **SHORT, "num_hidden_layers": 1})
    return qmj.CausalLM(dataclasses.replace(attention, num_mtp_layers=1), rngs=0)


def texts(model, proposals, prompts=PROMPTS, lengths=LENGTHS, **settings):
    """Token ids and log-probabilities of every prompt, one after the other."""
    configs = [
        qmj.GenerationConfig(max_new_tokens=length, num_speculative_tokens=proposals, **settings) for length in lengths
    ]
    found = [([], []) for _ in prompts]
    for chunk in stream(model, prompts, configs):
        found[chunk.index][0].extend(chunk.token_ids)
        found[chunk.index][1].extend(chunk.log_probs)
    return found


def assert_same(found, expected):
    for number, ((ids, log_probs), (expected_ids, expected_log_probs)) in enumerate(zip(found, expected, strict=True)):
        assert ids == expected_ids, number
        np.testing.assert_allclose(log_probs, expected_log_probs, atol=2e-5)


@pytest.mark.parametrize("name", ["hybrid", "attention"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"do_sample": True, "temperature": 1.3, "seed": 7, "repetition_penalty": 1.2, "eos_token_id": (2,)}],
    ids=["greedy", "sampled"],
)
def test_a_ragged_batch_is_that_of_plain_decoding(name, settings):
    model = model_of(name)
    plain = texts(model, 0, **settings)
    assert_same(texts(model, 3, **settings), plain)
    if settings:
        assert any(ids[-1] == 2 for ids, _ in plain) and len({len(ids) for ids, _ in plain}) > 2


def test_proposals_are_accepted_and_rejected():
    """Sampled texts differ enough from what is proposed; and a head that knows nothing is right now and then."""
    model, prompt, proposals = model_of("hybrid"), PROMPTS[0], 1
    config = qmj.GenerationConfig(max_new_tokens=48, do_sample=True, seed=1, num_speculative_tokens=proposals)
    session = Session(model, max_length=64)
    for _ in session.generate(prompt, config):
        pass
    assert session.decoded == 47
    assert 47 / (proposals + 1) < session.passes < 47


def test_turns_of_a_session_are_those_of_plain_decoding():
    """Each turn goes on from keys, values and states of which rejected proposals left no trace."""

    def turns(proposals):
        session, prompt, said = Session(model_of("hybrid"), max_length=128), [1, 2, 3], []
        for number in range(3):
            config = qmj.GenerationConfig(max_new_tokens=9 + number, num_speculative_tokens=proposals)
            answer = [token for chunk in session.generate(prompt, config) for token in chunk.token_ids]
            said.append(answer)
            prompt = [*prompt, *answer, 4, number]
        return said

    assert turns(2) == turns(0)


def test_a_mesh_decodes_what_one_device_does():
    model, prompts, lengths = model_of("hybrid"), PROMPTS[:2], LENGTHS[:2]
    expected = texts(model, 2, prompts, lengths)
    assert_same(texts(on_mesh(model, qmj.make_mesh(data=2, context=2, tensor=2)), 2, prompts, lengths), expected)


def test_sampled_tokens_have_the_models_distribution():
    """Pairs of the second and third new token of 2,048 seeds against the probabilities of the full forward."""
    model, prompt, count = model_of("attention"), [1, 2], 2048
    configs = [
        qmj.GenerationConfig(
            max_new_tokens=3, do_sample=True, top_k=0, temperature=4, seed=seed, num_speculative_tokens=2
        )
        for seed in range(count)
    ]
    session = Session(model, max_length=8, rows=count)
    sampled = np.zeros((count, 3), np.int32)
    filled = np.zeros(count, np.int32)
    for chunk in session.run([prompt] * count, configs, lambda chunk: False):
        for token in chunk.token_ids:
            sampled[chunk.index, filled[chunk.index]] = token
            filled[chunk.index] += 1
    assert (filled == 3).all() and session.passes < session.decoded  # some proposals were accepted
    branches = np.array([[*prompt, *pair] for pair in itertools.product(range(VOCABULARY), repeat=2)])
    probs = jax.nn.softmax(model(branches).logits / 4, axis=-1)
    probs = np.asarray(probs).reshape(VOCABULARY, VOCABULARY, 4, VOCABULARY)
    first, second, third = probs[0, 0, 1], probs[:, 0, 2], probs[:, :, 3]
    expected = count * np.einsum("a,ab,abc->bc", first, second, third)
    observed = np.zeros_like(expected)
    np.add.at(observed, (sampled[:, 1], sampled[:, 2]), 1)
    chi_squared = ((observed - expected) ** 2 / expected).sum()
    assert expected.min() > 5 and chi_squared < 66.6  # of 35 degrees of freedom, the 99.9th percentile


def test_a_model_without_a_head_refuses_by_name_and_reason():
    config = qmj.ModelConfig.from_pretrained({**CASES["qwen3-plain"].config, "vocab_size": VOCABULARY})
    with pytest.raises(qmj.RequestError, match="prompt 0: num_speculative_tokens=2 needs a next-token head, and this"):
        next(stream(qmj.CausalLM(config, rngs=0), [[1]], [qmj.GenerationConfig(num_speculative_tokens=2)]))
    with pytest.raises(qmj.ConfigError, match="num_speculative_tokens=16 is not supported: expected between 0 and 15"):
        qmj.GenerationConfig(num_speculative_tokens=16)
