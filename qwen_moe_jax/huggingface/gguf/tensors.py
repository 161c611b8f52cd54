"""The tensors of a GGUF file, from those of a checkpoint: llama.cpp's names, experts stacked, vectors in float32."""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.huggingface.gguf.linear_layers import hybrid_tensors
from qwen_moe_jax.huggingface.sparse_families import MATRICES, FeedForward
from qwen_moe_jax.storage.picked import Picked
from qwen_moe_jax.storage.tensor import CastTensor, Index, StackedTensor, StoredTensor, TensorView

#: Name in GGUF by the name behind the layer's number.
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_ba.weight": "ssm_ba.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
}
#: Parts of names of tensors that llama.cpp wants in float32, in addition to vectors.
_FLOAT32 = ("ffn_gate_inp", "ssm_conv1d")
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.")


def gguf_tensors(
    tensors: Mapping[str, StoredTensor], config: ModelConfig, dtype: str, *, interleaved: bool
) -> dict[str, StoredTensor]:
    """The tensors of the file by name.

    Args:
        tensors: of the checkpoint, by the names of `hub_parameters`.
        config: of the model.
        dtype: of the matrices; vectors and routers are float32, as llama.cpp has them.
        interleaved: the rope of the architecture turns neighbouring rows of queries and keys, and not halves of a head.
    """
    found: dict[str, StoredTensor] = {}
    names = _LAYER
    if config.linear_attention is not None:
        tensors = hybrid_tensors(tensors, config)
        names = _LAYER | {"post_attention_layernorm.weight": "post_attention_norm.weight"}
    for name, tensor in tensors.items():
        expert = _EXPERT.match(name)
        if expert is not None:
            if expert[2] == "0":
                found |= _stacked(int(expert[1]), tensors, config, dtype)
            continue
        layer = _NAME.fullmatch(name)
        own = f"blk.{layer[1]}.{names[layer[2]]}" if layer is not None else _TOP[name]
        if interleaved and own.endswith(("attn_q.weight", "attn_k.weight")):
            tensor = _neighbours(tensor, config.attention.head_dim)
        if "ffn_gate_inp_shexp" in own:  # a vector there
            tensor = OnlyRow(tensor)
        is_float32 = len(tensor.shape) == 1 or any(part in own for part in _FLOAT32)
        found[own] = CastTensor(tensor, "float32" if is_float32 else dtype)
    return found


def _stacked(
    layer: int, tensors: Mapping[str, StoredTensor], config: ModelConfig, dtype: str
) -> dict[str, StoredTensor]:
    names = FeedForward(config, f"model.layers.{layer}")
    found: dict[str, StoredTensor] = {}
    for matrix in MATRICES:
        own = f"blk.{layer}.ffn_{matrix}_exps.weight"
        grid = np.empty(config.moe.num_experts, object)
        for expert in range(config.moe.num_experts):
            grid[expert] = tensors[names.expert(expert, matrix)]
        found[own] = StackedTensor(grid, dtype)
    return found


def _neighbours(tensor: StoredTensor, head_dim: int) -> StoredTensor:
    """Rows i and i + head_dim / 2 of each head, which turn together, next to one another."""
    order = np.arange(tensor.shape[0]).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)
    return Picked(tensor, 0, order)


@dataclasses.dataclass(frozen=True)
class OnlyRow(TensorView):
    """A matrix of one row as a vector."""

    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[1:]

    def read_into(self, index: Index, out: np.ndarray) -> None:
        self.tensor.read_into((slice(0, 1), *index), out[None])
