"""The gradient of every parameter of a hybrid is that of the same model whose delta rule is the float64 recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.model.linear_attention import GatedDeltaNet
from qwen_moe_jax.nn.parameters import parameters_with_paths
from tests.attention_kernels.test_delta_rule import differentiable
from tests.distance import relative_l2
from tests.model.hybrid_configs import hybrid_config

# Chunks against tokens, in a model that is float32 otherwise: 5e-6 was found, 1.7e-5 with norms of more spread. Decay
# that is wrong by a factor of 1 + 1e-3 comes to 3e-4 and more.
TOLERANCE = 1e-4
#: Rows of 100 tokens, two chunks: two documents each, padding in front of, between and after them.
IDS_BT = np.repeat([[0, 1, 2, 0], [4, 0, 3, 0]], [9, 31, 47, 13], axis=1).astype(np.int32)
TOKENS_BT = np.random.default_rng(0).integers(0, 98, IDS_BT.shape).astype(np.int32)


def test_every_gradient_is_that_of_the_recurrence_in_float64():
    """Three linear layers to a full one, experts in all, as in Qwen3-Next and Qwen3.5; three value heads a key head."""
    model = random_model()
    found = gradients_of(model)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, GatedDeltaNet):
            module.__class__ = ByTokens  # another tree: JAX does not use what it traced of the first
    expected = gradients_of(model)
    assert all(np.any(values) for values in expected.values())
    distances = {path: relative_l2(found[path], expected[path]) for path in expected}
    assert max(distances.values()) > 0, "the same rule twice"
    far = {path: distance for path, distance in distances.items() if not distance <= TOLERANCE}
    assert not far, far


def random_model() -> qmj.CausalLM:
    """Drawn by NumPy: nothing is compiled for it."""
    config = hybrid_config("lllf", linear=dict(num_value_heads=6))
    model = qmj.CausalLM(config, rngs=None, execution=qmj.ExecutionConfig(dispatch="dense"))
    numbers = np.random.default_rng(1)
    for path, param in parameters_with_paths(model):
        abstract, mean = param.get_value(), float(path.endswith(("linear_attn.norm.weight", "dt_bias")))
        value = numbers.normal(mean, config.initializer_range, abstract.shape)
        if path.endswith("A_log"):
            value = np.log(numbers.uniform(0.01, 16, abstract.shape))
        param.set_value(jax.device_put(value.astype(abstract.dtype), abstract.sharding))
    return model


def gradients_of(model: qmj.CausalLM) -> dict[str, np.ndarray]:
    """Of the sum of losses of tokens whose target is of their document, by path."""
    counted_BT = (IDS_BT[:, :-1] == IDS_BT[:, 1:]) & (IDS_BT[:, 1:] != 0)

    def loss(model):
        losses_BT = model.token_losses(TOKENS_BT[:, :-1], TOKENS_BT[:, 1:], IDS_BT[:, :-1]).losses
        return jnp.sum(losses_BT * counted_BT)

    found = jax.jit(jax.grad(loss))(model)
    return {path: np.asarray(param.get_value()) for path, param in parameters_with_paths(found)}


class ByTokens(GatedDeltaNet):
    """The layer with the recurrence in float64 as its rule."""

    def _rule(self, execution):
        return lambda *inputs: by_tokens(*inputs[:6])


@jax.custom_vjp
def by_tokens(q, k, v, g, beta, ids):
    """Results and final state from a zero state. They and the gradients are rounded once, to float32."""
    return in_float64(q, k, v, g, beta, ids)


def in_float64(*inputs, of_results=None):
    """The results, or the gradients of the inputs where those of the results are given.

    x64 is enabled for the rule alone, in both passes: the model's float32 loops cannot be traced with it.
    """
    *numbers, ids = inputs
    with jax.enable_x64():
        wide, of_results = jax.tree.map(lambda x: x.astype(jnp.float64), (numbers, of_results))
        k, v = wide[1:3]
        state = jnp.zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), jnp.float64)
        found, pull = jax.vjp(lambda *wide: differentiable(*wide, ids, state), *wide)
        found = found if of_results is None else pull(of_results)
        assert all(x.dtype == jnp.float64 for x in found)
        return tuple(x.astype(jnp.float32) for x in found)


by_tokens.defvjp(
    lambda *inputs: (in_float64(*inputs), inputs),
    lambda inputs, of_results: (*in_float64(*inputs, of_results=of_results), None),
)
