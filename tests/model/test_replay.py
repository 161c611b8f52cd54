"""Routing replay: a model's own routing gives its own logits, another's gives that one's choices, and edits hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.model.cache import abstract_cache, empty_cache
from tests.model.hybrid_configs import hybrid_config, hybrid_model
from tests.moe.blocks import relative
from tests.subject import on_mesh

B, T = 8, 10
CONFIG = hybrid_config("Fff")  # a dense layer before two sparse ones, as in all of these
TOKENS_BT = np.random.default_rng(0).integers(0, 98, (B, T))
#: Padding after, before and between, and a row of two texts.
SEGMENTS_BT = np.ones((B, T), np.int32)
SEGMENTS_BT[0, 6:] = SEGMENTS_BT[1, :3] = SEGMENTS_BT[2, 4:6] = 0
SEGMENTS_BT[3, 5:] = 2
SMALL = slice(0, 2)


@functools.cache
def plain_model() -> qmj.CausalLM:
    return hybrid_model(CONFIG, execution=qmj.ExecutionConfig(dispatch="dense"))


@functools.cache
def plain_output():
    return plain_model()(TOKENS_BT, SEGMENTS_BT, output_router_logits=True)


def assert_bit_equal(found, expected) -> None:
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("dispatch", ["dense", "capacity", "dropless"])
def test_its_own_trace_gives_a_model_its_own_output_bit_for_bit_on_a_mesh(dispatch):
    """Logits, drops, statistics and losses, with padding and packed texts."""
    execution = qmj.ExecutionConfig(dispatch=dispatch, eval_capacity_factor=0.75)
    model = on_mesh(plain_model(), qmj.make_mesh(data=2, expert=4), execution)
    out = model(TOKENS_BT, SEGMENTS_BT, output_router_logits=True)
    assert (dispatch == "capacity") == bool(np.any(out.router.trace.dropped))
    assert_bit_equal(model(TOKENS_BT, SEGMENTS_BT, output_router_logits=True, replay=out.router.trace), out)


def test_a_hybrid_replays_its_own_trace_bit_for_bit():
    model = hybrid_model(hybrid_config("Llf"))
    tokens_BT, segments_BT = TOKENS_BT[SMALL], SEGMENTS_BT[SMALL]
    out = model(tokens_BT, segments_BT, output_router_logits=True)
    assert_bit_equal(model(tokens_BT, segments_BT, output_router_logits=True, replay=out.router.trace), out)


def test_with_a_cache_new_tokens_replay_their_trace_bit_for_bit():
    model = plain_model()
    read = jax.jit(functools.partial(model, output_router_logits=True))
    cache = empty_cache(abstract_cache(CONFIG, model.mesh, batch=2, max_length=16, max_write=8, dtype="float32"))
    cache = read(TOKENS_BT[SMALL, :4], cache=cache).cache
    out = read(TOKENS_BT[SMALL, 4:5], cache=cache)
    assert out.router.trace.experts.shape == (2, 2, 1, 3)
    assert_bit_equal(read(TOKENS_BT[SMALL, 4:5], cache=cache, replay=out.router.trace), out)


def test_anothers_trace_prescribes_experts_and_leaves_weights_to_the_present_logits():
    """Padding and the first router's logits are as ever; experts are the other's; the statistics count them."""
    out = plain_output()
    other = np.asarray(out.router.trace.experts)[:, :, ::-1]  # of other tokens
    found = plain_model()(TOKENS_BT, SEGMENTS_BT, output_router_logits=True, replay=other)
    real_BT = SEGMENTS_BT != 0
    trace = found.router.trace
    np.testing.assert_array_equal(np.asarray(trace.experts)[:, real_BT], other[:, real_BT])
    np.testing.assert_array_equal(trace.experts[0][~real_BT], out.router.trace.experts[0][~real_BT])
    np.testing.assert_array_equal(trace.logits[0], out.router.trace.logits[0])
    probs_LBTE = np.asarray(jax.nn.softmax(trace.logits, axis=-1))
    weights_LBTA = np.take_along_axis(probs_LBTE, np.asarray(trace.experts), axis=-1)
    weights_LBTA /= weights_LBTA.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(trace.weights)[:, real_BT], weights_LBTA[:, real_BT], rtol=1e-5)
    counts = [np.bincount(layer[real_BT].ravel(), minlength=8) for layer in other]
    np.testing.assert_array_equal(found.router.stats.tokens_per_expert, counts)
    assert np.abs(found.logits - out.logits)[real_BT].max() > 1e-3


def test_losses_take_a_replay_and_their_gradient_reaches_the_router():
    """The gradient is the plain one where the replay is the model's own choice."""
    model, trace = plain_model(), plain_output().router.trace

    def loss(model, replay):
        out = model.token_losses(TOKENS_BT, np.roll(TOKENS_BT, -1), SEGMENTS_BT, replay=replay)
        return jnp.sum(jnp.where(SEGMENTS_BT != 0, out.losses, 0)) + out.router.losses.load_balancing

    gradient = jax.jit(jax.grad(loss))
    plain, replayed = gradient(model, None), gradient(model, trace.experts)
    for ours, theirs in zip(jax.tree.leaves(replayed), jax.tree.leaves(plain), strict=True):
        assert relative(np.asarray(ours), np.asarray(theirs)) < 1e-5
    assert np.abs(replayed.model.layers.segments[1][0].mlp.gate.weight[...]).max() > 1e-3


