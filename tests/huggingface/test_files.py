"""Which files a folder's tensors are taken from."""

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import qwen_moe_jax as qmj


@pytest.fixture(scope="module")
def model():
    hub = dict(
        model_type="mixtral",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    return qmj.CausalLM(qmj.ModelConfig.from_pretrained(hub), rngs=nnx.Rngs(0))


def test_a_tensor_in_two_files_is_refused_by_name(model, tmp_path):
    """Transformers takes whichever it reads last."""
    folder = tmp_path / "checkpoint"
    qmj.save_pretrained(model, folder, max_shard_size="10KB")
    first, *_, last = sorted(folder.glob("*.safetensors"))
    assert "lm_head.weight" in load_file(first) and "lm_head.weight" not in load_file(last)
    stray = load_file(last) | {"lm_head.weight": np.zeros((32, 16), np.float32)}
    save_file(stray, last, metadata={"format": "pt"})
    with pytest.raises(qmj.CheckpointError, match=f"duplicated: lm_head.weight is in {first.name} and in {last.name}"):
        qmj.from_pretrained(folder)
