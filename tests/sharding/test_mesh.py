"""Meshes: what they refuse, and that eight devices say what one says."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qwen_moe_jax as qmj
from qwen_moe_jax.sharding.rules import COMPUTE_AXES, partition_spec

MOE = dict(
    model_type="qwen2_moe",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    decoder_sparse_step=2,
    initializer_range=0.3,
)
MESHES = [dict(data=2, expert=4), dict(fsdp=2, expert=2, tensor=2), dict(data=8)]
TOKENS_BT = np.random.default_rng(0).integers(0, 64, (6, 10))  # 6 rows: no mesh here divides them
SEGMENTS_BT = np.ones_like(TOKENS_BT)
SEGMENTS_BT[0, :4] = 0
SEGMENTS_BT[1, 5:] = 2
SEGMENTS_BT[2, 7:] = 0


def build(mesh=None, **execution):
    config = qmj.ModelConfig.from_pretrained(MOE)
    return qmj.CausalLM(config, rngs=nnx.Rngs(0), mesh=mesh, execution=qmj.ExecutionConfig(**execution))


def run(model):
    """((loss, logits), gradients) by one program."""

    def loss(model):
        out = model(TOKENS_BT, SEGMENTS_BT)
        logp_BTV = jax.nn.log_softmax(out.logits)
        picked_BT = jax.numpy.take_along_axis(logp_BTV, TOKENS_BT[..., None], -1)[..., 0]
        return -(picked_BT * (SEGMENTS_BT != 0)).sum() + out.router.losses.load_balancing, out.logits

    return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(model))


@pytest.fixture(scope="module")
def one_device():
    return run(build())


@pytest.mark.parametrize("dispatch", ["dense", "capacity", "dropless"])
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_any_mesh_gives_what_one_device_gives(axes, dispatch, one_device):
    (loss, logits_BTV), gradients = one_device
    model = build(qmj.make_mesh(**axes), dispatch=dispatch, eval_capacity_factor=8.0, remat="full")
    (found_loss, found), found_gradients = run(model)
    real = SEGMENTS_BT != 0
    # float32 sums in another order over devices: about 3e-7 a layer
    assert np.linalg.norm((found - logits_BTV)[real]) < 2e-6 * np.linalg.norm(logits_BTV[real])
    assert float(found_loss) == pytest.approx(float(loss), rel=2e-6)
    for ours, theirs in zip(jax.tree.leaves(found_gradients), jax.tree.leaves(gradients), strict=True):
        assert np.linalg.norm(ours - theirs) < 5e-6 * np.linalg.norm(theirs) + 1e-9


def test_no_mesh_context_is_needed_to_call_index_or_differentiate():
    """Eagerly, on several devices, with code that a user writes without thinking of meshes."""
    model = build(qmj.make_mesh(data=2, expert=4))
    logits_BTV = model(TOKENS_BT).logits
    assert np.isfinite(logits_BTV[0, -1, 3])
    gradients = jax.grad(lambda model: (model(TOKENS_BT).logits[:, -1] ** 2).mean())(model)
    assert jax.tree.structure(gradients) == jax.tree.structure(model)
    for gradient, weight in zip(jax.tree.leaves(gradients), jax.tree.leaves(model), strict=True):
        assert gradient.sharding.is_equivalent_to(weight.sharding, weight.ndim)


def test_two_models_on_two_meshes_live_side_by_side():
    small, large = build(qmj.make_mesh(expert=2)), build(qmj.make_mesh(data=2, expert=4))
    first, second = np.asarray(small(TOKENS_BT).logits), np.asarray(large(TOKENS_BT).logits)
    assert np.linalg.norm(first - second) < 2e-6 * np.linalg.norm(first)


def test_no_device_holds_a_second_copy_of_a_matrix():
    model = build(qmj.make_mesh(fsdp=2, expert=2, tensor=2))
    for param in jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Param)):
        if not {"embed", "expert"} & set(param.axes):
            continue  # norms and biases
        held = sum(shard.data.size for shard in param[...].addressable_shards)
        # Every device of a tensor group needs the whole (small) router.
        copies = 2 if "router" in param.axes else 1
        assert held == copies * param[...].size, (param.axes, param[...].sharding)


def test_description_without_weights_has_the_shardings_of_the_weights():
    mesh = qmj.make_mesh(data=2, expert=4)
    config = qmj.ModelConfig.from_pretrained(MOE)
    described = jax.tree.leaves(qmj.CausalLM(config, rngs=None, mesh=mesh))
    for description, weight in zip(described, jax.tree.leaves(build(mesh)), strict=True):
        assert (description.shape, description.dtype) == (weight.shape, weight.dtype)
        assert description.sharding == weight.sharding


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
#: Meshes as users make them: fewer axes, another order, other types.
OWN_MESHES = {
    "data, expert": ((2, 4), ("data", "expert"), (AUTO, AUTO)),
    "tensor, expert, explicit": ((2, 2), ("tensor", "expert"), (EXPLICIT, EXPLICIT)),
}


@pytest.mark.parametrize("name", OWN_MESHES)
def test_a_mesh_of_the_users_own_making_gives_what_one_device_gives(name, one_device):
    sizes, axes, types = OWN_MESHES[name]
    mesh = jax.make_mesh(sizes, axes, axis_types=types)
    model = build(mesh, dispatch="dropless")
    assert set(model.mesh.axis_names) == {"data", "fsdp", "expert", "context", "tensor"}
    assert list(model.mesh.devices.flat) == list(mesh.devices.flat)
    assert all(model.mesh.shape[axis] == size for axis, size in zip(axes, sizes, strict=True))
    (loss, logits_BTV), gradients = one_device
    (found_loss, found), found_gradients = run(model)
    real = SEGMENTS_BT != 0
    assert np.linalg.norm((found - logits_BTV)[real]) < 2e-6 * np.linalg.norm(logits_BTV[real])
    assert float(found_loss) == pytest.approx(float(loss), rel=2e-6)
    for ours, theirs in zip(jax.tree.leaves(found_gradients), jax.tree.leaves(gradients), strict=True):
        assert np.linalg.norm(ours - theirs) < 5e-6 * np.linalg.norm(theirs) + 1e-9


def test_a_mesh_with_explicit_axes_is_taken_as_well():
    mesh = jax.make_mesh((1, 1, 2, 1), ("data", "fsdp", "expert", "tensor"), axis_types=(AxisType.Explicit,) * 4)
    assert np.isfinite(build(mesh)(TOKENS_BT).logits).all()


def test_a_checkpoint_loads_onto_a_mesh_of_the_users_own_making_and_generates(tmp_path):
    mesh = jax.make_mesh((4, 2), ("expert", "data"), axis_types=(EXPLICIT, EXPLICIT))
    qmj.save_pretrained(build(), tmp_path)
    model = qmj.from_pretrained(tmp_path, mesh=mesh)
    prompts = [[3, 1, 4], [1, 5]]
    wanted, found = (
        [answer.token_ids for answer in qmj.complete(each, prompts, max_new_tokens=4)] for each in (build(), model)
    )
    assert found == wanted
    # Tokens that the user has placed on that mesh, with its types, go into the same program.
    tokens_BT = np.tile(TOKENS_BT, (4, 1))
    placed = jax.device_put(tokens_BT, NamedSharding(mesh, P(("data", "expert"))))
    np.testing.assert_array_equal(model(placed).logits, model(tokens_BT).logits)


def test_a_model_runs_inside_any_mesh_and_a_program_traced_inside_another_is_refused():
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AUTO, AUTO))
    model = build(mesh)
    expected = model(TOKENS_BT).logits
    with jax.set_mesh(model.mesh):
        np.testing.assert_array_equal(model(TOKENS_BT).logits, expected)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(np.asarray(model(TOKENS_BT).logits), expected)
        with pytest.raises(qmj.ShardingError, match=r"mesh of .*'tensor': 1.* jax.set_mesh\(model.mesh"):
            jax.jit(lambda model: model(TOKENS_BT).logits)(model)


def test_tokens_that_the_user_has_sharded_are_taken():
    mesh = qmj.make_mesh(data=2, expert=4)
    tokens_BT = np.tile(TOKENS_BT, (4, 1))
    placed = jax.device_put(tokens_BT, NamedSharding(mesh, P(("data", "fsdp", "expert"))))
    model = build(mesh)
    np.testing.assert_array_equal(model(placed).logits, model(tokens_BT).logits)


def test_too_few_devices_are_reported_with_both_numbers():
    with pytest.raises(qmj.ShardingError, match=r"data=4, expert=4 needs 16 devices, found 8 \(cpu\)"):
        qmj.make_mesh(data=4, expert=4)
    with pytest.raises(qmj.ShardingError, match="tensor=0"):
        qmj.make_mesh(tensor=0)


def test_a_mesh_with_an_unknown_axis_is_refused_with_the_known_ones():
    mesh = jax.make_mesh((2, 1), ("experts", "data"), axis_types=(AUTO, AUTO))
    message = (
        r"axes \('experts', 'data'\): 'experts' is unknown; did you mean 'expert'\? .*data, fsdp, .*context, tensor"
    )
    with pytest.raises(qmj.ShardingError, match=message):
        build(mesh)


@pytest.mark.parametrize(
    "changed, axes, message",
    [
        (dict(num_experts=6), dict(expert=4), r"num_experts=6 does not divide over the mesh axes expert=4"),
        (dict(hidden_size=36, head_dim=8), dict(expert=8), r"'embed' axis of size 36 .* fsdp=1, expert=8"),
        (dict(intermediate_size=49), dict(tensor=2), r"gate_proj.weight: its 'ffn' axis of size 49 .* tensor=2"),
        (dict(), dict(tensor=4), r"num_key_value_heads=2 does not divide over the mesh axis tensor=4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_numbers(changed, axes, message):
    config = qmj.ModelConfig.from_pretrained(MOE | changed)
    with pytest.raises(qmj.ShardingError, match=message):
        qmj.CausalLM(config, rngs=None, mesh=qmj.make_mesh(**axes))


def test_two_axes_of_one_array_on_one_mesh_axis_are_refused():
    with pytest.raises(qmj.ShardingError, match="mesh axis 'tensor' is used twice"):
        partition_spec(("vocab", "ffn"))
    with pytest.raises(qmj.ShardingError, match="unknown logical axes"):
        partition_spec(("vocabulary",))


def test_using_a_weight_never_gathers_it_over_expert_or_tensor():
    assert COMPUTE_AXES["expert"] == ("expert",)
    assert {axis for axis, place in COMPUTE_AXES.items() if place == ("tensor",)} == {"vocab", "heads", "ffn"}
