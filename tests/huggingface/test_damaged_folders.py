"""Every kind of damage to a checkpoint folder, and what is said of it: the file, what was found, what was expected."""

import dataclasses
import gc
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
ROUTER, GATE = "model.layers.1.mlp.gate.weight", "model.layers.0.mlp.experts.1.gate_proj.weight"
COMMON = dict(
    vocab_size=24,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    num_experts_per_tok=1,
    max_position_embeddings=32,
    torch_dtype="float32",
)
QWEN = dict(model_type="qwen3_moe", num_experts=2, moe_intermediate_size=6, **COMMON)
MIXTRAL = dict(model_type="mixtral", num_local_experts=2, **COMMON)
FP8 = {"quant_method": "fp8", "weight_block_size": [4, 4]}
DTYPES = {"F32": "float32", "I32": "int32", "F8_E4M3": "float8_e4m3fn"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`single`: one file of a Qwen3-MoE. `sharded`: several files of a Mixtral. `fp8`: the first one, quantised."""
    root = tmp_path_factory.mktemp("whole")
    for name, hub, limit in (("single", QWEN, "5GB"), ("sharded", MIXTRAL, 3000)):
        config = qmj.ModelConfig.from_pretrained(hub)
        qmj.save_pretrained(qmj.CausalLM(config, rngs=nnx.Rngs(0)), root / name, max_shard_size=limit)
    shutil.copytree(root / "single", root / "fp8")
    in_config(quantization_config=FP8)(root / "fp8")

    def quantise(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
            tensors[name + "_scale_inv"] = np.ones([-(-size // 4) for size in tensors[name].shape], np.float32)

    in_tensors(quantise)(root / "fp8")
    return root


# ---- ways to damage a folder ----------------------------------------------------------------------------------------

Damage = Callable[[Path], object]


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes, said: int = 0) -> None:
    """Any text as a header, with its length or another one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((said or len(text)).to_bytes(8, "little") + text + data)


def in_header(edit: Callable[[dict[str, Any]], object], file: str = SINGLE) -> Damage:
    """Changes the header of a file, and not its data."""

    def damage(folder: Path) -> None:
        header, data = read_raw(folder / file)
        edit(header)
        write_raw(folder / file, header, data)

    return damage


def in_tensors(edit: Callable[[dict[str, np.ndarray]], object], file: str = SINGLE) -> Damage:
    """Changes the tensors of a file, which stays a sound one."""

    def damage(folder: Path) -> None:
        header, data = read_raw(folder / file)
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            part = data[slice(*entry["data_offsets"])]
            tensors[name] = np.frombuffer(part, DTYPES[entry["dtype"]]).reshape(entry["shape"])
        edit(tensors)
        written, end = {}, 0
        for name, values in tensors.items():
            start, end = end, end + values.nbytes
            dtype = next(short for short, long in DTYPES.items() if long == values.dtype)
            written[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [start, end]}
        write_raw(folder / file, written, b"".join(values.tobytes() for values in tensors.values()))

    return damage


def set_tensor(name: str, *shape: int, dtype: str = "float32", file: str = SINGLE) -> Damage:
    return in_tensors(lambda tensors: tensors.update({name: np.zeros(shape, dtype)}), file)


def without_tensor(name: str, file: str = SINGLE) -> Damage:
    return in_tensors(lambda tensors: tensors.pop(name), file)


def in_json(file: str, edit: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        edit(content)
        (folder / file).write_text(json.dumps(content))

    return damage


def in_config(**fields: Any) -> Damage:
    return in_json(CONFIG, lambda config: config.update(fields))


def text(file: str, content: bytes | str) -> Damage:
    return lambda folder: (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def without(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def shard(number: int) -> str:
    """The name of a file of the Mixtral; what is in each is asserted where it matters."""
    return f"model-{number:05d}-of-00003.safetensors"


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def cut(file: str, change: int) -> Damage:
    """Cuts bytes off the end of a file, or adds some."""

    def damage(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:change] if change < 0 else content + bytes(change))

    return damage


def move(name: str, by: int) -> Callable[[dict[str, Any]], None]:
    """Moves a tensor in the header: its data begins and ends so many bytes later."""

    def edit(header: dict[str, Any]) -> None:
        header[name]["data_offsets"] = [at + by for at in header[name]["data_offsets"]]

    return edit


def entry_of(name: str, **fields: Any) -> Damage:
    return in_header(lambda header: header[name].update(fields))


def named_twice(folder: Path) -> None:
    header, data = read_raw(folder / SINGLE)
    text = json.dumps(header)
    write_raw(folder / SINGLE, (text[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}').encode(), data)


def fused_beside(folder: Path) -> None:
    in_tensors(lambda tensors: tensors.update({"model.layers.0.mlp.experts.down_proj": np.zeros((2, 8, 6), "f")}))(
        folder
    )


def as_folder(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()


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


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and when it was written."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def open_files(folder: Path) -> list[str]:
    """Files of a folder that this process holds open, where the system tells."""
    held = Path("/proc/self/fd")
    links = [os.readlink(path) for path in held.iterdir() if path.is_symlink()] if held.is_dir() else []
    return [link for link in links if link.startswith(str(folder))]


def refused(folder: Path, error: type[Exception]) -> str:
    """The message of a refusal that left nothing behind: no file, no open file, no array."""
    before, arrays = state_of(folder), len(jax.live_arrays())
    with pytest.raises(error) as failure:
        qmj.from_pretrained(folder)
    message, kind = str(failure.value), failure.type
    del failure
    gc.collect()
    assert kind is error
    assert str(folder) in message
    assert state_of(folder) == before and not open_files(folder) and len(jax.live_arrays()) <= arrays
    return message


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


# ---- PyTorch's files ------------------------------------------------------------------------------------------------

BIN = "pytorch_model.bin"


@pytest.fixture
def bin_folder(whole, tmp_path):
    folder = Path(shutil.copytree(whole / "single", tmp_path / "checkpoint"))
    (folder / SINGLE).unlink()
    return folder


def import_torch():
    return pytest.importorskip("torch", reason="torch is not installed")


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("written_by", ["torch", "pickle"])
def test_code_in_a_pickle_is_not_run(bin_folder, tmp_path, written_by):
    torch = import_torch()
    marker = tmp_path / "ran"
    content = {NORM: Bomb(marker)}
    if written_by == "torch":
        torch.save(content, bin_folder / BIN)
    else:
        (bin_folder / BIN).write_bytes(pickle.dumps(content, protocol=2))
    message = refused(bin_folder, qmj.CheckpointError)
    assert f"damaged: {BIN} is not a PyTorch file of tensors only" in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(content))
    assert marker.exists(), "the pickle has no code in it"


def test_a_pytorch_file_where_torch_is_absent_is_refused_with_the_way_out(bin_folder, monkeypatch):
    (bin_folder / BIN).write_bytes(b"whatever")
    monkeypatch.setitem(sys.modules, "torch", None)
    message = refused(bin_folder, qmj.CheckpointError)
    assert f"{bin_folder / BIN} is a PyTorch file" in message
    for word in ("torch is not installed", "pip install torch", "save_pretrained", "safetensors"):
        assert word in message


def save_bin(folder: Path, content: Any) -> None:
    torch = import_torch()
    torch.save(content(torch), folder / BIN)


PYTORCH_KINDS = {
    "truncated": (lambda torch: {NORM: torch.ones(8)}, cut(BIN, -200), f"damaged: {BIN} is not a PyTorch file"),
    "empty": (lambda torch: {}, text(BIN, b""), f"damaged: {BIN} is not a PyTorch file"),
    "HTML": (lambda torch: {}, text(BIN, b"<html>"), f"damaged: {BIN} is not a PyTorch file"),
    "a list": (lambda torch: [torch.ones(8)], None, f"damaged: {BIN} does not hold a dictionary of tensors by name"),
    "no tensors": (lambda torch: {}, None, f"damaged: {BIN} does not hold a dictionary of tensors by name"),
    "numbers": (lambda torch: {NORM: 1.0}, None, f"damaged: {BIN} does not hold a dictionary of tensors by name"),
    "nested": (lambda torch: {"model": {NORM: torch.ones(8)}}, None, f"damaged: {BIN} does not hold a dictionary"),
    "sparse": (lambda torch: {NORM: torch.ones(8).to_sparse()}, None, f"damaged: {BIN} does not hold a dictionary"),
    "without data": (lambda torch: {NORM: torch.ones(8, device="meta")}, None, f"damaged: {BIN} does not hold"),
    "complex": (
        lambda torch: {NORM: torch.ones(8) + 0j},
        None,
        f"dtype: {NORM} is complex64 in {BIN}, expected one of",
    ),
    "wrong shape": (lambda torch: {NORM: torch.ones(9)}, None, f"shape: {NORM} is [9] in {BIN}, expected [8]"),
}


@pytest.mark.parametrize("kind", PYTORCH_KINDS)
def test_a_damaged_pytorch_file_is_refused(bin_folder, kind):
    content, damage, line = PYTORCH_KINDS[kind]
    save_bin(bin_folder, content)
    if damage is not None:
        damage(bin_folder)
    assert line in refused(bin_folder, qmj.CheckpointError)
