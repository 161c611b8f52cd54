"""A step keeps the shardings of its state, and counts what it reports."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.model import cross_entropy
from tests.model.test_balancing import biases
from train.config import LossConfig, OptimizerConfig
from train.data.batches import batch_at
from train.data.rows import pack
from train.optimizer import make_optimizer
from train.step import heldout_metrics, initial_state, make_eval_step, make_train_step, state_shardings

HUB_CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def setting():
    """One step on a mesh of four devices: the states before (as NumPy) and after, and what was measured.

    The state after is followed by another, of a second step on a batch that the loss of is NaN.
    """
    mesh = qmj.make_mesh(data=2, expert=2)
    execution = qmj.ExecutionConfig(dtype="float32", capacity_factor=0.5, group_size=16)
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(HUB_CONFIG), rngs=nnx.Rngs(0), mesh=mesh, execution=execution)
    eval_graph = nnx.graphdef(model)
    model.train()
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), steps=10)
    shardings = state_shardings(params, optimizer, mesh)
    state = initial_state(params, optimizer, shardings)
    before = jax.tree.map(lambda array: (np.array(array), array.sharding), state)
    documents = np.split(np.random.default_rng(0).integers(1, 64, 120), [33, 60])
    batch = batch_at(pack(documents, 16), step=0, batch_size=8, seed=0)
    eval_step = make_eval_step(eval_graph)
    loss_before = heldout_metrics(eval_step, params, [batch])["loss"]
    train_step = make_train_step(graph, optimizer, LossConfig(router_aux_loss_coef=0.01), shardings, seed=0)
    old = state
    state, metrics = train_step(state, {}, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old)), "the old state's memory should have been reused"
    loss_after = heldout_metrics(eval_step, state.params, [batch])["loss"]
    beyond = dataclasses.replace(batch, tokens_BT=batch.tokens_BT + 64)  # tokens that the vocabulary does not have
    broken = train_step(jax.tree.map(jax.numpy.copy, state), {}, beyond)
    return before, state, metrics, batch, (loss_before, loss_after), broken


def test_moments_lie_where_their_parameters_lie_before_and_after_a_step(setting):
    before, state, _, _, _, _ = setting

    def is_pair(leaf):
        return isinstance(leaf, tuple) and len(leaf) == 2 and isinstance(leaf[0], np.ndarray)

    for tree in (
        jax.tree.map(lambda pair: pair[1], before, is_leaf=is_pair),
        jax.tree.map(lambda a: a.sharding, state),
    ):
        adam = tree.optimizer[1][0]
        assert adam.mu == adam.nu == tree.params
    experts = state.params["model"]["layers"]
    specs = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(experts)}
    assert any("expert" in spec for spec in specs)  # and it is a real cut, not everything everywhere


def test_a_step_changes_every_parameter_and_lowers_the_loss_of_its_batch(setting):
    before, state, _, _, (loss_before, loss_after), _ = setting
    changed = jax.tree.map(lambda new, old: bool((np.array(new) != old[0]).any()), state.params, before.params)
    assert all(jax.tree.leaves(changed))
    assert int(state.step) == 1
    assert loss_after < loss_before


def test_metrics_count_real_tokens_and_dropped_assignments(setting):
    _, _, metrics, batch, _, _ = setting
    real = (batch.segment_ids_BT > 0).sum()
    assert metrics.tokens == real == 120
    assert metrics.assignments == real * 2 * 2  # two experts a token in each of two layers
    assert 0 < metrics.dropped < metrics.assignments  # half the capacity that an even load needs
    assert np.isfinite(metrics.gradient_norm) and metrics.terms["balance_loss"] > 1
    assert 1 < metrics.load_imbalance <= 2  # of four experts, two of which every token takes
    assert 0 < metrics.terms["router_z"] < 20  # log(4)² = 1.9 is a router that knows nothing


def test_a_step_whose_loss_is_not_finite_changes_nothing_but_the_count_of_steps(setting):
    _, state, metrics, _, _, (broken, broken_metrics) = setting
    assert metrics.finite and not broken_metrics.finite
    assert np.isnan(broken_metrics.loss) and int(broken.step) == 2
    for kept, old in zip(
        jax.tree.leaves((broken.params, broken.optimizer)),
        jax.tree.leaves((state.params, state.optimizer)),
        strict=True,
    ):
        np.testing.assert_array_equal(kept, old)


def test_a_step_does_not_hold_the_logits_of_all_its_tokens(monkeypatch):
    """512 tokens of a vocabulary of 4096 are 8 MiB of logits, and their gradient as much again; a chunk has 256 KiB."""
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 2**16)
    settings = {key: value for key, value in HUB_CONFIG.items() if "expert" not in key and key != "norm_topk_prob"}
    settings |= {"model_type": "qwen3", "vocab_size": 4096, "hidden_size": 8, "intermediate_size": 16}
    mesh = qmj.make_mesh()
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(settings), rngs=nnx.Rngs(0), mesh=mesh)
    model.train()
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    optimizer = make_optimizer(OptimizerConfig(), steps=100)
    shardings = state_shardings(params, optimizer, mesh)
    state = initial_state(params, optimizer, shardings)
    batch = batch_at(pack([np.arange(512)], 16), step=0, batch_size=32, seed=0)
    step = make_train_step(graph, optimizer, LossConfig(router_aux_loss_coef=0.0, z_loss_coef=1e-4), shardings, seed=0)
    memory = step.lower(state, {}, batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 512 * 4096 * 4
    assert memory.alias_size_in_bytes > 0.9 * memory.output_size_in_bytes  # parameters and moments stay in their place


def one_step(model, loss: LossConfig, seed: int):
    """The model after one training step on a fixed batch, that batch, and the step's metrics."""
    model.train()
    graph, params = nnx.split(model)
    params = jax.tree.map(jax.numpy.copy, nnx.to_pure_dict(params))  # a step takes its state's memory
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0, weight_decay=0.5), steps=10)
    shardings = state_shardings(params, optimizer, model.mesh)
    state = initial_state(params, optimizer, shardings)
    batch = batch_at(pack([np.random.default_rng(0).integers(1, 64, 120)], 16), step=0, batch_size=8, seed=0)
    state, metrics = make_train_step(graph, optimizer, loss, shardings, seed)(state, {}, batch)
    return nnx.merge(graph, state.params), batch, metrics


