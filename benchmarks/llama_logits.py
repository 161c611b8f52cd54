"""GGUF files against llama.cpp: logits and greedy tokens of random models of every family, in float32.

    pip install llama-cpp-python gguf
    python -m benchmarks.llama_logits

Each model is written as a Hub folder, exported, and opened by llama.cpp; the logits of a text of random tokens and the
greedy tokens are compared with those of this package, which the test suite compares with transformers'.
"""

import ctypes
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.gguf.export import export_gguf
from tests.surgery.folders import arrays_of, config_of, write

LENGTH = 40
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
OWN_FACTOR = {**YARN, "attention_factor": 0.7, "beta_fast": 8.0, "beta_slow": 2.0}
#: Case of the tests, and fields of config.json in addition.
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen2-plain", {}),
    ("qwen3-plain", {}),
    ("qwen2_moe-plain", {}),
    ("qwen3_moe-plain", {}),
    ("mixtral-plain", {}),
    ("qwen3-plain", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ("qwen2-plain", {"rope_scaling": YARN}),
    ("qwen3_moe-plain", {"rope_scaling": YARN}),
    ("qwen3_moe-plain", {"rope_scaling": OWN_FACTOR}),
    ("mixtral-plain", {"rope_scaling": YARN}),
    ("mixtral-plain", {"sliding_window": 4096}),
    ("qwen3_next-plain", {"linear_value_head_dim": 8}),
    ("qwen3_next-one_value_head", {"linear_value_head_dim": 8}),
    ("qwen3_5_text-plain", {"linear_value_head_dim": 8}),
    ("qwen3_5_text-three_value_heads", {"linear_value_head_dim": 8}),
    ("qwen3_5_moe_text-plain", {"linear_value_head_dim": 8}),
    ("qwen3_5_moe_text-four_value_heads", {"linear_value_head_dim": 8}),
)


def llama_logits(path: Path, tokens: list[int], vocab_size: int) -> np.ndarray:
    """llama.cpp's logits [T, V] of a text."""
    import llama_cpp as cpp

    cpp.llama_backend_init()
    cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    model = cpp.llama_model_load_from_file(str(path).encode(), cpp.llama_model_default_params())
    if not model:
        raise RuntimeError("llama.cpp did not load the file")
    settings = cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_threads = 256, 256, 1
    settings.type_k = settings.type_v = 0  # keys and values in float32
    settings.flash_attn_type = 0  # whose products are in float16
    context = cpp.llama_init_from_model(model, settings)
    chunk = cpp.llama_batch_init(len(tokens), 0, 1)
    chunk.n_tokens = len(tokens)
    for index, token in enumerate(tokens):
        chunk.token[index], chunk.pos[index], chunk.logits[index] = token, index, True
        chunk.n_seq_id[index], chunk.seq_id[index][0] = 1, 0
    if cpp.llama_decode(context, chunk):
        raise RuntimeError("llama.cpp did not decode the text")
    rows = [np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, at), (vocab_size,)).copy() for at in range(LENGTH)]
    cpp.llama_free(context)
    cpp.llama_model_free(model)
    return np.stack(rows)


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _quiet(level: int, text: bytes, data: int) -> None:
    """Takes llama.cpp's log, and shows errors."""
    if level >= 4:
        sys.stderr.write(text.decode(errors="replace"))


def arrays(name: str, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Random tensors of a case, with the rows that fields in addition want; large enough for logits that differ."""
    model_config = qmj.ModelConfig.from_pretrained(dict(config))
    if name.startswith(("qwen3_next", "qwen3_5")):
        from flax import nnx

        from tests.subject import hub_arrays

        shapes = {key: value.shape for key, value in hub_arrays(qmj.CausalLM(model_config, rngs=nnx.Rngs(0)))}
    else:
        shapes = {key: value.shape for key, value in arrays_of(name).items()}
    rng = np.random.default_rng(0)
    plain = 0.0 if model_config.zero_centered_norm else 1.0
    found = {}
    for key, shape in shapes.items():
        is_norm = "norm" in key and ("linear_attn" not in key)
        base = plain if is_norm else 1.0 if "norm" in key else 0.0
        found[key] = (rng.standard_normal(shape) * (0.3 if len(shape) > 1 else 0.2) + base).astype(np.float32)
    return found


def main() -> None:
    print("| model | in addition | largest logit | largest difference | greedy tokens |\n|---|---|---|---|---|")
    tokens = np.random.default_rng(1).integers(0, 90, LENGTH).tolist()
    for name, extra in CASES:
        config = {**config_of(name), **extra}
        with tempfile.TemporaryDirectory() as temporary:
            folder = write(Path(temporary) / "model", arrays(name, config), config)
            model = qmj.from_pretrained(folder, dtype="float32")
            own = np.asarray(model(np.array([tokens])).logits)[0]
            try:
                export_gguf(folder, Path(temporary) / "model.gguf", verify=True)
                found = llama_logits(Path(temporary) / "model.gguf", tokens, own.shape[1])
            except (RuntimeError, qmj.ConfigError) as error:
                print(f"| {name} | {extra} | {error} | | |", flush=True)
                continue
        same = int((own.argmax(1) == found.argmax(1)).sum())
        difference = np.abs(own - found).max()
        print(f"| {name} | {extra} | {np.abs(own).max():.1f} | {difference:.1e} | {same} of {LENGTH} |", flush=True)


if __name__ == "__main__":
    main()
