"""Model FLOPs of a token: of training for utilisation (MFU), and of every step for plans.

Model FLOPs are those that the model's definition asks for: no recomputation, no one-hot einsums, no masked-out scores.
"""

from qwen_moe_jax.config import LayerKind, ModelConfig

#: Tokens of a chunk of the gated delta rule.
CHUNK_SIZE = 64


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
    """FLOPs of one token, forward: a multiply and an add for each weight but the embedding's, and its mixers.

    In attention, each key that a query sees costs a product of `head_dim` numbers in every head, and its value another.
    Of linear layers, see `rule_flops_per_token`.
    """
    return extend_flops_per_token(config, 0, seq_len)


def extend_flops_per_token(config: ModelConfig, before: int, new: int) -> float:
    """FLOPs of one token, the mean over `new` tokens after `before` cached ones."""
    weights = 2 * config.num_active_parameters(exclude_embeddings=True)
    attention = config.attention
    per_key = 4 * attention.num_attention_heads * attention.head_dim
    attending = [kind for kind in config.layers if kind.mixer != "linear"]
    keys = sum(_keys_per_query(kind, attention.sliding_window, before, new) for kind in attending)
    return weights + per_key * keys + rule_flops_per_token(config, new)


def rule_flops_per_token(config: ModelConfig, new: int) -> float:
    """FLOPs of the gated delta rule of all linear layers for one token, one of `new`; 0 where there are none.

    The convolution's and the projections' are among those of the weights. With H and P the sizes of a key and of a
    value head, a value head costs, in multiply-adds a token:

    - one token at a time: 3 H P: it reads the state for its key, writes to it, and reads the result;
    - in chunks of C tokens: the same 3 H P, and C (2.5 H + 1.5 P): products of keys and of queries with all keys (2 H),
      the triangular system of two right-hand sides, of which half is zeros (H / 2 and P / 2), and what was written by
      those products (P). 82 thousand for C = 64 and H = P = 128.

    So the operations of transformers' `chunk_gated_delta_rule` are counted. `attention_kernels.delta_rule` saves some
    of them: a key's products are made once for all value heads that share it, and the state is inside the system.
    """
    linear = config.linear_attention
    if linear is None:
        return 0.0
    key_size, value_size = linear.key_head_dim, linear.value_head_dim
    multiply_adds = 3.0 * key_size * value_size
    if new > 1:
        multiply_adds += min(CHUNK_SIZE, new) * (2.5 * key_size + 1.5 * value_size)
    layers = sum(kind.mixer == "linear" for kind in config.layers)
    return 2 * layers * linear.num_value_heads * multiply_adds


def _keys_per_query(kind: LayerKind, sliding_window: int | None, before: int, new: int) -> float:
    """Mean number of keys over the new queries: the query at position t, counted from 1, sees t keys, or the window."""
    window = before + new
    if kind.mixer == "sliding" and sliding_window is not None:
        window = sliding_window
    growing = max(min(window, before + new) - before, 0)  # queries that see all there is
    return (growing * before + growing * (growing + 1) / 2 + (new - growing) * window) / new
