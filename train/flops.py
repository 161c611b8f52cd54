"""How much arithmetic a token is, and how much a chip could do: what model FLOPs utilisation (MFU) is made of.

Model FLOPs are those that the model's definition asks for: no recomputation, no one-hot einsums, no masked-out scores.
"""

from qwen_moe_jax.config import LayerKind, ModelConfig

#: Dense bfloat16 FLOP/s of one device, by how jax's `device_kind` begins; the longest beginning that fits counts.
PEAK_FLOPS = {
    # https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e: "Peak compute per chip (bf16)"
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # what jax calls v5p
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    # NVIDIA's data sheets of the A100, H100, H200 and (HGX) B200, "BFLOAT16 Tensor Core". From the H100 on they print
    # the number with sparsity, which is twice this one.
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989.4e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989.4e12,  # SXM
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
}


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of one token, forward and backward (which is twice the forward), in a causal row of `seq_len` tokens.

    A row that holds several documents attends to less, which is not taken off.
    """
    return 3 * forward_flops_per_token(config, seq_len)


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """A multiply and an add for each weight a token meets, the head's too and the embedding's not; and its attention.

    Each key that a query sees costs a product of `head_dim` numbers in every head, and its value another.
    """
    weights = 2 * config.num_active_parameters(exclude_embeddings=True)
    attention = config.attention
    per_key = 4 * attention.num_attention_heads * attention.head_dim
    keys = sum(_keys_per_query(kind, attention.sliding_window, seq_len) for kind in config.layers)
    return weights + per_key * keys


def peak_flops(device_kind: str) -> float | None:
    """What the table says of a device (`jax.devices()[0].device_kind`); None for a CPU or an unknown one."""
    fits = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(fits, key=len)] if fits else None


def _keys_per_query(kind: LayerKind, sliding_window: int | None, seq_len: int) -> float:
    """The mean over the queries of a row: query t, from 1, sees t keys, or the window."""
    window = min(sliding_window, seq_len) if kind.attention == "sliding" else seq_len
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
