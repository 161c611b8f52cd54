"""What users run into with checkpoints that others made: read where that is right, or refused with the way out."""

import dataclasses
import errno
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface import unused_fields
from qwen_moe_jax.huggingface.convert import convert
from qwen_moe_jax.huggingface.families import FAMILIES
from qwen_moe_jax.huggingface.known_fields import CONFIG_READ
from qwen_moe_jax.inference.chat_template import load_chat_template
from qwen_moe_jax.inference.tokenizer import load_tokenizer
from tests.inference.tokenizer_kinds import byte_level
from tests.subject import hub_arrays

CONFIG = {
    **{"model_type": "qwen3", "vocab_size": 98, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2},
}
MOE = CONFIG | {
    **{"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(CONFIG), rngs=0)
    qmj.save_pretrained(model, tmp_path / "model")
    unused_fields._said.clear()
    return tmp_path / "model"


def rename(folder, change) -> None:
    save_file({change(name): array for name, array in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


def edit(path, **changes) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | changes))


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "_fsdp_wrapped_module."]
)
def test_prefixes_that_wrappers_leave_before_every_name_are_removed_and_said(folder, prefix, capsys):
    expected = dict(hub_arrays(qmj.from_pretrained(folder)))
    capsys.readouterr()
    rename(folder, lambda name: prefix + name)
    for name, array in hub_arrays(qmj.from_pretrained(folder)):
        np.testing.assert_array_equal(array, expected[name])
    assert capsys.readouterr().err.count(f"all tensor names begin with '{prefix}'") == 1


def test_a_prefix_of_some_names_is_a_problem_of_these(folder):
    rename(folder, lambda name: f"module.{name}" if name == "model.norm.weight" else name)
    with pytest.raises(qmj.CheckpointError, match=r"unexpected: module\.model\.norm\.weight"):
        qmj.from_pretrained(folder)


@pytest.mark.parametrize("prefix", ["student.", "model.", "transformer.decoder."])
def test_any_other_prefix_of_every_name_is_one_problem_with_the_right_name(folder, prefix):
    rename(folder, lambda name: prefix + name)
    with pytest.raises(qmj.CheckpointError) as refusal:
        qmj.from_pretrained(folder)
    assert "(1 problem)" in str(refusal.value)
    assert f"names: all 25 tensor names begin with '{prefix}', expected names without it" in str(refusal.value)


