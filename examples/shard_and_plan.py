"""Shard and plan: one model on one device and on eight, what each device stores, and what decoding would send.

python examples/shard_and_plan.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.main import main as command

HERE = Path(__file__).parent


def main() -> None:
    mesh = qmj.make_mesh(fsdp=2, expert=4)  # simulated devices where there are CPUs only
    config = qmj.ModelConfig.from_pretrained(HERE / "tiny_model.json")
    sharded = qmj.CausalLM(config, rngs=nnx.Rngs(0), mesh=mesh)  # drawn in place, never whole on one device
    single = qmj.CausalLM(config, rngs=nnx.Rngs(0))

    print("how some weights are stored, [layers, …]:")
    for path, parameter in nnx.to_flat_state(nnx.state(sharded, nnx.Param)):
        name = ".".join(map(str, path))
        if name.endswith(("embed_tokens.weight", "q_proj.weight", "gate_proj", "mlp.gate.weight")):
            value = parameter.get_value()
            print(f"   {name:44} {value.shape!s:16} {value.sharding.spec}")
    for rules in ("expert+fsdp", "expert+tensor"):
        model = qmj.CausalLM(config, rngs=None, mesh=mesh, execution=qmj.ExecutionConfig(sharding=rules))
        leaves = jax.tree.leaves(model)  # abstract: shapes and shardings, not a byte of weights
        stored = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        print(f"   under {rules}, a device stores {int(stored):,} bytes")

    tokens = jnp.arange(64).reshape(4, 16)
    distance = np.abs(np.asarray(sharded(tokens).logits) - np.asarray(single(tokens).logits)).max()
    print(f"logits on eight devices and on one differ by {distance:.1e} at most\n")

    print("the program that decodes a token, compiled for eight devices:")
    words = ["--for", "decode", "--batch", "8", "--context", "256", "--mesh", "fsdp=2,expert=4", "--target", "cpu:8"]
    command(["plan", str(HERE / "tiny_model.json"), *words])


if __name__ == "__main__":
    main()
