"""Compile time of a training step at 2 and at 32 layers, interleaved: `python benchmarks/compile_depth.py`.

Layers of a kind are scanned, so depth should cost nothing. Prints the medians and their ratio.
"""

import statistics
import time

import jax
import numpy as np

import qwen_moe_jax as qmj

DEPTHS, ROUNDS = (2, 32), 5


def compile_seconds(layers: int) -> float:
    """Seconds from a traced step to a compiled one, tracing included."""
    hub = dict(
        model_type="qwen3_moe",
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
    )
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(hub), rngs=None)  # described, not allocated
    model.train()
    tokens_BT = jax.ShapeDtypeStruct((4, 128), np.int32)
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(jax.grad(lambda model, tokens_BT: model(tokens_BT).logits.mean())).lower(model, tokens_BT).compile()
    return time.perf_counter() - start


def main() -> None:
    """Prints the table."""
    seconds = {depth: [] for depth in DEPTHS}
    for _ in range(ROUNDS):
        for depth in DEPTHS:
            seconds[depth].append(compile_seconds(depth))
    medians = {depth: statistics.median(times) for depth, times in seconds.items()}
    for depth, median in medians.items():
        print(f"{depth:3d} layers: {median:.2f} s (median of {ROUNDS})")
    print(f"ratio: {medians[DEPTHS[1]] / medians[DEPTHS[0]]:.2f}")


if __name__ == "__main__":
    main()
