"""AdamW in place on a single CPU against optax's chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from train import adamw_cpu
from train.config import OptimizerConfig
from train.optimizer import make_optimizer

pytest.importorskip("llvmlite")

#: Two that are moved in place, of which norms do not decay; one too small, one of another size, one that a rule moves.
SHAPES = {
    "w": (7, 80, 32), "norm": (128, 128), "small": (3, 5), "odd": (8193, 3), "e_score_correction_bias": (128, 128)
}  # fmt: skip
MOVED = {"w", "norm"}


def arrays(numbers: np.random.Generator, scale: float = 1.0) -> dict[str, jax.Array]:
    return {name: jnp.asarray(scale * numbers.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}


def optimizer_of(**settings) -> optax.GradientTransformation:
    config = OptimizerConfig(learning_rate=0.01, warmup_steps=2, weight_decay=0.1, max_grad_norm=1.0, **settings)
    return make_optimizer(config, steps=10)


def shardings(devices: int) -> dict[str, NamedSharding]:
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    return dict.fromkeys(SHAPES, NamedSharding(mesh, PartitionSpec()))


def test_steps_in_place_are_optaxs_and_without_a_step_nothing_changes():
    numbers, optimizer = np.random.default_rng(0), optimizer_of()
    params = arrays(numbers)
    chosen = adamw_cpu.in_place(optimizer, shardings(1), params)

    def step(params, state, gradients, is_step):
        norm = optax.tree_utils.tree_norm(gradients)
        return adamw_cpu.step(optimizer, gradients, norm, params, state, is_step, chosen)

    def by_optax(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    expected = params, optimizer.init(params)
    found = jax.tree.map(jnp.copy, expected)
    in_place, optaxs = jax.jit(step, donate_argnums=(0, 1)), jax.jit(by_optax)
    for scale in (1.0, 1e-4, 3.0):  # clipped, and not
        gradients = arrays(numbers, scale)
        before = jax.tree.map(np.array, found)
        broken = jax.tree.map(lambda gradient: gradient.at[0, 0].set(jnp.nan), gradients)
        found = in_place(*found, broken, jnp.bool_(False))
        jax.tree.map(np.testing.assert_array_equal, found, before)
        found = in_place(*found, gradients, jnp.bool_(True))
        expected = optaxs(*expected, gradients)
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-6, atol=5e-7), found, expected)


def test_float32_arrays_of_adamw_on_a_single_cpu_are_moved_in_place():
    params = arrays(np.random.default_rng(0))
    chosen = adamw_cpu.in_place(optimizer_of(), shardings(1), params)
    assert {name for name, is_chosen in chosen.items() if is_chosen} == MOVED
    half = jax.tree.map(lambda param: param.astype(jnp.bfloat16), params)
    for optimizer, devices, others in (
        (optimizer_of(), 2, params),
        (optimizer_of(), 1, half),
        (optimizer_of(mu_dtype="bfloat16"), 1, params),
        (optimizer_of(type="adafactor"), 1, params),
    ):
        assert not any(adamw_cpu.in_place(optimizer, shardings(devices), others).values())
