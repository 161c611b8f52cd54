"""The model that is measured beside transformers: a mixture of 115M parameters, of which 27M count for a token."""

HUB_CONFIG = dict(
    model_type="qwen3_moe",
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    moe_intermediate_size=256,
    num_experts=32,
    num_experts_per_tok=4,
    norm_topk_prob=True,
    router_aux_loss_coef=0.001,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
