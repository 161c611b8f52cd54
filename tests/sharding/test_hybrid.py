"""Hybrids on a mesh: eight devices say what one says, and heads of linear layers exchange nothing between devices."""

import jax
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.model.causal_lm import CausalLM
from tests.distance import relative_l2
from tests.model.hybrid_configs import hybrid_config, hybrid_model
from tests.sharding.test_collectives import collectives
from tests.sharding.test_rules import CROSSWISE
from tests.subject import on_mesh

MESHES = [dict(data=2, expert=4), dict(expert=4, tensor=2), dict(fsdp=2, expert=4)]
ROWS, LENGTH = 6, 70  # six rows, which no mesh here divides, of two chunks
TOKENS_BT = np.random.default_rng(0).integers(0, 98, (ROWS, LENGTH))
SEGMENTS_BT = np.ones_like(TOKENS_BT)
SEGMENTS_BT[0, :20] = 0
SEGMENTS_BT[1, 35:] = 2
SEGMENTS_BT[2, 60:] = 0


def run(model):
    """((loss, logits), gradients) by one program."""

    def loss(model):
        out = model(TOKENS_BT, SEGMENTS_BT)
        picked_BT = jax.numpy.take_along_axis(jax.nn.log_softmax(out.logits), TOKENS_BT[..., None], -1)[..., 0]
        return -(picked_BT * (SEGMENTS_BT != 0)).mean() + out.router.losses.load_balancing, out.logits

    return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(model))


@pytest.fixture(scope="module")
def one_device():
    model = hybrid_model(hybrid_config("lf"), execution=qmj.ExecutionConfig(dispatch="dropless"))
    return model, run(model)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_any_mesh_gives_logits_and_gradients_of_one_device(axes, one_device):
    model, ((loss, logits_BTV), gradients) = one_device
    (found_loss, found_BTV), found_gradients = run(on_mesh(model, qmj.make_mesh(**axes)))
    real_BT = SEGMENTS_BT != 0
    # float32 sums in another order over devices: about 3e-7 a layer
    assert np.linalg.norm((found_BTV - logits_BTV)[real_BT]) < 2e-6 * np.linalg.norm(logits_BTV[real_BT])
    assert float(found_loss) == pytest.approx(float(loss), rel=2e-6)
    for ours, theirs in zip(jax.tree.leaves(found_gradients), jax.tree.leaves(gradients), strict=True):
        assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs) + 1e-9


def test_heads_that_are_stored_over_more_axes_are_gathered_and_change_no_number():
    """Rows of projections, channels of the convolution, rates and time steps, over tensor and fsdp."""
    model, mesh = hybrid_model(hybrid_config("L", vocab_size=100)), qmj.make_mesh(fsdp=2, expert=2, tensor=2)
    crosswise = qmj.ExecutionConfig(sharding=CROSSWISE, dtype="float32")
    found_BTV = on_mesh(model, mesh, crosswise)(TOKENS_BT, SEGMENTS_BT).logits
    assert relative_l2(found_BTV, model(TOKENS_BT, SEGMENTS_BT).logits) < 2e-6


def program(axes: dict[str, int], *, gradient: bool):
    """The collectives of a stack of dense linear layers, compiled for a mesh."""
    model = CausalLM(hybrid_config("LLL"), rngs=None, mesh=qmj.make_mesh(**axes))

    def loss(model, tokens_BT):
        return model(tokens_BT).logits.mean()

    tokens_BT = jax.ShapeDtypeStruct((8, LENGTH), np.int32)
    return collectives(jax.jit(jax.grad(loss) if gradient else loss).lower(model, tokens_BT).compile())


@pytest.mark.parametrize("gradient, sums", [(False, 2), (True, 8)], ids=["forward", "both"])
def test_over_tensor_a_linear_layer_only_sums_hidden_states(gradient, sums):
    """Forward the results of mixer and MLP; backward what each of their 4 + 2 projections gives its input.

    XLA for TPUs adds up what the projections of a mixer or an MLP give before it exchanges it: 2 and 4 sums (v5p).
    What is less than a layer's hidden states are gradients of weights that all heads share.
    """
    hidden = 8 * LENGTH * 32 * 4
    found = program(dict(tensor=2), gradient=gradient).in_loops
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert 0 <= sum(size for _, size in found) - sums * hidden < 0.02 * hidden, found


def test_over_rows_a_linear_layer_exchanges_nothing_forward():
    assert not program(dict(data=8), gradient=False).in_loops


@pytest.mark.parametrize("layers, named", [("L", "linear_num_key_heads=2"), ("F", "num_key_value_heads=2")])
def test_heads_that_do_not_divide_are_refused_by_the_name_of_their_field(layers, named):
    with pytest.raises(qmj.ShardingError, match=f"{named} does not divide over the mesh axis tensor=4.*divides 2"):
        CausalLM(hybrid_config(layers), rngs=None, mesh=qmj.make_mesh(tensor=4))
