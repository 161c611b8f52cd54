"""A dispatcher of your own: two functions, registered by name, under which any model runs.

    python examples/own_dispatcher.py

Each token goes to the strongest of its experts alone, as in a Switch transformer; all else is left to dropless.
"""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.moe.dispatch import dropless

HERE = Path(__file__).parent


def dispatch(hidden_BTD, routing, execution):
    """Tokens to the rows of their experts, and the plan of the way back: the choices after the first one count 0."""
    first_A = jnp.arange(routing.weights_BTA.shape[-1]) == 0  # a token's experts come strongest first
    strongest = dataclasses.replace(routing, weights_BTA=jnp.where(first_A, routing.weights_BTA, 0))
    return dropless.dispatch(hidden_BTD, strongest, execution)


qmj.register_dispatcher("strongest", SimpleNamespace(dispatch=dispatch, combine=dropless.combine))


def main() -> None:
    config = qmj.ModelConfig.from_pretrained(HERE / "tiny_model.json")
    tokens = jnp.asarray([list(b"def add(a, b): return a + b")])
    logits = {}
    for name in ("dense", "dropless", "strongest"):
        model = qmj.CausalLM(config, rngs=nnx.Rngs(0), execution=qmj.ExecutionConfig(dispatch=name))
        logits[name] = model(tokens).logits
        distance = float(jnp.abs(logits[name] - logits["dense"]).max())
        print(f"{name:>10}: logits differ from dense by {distance:.1e}")
    same = (logits["strongest"].argmax(-1) == logits["dense"].argmax(-1)).mean()
    print(
        f"with one expert a token instead of {config.moe.num_experts_per_tok}, {same:.0%} of next tokens are the same"
    )


if __name__ == "__main__":
    main()
