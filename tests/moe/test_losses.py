"""The router's losses: from scratch in NumPy, differentiated through a plain reference, on one device and on eight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qwen_moe_jax as qmj
from qwen_moe_jax.config import MoEConfig
from qwen_moe_jax.moe.losses import RouterLosses, global_batch_loss, router_losses
from qwen_moe_jax.moe.router import route
from qwen_moe_jax.moe.stats import RouterStats, count, no_drops, sum_stats
from qwen_moe_jax.sharding.rules import BATCH

L, B, T, E, A = 2, 8, 5, 6, 2
MOE = MoEConfig(num_experts=E, num_experts_per_tok=A, moe_intermediate_size=4, norm_topk_prob=True)
NAMES = [field.name for field in dataclasses.fields(RouterLosses)]
MESHES = {"one device": {}, "data=2·expert=4": dict(data=2, expert=4)}
#: Sums of float32 in another order.
SAME = 2e-6


def example(seed=0):
    """Logits of two layers with a common taste, and padding: in rows, and one row of nothing else."""
    rng = np.random.default_rng(seed)
    logits_LBTE = (1.5 * rng.normal(size=(L, B, T, E)) + rng.normal(size=(L, 1, 1, E))).astype(np.float32)
    token_mask_BT = rng.random((B, T)) < 0.7
    token_mask_BT[0], token_mask_BT[1], token_mask_BT[-1] = True, False, np.arange(T) < 1
    return logits_LBTE, token_mask_BT


def stats_of(logits_LBTE, token_mask_BT, axes) -> RouterStats:
    """What `route` and `count` make of the logits of L layers on a mesh. Call it while tracing."""
    mesh = qmj.make_mesh(**axes)

    def of_layer(logits_BTE, token_mask_BT):
        routing = route(logits_BTE, token_mask_BT, MOE)
        return count(logits_BTE, routing, no_drops(routing))

    def inside(logits_LBTE, token_mask_BT):
        layers = [of_layer(logits_LBTE[layer], token_mask_BT) for layer in range(L)]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        specs = (P(None, BATCH, None, None), P(BATCH, None))
        return jax.sharding.explicit_axes(inside, in_sharding=specs)(logits_LBTE, token_mask_BT)


def placed(logits_LBTE, axes):
    return jax.device_put(logits_LBTE, NamedSharding(qmj.make_mesh(**axes), P()))


@functools.cache
def compiled_losses(mesh: str):
    """(logits, real) → all losses and their gradients, by the name of a mesh: compiled once for each shape."""

    @jax.jit
    def run(logits_LBTE, token_mask_BT):
        def losses(logits_LBTE):
            found = router_losses(stats_of(logits_LBTE, token_mask_BT, MESHES[mesh]))
            return jnp.stack([getattr(found, name) for name in NAMES])

        return losses(logits_LBTE), jax.jacrev(losses)(logits_LBTE)

    return run


def losses_and_gradients(logits_LBTE, token_mask_BT, mesh="one device"):
    values, gradients = jax.device_get(compiled_losses(mesh)(placed(logits_LBTE, MESHES[mesh]), token_mask_BT))
    return dict(zip(NAMES, values, strict=True)), dict(zip(NAMES, gradients, strict=True))


def reference(xp, logits_LBTE, token_mask_BT) -> dict:
    """Every loss by its formula, token by token where that is how it is meant; `xp` is NumPy or jax.numpy."""
    scores = xp.exp(logits_LBTE - xp.max(logits_LBTE, axis=-1, keepdims=True))
    probs_LBTE = scores / xp.sum(scores, axis=-1, keepdims=True)
    fixed_LBTE = np.asarray(jax.lax.stop_gradient(logits_LBTE)) if xp is np else jax.lax.stop_gradient(logits_LBTE)
    order_LBTE = xp.argsort(xp.argsort(-fixed_LBTE, axis=-1), axis=-1)
    chosen_LBTE = (order_LBTE < A) * 1.0
    token_mask_BT1 = token_mask_BT[..., None]

    def product(layers, rows):
        """sum_e f_e P_e over these layers and rows as one."""
        tokens = len(layers) * token_mask_BT[rows].sum()
        f_E = sum((chosen_LBTE[layer, rows] * token_mask_BT1[rows]).sum((0, 1)) for layer in layers) / tokens
        p_E = sum((probs_LBTE[layer, rows] * token_mask_BT1[rows]).sum((0, 1)) for layer in layers) / tokens
        return (f_E * p_E).sum()

    rows = [row for row in range(len(token_mask_BT)) if token_mask_BT[row].any()]
    layers, everything = range(len(logits_LBTE)), slice(None)
    z_LBT = xp.log(xp.sum(xp.exp(logits_LBTE), axis=-1)) ** 2
    return {
        "load_balancing": E * product(list(layers), everything),
        "global_batch": E * sum(product([layer], everything) for layer in layers) / L,
        "sequence": E / A * sum(product([layer], [row]) for layer in layers for row in rows) / L / len(rows),
        "router_z": (z_LBT * token_mask_BT).sum() / token_mask_BT.sum() / L,
    }


@pytest.fixture(scope="module", params=MESHES)
def mesh(request):
    return request.param


@pytest.fixture(scope="module")
def found(mesh):
    return losses_and_gradients(*example(), mesh)


@pytest.fixture(scope="module")
def expected_gradients():
    """Of the plain formulas, in float32."""
    logits_LBTE, token_mask_BT = example()
    return jax.jacrev(lambda logits: reference(jnp, logits, token_mask_BT))(jnp.asarray(logits_LBTE))


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_is_its_formula(name, found):
    logits_LBTE, token_mask_BT = example()
    expected = reference(np, logits_LBTE.astype(np.float64), token_mask_BT)[name]
    np.testing.assert_allclose(found[0][name], expected, rtol=SAME)
    assert found[0][name].dtype == np.float32


@pytest.mark.parametrize("name", NAMES)
def test_its_gradient_is_that_of_the_plain_formula(name, found, expected_gradients):
    _, token_mask_BT = example()
    expected_LBTE = expected_gradients[name]
    assert np.linalg.norm(expected_LBTE) > 1e-3
    assert np.linalg.norm(found[1][name] - expected_LBTE) < SAME * np.linalg.norm(expected_LBTE)
    assert not found[1][name][:, ~token_mask_BT].any(), "padding pulls at nothing"


def test_what_stands_in_the_padding_changes_nothing(mesh, found):
    logits_LBTE, token_mask_BT = example()
    logits_LBTE[:, ~token_mask_BT] = 50.0 * np.arange(E)
    values, gradients = losses_and_gradients(logits_LBTE, token_mask_BT, mesh)
    for name in NAMES:
        np.testing.assert_allclose(values[name], found[0][name], rtol=SAME)
        np.testing.assert_allclose(gradients[name], found[1][name], rtol=1e-5, atol=1e-8)


def test_a_batch_of_padding_has_losses_and_gradients_of_zero():
    logits_LBTE, token_mask_BT = example()
    values, gradients = losses_and_gradients(logits_LBTE, np.zeros_like(token_mask_BT))
    for name in NAMES:
        assert values[name] == 0 and not gradients[name].any()


def test_an_even_load_is_worth_what_the_documentation_says():
    """Three tokens that each prefer two experts of six, in turn."""
    logits_BTE = np.full((1, 3, E), 0.0, np.float32)
    for token in range(3):
        logits_BTE[0, token, [2 * token, 2 * token + 1]] = 1.0
    values, _ = losses_and_gradients(np.stack([logits_BTE, logits_BTE]), np.ones((1, 3), bool))
    np.testing.assert_allclose([values[name] for name in NAMES[:3]], [A, A, 1], rtol=SAME)


def test_pooling_lets_layers_make_up_for_each_other_and_the_global_batch_loss_does_not():
    logits_BTE = np.zeros((1, 4, E), np.float32)
    logits_BTE[..., :2] = 3.0
    opposite_BTE = np.roll(logits_BTE, 3, axis=-1)
    values, _ = losses_and_gradients(np.stack([logits_BTE, opposite_BTE]), np.ones((1, 4), bool))
    assert values["load_balancing"] < 0.6 * values["global_batch"]


def test_global_batch_losses_of_micro_steps_sum_to_that_of_the_large_batch(mesh):
    """Values and gradients; the micro-steps have different numbers of real tokens."""
    axes, rows = MESHES[mesh], 2 * B
    (first_LBTE, first_BT), (second_LBTE, second_BT) = example(1), example(2)
    logits_LBTE = np.concatenate([first_LBTE, second_LBTE], axis=1)
    token_mask_BT = np.concatenate([first_BT, second_BT])
    token_mask_BT[B:, 2:] = False
    micro_steps = [slice(start, start + B) for start in range(0, rows, B)]

    @jax.jit
    def run(logits_LBTE, token_mask_BT):
        def large(logits_LBTE):
            return global_batch_loss(stats_of(logits_LBTE, token_mask_BT, axes))

        def accumulated(logits_LBTE):
            steps = [stats_of(logits_LBTE[:, rows], token_mask_BT[rows], axes) for rows in micro_steps]
            whole = sum_stats(jax.lax.stop_gradient(steps))
            return sum(global_batch_loss(step, whole) for step in steps)

        return [jax.value_and_grad(loss)(logits_LBTE) for loss in (large, accumulated)]

    (large, of_large), (summed, of_summed) = jax.device_get(run(placed(logits_LBTE, axes), token_mask_BT))
    np.testing.assert_allclose(summed, large, rtol=SAME)
    assert np.linalg.norm(of_summed - of_large) < SAME * np.linalg.norm(of_large)
    alone = [losses_and_gradients(logits_LBTE[:, rows], token_mask_BT[rows], mesh)[0] for rows in micro_steps]
    mean = np.mean([values["global_batch"] for values in alone])
    assert mean > large * 1.001, "the mean of the micro-steps' own losses is another thing"


def test_stats_of_micro_steps_add_up_to_those_of_the_large_batch():
    logits_LBTE, token_mask_BT = example()
    run = jax.jit(lambda logits_LBTE, token_mask_BT: stats_of(logits_LBTE, token_mask_BT, {}))
    parts = [run(placed(logits_LBTE[:, rows], {}), token_mask_BT[rows]) for rows in (slice(0, 3), slice(3, B))]
    summed, whole = sum_stats(parts), run(placed(logits_LBTE, {}), token_mask_BT)
    for field in dataclasses.fields(RouterStats):
        np.testing.assert_allclose(
            getattr(summed, field.name), getattr(whole, field.name), rtol=SAME, err_msg=field.name
        )
