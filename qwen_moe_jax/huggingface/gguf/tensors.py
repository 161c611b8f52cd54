"""The tensors of a GGUF file, from those of a checkpoint: llama.cpp's names, experts stacked, vectors in float32."""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.huggingface.sparse_families import FeedForward
from qwen_moe_jax.storage.tensor import CastTensor, Index, PickedRows, StackedTensor, StoredTensor, TensorView

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
}
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
    for name, tensor in tensors.items():
        expert = _EXPERT.match(name)
        if expert is not None:
            if expert[2] == "0":
                found |= _stacked(int(expert[1]), tensors, config, dtype)
            continue
        layer = _NAME.fullmatch(name)
        own = f"blk.{layer[1]}.{_LAYER[layer[2]]}" if layer is not None else _TOP[name]
        if interleaved and own.endswith(("attn_q.weight", "attn_k.weight")):
            tensor = _neighbours(tensor, config.attention.head_dim)
        if "ffn_gate_inp_shexp" in own:  # a vector there
            tensor = OnlyRow(tensor)
        is_vector = len(tensor.shape) == 1 or "ffn_gate_inp" in own
        found[own] = CastTensor(tensor, "float32" if is_vector else dtype)
    return found


def _stacked(
    layer: int, tensors: Mapping[str, StoredTensor], config: ModelConfig, dtype: str
) -> dict[str, StoredTensor]:
    names = FeedForward(config, f"model.layers.{layer}")
    found: dict[str, StoredTensor] = {}
    for matrix in ("gate", "up", "down"):
        own = f"blk.{layer}.ffn_{matrix}_exps.weight"
        grid = np.empty(config.moe.num_experts, object)
        for expert in range(config.moe.num_experts):
            grid[expert] = tensors[names.expert(expert, matrix)]
        found[own] = StackedTensor(grid, dtype)
    return found


def _neighbours(tensor: StoredTensor, head_dim: int) -> StoredTensor:
    """Rows i and i + head_dim / 2 of each head, which turn together, next to one another."""
    order = np.arange(tensor.shape[0]).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)
    return PickedRows(tuple((tensor, int(row), int(row) + 1) for row in order))


@dataclasses.dataclass(frozen=True)
class OnlyRow(TensorView):
    """A matrix of one row as a vector."""

    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[1:]

    def read_into(self, index: Index, out: np.ndarray) -> None:
        self.tensor.read_into((slice(0, 1), *index), out[None])
