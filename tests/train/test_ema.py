"""The moving average of the weights follows them by its formula, in float32, and is what is evaluated."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qwen_moe_jax as qmj
from train.config import LossConfig, OptimizerConfig
from train.data.batches import batch_at
from train.data.rows import pack
from train.optimizer import make_optimizer
from train.step import abstract_state, initial_state, make_train_step, state_shardings

HUB_CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
DECAY = 0.2


def _moved(decay, mean, new):
    return decay * mean + (1 - decay) * np.asarray(new, np.float64)


def test_the_average_of_bfloat16_weights_follows_the_formula_and_a_step_that_changes_nothing_leaves_it():
    mesh = qmj.make_mesh(fsdp=2)
    execution = qmj.ExecutionConfig(param_dtype="bfloat16")
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(HUB_CONFIG), rngs=nnx.Rngs(0), mesh=mesh, execution=execution)
    model.train()
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0, learning_rate=0.05), steps=9)
    shardings = state_shardings(params, optimizer, mesh)
    shardings = dataclasses.replace(shardings, ema=shardings.params)
    state = initial_state(params, optimizer, shardings)
    batch = batch_at(pack([np.arange(1, 32)], 8), step=0, batch_size=2, seed=0)
    step = make_train_step(graph, optimizer, LossConfig(router_aux_loss_coef=0.0), shardings, seed=0, ema_decay=DECAY)

    means = jax.tree.map(lambda param: np.asarray(param, np.float64), state.params)
    for decay in (2 / 11, DECAY, DECAY):  # (1 + n) / (10 + n) is larger from n = 2 on
        state, _ = step(state, {}, batch)
        means = jax.tree.map(functools.partial(_moved, decay), means, state.params)
    # float32's rounding of three steps, weights of about 1
    jax.tree.map(lambda mean, ema: np.testing.assert_allclose(ema, mean, atol=1e-6), means, state.ema)
    jax.tree.map(
        np.testing.assert_array_equal, state.evaluated, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.ema)
    )
    assert any(
        not np.array_equal(*both) for both in zip(*map(jax.tree.leaves, (state.evaluated, state.params)), strict=True)
    )
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    described = abstract_state(params, optimizer, shardings)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), described)

    before = jax.tree.map(np.asarray, state.ema)
    state, metrics = step(state, {}, dataclasses.replace(batch, target_mask_BT=np.zeros_like(batch.target_mask_BT)))
    assert metrics.learned_tokens == 0
    jax.tree.map(np.testing.assert_array_equal, state.ema, before)