def test_a_model_with_adapters_inside_says_to_merge_them(folder):
    rename(folder, lambda name: "base_model.model." + name.replace("q_proj.", "q_proj.base_layer."))
    with pytest.raises(
        qmj.CheckpointError, match=r"unexpected: .*base_layer.*: of a model with PEFT's adapters inside;"
    ):
        qmj.from_pretrained(folder)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_json_and_templates_of_any_unicode_encoding_are_read(folder, encoding):
    expected = qmj.from_pretrained(folder)
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}hé {{ m.content }}{% endfor %}")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "é"}')
    names = dict.fromkeys(load_file(folder / WEIGHTS), "model-00001.safetensors")
    (folder / WEIGHTS).rename(folder / "model-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    for path in (*folder.glob("*.json"), *folder.glob("*.jinja")):
        path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    found = qmj.from_pretrained(folder)
    assert found.config == expected.config and found.generation_config == expected.generation_config
    assert load_tokenizer(folder).encode("hi").ids
    assert load_chat_template(folder).render([{"role": "user", "content": "x"}]) == "hé x"


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_git_lfs_pointer_in_place_of_a_tokenizer_or_template_says_what_to_run(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4096\n")
    with pytest.raises(qmj.CheckpointError, match=f"{name} is a Git LFS pointer, not the file itself: run `git"):
        load_tokenizer(folder) if name == "tokenizer.json" else load_chat_template(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin"])
def test_weights_without_permission_are_refused_in_one_line(folder, name, monkeypatch):
    def forbidden(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    if name == WEIGHTS:
        monkeypatch.setattr("qwen_moe_jax.storage.safetensors_file.os.open", forbidden)
    else:
        monkeypatch.setattr(pytest.importorskip("torch"), "load", forbidden)
        (folder / WEIGHTS).rename(folder / name)
    with pytest.raises(qmj.CheckpointError) as refusal:
        qmj.from_pretrained(folder)
    assert str(refusal.value) == f"{folder / name}: cannot be read (Permission denied)."


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "pytorch_model.bin", "generation_config.json"])
def test_a_git_lfs_pointer_says_what_to_run(folder, name):
    if name == "pytorch_model.bin":
        (folder / WEIGHTS).unlink()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4096\n"
    (folder / name).write_text(pointer)
    with pytest.raises((qmj.CheckpointError, qmj.ConfigError)) as refusal:
        qmj.from_pretrained(folder)
    assert f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull` in {folder}" in str(refusal.value)


@pytest.mark.parametrize("file", [WEIGHTS, "model-mtp.safetensors"])
def test_an_index_may_name_tensors_that_no_forward_pass_reads(folder, file):
    (folder / WEIGHTS).rename(folder / "model-00001.safetensors")
    names = dict.fromkeys(load_file(folder / "model-00001.safetensors"), "model-00001.safetensors")
    file = "model-00001.safetensors" if file == WEIGHTS else file
    extra = {"mtp.fc.weight": file, "model.layers.0.self_attn.rotary_emb.inv_freq": file}
    (folder / INDEX).write_text(json.dumps({"weight_map": names | extra}))
    qmj.from_pretrained(folder)
    convert(folder, folder.parent / "converted")
    (folder / INDEX).write_text(json.dumps({"weight_map": names | {"model.extra.weight": file}}))
    with pytest.raises(qmj.CheckpointError, match=re.escape(file)):
        qmj.from_pretrained(folder)


def test_a_missing_head_may_be_the_token_table(folder):
    save_file({k: v for k, v in load_file(folder / WEIGHTS).items() if k != "lm_head.weight"}, folder / WEIGHTS)
    with pytest.raises(qmj.CheckpointError, match=r"missing: lm_head.weight \[98, 32\]: add it, or set tie_word_embed"):
        qmj.from_pretrained(folder)
    edit(folder / "config.json", tie_word_embeddings=True)
    assert qmj.from_pretrained(folder).lm_head is None


@pytest.mark.parametrize("field", ["pad_token_id", "bos_token_id", "eos_token_id"])
def test_a_token_id_of_minus_one_is_none(folder, field):
    edit(folder / "config.json", **{field: -1})
    (folder / "generation_config.json").unlink()
    assert getattr(qmj.from_pretrained(folder).config, field) in (None, ())
    edit(folder / "generation_config.json", **{field: -1})
    assert qmj.from_pretrained(folder).generation_config.eos_token_id in ((), (2,))


def test_a_classifier_without_a_head_says_how_to_get_one_and_takes_its_labels(folder):
    with pytest.raises(qmj.CheckpointError, match=r"missing: score.weight \[2, 32\]: pass rngs=nnx.Rngs\(0\)") as found:
        qmj.SequenceClassifier.from_pretrained(folder)
    assert "(1 problem)" in str(found.value), "the head of the language model is no problem"
    model = qmj.SequenceClassifier.from_pretrained(folder, rngs=0, num_labels=5)
    assert model.config.num_labels == 5 and model.score.weight.shape == (5, 32)
    qmj.save_pretrained(model, folder.parent / "classifier")
    assert qmj.SequenceClassifier.from_pretrained(folder.parent / "classifier").score.weight.shape == (5, 32)


@pytest.mark.parametrize("rngs", [jax.random.key(0), 0, np.int32(0)], ids=["key", "seed", "NumPy's"])
def test_a_key_or_a_seed_serves_as_rngs(rngs):
    config = qmj.ModelConfig.from_pretrained(CONFIG)
    found, expected = (hub_arrays(qmj.CausalLM(config, rngs=each)) for each in (rngs, nnx.Rngs(0)))
    for (_, one), (_, other) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_rngs_of_another_kind_are_refused_in_one_line():
    with pytest.raises(
        TypeError, match=r"^rngs='0' is not supported: expected nnx.Rngs\(0\), jax.random.key\(0\)[^\n]*$"
    ):
        qmj.CausalLM(qmj.ModelConfig.from_pretrained(CONFIG), rngs="0")


def test_arguments_of_transformers_are_refused_with_the_name_of_ours(folder):
    with pytest.raises(TypeError, match=r"from_pretrained\(\) has no argument 'torch_dtype': here that is dtype"):
        qmj.from_pretrained(folder, torch_dtype="auto")
    with pytest.raises(TypeError, match=r"no argument 'device_map': here that is mesh"):
        qmj.CausalLM.from_pretrained(folder, device_map="auto")
    with pytest.raises(TypeError, match=r"no argument 'dtyp': did you mean 'dtype'"):
        qmj.from_pretrained(folder, dtyp="float32")
    model = qmj.from_pretrained(folder)
    with pytest.raises(TypeError, match=r"no argument 'attention_mask': here that is segment_ids"):
        model(np.ones((1, 3), int), attention_mask=np.ones((1, 3), int))


def test_settings_that_are_not_acted_on_are_named_once(folder, capsys):
    edit(
        folder / "generation_config.json",
        num_beams=4,
        diversity_penalty=0.5,
        top_k=20,
        length_penalty=1.0,
        use_cache=True,
    )
    edit(folder / "config.json", auto_map={"AutoModel": "modeling.Mine"}, of_tomorrow=3, another=None, use_cache=False)
    edit(folder / "tokenizer_config.json", add_bos_token=True, add_eos_token=False, model_max_length=9)
    for _ in range(2):
        qmj.from_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"post_processor": {"type": "TemplateProcessing"}}')
    unused_fields.say_unused_fields(folder)  # tokenizer.json has the step now
    said = capsys.readouterr().err
    assert said.count("num_beams=4, diversity_penalty=0.5.") == 1
    assert said.count("config.json: not acted on: auto_map={'AutoModel': 'modeling.Mine'}, of_tomorrow=3.") == 1
    assert said.count("tokenizer_config.json: not acted on: add_bos_token=True.") == 1
    assert len(said.splitlines()) == 3


@pytest.fixture
def toy_family(monkeypatch):
    """A family with a key of its own for the number of experts, and a rule that reads a key of its own."""
    family = dataclasses.replace(
        FAMILIES["qwen3_moe"],
        class_prefix="Toy",
        renames={"num_experts": "n_routed_experts"},
        sparse=lambda fields, layer: layer >= fields.integer("first_k_dense_replace", 0),
    )
    monkeypatch.setitem(FAMILIES, "toy", family)
    renamed = {"n_routed_experts" if name == "num_experts" else name: value for name, value in MOE.items()}
    return renamed | {"model_type": "toy", "num_hidden_layers": 3, "first_k_dense_replace": 1}


def test_a_familys_own_keys_are_read_and_exported_and_not_named_as_unused(toy_family, tmp_path, capsys):
    config = qmj.ModelConfig.from_pretrained(toy_family)
    assert config.moe.num_experts == MOE["num_experts"]
    assert [kind.mlp for kind in config.layers] == ["dense", "sparse", "sparse"]
    qmj.save_pretrained(qmj.CausalLM(config, rngs=nnx.Rngs(0)), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["n_routed_experts"] == MOE["num_experts"] and written["first_k_dense_replace"] == 1
    assert not {"num_experts", "num_local_experts"} & written.keys()
    capsys.readouterr()
    assert qmj.from_pretrained(tmp_path).config.layers == config.layers
    assert "not acted on" not in capsys.readouterr().err
    edit(tmp_path / "config.json", num_experts=7)
    qmj.from_pretrained(tmp_path)
    assert "not acted on: num_experts=7." in capsys.readouterr().err


def test_an_error_names_the_familys_own_key(toy_family):
    with pytest.raises(qmj.ConfigError, match="n_routed_experts='many' is not supported: expected an integer"):
        qmj.ModelConfig.from_pretrained(toy_family | {"n_routed_experts": "many"})
    with pytest.raises(qmj.ConfigError, match="n_routed_expert=4: .*expected n_routed_experts"):
        qmj.ModelConfig.from_pretrained(toy_family | {"n_routed_expert": 4})


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("num_expert", "num_experts"),
        ("num_experts_per_token", "num_experts_per_tok"),
        ("hiden_size", "hidden_size"),
        ("num_attention_head", "num_attention_heads"),
    ],
)
def test_a_key_that_is_nearly_one_that_is_read_is_refused_with_the_right_one(wrong, right):
    renamed = {wrong if name == right else name: value for name, value in MOE.items()}
    with pytest.raises(qmj.ConfigError, match=rf"config: {wrong}={MOE[right]}: .*expected {right}\."):
        qmj.ModelConfig.from_pretrained(renamed)


@pytest.mark.parametrize("key", ["v_head_dim", "eod_token_id", "router_z_loss_coef", "dense_intermediate_size"])
def test_a_field_of_another_family_is_no_misspelt_one(key):
    assert qmj.ModelConfig.from_pretrained(MOE | {key: 3}).attention == qmj.ModelConfig.from_pretrained(MOE).attention


def test_a_config_file_in_place_of_a_folder_is_refused_with_how_fresh_weights_are_made(folder):
    with pytest.raises(qmj.CheckpointError, match=r"for fresh weights: CausalLM\(ModelConfig.from_pretrained\("):
        qmj.from_pretrained(folder / "config.json")


def test_keys_that_resemble_none_are_accepted():
    assert qmj.ModelConfig.from_pretrained(MOE | {"of_tomorrow": 3, "num_expert": None}).hub_fields


def test_every_field_of_config_json_that_is_read_is_known(monkeypatch):
    from qwen_moe_jax.huggingface.fields import Fields

    read = set()
    get = Fields._get
    monkeypatch.setattr(
        Fields, "_get", lambda self, name, default: (read.add((self.where, name)), get(self, name, default))[1]
    )
    for model_type in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mixtral"):
        qmj.ModelConfig.from_pretrained({"model_type": model_type, "use_sliding_window": True})
    assert {name for where, name in read if where == "config"} <= CONFIG_READ


@pytest.mark.parametrize(
    "field, value",
    [
        ("is_causal", False),
        ("attention_chunk_size", 128),
        ("per_layer_config", {"0": {"sliding_window": 4}}),
        ("token_classification_bias", False),
        ("logits_mup_width_multiplier", 2.0),
        ("unpadded_vocab_size", 90),
    ],
)
def test_what_transformers_acts_on_in_every_family_is_refused_where_it_is_not_implemented(field, value):
    with pytest.raises(qmj.ConfigError, match=f"{field}={re.escape(repr(value))[:8]}.*is not supported: expected"):
        qmj.ModelConfig.from_pretrained(CONFIG | {field: value})
    qmj.ModelConfig.from_pretrained(CONFIG | {"is_causal": True, "per_layer_config": {}, field: None})


def test_transformers_attends_both_ways_where_is_causal_is_false():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokens = torch.arange(12)[None]
    logits = []
    for is_causal in (True, False):
        torch.manual_seed(0)
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**CONFIG, is_causal=is_causal)).eval()
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert not torch.allclose(*logits, atol=1e-4)
