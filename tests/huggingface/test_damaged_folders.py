"""Every kind of damage to a checkpoint folder, and what is said of it: the file, what was found, what was expected."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

import qwen_moe_jax as qmj
from tests.huggingface import damaged
from tests.huggingface.damaged import (
    CONFIG,
    EMBEDDING,
    GATE,
    HEAD,
    INDEX,
    NORM,
    ROUTER,
    SINGLE,
    Damage,
    as_folder,
    both,
    cut,
    entry_of,
    fused_beside,
    in_config,
    in_header,
    in_json,
    move,
    named_twice,
    refused,
    set_tensor,
    shard,
    text,
    without,
    without_tensor,
    write_raw,
)

whole = damaged.whole

# ---- the table ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of damage.

    Attributes:
        of: the folder that is damaged.
        damage: what is done to it.
        error: that is raised.
        words: that the message has, in this order: the file, the tensor or field, what was found, what was expected.
    """

    of: str
    damage: Damage
    error: type[Exception]
    words: tuple[str, ...]


def config_kind(damage: Damage, *words: str, of: str = "single") -> Kind:
    return Kind(of, damage, qmj.ConfigError, (CONFIG, *words))


def tensor_kind(damage: Damage, *words: str, of: str = "single") -> Kind:
    return Kind(of, damage, qmj.CheckpointError, words)


