"""GGUF files: llama.cpp's names, shapes, metadata and tokenizers, read by the gguf library's own reader."""

import json
import struct

import gguf
import numpy as np
import pytest
import tokenizers

from qwen_moe_jax.cli.main import main
from qwen_moe_jax.huggingface.gguf import export
from qwen_moe_jax.huggingface.gguf.tokenizer import read_vocabulary
from tests.inference.tokenizer_kinds import byte_level
from tests.surgery.folders import arrays_of, config_of, write


def exported(name, tmp_path, config=None, *words):
    """The folder's arrays, and the reader of the file."""
    folder = write(tmp_path / "source", arrays_of(name), config_of(name) | (config or {}))
    target = tmp_path / "deep/model.gguf"
    assert main(["convert", str(folder), str(target), "--to", "gguf", *words]) == 0
    return arrays_of(name), gguf.GGUFReader(target)


def values(reader):
    """The tensors by name, in NumPy's order of axes."""
    return {tensor.name: np.array(tensor.data).reshape(tuple(reversed(tensor.shape))) for tensor in reader.tensors}


@pytest.mark.parametrize("name", ["qwen2-plain", "qwen3-plain", "qwen2_moe-plain", "qwen3_moe-plain", "mixtral-plain"])
def test_the_tensors_have_the_names_of_their_architecture(name, tmp_path):
    arrays, reader = exported(name, tmp_path)
    architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    number = next(key for key, own in gguf.MODEL_ARCH_NAMES.items() if own == architecture)
    templates = [gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[number]]
    layers = config_of(name)["num_hidden_layers"]
    known = {f"{template.format(bid=layer)}.weight" for template in templates for layer in range(layers)}
    found = values(reader)
    assert {own for own in found if own.endswith(".weight")} <= known
    assert sum(value.size for value in found.values()) == sum(value.size for value in arrays.values())
    assert (found["blk.1.attn_v.weight"] == arrays["model.layers.1.self_attn.v_proj.weight"]).all()


def test_experts_are_stacked_and_queries_of_mixtral_have_their_pairs_side_by_side(tmp_path):
    arrays, reader = exported("mixtral-plain", tmp_path)
    found = values(reader)
    block = "model.layers.2.block_sparse_moe"
    down = np.stack([arrays[f"{block}.experts.{e}.w2.weight"] for e in range(len(found["blk.2.ffn_down_exps.weight"]))])
    assert (found["blk.2.ffn_down_exps.weight"] == down).all()
    query, written = arrays["model.layers.0.self_attn.q_proj.weight"], found["blk.0.attn_q.weight"]
    assert (written[0:4] == query[[0, 4, 1, 5]]).all()  # heads of eight: row i turns with row i + 4
    assert (written[8:10] == query[[8, 12]]).all()


def test_metadata_are_those_of_the_config_and_vectors_stay_in_float32(tmp_path):
    rope = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    _, reader = exported("qwen2_moe-plain", tmp_path, rope, "--dtype", "bfloat16")
    fields = {name: field.parts[-1].tolist()[0] for name, field in reader.fields.items() if name.startswith("qwen2moe")}
    config = config_of("qwen2_moe-plain")
    expected = {
        "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size",
        "attention.head_count_kv": "num_key_value_heads",
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    }
    assert {own: fields[f"qwen2moe.{own}"] for own in expected} == {own: config[key] for own, key in expected.items()}
    assert fields["qwen2moe.rope.scaling.factor"] == 4.0
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_up_exps.weight"] == kinds["token_embd.weight"] == "BF16"
    vectors = ("attn_norm.weight", "attn_q.bias", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
    assert {kinds[f"blk.0.{name}"] for name in vectors} == {"F32"}


def test_a_byte_level_tokenizer_is_written_with_its_merges_and_kinds(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_tokens([tokenizers.AddedToken("<tool>", special=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    found = read_vocabulary(tmp_path, size + 2)
    assert (found.model, found.pre) == ("gpt2", "gpt-2")
    assert found.tokens[:size] == [tokenizer.id_to_token(token) for token in range(size)]
    assert found.types[tokenizer.token_to_id("<|im_end|>")] == 3 and found.types[tokenizer.token_to_id("<tool>")] == 4
    assert found.types[size:] == [5, 5]
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert "by a rule that llama.cpp has no name for" in read_vocabulary(tmp_path, size)


def test_sentencepiece_is_read_off_its_protocol_buffer(tmp_path):
    def piece(text, score, kind):
        inner = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        return b"\x0a" + bytes([len(inner)]) + inner

    data = piece(b"<unk>", 0.0, 2) + piece(b"<s>", 0.0, 3) + piece("▁a".encode(), -1.5, 1) + b"\x12\x02\x08\x01"
    (tmp_path / "tokenizer.model").write_bytes(data)
    found = read_vocabulary(tmp_path, 4)
    assert (found.tokens, found.types) == (["<unk>", "<s>", "▁a", "[PAD3]"], [2, 3, 1, 5])
    assert found.scores == [0.0, 0.0, -1.5, 0.0] and found.model == "llama"
    (tmp_path / "tokenizer.model").write_bytes(data[:20])
    assert "tokenizer.model cannot be read" in read_vocabulary(tmp_path, 4)


@pytest.mark.parametrize(
    "name, config, said",
    [
        ("qwen3_next-plain", {}, "model_type='qwen3_next' cannot be written as GGUF"),
        ("qwen3_moe-plain", {"norm_topk_prob": False}, "norm_topk_prob=False cannot be written as GGUF: expected True"),
        ("qwen2_moe-mlp_only_layers", {}, "mlp_only_layers=dense layers"),
        ("qwen3-plain", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("qwen3-plain", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused_by_its_field(name, config, said, tmp_path, capsys):
    folder = write(tmp_path / "source", arrays_of("qwen3-plain"), config_of(name) | config)  # before tensors are read
    assert main(["convert", str(folder), str(tmp_path / "model.gguf"), "--to", "gguf"]) == 2
    assert said in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_file_that_differs_is_not_left(tmp_path, monkeypatch, capsys):
    honest = export._append_tensors

    def damaging(path, tensors):
        honest(path, tensors)
        with open(path, "r+b") as file:
            file.seek(-40, 2)
            file.write(b"\xff")

    monkeypatch.setattr(export, "_append_tensors", damaging)
    folder = write(tmp_path / "source", arrays_of("qwen3-plain"), config_of("qwen3-plain"))
    assert main(["convert", str(folder), str(tmp_path / "model.gguf"), "--to", "gguf"]) == 2
    assert "differs from the checkpoint in 1 tensors" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