def test_without_an_expert_the_next_best_is_chosen():
    """In that layer alone, whether the rest is chosen or replayed; the expert's weights make no difference."""
    experts = np.asarray(plain_output().router.trace.experts)
    expert = int(experts[1, 4, 0, 0])
    chosen = plain_model()(TOKENS_BT, SEGMENTS_BT, output_router_logits=True, without=[(1, expert)])
    replayed = plain_model()(TOKENS_BT, SEGMENTS_BT, output_router_logits=True, replay=experts, without=[(1, expert)])
    real_BT = SEGMENTS_BT != 0
    for out in (chosen, replayed):
        found = np.asarray(out.router.trace.experts)
        np.testing.assert_array_equal(found[0][real_BT], experts[0][real_BT])
        had_BT = (experts[1] == expert).any(-1) & real_BT
        assert not (found[1] == expert).any() and out.router.stats.tokens_per_expert[1, expert] == 0
        for b, t in np.argwhere(had_BT):  # one other expert in its place
            assert len(set(found[1, b, t].tolist()) - set(experts[1, b, t].tolist())) == 1
        np.testing.assert_array_equal(found[1][real_BT & ~had_BT], experts[1][real_BT & ~had_BT])
    np.testing.assert_allclose(chosen.logits[real_BT], replayed.logits[real_BT], rtol=1e-4, atol=1e-5)


def test_what_generation_chose_replayed_over_the_text_gives_its_log_probabilities():
    """To float32's rounding: a text is read at once, and was decoded token by token against a cache."""
    model = plain_model()
    prompts, settings = [[5, 6, 7, 8, 9], [11, 12]], dict(max_new_tokens=5, do_sample=True, seed=1)
    recorded = qmj.complete(model, prompts, return_routing=True, **settings)
    plain = qmj.complete(model, prompts, **settings)
    assert recorded == plain and all(completion.routing is None for completion in plain)
    tokens_BT, mask_BT = np.zeros((2, T), int), np.zeros((2, T), bool)
    for row, (prompt, completion) in enumerate(zip(prompts, recorded, strict=True)):
        text = [*prompt, *completion.token_ids]
        assert completion.routing.experts.shape == (2, len(text) - 1, 3)
        assert completion.routing.experts.dtype == np.uint8
        tokens_BT[row, : len(text)], mask_BT[row, : len(text)] = text, True
    out = model(tokens_BT, mask_BT, replay=[completion.routing for completion in recorded], output_router_logits=True)
    log_probs_BTV = np.asarray(jax.nn.log_softmax(out.logits, axis=-1))
    for row, (prompt, completion) in enumerate(zip(prompts, recorded, strict=True)):
        at = np.arange(len(prompt) - 1, len(prompt) - 1 + len(completion.token_ids))
        found = log_probs_BTV[row, at, list(completion.token_ids)]
        np.testing.assert_allclose(found, completion.log_probs, rtol=1e-4, atol=1e-5)
        own = qmj.RecordedRouting.of_trace(out.router.trace, row, at[-1] + 1)
        np.testing.assert_array_equal(own.experts, completion.routing.experts)


