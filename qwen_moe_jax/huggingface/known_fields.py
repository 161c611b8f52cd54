"""Keys of config.json that are known: read, without effect, or neutral at one value."""

from typing import Any

#: Read by `config_from_hub`, the families or `open_checkpoint`.
CONFIG_READ = set(
    "architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim hidden_act max_position_embeddings initializer_range rms_norm_eps "
    "tie_word_embeddings attention_dropout attention_bias qkv_bias bos_token_id eos_token_id pad_token_id dtype "
    "torch_dtype rope_theta rope_scaling rope_parameters original_max_position_embeddings partial_rotary_factor "
    "sliding_window use_sliding_window max_window_layers layer_types num_experts num_local_experts "
    "num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size norm_topk_prob decoder_sparse_step "
    "mlp_only_layers router_aux_loss_coef router_jitter_noise id2label num_labels quantization_config "
    "full_attention_interval linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim "
    "linear_conv_kernel_dim mtp_num_hidden_layers qwen_moe_jax_balancing_bias".split()
)
#: Without effect on the model's numbers.
CONFIG_WITHOUT_EFFECT = set(
    "_name_or_path name_or_path transformers_version _commit_hash label2id use_cache return_dict output_hidden_states "
    "output_attentions output_router_logits task_specific_params problem_type finetuning_task tokenizer_class prefix "
    "_attn_implementation attn_implementation _attn_implementation_autoset _experts_implementation torchscript "
    "is_decoder chunk_size_feed_forward unsloth_version unsloth_fixed model_name license tags library_name "
    "pretraining_tp sep_token_id decoder_start_token_id "
    # The dtype of the files is that of A_log and the gated norm; the state is float32.
    "mamba_ssm_dtype".split()
)
#: Of these families, transformers' classes have no such part, whatever the field says.
CONFIG_NEUTRAL = {
    "use_mrope": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "attn_output_gate": True,
    "mtp_use_dedicated_embeddings": False,
}
#: Fields that transformers 5.23 has in other families, and whose names are nearly those of fields that are read.
#: num_experts_per_token is not among them: it means the same as num_experts_per_tok, whose default would be used.
CONFIG_OF_OTHER_FAMILIES = set(
    "architecture attention_heads attention_out_bias boa_token_id boi_token_id conf_attention_chunk_size "
    "conf_num_attention_heads conf_num_hidden_layers cross_num_attention_heads cross_num_key_value_heads "
    "decoder_intermediate_size dense_intermediate_size encoder_sparse_step eoa_token_id eod_token_id eoi_token_id "
    "hidden_sizes intermediate_size_mlp layer_type left_max_position_embeddings linear_head_dim linear_num_heads "
    "max_2d_position_embeddings mit_intermediate_size mit_num_attention_heads mit_num_hidden_layers "
    "moe_shared_expert_intermediate_size num_cross_attention_heads num_position_embeddings num_qa_labels "
    "num_self_attention_heads pred_num_attention_heads pred_num_hidden_layers pred_token_id qv_bias "
    "right_max_position_embeddings router_z_loss_coef shared_experts_intermediate_size shared_intermediate_size "
    "sliding_windows swa_num_attention_heads swa_num_key_value_heads t2u_max_position_embeddings use_attention_bias "
    "v_head_dim".split()
)

#: Other names of transformers' for functions that `hidden_act` may be.
_ACTIVATION_ALIASES = {"swish": "silu", "gelu_python": "gelu", "gelu_python_tanh": "gelu_pytorch_tanh"}


def activation_name(found: Any) -> Any:
    """The name that this package has for an activation of transformers, where it has one."""
    return _ACTIVATION_ALIASES.get(found, found)
