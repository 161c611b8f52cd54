"""Muon and Adafactor on stacked matrices: optax's results for each of them, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.plan.collectives import collectives_of
from qwen_moe_jax.plan.hlo import Module
from qwen_moe_jax.sharding.mesh import make_mesh
from train.config import OptimizerConfig
from train.optimizer import make_optimizer, make_schedule
from train.step import abstract_state, initial_state, state_shardings

#: Shapes, axes that matrices are stacked along, and how a mesh shards them. Adafactor factors what is 128 or wider.
PARAMS = {
    "experts.gate_proj": ((2, 4, 128, 130), 2, P(None, "expert", None, "fsdp")),
    "q_proj.weight": ((2, 24, 16), 1, P(None, None, ("fsdp", "expert"))),
    "fc.weight": ((24, 16), 0, P("fsdp")),
    "embed_tokens.weight": ((32, 16), 0, P(("fsdp", "expert"))),
    "norm.weight": ((2, 16), 1, P()),
}
AXES = {path: axes for path, (_, axes, _) in PARAMS.items()}
STEPS = 20


def tree(value):
    """As the model's parameters: nested by the parts of a path."""
    found = {}
    for path in PARAMS:
        module, name = path.split(".")
        found.setdefault(module, {})[name] = value(path)
    return found


def drawn(numbers):
    return tree(lambda path: numbers.normal(size=PARAMS[path][0]).astype(np.float32))


def settings(kind: str) -> OptimizerConfig:
    return OptimizerConfig(type=kind, learning_rate=0.02, warmup_steps=0, weight_decay=0.1, max_grad_norm=1e9)


def trained(kind: str, mesh=None):
    """Parameters and optimizer state after some steps, and the compiled update."""
    numbers = np.random.default_rng(0)
    optimizer, params = make_optimizer(settings(kind), STEPS, AXES), drawn(numbers)
    if mesh is None:
        state = optimizer.init(params)
    else:
        params = jax.device_put(params, tree(lambda path: NamedSharding(mesh, PARAMS[path][2])))
        state = initial_state(params, optimizer, state_shardings(params, optimizer, mesh)).optimizer
    shardings = None if mesh is None else jax.tree.map(lambda x: x.sharding, (params, state))

    @functools.partial(jax.jit, out_shardings=shardings)
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    gradients = [jax.tree.map(lambda x, p: jax.device_put(x, p.sharding) if mesh else x, drawn(numbers), params)] * 3
    compiled = step.lower(params, state, gradients[0]).compile()
    for turn in range(STEPS):
        params, state = compiled(params, state, gradients[turn % 3])
    return params, state, compiled


@pytest.fixture(scope="module", params=["muon", "adafactor"])
def alone(request):
    return request.param, *trained(request.param)


def test_every_matrix_is_updated_as_optax_updates_it_by_itself(alone):
    kind, found, _, _ = alone
    config = settings(kind)
    schedule = make_schedule(config, STEPS)
    numbers = np.random.default_rng(0)
    params, gradients = drawn(numbers), drawn(numbers)

    def optimizer(path):
        if kind == "adafactor":
            decay = optax.add_decayed_weights(0.0 if "norm" in path else 0.1)
            parts = optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), decay
            return optax.chain(*parts, optax.scale_by_learning_rate(schedule))
        if "embed" in path or "norm" in path:
            return optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.0 if "norm" in path else 0.1)
        return optax.contrib.muon(schedule, beta=0.9, weight_decay=0.1, consistent_rms=0.2)

    for path, axes in AXES.items():
        module, name = path.split(".")
        one = optimizer(path)

        @jax.jit
        def run(param, gradient, one=one):
            def step(_, carry):
                updates, state = one.update(gradient, carry[1], carry[0])
                return optax.apply_updates(carry[0], updates), state

            return jax.lax.fori_loop(0, STEPS, step, (param, one.init(param)))[0]

        for index in np.ndindex(*PARAMS[path][0][:axes]):
            expected = run(*(jnp.asarray(x[module][name][index]) for x in (params, gradients)))
            np.testing.assert_allclose(found[module][name][index], expected, rtol=2e-4, atol=2e-4, err_msg=path)


def test_eight_devices_update_as_one_and_experts_stay_where_they_are(alone):
    kind, expected, _, _ = alone
    mesh = make_mesh(fsdp=2, expert=4)
    params, state, compiled = trained(kind, mesh)
    for path, found in jax.tree_util.tree_leaves_with_path(params):
        right = functools.reduce(lambda tree, key: tree[key.key], path, expected)
        np.testing.assert_allclose(found, right, rtol=2e-4, atol=2e-4, err_msg=str(path))
        assert found.sharding.spec == PARAMS[jax.tree_util.keystr(path, simple=True, separator=".")][2]
    moments = [x for x in jax.tree.leaves(state) if x.ndim > 2 and x.shape[1] == 4 and x.shape[-1] >= 128]
    assert moments and all(x.sharding.spec[1] == "expert" for x in moments), "moments are sharded as their parameters"
    sent = collectives_of(Module(compiled.as_text()), mesh.shape, "cpu")
    large = [one for one in sent if "expert" in one.axes and one.shape[-2:] in ((128, 130), (128, 65), (130, 128))]
    assert not large, "no expert's matrix goes to another device of the expert axis"


def test_the_state_is_abstract_before_it_is_allocated(alone):
    """What a checkpoint is restored into has the shapes and shardings of the state itself."""
    kind = alone[0]
    mesh = make_mesh(fsdp=2, expert=4)
    optimizer = make_optimizer(settings(kind), STEPS, AXES)
    params = tree(
        lambda path: jax.ShapeDtypeStruct(PARAMS[path][0], jnp.float32, sharding=NamedSharding(mesh, PARAMS[path][2]))
    )
    abstract = abstract_state(params, optimizer, state_shardings(params, optimizer, mesh)).optimizer
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(alone[2])]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == shapes