def test_speculative_decoding_records_the_tokens_that_were_kept():
    """A proposal that was read and refused leaves nothing; the text and its routing are those of plain decoding."""
    model = hybrid_model(hybrid_config("f", num_mtp_layers=1))
    settings = dict(max_new_tokens=8, return_routing=True)
    [plain] = qmj.complete(model, [[5, 6, 7, 8]], **settings)
    [speculative] = qmj.complete(model, [[5, 6, 7, 8]], num_speculative_tokens=2, **settings)
    assert speculative.token_ids == plain.token_ids
    np.testing.assert_array_equal(speculative.routing.experts, plain.routing.experts)


def test_a_session_knows_the_routing_of_tokens_it_does_not_read_again():
    model = plain_model()
    session = qmj.Session(model, 32, return_routing=True)
    config = qmj.GenerationConfig(max_new_tokens=3)

    def turn(prompt):
        chunks = list(session.generate(prompt, config))
        return [t for chunk in chunks for t in chunk.token_ids], np.concatenate([c.routing for c in chunks], axis=1)

    first, first_LTA = turn([5, 6, 7])
    text = [5, 6, 7, *first, 8, 9]
    _, second_LTA = turn(text)
    np.testing.assert_array_equal(second_LTA[:, :5], first_LTA)
    [fresh] = qmj.complete(model, [text], config, return_routing=True)
    np.testing.assert_array_equal(second_LTA, fresh.routing.experts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(replay=np.zeros((3, 2, 4, 3), int)), r"replay is int64 \[3, 2, 4, 3\], expected integers \[2, 2, 4, 3\]"),
        (dict(replay=np.zeros((2, 2, 4, 3))), r"replay is float64 .*expected integers"),
        (dict(replay=np.full((2, 2, 4, 3), 8)), "replay: found expert 8, expected numbers from 0 to 7"),
        (dict(replay=np.zeros((2, 2, 4, 3), int)), "replay: one expert twice for the token"),
        (dict(replay=[qmj.RecordedRouting.all_open(2, 4, CONFIG.moe)]), "has 1 recordings, expected 2: one for each"),
        (
            dict(replay=[qmj.RecordedRouting.all_open(2, 5, CONFIG.moe)] * 2),
            r"replay\[0\] has 2 sparse layers, 5 tokens and 3 of 8 experts per token, expected 2, at most 4, and 3 of",
        ),
        (dict(without=[(2, 0)]), r"without holds \(2, 0\), expected pairs .*one of 2 sparse layers, one of 8 experts"),
        (dict(without=[(1, expert) for expert in range(6)]), "without leaves 2 experts of sparse layer 1, expected at"),
        (dict(without=np.zeros((2, 7), bool)), r"without is bool \[2, 7\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments, message):
    with pytest.raises(qmj.RequestError, match=message):
        plain_model()(TOKENS_BT[SMALL, :4], **arguments)


def test_a_dense_model_has_no_routing():
    model = qmj.CausalLM(hybrid_config("F"), rngs=None)
    for refused in (dict(replay=np.zeros((0, 1, 2, 3), int)), dict(without=[(0, 0)])):
        with pytest.raises(qmj.RequestError, match="has no sparse layer"):
            model([[1, 2]], **refused)