def test_a_step_moves_the_balancing_bias_by_its_rule_alone():
    config = qmj.ModelConfig.from_pretrained(HUB_CONFIG)
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, balancing_bias=True))
    model = qmj.CausalLM(config, rngs=nnx.Rngs(0), mesh=qmj.make_mesh(data=2, expert=2))
    [bias] = [leaf for leaf in jax.tree.leaves(model, is_leaf=is_variable) if not isinstance(leaf, nnx.Param)]
    bias.set_value(bias.get_value() + 0.25)  # weight decay would shrink it
    after, batch, _ = one_step(model, LossConfig(router_aux_loss_coef=0.0, router_bias_update_rate=0.125), seed=0)
    stats = model(batch.tokens_BT, segment_ids=batch.segment_ids_BT).router.stats
    for layer, loads_E in enumerate(np.asarray(stats.tokens_per_expert)):
        np.testing.assert_array_equal(biases(after)[layer], 0.25 + 0.125 * np.sign(loads_E.mean() - loads_E))


@pytest.mark.usefixtures("programs_compiled_once")
def test_jitter_is_drawn_from_the_seed():
    settings = {key: value for key, value in HUB_CONFIG.items() if key not in ("num_experts", "norm_topk_prob")}
    settings |= {"model_type": "mixtral", "num_local_experts": 4, "router_jitter_noise": 0.1, "intermediate_size": 16}
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(settings), rngs=nnx.Rngs(0))
    losses = [one_step(model, LossConfig(router_aux_loss_coef=0.0), seed)[2].loss for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def is_variable(node) -> bool:
    return isinstance(node, nnx.Variable)
