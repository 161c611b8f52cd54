"""A sparse block in a model of your own: SparseMoeBlock, its router and dispatchers, without the rest of the package.

    python examples/own_moe_block.py

A classifier that learns on which side of a wave a point lies, with eight experts spread over eight devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import qwen_moe_jax as qmj

MOE = qmj.MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)
MESH = qmj.make_mesh(data=2, expert=4)  # simulated devices where there are CPUs only


class Classifier(nnx.Module):
    """Points [B, T, 2] → logits [B, T, 2]: a linear layer, a sparse block with a residual, a linear layer."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.enter = nnx.Linear(2, width, rngs=rngs)
        make = qmj.ParameterFactory(mesh=MESH, dtype="float32", initializer_range=0.5, rngs=rngs)
        self.block = qmj.SparseMoeBlock(width, MOE, make=make)
        self.leave = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, points_BTH: jax.Array):
        hidden_BTD = jnp.tanh(self.enter(points_BTH))
        mixed_BTD, stats, _ = self.block(hidden_BTD)
        return self.leave(hidden_BTD + mixed_BTD), stats


def waves(random: np.random.Generator, rows: int = 8, length: int = 64):
    """Points [rows, length, 2], and on which side of a wave each lies."""
    points = random.uniform(-2, 2, (rows, length, 2)).astype(np.float32)
    return points, (np.sin(4 * points[..., 0]) > points[..., 1]).astype(np.int32)


def main() -> None:
    model, optimizer, random = Classifier(16, nnx.Rngs(0)), optax.adam(1e-2), np.random.default_rng(0)
    state = optimizer.init(model)

    @jax.jit
    def step(model, state, points, labels):
        def loss_fn(model):
            logits, stats = model(points)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), stats

        (loss, stats), gradients = jax.value_and_grad(loss_fn, has_aux=True)(model)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(model, updates), state, loss, stats

    for number in range(101):
        model, state, loss, stats = step(model, state, *waves(random))
        if number % 25 == 0:
            print(f"step {number:3}  loss {float(loss):.3f}  tokens per expert {stats.tokens_per_expert.tolist()}")


if __name__ == "__main__":
    main()
