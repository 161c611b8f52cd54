"""The mixture of `mixture.py` as a GGUF file, and llama.cpp continuing prompts with it: engines for `all.py`.

The file is written from a folder that `save_pretrained` made, by the `gguf` library; llama.cpp runs by its Python
binding, `llama-cpp-python`. Both are optional: nothing else needs them.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mixture import HUB_CONFIG

#: Names of a layer's tensors, and those of llama.cpp (architecture `qwen3moe`).
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(folder: Path, path: Path, dtype: str) -> None:
    """Writes the checkpoint in `folder` as one GGUF file of the dtype; vectors and routers in float32."""
    import gguf
    from safetensors.numpy import load_file

    tensors = {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}
    config = HUB_CONFIG
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, x: np.ndarray) -> None:
        if dtype == "bfloat16" and x.ndim > 1 and not name.endswith("ffn_gate_inp.weight"):
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quants.quantize(x.astype(np.float32), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, x.astype(np.float32))

    for name, theirs in TOP.items():
        add(f"{theirs}.weight", tensors[f"{name}.weight"])
    for layer in range(config["num_hidden_layers"]):
        for name, theirs in LAYER.items():
            add(f"blk.{layer}.{theirs}.weight", tensors[f"model.layers.{layer}.{name}.weight"])
        for kind in ("gate", "up", "down"):
            names = (
                f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight"
                for expert in range(config["num_experts"])
            )
            add(f"blk.{layer}.ffn_{kind}_exps.weight", np.stack([tensors[name] for name in names]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def engine(
    path: Path, batch: int, length: int, threads: int, dtype: str
) -> Callable[[list[list[int]], int], list[list[int]]]:
    """Continues all prompts, of one length, by so many tokens: the prompts one by one, then all rows together.

    In float32, keys and values are float32 as well, and attention's products: by default both are float16, and the
    tokens soon are others than ours.
    """
    import llama_cpp as cpp

    cpp.llama_backend_init()
    cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    model = cpp.llama_model_load_from_file(str(path).encode(), cpp.llama_model_default_params())
    settings = cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_seq_max = batch * length, 512, batch
    settings.n_ubatch = settings.n_batch
    settings.n_threads = settings.n_threads_batch = threads
    if dtype == "float32":
        settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
        settings.flash_attn_type = 0
    context = cpp.llama_init_from_model(model, settings)
    size = HUB_CONFIG["vocab_size"]

    def read(tokens: list[tuple[int, int, int]], wanted: list[int]) -> list[int]:
        """Reads (token, position, row)s; the most probable token after each of the wanted ones."""
        chunk = cpp.llama_batch_init(len(tokens), 0, 1)
        chunk.n_tokens = len(tokens)
        for index, (token, position, row) in enumerate(tokens):
            chunk.token[index], chunk.pos[index], chunk.logits[index] = token, position, index in wanted
            chunk.n_seq_id[index], chunk.seq_id[index][0] = 1, row
        if cpp.llama_decode(context, chunk):
            raise RuntimeError("llama.cpp did not decode the batch")
        rows = (np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, index), (size,)) for index in wanted)
        chosen = [int(np.argmax(row)) for row in rows]
        cpp.llama_batch_free(chunk)
        return chosen

    def run(prompts: list[list[int]], count: int) -> list[list[int]]:
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        start = len(prompts[0])
        written = [
            read([(token, position, row) for position, token in enumerate(prompt)], [start - 1])
            for row, prompt in enumerate(prompts)
        ]
        for position in range(start, start + count - 1):
            last = [(text[-1], position, row) for row, text in enumerate(written)]
            for text, token in zip(written, read(last, list(range(len(last)))), strict=True):
                text.append(token)
        return written

    return run


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _quiet(level: int, text: bytes, data: int) -> None:
    """Takes llama.cpp's log."""
