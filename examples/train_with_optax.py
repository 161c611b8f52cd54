"""A training loop of your own: a mesh of eight devices, optax, the load-balancing loss, an export for transformers.

    python examples/train_with_optax.py

A byte-level mixture of experts learns this file by heart, then continues its first line.
"""

import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

import qwen_moe_jax as qmj

HERE = Path(__file__).parent
BATCH, LENGTH, STEPS = 8, 64, 60


def batches(text: bytes, seed: int):
    """Endless (tokens, targets), int32 [BATCH, LENGTH], cut anywhere in the text."""
    data, random = np.frombuffer(text, np.uint8).astype(np.int32), np.random.default_rng(seed)
    while True:
        starts = random.integers(0, len(data) - LENGTH, BATCH)
        rows = np.stack([data[start : start + LENGTH + 1] for start in starts])
        yield rows[:, :-1], rows[:, 1:]


def main() -> None:
    mesh = qmj.make_mesh(data=2, expert=4)  # simulated devices where there are CPUs only
    config = qmj.ModelConfig.from_pretrained(HERE / "tiny_model.json")
    model = qmj.CausalLM(config, rngs=nnx.Rngs(0), mesh=mesh)
    model.train()
    print(f"{config.num_parameters():,} parameters, {config.num_active_parameters():,} active, on {dict(mesh.shape)}")

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, STEPS)))
    state = optimizer.init(model)  # a model is a pytree: its moments are sharded as its parameters are

    def loss_fn(model, tokens, targets):
        out = model.token_losses(tokens, targets)
        loss = out.losses.mean()
        return loss + config.moe.router_aux_loss_coef * out.router.losses.load_balancing, (loss, out.router.stats)

    @jax.jit(donate_argnums=(0, 1))
    def step(model, state, tokens, targets):
        gradients, (loss, stats) = jax.grad(loss_fn, has_aux=True)(model, tokens, targets)
        updates, state = optimizer.update(gradients, state, model)
        return optax.apply_updates(model, updates), state, loss, stats

    data = batches(Path(__file__).read_bytes(), seed=0)
    for number in range(STEPS + 1):
        model, state, loss, stats = step(model, state, *next(data))
        if number % 20 == 0:
            counts_LE = np.asarray(stats.tokens_per_expert)
            busiest = (counts_LE.max(1) / counts_LE.mean(1)).max()
            print(f"step {number:3}  loss {float(loss):.3f}  busiest expert {busiest:.1f} times the mean load")

    model.eval()
    prompt = b'"""A training loop of your'
    [continuation] = qmj.generate(model, [list(prompt)], max_new_tokens=40)
    print((prompt + bytes(continuation)).decode(errors="replace"))
    with tempfile.TemporaryDirectory() as folder:
        qmj.save_pretrained(model, Path(folder) / "export")
        print("written for transformers:", sorted(path.name for path in (Path(folder) / "export").iterdir()))


if __name__ == "__main__":
    main()
