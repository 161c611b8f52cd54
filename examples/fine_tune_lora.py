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


def is_adapter(path: tuple, value: object) -> bool:
    """A filter of Flax: the two matrices of every adapter."""
    return path[-1] in ("lora_A", "lora_B")


def main() -> None:
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(HERE / "tiny_model.json"), rngs=nnx.Rngs(0))
    config = qmj.LoraConfig(r=8, lora_alpha=32, target_modules=("q_proj", "v_proj", "o_proj", "experts"))
    qmj.add_lora(model, config, rngs=nnx.Rngs(1))  # without effect until trained: B is zero
    graphdef, adapters, weights = nnx.split(model, is_adapter, ...)
    count = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    print(f"{count:,} parameters of adapters in addition to {model.config.num_parameters():,} that stay fixed")

    row = jnp.asarray([list(SENTENCE)])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, STEPS)))
    state = optimizer.init(adapters)

    @jax.jit
    def step(adapters, state):
        def loss_fn(adapters):
            return nnx.merge(graphdef, adapters, weights).token_losses(row[:, :-1], row[:, 1:]).losses.mean()

        loss, gradients = jax.value_and_grad(loss_fn)(adapters)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(adapters, updates), state, loss

    for number in range(STEPS + 1):
        adapters, state, loss = step(adapters, state)
        if number % 20 == 0:
            print(f"step {number:2}  loss {float(loss):.3f}")
    nnx.update(model, adapters)

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
