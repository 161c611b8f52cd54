"""The gradient of a norm's weight in bfloat16, on a single CPU."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import use_abstract_mesh

import qwen_moe_jax as qmj
from qwen_moe_jax.nn.norm import RMSNorm


def test_the_gradient_of_a_norms_weight_is_summed_in_float32():
    mesh = qmj.make_mesh(devices=jax.devices()[:1])
    make = qmj.ParameterFactory(mesh=mesh, dtype="float32", initializer_range=0.3, rngs=nnx.Rngs(0))
    norm = RMSNorm("norm", 48, 1e-6, make)
    numbers = np.random.default_rng(0)
    x_RD, of_y_RD = (jnp.asarray(numbers.uniform(0.5, 1, (2048, 48)), jnp.bfloat16) for _ in range(2))

    @jax.jit
    def gradients(norm, x_RD, of_y_RD):
        with use_abstract_mesh(mesh.abstract_mesh):
            return jax.vjp(lambda norm, x_RD: norm(x_RD), norm, x_RD)[1](of_y_RD)

    of_norm, of_x_RD = gradients(norm, x_RD, of_y_RD)
    wide = np.asarray(x_RD, np.float64)
    quotient = wide / np.sqrt(np.mean(np.square(wide), axis=1, keepdims=True))
    expected_D = np.sum(np.asarray(of_y_RD, np.float64) * quotient, axis=0)
    np.testing.assert_allclose(of_norm.weight[...], expected_D, rtol=1e-3)  # summed in bfloat16, it is 1 % off
    assert of_x_RD.dtype == jnp.bfloat16 and of_norm.weight.dtype == jnp.float32
