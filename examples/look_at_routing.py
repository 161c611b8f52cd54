"""Look at routing: which experts each token chose, how even the load is, what capacity would drop.

python examples/look_at_routing.py
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

import qwen_moe_jax as qmj

HERE = Path(__file__).parent
TEXT = b"def fibonacci(n):"


def main() -> None:
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(HERE / "tiny_model.json"), rngs=nnx.Rngs(0))
    tokens = jnp.asarray([list(TEXT)])
    router = model(tokens, output_router_logits=True).router

    print("layer 0, a row for each token: the weight of every expert in percent")
    experts, weights = np.asarray(router.trace.experts[0, 0]), np.asarray(router.trace.weights[0, 0])
    num_experts = model.config.moe.num_experts
    print("     " + "".join(f"{expert:>5}" for expert in range(num_experts)))
    for byte, chosen, weight in zip(TEXT, experts, weights, strict=True):
        shares = dict(zip(chosen.tolist(), weight.tolist(), strict=True))
        cells = (f"{100 * shares[expert]:5.0f}" if expert in shares else "    ·" for expert in range(num_experts))
        print(f"{chr(byte)!r:>5}" + "".join(cells))

    for layer, counts in enumerate(np.asarray(router.stats.tokens_per_expert)):  # one row for each sparse layer
        busiest = counts.max() / counts.mean()
        print(f"layer {layer}: tokens per expert {counts.tolist()}, the busiest has {busiest:.2f} times the mean")
    losses = router.losses
    print(f"load balancing loss {losses.load_balancing:.3f}, router z-loss {losses.router_z:.3f}")

    print("what full experts would drop, by capacity factor:")
    for factor in (0.5, 1.0, 2.0):
        model.execution = dataclasses.replace(
            model.execution, dispatch="capacity", eval_capacity_factor=factor, min_capacity=1, group_size=len(TEXT)
        )
        dropped = np.asarray(model(tokens, output_router_logits=True).router.trace.dropped)
        print(f"   factor {factor}: {dropped.sum()} of {dropped.size} assignments")


if __name__ == "__main__":
    main()
