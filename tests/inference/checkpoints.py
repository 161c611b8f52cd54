"""A tiny checkpoint folder with a tokenizer: random weights, sure enough of themselves to prefer some tokens."""

import json
from pathlib import Path

import tokenizers
from flax import nnx

import qwen_moe_jax as qmj
from tests.cases import CASES
from tests.inference.tokenizer_kinds import byte_level


def make_checkpoint(folder: Path, tokenizer: tokenizers.Tokenizer | None = None, **special_tokens: str) -> Path:
    """Writes the folder; special tokens go into tokenizer_config.json as transformers writes them."""
    tokenizer = tokenizer or byte_level()
    settings = {"vocab_size": tokenizer.get_vocab_size(), "initializer_range": 0.4, "max_position_embeddings": 96}
    config = qmj.ModelConfig.from_pretrained({**CASES["qwen3_moe-plain"].config, **settings})
    qmj.save_pretrained(qmj.CausalLM(config, rngs=nnx.Rngs(3)), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    special_tokens = special_tokens or {"eos_token": "<|im_end|>"}
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({**special_tokens, "chat_template": template}))
    return folder
