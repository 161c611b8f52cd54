"""What a step of GRPO learns from: the rollout of the very model that is trained, under the experts that sampled it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.errors import ConfigError
from tests.train.grpo_runs import write_place
from train.config import load_config
from train.data.feed import to_devices
from train.initial import initial_model_config, initial_params
from train.objectives.policy_gradient import group_advantages
from train.parameters import select
from train.program import assemble, batch_sharding
from train.rollout.batch import rollout_batch
from train.rollout.corpus import load_prompts
from train.rollout.generate import Sampling, seed_of
from train.rollout.reference import scorer

ROWS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("grpo")
    write_place(place)
    return place


def setting(place, *words, devices=1):
    """Config, corpus and program of a run."""
    words = (*words, *(("--mesh.data=2", "--mesh.expert=4") if devices == 8 else ()))
    config = load_config(place / "run.toml", [*words, "--optimizer.warmup_steps=0", "--grpo.num_iterations=1"])
    corpus = load_prompts(place / "corpus", config)
    mesh = qmj.make_mesh(**config.mesh.sizes, devices=jax.devices()[:devices])
    return config, corpus, assemble(config, initial_model_config(config, corpus), mesh)


def twins(path, array):
    """Routers in which four experts are equally good, and the other four are: rounding decides which two are chosen."""
    if ".gate." not in jax.tree_util.keystr(path, simple=True, separator="."):
        return array
    return jnp.repeat(array[..., ::4, :], 4, axis=-2)


def nudged(path, array):
    """The routers after a change as small as rounding, which favours the last of four instead of the first."""
    if ".gate." not in jax.tree_util.keystr(path, simple=True, separator="."):
        return array
    return array * (1 + 1e-6 * (jnp.arange(array.shape[-2]) % 4))[:, None]  # the logits that are chosen are positive


@pytest.fixture(scope="module")
def rollout(place):
    """Rollouts of routers with twins, and their batch on the host."""
    config, corpus, program = setting(place)
    params = jax.tree_util.tree_map_with_path(twins, initial_params(config, program.model))
    sampling = Sampling.of(config, program, corpus)
    prompts = [corpus.prompts[0].training[number] for number in (0, 3)]
    requests = [(prompt, seed_of(0, prompt.name, n)) for prompt in prompts for n in range(ROWS // 2)]
    rollouts = sampling.sample(params, requests)
    advantages = group_advantages(np.arange(ROWS) % 3, ROWS // 2, "group")
    batch = rollout_batch(rollouts, advantages, config.data.seq_len, mask_truncated=False)
    return config, program, params, sampling, requests, rollouts, batch


def test_a_batch_has_every_completion_as_targets_under_its_prompt(rollout):
    *_, rollouts, batch = rollout
    for row, one in enumerate(rollouts):
        mask = batch.target_mask_BT[row]
        assert tuple(batch.targets_BT[row][mask]) == one.token_ids
        np.testing.assert_array_equal(batch.log_probs_BT[row][mask], one.log_probs)
        read = [*one.prompt.token_ids, *one.token_ids][:-1]
        assert batch.tokens_BT[row][batch.segment_ids_BT[row] == 1].tolist() == read
        np.testing.assert_array_equal(np.swapaxes(batch.experts_BTLA[row, : len(read)], 0, 1), one.experts)
    assert len({len(one.prompt.token_ids) for one in rollouts}) == 2
    assert len({one.token_ids for one in rollouts}) == ROWS


def test_a_completion_depends_on_its_seed_and_its_prompt_alone(rollout):
    _, _, params, sampling, requests, rollouts, _ = rollout
    again = sampling.sample(params, [requests[5], requests[2]])
    for one, same in zip(again, (rollouts[5], rollouts[2]), strict=True):
        assert one.token_ids == same.token_ids
        np.testing.assert_allclose(one.log_probs, same.log_probs, atol=1e-5)


@pytest.mark.parametrize("replay", [True, False], ids=["replay", "no replay"])
def test_ratios_of_the_first_update_are_1_under_a_nudged_router_with_replay_alone(rollout, replay):
    config, program, params, *_, batch = rollout
    config = dataclasses.replace(config, grpo=dataclasses.replace(config.grpo, routing_replay=replay))
    objective = dataclasses.replace(program.objective, config=config.grpo)

    @jax.jit
    def terms(params):
        whole = objective.whole_batch(batch, 1)
        out = objective.forward(nnx.merge(program.eval_graph, params), batch)
        loss = objective.training_loss(out, batch, whole, dataclasses.replace(config.loss, router_aux_loss_coef=0.0))
        return loss.terms, jnp.exp(jnp.where(batch.target_mask_BT, -out.losses - batch.log_probs_BT, 0))

    same, ratios = terms(params)
    assert same["routing_difference"] == 0 and same["sampling_kl"] < 1e-9
    np.testing.assert_allclose(ratios, 1, atol=1e-5)
    other, ratios = terms(jax.tree_util.tree_map_with_path(nudged, params))
    assert other["routing_difference"] > 0.1
    if replay:
        np.testing.assert_allclose(ratios, 1, atol=1e-4)
        assert other["sampling_kl"] < 1e-5
    else:
        assert np.abs(np.asarray(ratios) - 1).max() > 0.1 and other["sampling_kl"] > 1e-3


def test_eight_devices_learn_the_same_from_a_rollout(rollout, place):
    _, program, params, *_, batch = rollout
    learned = []
    for devices in (1, 8):
        _, _, program = setting(place, devices=devices)
        places = jax.tree.map(lambda shape: shape.sharding, program.state.params)
        state = program.begin(jax.device_put(jax.device_get(params), places))
        on_devices = to_devices(batch, batch_sharding(program.model.mesh))
        state, metrics = program.train_step(state, {}, on_devices)
        learned.append((jax.device_get(state.params), jax.device_get(metrics.terms), metrics.gradient_norm))
    (one, terms, norm), (eight, other_terms, other_norm) = learned
    np.testing.assert_allclose(other_norm, norm, rtol=1e-4)
    for name in terms:
        np.testing.assert_allclose(other_terms[name], terms[name], rtol=1e-4, atol=1e-6, err_msg=name)
    # Adam's first step is as large for a gradient of rounding as for any other: most, and not all, are equal.
    close = [np.isclose(a, b, atol=1e-5).mean() for a, b in zip(*map(jax.tree.leaves, (one, eight)), strict=True)]
    assert np.mean(close) > 0.99


def test_the_base_under_adapters_is_the_reference_and_log_probs_are_of_the_temperature(rollout, place):
    _, base_program, *_, batch = rollout
    words = ("--lora.r=2", "--grpo.beta=0.1", "--grpo.temperature=0.5")
    config, _, program = setting(place, *words)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.3 if str(path[-1]).endswith("lora_B']") else x, initial_params(config, program.model)
    )
    base = select(params, like=base_program.state.params)
    score = scorer(config, program, batch_sharding(program.model.mesh), params, first_step=0)
    scored = score(params, batch)
    mask = batch.target_mask_BT

    def log_probs(graph, params, replay):
        out = nnx.merge(graph, params)(batch.tokens_BT, batch.segment_ids_BT, replay=replay)
        picked = jnp.take_along_axis(jax.nn.log_softmax(out.logits / 0.5), batch.targets_BT[..., None], axis=-1)
        return np.asarray(picked[..., 0])[mask]

    own = log_probs(program.eval_graph, params, batch.experts_LBTA)
    np.testing.assert_allclose(np.asarray(scored.log_probs_BT)[mask], own, atol=1e-4)
    np.testing.assert_allclose(
        np.asarray(scored.reference_log_probs_BT)[mask], log_probs(base_program.eval_graph, base, None), atol=1e-4
    )
    assert np.abs(own - np.asarray(scored.reference_log_probs_BT)[mask]).max() > 1e-2


def test_prompts_are_texts_or_conversations_of_which_some_are_held_out(place):
    config, corpus, _ = setting(place)
    [part] = corpus.prompts
    assert len(part.heldout) == 3 and not {one.name for one in part.heldout} & {one.name for one in part.training}
    by_name = {one.name: one for one in [*part.training, *part.heldout]}
    text, chat = by_name["prompts.jsonl:1"], by_name["prompts.jsonl:11"]
    assert corpus.tokenizer.decode(text.token_ids) == text.prompt == text.row["prompt"]
    assert corpus.tokenizer.decode(chat.token_ids) == "say this 0.A:"
    assert chat.prompt == [{"role": "user", "content": "say this 0"}] and chat.text == "say this 0"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question": "?"}, "line 1: found the keys question, expected"),
        ({"prompt": "?", "messages": []}, "line 1: found both prompt and messages"),
        ({"messages": [{"role": "assistant", "content": "!"}]}, "the last message is the assistant's"),
        ({"prompt": ""}, "found no token, expected a prompt"),
        ({"prompt": "?", "tools": [{"name": "add"}]}, "line 1: tools: found with a prompt of text"),
        (
            {"messages": [{"role": "user", "content": "?"}], "tools": [{"name": "add"}]},
            "line 1: tools: the chat template of .* renders the same with and without",
        ),
        ({"prompt": "far too long for the row"}, "found 0 prompts of at most 16 tokens"),
    ],
)
def test_a_record_that_is_no_prompt_is_refused_by_its_place(place, tmp_path, record, said):
    import json

    (tmp_path / "bad.jsonl").write_text(json.dumps(record) + "\n")
    config = load_config(place / "run.toml", [f"--data.path={tmp_path}/bad.jsonl"])
    with pytest.raises(ConfigError, match=said):
        load_prompts(tmp_path / "corpus", config)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--grpo.reward="], "grpo.reward: found neither, expected one of reward and"),
        (["--grpo.num_generations=3"], "grpo.num_generations: found 3, expected a divisor of data.batch_size, 8"),
        (["--grpo.max_completion_length=25"], "grpo.max_completion_length: found 25, expected less than data.seq_len"),
        (["--data.format=text"], "data.format: found 'text', expected 'jsonl' with a"),
        (["--loss.z_loss_coef=0.1"], "loss.z_loss_coef: found 0.1, expected 0 with a"),
        (["--grpo.temperature=0"], "grpo.temperature: found 0.0, expected a number above 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(place, words, said):
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        load_config(place / "run.toml", words)
