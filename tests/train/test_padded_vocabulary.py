"""Training with a vocabulary that does not divide over the mesh is training on one device; checkpoints fit any mesh."""

import jax
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from tests.distance import assert_near
from tests.sharding.test_padded_vocabulary import BOTH, VOCABULARY, build
from train.checkpoint import Checkpoints
from train.config import LossConfig, OptimizerConfig
from train.data.batches import batch_at
from train.data.rows import pack
from train.objectives.language_modelling import resolve_loss
from train.optimizer import make_optimizer
from train.step import TrainState, abstract_state, initial_state, make_train_step, state_shardings

OPTIMIZER = make_optimizer(OptimizerConfig(weight_decay=0.1, warmup_steps=0, learning_rate=1e-2), steps=10)
BATCHES = [
    batch_at(pack([np.random.default_rng(0).integers(1, VOCABULARY, 60)], 15), step=step, batch_size=4, seed=0)
    for step in range(3)
]


def abstract(config, mesh, rules=qmj.ShardingRules()) -> tuple[qmj.CausalLM, TrainState]:
    """A model on a mesh, and the state of its training there; nothing is allocated."""
    model = qmj.CausalLM(config, rngs=None, mesh=mesh, execution=qmj.ExecutionConfig(sharding=rules))
    params = nnx.to_pure_dict(nnx.state(model))
    return model, abstract_state(params, OPTIMIZER, state_shardings(params, OPTIMIZER, mesh))


@pytest.fixture(scope="module")
def states() -> dict[str, TrainState]:
    """The state after three steps, on one device and on two that share the vocabulary."""
    found = {}
    for name, axes in (("one", {}), ("two", dict(tensor=2))):
        model = build(**axes)
        model.train()
        graph, params = nnx.split(model)
        params = jax.tree.map(jax.numpy.copy, nnx.to_pure_dict(params))  # the first step takes their memory
        shardings = state_shardings(params, OPTIMIZER, model.mesh)
        step = make_train_step(graph, OPTIMIZER, resolve_loss(LossConfig(), model.config), shardings, seed=0)
        state = initial_state(params, OPTIMIZER, shardings)
        for batch in BATCHES:
            state, metrics = step(state, {}, batch)
        assert metrics.finite
        found[name] = state
    return found


def without_padding(state: TrainState) -> dict[str, np.ndarray]:
    """Every array by its path, cut to the size it has on one device; the rest has to be zero."""
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        name, values = jax.tree_util.keystr(keys, simple=True, separator="."), np.asarray(leaf)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert not values[VOCABULARY:].any(), name
            values = values[:VOCABULARY]
        found[name] = values
    return found


def test_steps_with_weight_decay_are_those_of_one_device_and_padding_stays_zero(states):
    assert states["two"].params["lm_head"]["weight"].shape == (VOCABULARY + 1, 16)
    wanted = without_padding(states["one"])
    for name, values in without_padding(states["two"]).items():
        assert_near(values, wanted[name], 1e-5, name)


def test_a_checkpoint_of_one_mesh_is_restored_on_meshes_with_other_padding(states, tmp_path):
    config = build().config
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, states["two"])
        checkpoints.wait()
        wanted = without_padding(states["two"])
        cases = {
            211: abstract(config, qmj.make_mesh()),
            216: abstract(config, qmj.make_mesh(tensor=2, fsdp=3), BOTH),
        }
        for rows, (model, like) in cases.items():
            restored = checkpoints.restore(like=like, model=model)
            assert restored.params["lm_head"]["weight"].shape == (rows, 16)
            for found, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
                assert found.sharding == expected.sharding
            for name, values in without_padding(restored).items():
                np.testing.assert_array_equal(values, wanted[name], err_msg=name)

        model, like = abstract(build(VOCABULARY + 20).config, qmj.make_mesh())
        with pytest.raises(qmj.CheckpointError, match=r"lm_head.weight of shape \[212, 16\], .* is \[231, 16\]"):
            checkpoints.restore(like=like, model=model)
