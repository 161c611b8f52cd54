"""Model FLOPs of a token: of training for utilisation (MFU), and of every step for plans.

Model FLOPs are those that the model's definition asks for: no recomputation, no one-hot einsums, no masked-out scores.
"""

from qwen_moe_jax.config import LayerKind, ModelConfig


def training_flops_per_token(config: ModelConfig, seq_len: int, trained_share: float = 1.0) -> float:
    """FLOPs of one token, forward and backward (twice the forward), in a causal row of `seq_len` tokens.

    A row that holds several documents attends to less, which is not taken off.

    Args:
        config: of the model.
        seq_len: of a row.
        trained_share: of the parameters, 0 to 1. A frozen weight has no gradient of its own: that half of
            the backward pass falls away. What LoRA adapters compute is not counted.
    """
    weight_gradients = 2 * config.num_active_parameters(exclude_embeddings=True)
    return 3 * forward_flops_per_token(config, seq_len) - (1 - trained_share) * weight_gradients


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of one token, forward: a multiply and an add for each weight but the embedding's, and its attention.

    Each key that a query sees costs a product of `head_dim` numbers in every head, and its value another.
    """
    return extend_flops_per_token(config, 0, seq_len)


def extend_flops_per_token(config: ModelConfig, before: int, new: int) -> float:
    """FLOPs of one token, the mean over `new` tokens after `before` cached ones."""
    weights = 2 * config.num_active_parameters(exclude_embeddings=True)
    attention = config.attention
    per_key = 4 * attention.num_attention_heads * attention.head_dim
    keys = sum(_keys_per_query(kind, attention.sliding_window, before, new) for kind in config.layers)
    return weights + per_key * keys


def _keys_per_query(kind: LayerKind, sliding_window: int | None, before: int, new: int) -> float:
    """Mean number of keys over the new queries: the query at position t, counted from 1, sees t keys, or the window."""
    window = before + new
    if kind.mixer == "sliding" and sliding_window is not None:
        window = sliding_window
    growing = max(min(window, before + new) - before, 0)  # queries that see all there is
    return (growing * before + growing * (growing + 1) / 2 + (new - growing) * window) / new