KINDS = {
    # config.json
    "no config": config_kind(without(CONFIG), "no such file", "A checkpoint folder needs one"),
    "config not JSON": config_kind(text(CONFIG, "{'vocab_size': 3}"), "cannot be read as JSON", "double quotes"),
    "config not UTF-8": config_kind(text(CONFIG, b'{"a": "\xff"}'), "cannot be read as JSON", "utf-8"),
    "config empty": config_kind(text(CONFIG, ""), "cannot be read as JSON"),
    "config nested without end": config_kind(text(CONFIG, '{"a": ' * 10**5), "cannot be read as JSON", "too deeply"),
    "config an array": config_kind(text(CONFIG, "[1, 2]"), "expected a JSON object, found list"),
    "config a folder": config_kind(both(without(CONFIG), lambda folder: (folder / CONFIG).mkdir()), "cannot be read"),
    "model type unknown": config_kind(
        in_config(model_type="llama"), "model_type='llama'",
        "expected one of qwen2, qwen2_moe, qwen3, qwen3_moe, mixtral",
    ),
    "gptq of three bits": config_kind(
        in_config(quantization_config={"quant_method": "gptq", "bits": 3}),
        "quant_method='gptq'", "expected 2, 4 or 8", "Take the unquantised checkpoint",
    ),
    "hqq": config_kind(
        in_config(quantization_config={"quant_method": "hqq"}),
        "quant_method='hqq'", "expected unquantised weights, or one of fp8, fbgemm_fp8, gptq, awq",
    ),
    "bitsandbytes": config_kind(
        in_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": False}),
        "quant_method='bitsandbytes'", "expected",
    ),
    "fp8 without blocks": config_kind(
        in_config(quantization_config={"quant_method": "fp8"}), "weight_block_size=None", "two positive integers"
    ),
    "layers without end": config_kind(
        in_config(num_hidden_layers=10**12), "num_hidden_layers=1000000000000", "between 1 and 1000"
    ),
    "experts without end": config_kind(
        in_config(num_local_experts=10**9), "num_local_experts=1000000000", "at most 100000 experts in the 2 layers"
    ),
    "a width beyond any index": config_kind(in_config(hidden_size=10**12), "hidden_size=1000000000000", "below 2**31"),
    "a number that is none": config_kind(in_config(rms_norm_eps=float("nan")), "rms_norm_eps=nan", "a finite number"),
    # config.json of another model
    "other vocabulary": tensor_kind(
        in_config(vocab_size=25), "(2 problems)",
        f"shape: {HEAD} is [24, 8] in {SINGLE}, expected [25, 8]",
        f"shape: {EMBEDDING} is [24, 8] in {SINGLE}, expected [25, 8]",
        "Check that config.json belongs to these files",
    ),
    "more experts": tensor_kind(
        in_config(num_local_experts=3), "(8 problems)", "missing: model.layers.0.mlp.experts.2.down_proj.weight [8, 6]",
        f"shape: {ROUTER} is [2, 8] in {SINGLE}, expected [3, 8]",
    ),
    "fewer experts": tensor_kind(
        in_config(num_local_experts=1), "(8 problems)",
        f"unexpected: model.layers.0.mlp.experts.1.down_proj.weight [8, 6] in {SINGLE}",
        f"shape: {ROUTER} is [2, 8] in {SINGLE}, expected [1, 8]",
    ),
    "more layers": tensor_kind(
        in_config(num_hidden_layers=3), "(15 problems)", "missing: model.layers.2.input_layernorm.weight [8]"
    ),
    "fewer layers": tensor_kind(
        in_config(num_hidden_layers=1), "(15 problems)",
        f"unexpected: model.layers.1.input_layernorm.weight [8] in {SINGLE}",
    ),
    "a hundred layers more": tensor_kind(
        in_config(num_hidden_layers=102), "(1500 problems)", "missing: model.layers.2.", "… and 1460 more"
    ),
    # which files there are
    "no weights": tensor_kind(
        without(SINGLE), "found none of model.safetensors", "but config.json, generation_config.json.",
        "A checkpoint folder needs one of them",
    ),
    "another format": tensor_kind(
        both(without(SINGLE), text("model.gguf", b"GGUF")), "found none of model.safetensors",
        "but config.json, generation_config.json, model.gguf.", "other formats have to be saved as safetensors first",
    ),
    "one of several files without their index": tensor_kind(
        both(without(SINGLE), text("model-00001-of-00002.safetensors", b"")),
        "found model-00001-of-00002.safetensors, one of several", "without model.safetensors.index.json", "Download",
    ),
    "a folder in place of the file": tensor_kind(as_folder, "found none of", f"but {CONFIG}", f"{SINGLE}/."),
    "index naming an absent file": tensor_kind(
        without(shard(2)), "(1 problem)", f"absent: {INDEX} names {shard(2)}, which is not in the folder", of="sharded"
    ),
    "index not JSON": tensor_kind(
        text(INDEX, "{"), "(1 problem)", f"damaged: {INDEX} is not an index of tensors", of="sharded"
    ),
    "index without weight_map": tensor_kind(
        text(INDEX, '{"metadata": {}}'), f"damaged: {INDEX} is not an index of tensors",
        "expected an object with a weight_map of tensor names to file names", of="sharded",
    ),
    "index with an empty weight_map": tensor_kind(
        text(INDEX, '{"weight_map": {}}'), f"damaged: {INDEX}", "expected an object with a weight_map", of="sharded"
    ),
    "index pointing outside": tensor_kind(
        in_json(INDEX, lambda index: index["weight_map"].update({NORM: f"../single/{SINGLE}"})),
        f"damaged: {INDEX}", "expected names of files in the folder itself, found '../single/model.safetensors'",
        of="sharded",
    ),
    "index pointing anywhere": tensor_kind(
        in_json(INDEX, lambda index: index["weight_map"].update({NORM: "/etc/passwd"})),
        f"damaged: {INDEX}", "expected names of files in the folder itself, found '/etc/passwd'", of="sharded",
    ),
    "index naming a file that holds no tensors": tensor_kind(
        in_json(INDEX, lambda index: index["weight_map"].update({NORM: CONFIG})),
        f"damaged: {CONFIG} is not a safetensors file", of="sharded",
    ),
    "index naming a tensor that its file lacks": tensor_kind(
        in_json(INDEX, lambda index: index["weight_map"].update({"x": shard(2)})),
        "(1 problem)", f"index: {INDEX} says that x is in {shard(2)}, which does not have it", of="sharded",
    ),
    "a tensor in two files": tensor_kind(
        set_tensor(HEAD, 24, 8, file=shard(3)),
        "(1 problem)", f"duplicated: {HEAD} is in {shard(1)} and in {shard(3)}", of="sharded",
    ),
    # the file itself
    "empty file": tensor_kind(text(SINGLE, b""), f"damaged: {SINGLE} is not a safetensors file (it has 0 bytes"),
    "file of a few bytes": tensor_kind(text(SINGLE, b"abc"), f"damaged: {SINGLE}", "it has 3 bytes"),
    "a page of HTML": tensor_kind(
        text(SINGLE, b"<!DOCTYPE html><html>404</html>"),
        f"damaged: {SINGLE} is not a safetensors file (it has 31 bytes",
    ),
    "truncated file": tensor_kind(
        cut(SINGLE, -40), "(1 problem)", f"truncated: {SINGLE} has 5688 bytes of data, and its header says 5728"
    ),
    "trailing bytes": tensor_kind(cut(SINGLE, 16), "(1 problem)", f"damaged: {SINGLE} has 16 bytes more than"),
    "header longer than the file": tensor_kind(
        lambda folder: write_raw(folder / SINGLE, b"{}", b"", said=1 << 40),
        f"damaged: {SINGLE}", "it has 10 bytes, and its first eight say that the header alone has 1099511627776",
    ),
    "header not JSON": tensor_kind(
        lambda folder: write_raw(folder / SINGLE, b"{x", b""),
        f"damaged: {SINGLE} is not a safetensors file", "Expecting property name",
    ),
    "header an array": tensor_kind(
        lambda folder: write_raw(folder / SINGLE, b"[]", b""), f"damaged: {SINGLE}", "its header is not a JSON object"
    ),
    "header without tensors": tensor_kind(
        lambda folder: write_raw(folder / SINGLE, b"{}", b""), f"damaged: {SINGLE}", "holds no tensors"
    ),
    "header nested without end": tensor_kind(
        lambda folder: write_raw(folder / SINGLE, b"[" * 10**5, b""), f"damaged: {SINGLE}", "recursion"
    ),
    "a tensor twice in the header": tensor_kind(
        named_twice, "(1 problem)", f"duplicated: {NORM} is twice in the header of {SINGLE}"
    ),
    "an entry that is none": tensor_kind(
        in_header(lambda header: header.update({NORM: [8]})),
        f"damaged: {NORM} in {SINGLE}: expected an object with dtype, shape and data_offsets",
    ),
    "a name that cannot be printed": tensor_kind(
        in_header(lambda header: header.update({"\x1b[2J": header.pop(NORM)})),
        f"damaged: '\\x1b[2J' in {SINGLE} is not a tensor name", "expected printable characters",
    ),
    "offsets that are not the shape's": tensor_kind(
        entry_of(NORM, shape=[9]), f"damaged: {NORM} in {SINGLE}: F32 [9] has 36 bytes, and its data_offsets", "say 32"
    ),
    "a negative size": tensor_kind(entry_of(NORM, shape=[-8]), f"damaged: {NORM} in {SINGLE}: expected an object with"),
    "overlapping tensors": tensor_kind(
        in_header(move(ROUTER, -8)), f"damaged: {ROUTER} in {SINGLE} overlaps the one before it: its data begins at"
    ),
    "a hole between tensors": tensor_kind(
        both(in_header(move(NORM, 8)), cut(SINGLE, 8)),
        f"damaged: {NORM} in {SINGLE} leaves a hole before it: its data begins at 5704, expected 5696",
    ),
    "unknown element type": tensor_kind(
        entry_of(NORM, dtype="C64"), f"damaged: {NORM} in {SINGLE}: dtype 'C64' is not known, expected one of BOOL, U8"
    ),
    # tensors that are not the model's
    "integers as weights": tensor_kind(
        entry_of(NORM, dtype="I32"), "(1 problem)",
        f"dtype: {NORM} is int32 in {SINGLE}, expected one of float32, bfloat16, float16",
    ),
    "weights in float64": tensor_kind(
        set_tensor(NORM, 8, dtype="float64"), "(1 problem)",
        f"dtype: {NORM} is float64 in {SINGLE}", "save the model in float32",
    ),
    "wrong shape": tensor_kind(
        set_tensor(GATE, 8, 6), "(1 problem)", f"shape: {GATE} is [8, 6] in {SINGLE}, expected [6, 8]"
    ),
    "wrong number of axes": tensor_kind(
        set_tensor(NORM, 1, 8), "(1 problem)", f"shape: {NORM} is [1, 8] in {SINGLE}, expected [8]"
    ),
    "missing tensor": tensor_kind(without_tensor(GATE), "(1 problem)", f"missing: {GATE} [6, 8]"),
    "unexpected tensor": tensor_kind(
        set_tensor("model.layers.0.self_attn.q_proj.bias", 8),
        "(1 problem)", f"unexpected: model.layers.0.self_attn.q_proj.bias [8] in {SINGLE}",
    ),
    "fused experts beside single ones": tensor_kind(
        fused_beside, "(2 problems)",
        f"duplicated: model.layers.0.mlp.experts.0.down_proj.weight is in {SINGLE} and, as "
        f"model.layers.0.mlp.experts.down_proj, in {SINGLE}",
    ),
    "fused experts of another number": tensor_kind(
        set_tensor("model.layers.0.mlp.experts.gate_up_proj", 3, 12, 8), "(1 problem)",
        f"shape: model.layers.0.mlp.experts.gate_up_proj is [3, 12, 8] in {SINGLE}, expected [2, 12, 8]",
    ),
    "the same tensor with a prefix and without": tensor_kind(
        set_tensor("norm.weight", 8), "(1 problem)", f"duplicated: {NORM} is in {SINGLE} and, as norm.weight, in"
    ),
    # float8
    "fp8 without its scale": tensor_kind(
        without_tensor(f"{GATE}_scale_inv"), "(1 problem)",
        f"fp8: {GATE} [6, 8] in {SINGLE} has no {GATE}_scale_inv, expected [2, 2]: one scale for 4 × 4 values",
        of="fp8",
    ),
    "fp8 with scales of another grid": tensor_kind(
        set_tensor(f"{GATE}_scale_inv", 1, 2), "(1 problem)",
        f"fp8: {GATE} [6, 8] in {SINGLE} has [1, 2] for its {GATE}_scale_inv, expected [2, 2]", of="fp8",
    ),
    "fp8 with scales that are no numbers": tensor_kind(
        set_tensor(f"{GATE}_scale_inv", 2, 2, dtype="int32"), "(1 problem)",
        f"fp8: {GATE}_scale_inv in {SINGLE} is int32, expected one of float32", of="fp8",
    ),
    "a scale beside a weight that is not fp8": tensor_kind(
        set_tensor(GATE, 6, 8), "(1 problem)", f"unexpected: {GATE}_scale_inv [2, 2] in {SINGLE}", of="fp8"
    ),
    "fp8 that the config does not tell of": tensor_kind(
        in_json(CONFIG, lambda config: config.pop("quantization_config")),
        f"dtype: {GATE} is float8_e4m3fn in {SINGLE}, expected one of float32, bfloat16, float16",
        f"unexpected: {GATE}_scale_inv [2, 2] in {SINGLE}", of="fp8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("of", ["single", "sharded", "fp8"])
def test_the_folders_are_whole_before_they_are_damaged(whole, of):
    qmj.from_pretrained(whole / of)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused_with_file_found_and_expected(whole, kind, tmp_path):
    kind = KINDS[kind]
    folder = Path(shutil.copytree(whole / kind.of, tmp_path / "checkpoint"))
    kind.damage(folder)
    message = refused(folder, kind.error)
    place = 0
    for word in kind.words:
        assert word in message[place:], message
        place = message.index(word, place)


def test_all_damage_of_a_folder_is_reported_at_once(whole, tmp_path):
    folder = Path(shutil.copytree(whole / "single", tmp_path / "checkpoint"))
    both(
        set_tensor(GATE, 8, 6),
        without_tensor(ROUTER),
        set_tensor("model.layers.0.self_attn.q_proj.bias", 8),
        set_tensor(HEAD, 24, 8, dtype="int32"),
        set_tensor("norm.weight", 8),
        in_config(vocab_size=25),
    )(folder)
    message = refused(folder, qmj.CheckpointError)
    assert re.findall(r"^  (\w+): (\S+)", message, re.MULTILINE) == [
        ("duplicated", NORM),
        ("missing", ROUTER),
        ("shape", HEAD),
        ("shape", EMBEDDING),
        ("shape", GATE),
        ("unexpected", "model.layers.0.self_attn.q_proj.bias"),
    ]
    assert "(6 problems)" in message


def test_damage_in_several_files_is_reported_at_once(whole, tmp_path):
    """What is absent or cut off is said once, and not again of every tensor that was in it."""
    folder = Path(shutil.copytree(whole / "sharded", tmp_path / "checkpoint"))
    last = json.loads((folder / INDEX).read_text())["weight_map"][NORM]
    assert last == shard(3)
    both(
        without(shard(1)),
        cut(shard(2), -8),
        set_tensor(NORM, 9, file=shard(3)),
        in_json(INDEX, lambda index: index["weight_map"].update({"x": shard(2)})),
    )(folder)
    message = refused(folder, qmj.CheckpointError)
    assert re.findall(r"^  (\w+): (\S+)", message, re.MULTILINE) == [
        ("absent", INDEX),
        ("truncated", shard(2)),
        ("index", INDEX),
        ("shape", NORM),
    ]


# ---- in place of a folder -------------------------------------------------------------------------------------------


def test_a_file_in_place_of_a_folder_is_refused(whole):
    path = whole / "single" / SINGLE
    with pytest.raises(qmj.CheckpointError, match=f"{path} is a file, expected a checkpoint folder"):
        qmj.from_pretrained(path)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "no folder", "a/b/c", "../nowhere", ""])
def test_a_name_that_is_neither_a_folder_nor_the_hubs_is_refused(name, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises((qmj.CheckpointError, qmj.ConfigError), match="no such f"):
        qmj.from_pretrained(name)
