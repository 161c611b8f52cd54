"""GGUF files: llama.cpp's names, shapes, metadata and tokenizers, read by the gguf library's own reader."""

import functools
import json
import struct

import gguf
import numpy as np
import pytest
import tokenizers
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.main import main
from qwen_moe_jax.huggingface.gguf import export
from qwen_moe_jax.huggingface.gguf.tokenizer import read_vocabulary
from tests.inference.tokenizer_kinds import byte_level
from tests.subject import hub_arrays
from tests.surgery.folders import arrays_of, config_of, write

#: Value heads of the size of key heads.
SQUARE = {"linear_value_head_dim": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def exported(name, tmp_path, config=None, *words):
    """The folder's arrays, and the reader of the file."""
    arrays = arrays_of(name) if config is None or "linear_value_head_dim" not in config else square(name)
    folder = write(tmp_path / "source", arrays, config_of(name) | (config or {}))
    target = tmp_path / "deep/model.gguf"
    assert main(["convert", str(folder), str(target), "--to", "gguf", *words]) == 0
    return arrays, gguf.GGUFReader(target)


@functools.cache
def square(name):
    """The tensors of a hybrid whose value heads have the size of its key heads, as llama.cpp wants them."""
    config = qmj.ModelConfig.from_pretrained(config_of(name) | SQUARE)
    shapes = {key: value.shape for key, value in hub_arrays(qmj.CausalLM(config, rngs=nnx.Rngs(0)))}
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def values(reader):
    """The tensors by name, in NumPy's order of axes."""
    return {tensor.name: np.array(tensor.data).reshape(tuple(reversed(tensor.shape))) for tensor in reader.tensors}


@pytest.mark.parametrize(
    "name, config",
    [
        ("qwen2-plain", {}),
        ("qwen3-plain", {}),
        ("qwen2_moe-plain", {}),
        ("qwen3_moe-plain", {}),
        ("mixtral-plain", {"sliding_window": 4096}),  # of more positions than there are
        ("qwen3_next-plain", SQUARE),
        ("qwen3_5_moe_text-plain", SQUARE),
    ],
)
def test_the_tensors_have_the_names_of_their_architecture(name, config, tmp_path):
    arrays, reader = exported(name, tmp_path, config)
    architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    number = next(key for key, own in gguf.MODEL_ARCH_NAMES.items() if own == architecture)
    templates = [gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[number]]
    layers = config_of(name)["num_hidden_layers"]
    full = layers - 1 if SQUARE == config else 1
    known = {f"{template.format(bid=layer)}.weight" for template in templates for layer in range(layers)}
    found = values(reader)
    assert {own for own in found if own.endswith(".weight")} <= known
    assert sum(value.size for value in found.values()) == sum(value.size for value in arrays.values())
    assert (found[f"blk.{full}.attn_v.weight"] == arrays[f"model.layers.{full}.self_attn.v_proj.weight"]).all()


def test_value_heads_of_a_hybrid_are_in_the_order_in_which_key_heads_are_repeated(tmp_path):
    """As in the project's own conversion of Qwen3.5: here 2 key heads of 8 rows with 2 value heads of 8 each."""
    arrays, reader = exported("qwen3_5_moe_text-plain", tmp_path, SQUARE)
    found, layer = values(reader), "model.layers.0.linear_attn"
    heads = np.arange(4).reshape(2, 2).T.reshape(-1)
    rows = (heads[:, None] * 8 + np.arange(8)).reshape(-1)
    joined = np.concatenate([np.arange(32), 32 + rows])
    expected = {
        "attn_qkv.weight": arrays[f"{layer}.in_proj_qkv.weight"][joined],
        "attn_gate.weight": arrays[f"{layer}.in_proj_z.weight"][rows],
        "ssm_alpha.weight": arrays[f"{layer}.in_proj_a.weight"][heads],
        "ssm_conv1d.weight": arrays[f"{layer}.conv1d.weight"][joined, 0],
        "ssm_a": -np.exp(arrays[f"{layer}.A_log"][heads]),
        "ssm_dt.bias": arrays[f"{layer}.dt_bias"][heads],
        "ssm_out.weight": arrays[f"{layer}.out_proj.weight"][:, rows],
        "ssm_norm.weight": arrays[f"{layer}.norm.weight"],
        "attn_norm.weight": arrays["model.layers.0.input_layernorm.weight"] + 1,
    }
    for name, array in expected.items():
        assert np.array_equal(found[f"blk.0.{name}"], array), name
    fields = {name.partition(".")[2]: field.parts[-1].tolist()[0] for name, field in reader.fields.items()}
    assert (fields["ssm.inner_size"], fields["full_attention_interval"], fields["rope.dimension_count"]) == (32, 4, 8)


def test_qwen3_nexts_joined_projection_is_taken_to_pieces_and_its_heads_keep_their_order(tmp_path):
    arrays, reader = exported("qwen3_next-plain", tmp_path, SQUARE)
    found, layer = values(reader), "model.layers.0.linear_attn"
    grouped = arrays[f"{layer}.in_proj_qkvz.weight"].reshape(2, 48, -1)  # of each key head 8 q, 8 k, 16 v, 16 z
    parts = [grouped[:, start:stop].reshape(-1, grouped.shape[2]) for start, stop in ((0, 8), (8, 16), (16, 32))]
    assert np.array_equal(found["blk.0.attn_qkv.weight"], np.concatenate(parts))
    assert np.array_equal(found["blk.0.attn_gate.weight"], grouped[:, 32:].reshape(-1, grouped.shape[2]))
    assert np.array_equal(found["blk.0.ssm_ba.weight"], arrays[f"{layer}.in_proj_ba.weight"])


def test_of_yarn_llama_cpps_own_factor_of_attention_is_taken_out(tmp_path):
    scaling = YARN | {"attention_factor": 0.7, "beta_fast": 8.0}
    _, reader = exported("qwen3-plain", tmp_path, {"rope_scaling": scaling})
    fields = {name: field.parts[-1].tolist()[0] for name, field in reader.fields.items() if "rope.scaling" in name}
    scaling = {name.removeprefix("qwen3.rope.scaling."): value for name, value in fields.items()}
    assert scaling["original_context_length"] == 16 and scaling["yarn_beta_fast"] == 8.0
    assert scaling["attn_factor"] == pytest.approx(0.7 / (1 + 0.1 * np.log(4.0)))


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
        ("qwen3_next-plain", {}, "linear_value_head_dim=12 with linear_key_head_dim=8 cannot be written as GGUF"),
        ("qwen3_next-full_first", SQUARE, "layer_types=another order"),
        (
            "mixtral-plain",
            {"sliding_window": 32},
            "sliding_window=32 cannot be written as GGUF",
        ),
        ("qwen3-plain", {"rope_scaling": YARN | {"truncate": False}}, "truncate=False"),
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


def test_a_file_that_is_there_is_replaced_if_that_is_asked_and_one_of_another_kind_never(tmp_path, capsys):
    folder, target = write(tmp_path / "source", arrays_of("qwen3-plain"), config_of("qwen3-plain")), tmp_path / "model"
    words = ["convert", str(folder), str(target), "--to", "gguf", "--no-verify"]
    assert main(words) == 0 and main(words) == 2
    assert "is there, and is not replaced unasked: with --replace (replace=True) it is" in capsys.readouterr().err
    assert main([*words, "--replace"]) == 0 and target.read_bytes()[:4] == b"GGUF"
    target.write_text("notes")
    for replace in ([], ["--replace"]):
        assert main([*words, *replace]) == 2 and target.read_text() == "notes"
        assert "is there and is no GGUF file: give another name, or delete it" in capsys.readouterr().err
