"""Fine-tune with LoRA: low-rank adapters on attention and on every expert, trained by optax; the weights stay fixed.

python examples/fine_tune_lora.py
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import qwen_moe_jax as qmj

HERE = Path(__file__).parent
STEPS = 60
SENTENCE = b"A mixture of experts sends every token to a few of its experts."


def loss_fn(model: qmj.CausalLM, row: jax.Array) -> jax.Array:
    return model.token_losses(row[:, :-1], row[:, 1:]).losses.mean()


@nnx.jit
def step(model: qmj.CausalLM, optimizer: nnx.Optimizer, row: jax.Array) -> jax.Array:
    """Changes the adapters only: gradients and moments of anything else do not exist."""
    loss, gradients = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, row)
    optimizer.update(model, gradients)
    return loss


def main() -> None:
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(HERE / "tiny_model.json"), rngs=nnx.Rngs(0))
    config = qmj.LoraConfig(r=8, lora_alpha=32, target_modules=("q_proj", "v_proj", "o_proj", "experts"))
    qmj.add_lora(model, config, rngs=nnx.Rngs(1))  # without effect until trained: B is zero
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    print(f"{count:,} parameters of adapters in addition to {model.config.num_parameters():,} that stay fixed")

    row = jnp.asarray([list(SENTENCE)])
    schedule = optax.cosine_decay_schedule(1e-2, STEPS)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    for number in range(STEPS + 1):
        loss = step(model, optimizer, row)
        if number % 20 == 0:
            print(f"step {number:2}  loss {float(loss):.3f}")

    with tempfile.TemporaryDirectory() as folder:
        qmj.save_adapter(model, Path(folder) / "adapter")  # PEFT's layout
        size = sum(path.stat().st_size for path in (Path(folder) / "adapter").iterdir())
        print(f"the adapter on disk: {size:,} bytes")

    prompt = SENTENCE[:12]
    before = qmj.generate(model, [list(prompt)], max_new_tokens=len(SENTENCE) - 12)
    qmj.merge_lora(model)  # in float32, rounded once
    after = qmj.generate(model, [list(prompt)], max_new_tokens=len(SENTENCE) - 12)
    print((prompt + bytes(after[0])).decode(errors="replace"))
    print("merged, the model continues", "the same way" if before == after else "differently")


if __name__ == "__main__":
    main()
