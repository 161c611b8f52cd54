"""The forms in which folders hold the same weights are read as one: PyTorch's files, bare decoders, ties, float8."""

import json
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.checkpoint import open_checkpoint
from tests.cases import CASES, FAMILIES, SPARSE_FAMILIES, Case
from tests.distance import assert_near
from tests.referee import Reference, load_file, logits_of, save_file, torch, transformers
from tests.subject import hub_arrays, run

SINGLE, CONFIG = "model.safetensors", "config.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def assert_holds(model, expected: dict) -> None:
    """Every parameter of the model is, bit for bit, the tensor of its Hub name."""
    found = dict(hub_arrays(model))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        bits = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert str(found[name].dtype) == str(value.dtype).removeprefix("torch.") and found[name].shape == value.shape
        assert found[name].tobytes() == bits, name


def assert_answers_as(model, reference, expected: np.ndarray) -> None:
    output = run(model, reference.batch.tokens, reference.batch.mask)
    real = reference.batch.real
    assert_near(np.asarray(output.logits)[real], expected[real], 1e-5, "logits")


def folder_with(source: Path, folder: Path, tensors: dict, **config) -> Path:
    """A checkpoint of these tensors in one file, with some fields of its config changed."""
    folder.mkdir()
    content = json.loads((source / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **config}))
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


# ---- PyTorch's files ------------------------------------------------------------------------------------------------


def as_bin(source: Path, folder: Path, tensors: dict, files: int) -> Path:
    """A checkpoint as transformers 4 wrote it: one pickled file, or several with an index."""
    folder.mkdir()
    shutil.copy(source / CONFIG, folder)
    if files == 1:
        torch.save(tensors, folder / BIN)
        return folder
    names = [f"pytorch_model-{number:05d}-of-{files:05d}.bin" for number in range(1, files + 1)]
    weight_map = {tensor: names[place % files] for place, tensor in enumerate(tensors)}
    for name in names:
        torch.save({tensor: tensors[tensor] for tensor in tensors if weight_map[tensor] == name}, folder / name)
    (folder / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pytorch_files_are_read_bit_equal(references, family, dtype, files, tmp_path):
    source = references[f"{family}-plain"].folder
    tensors = {name: value.to(getattr(torch, dtype)) for name, value in load_file(source / SINGLE).items()}
    folder = as_bin(source, tmp_path / "bin", tensors, files)
    assert_holds(qmj.from_pretrained(folder, dtype=dtype), tensors)


def test_pytorch_files_older_than_their_zip_format_are_read(references, tmp_path):
    source = references["qwen3_moe-plain"].folder
    tensors = load_file(source / SINGLE)
    folder = as_bin(source, tmp_path / "bin", tensors, 1)
    torch.save(tensors, folder / BIN, _use_new_zipfile_serialization=False)
    assert_holds(qmj.from_pretrained(folder), tensors)


def test_parameters_and_views_in_a_pytorch_file_are_read(references, tmp_path):
    """As torch.save writes what lies transposed in memory, is a part of something, or is trained."""
    source = references["qwen3_moe-plain"].folder
    tensors = load_file(source / SINGLE)
    q, k = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
    stored = {
        **tensors,
        q: torch.nn.Parameter(tensors[q]),
        k: tensors[k].T.contiguous().T,
        EMBEDDING: torch.cat([tensors[HEAD], tensors[EMBEDDING]])[97:],
    }
    assert_holds(qmj.from_pretrained(as_bin(source, tmp_path / "bin", stored, 1)), tensors)


@pytest.mark.parametrize("files", [1, 2])
def test_a_pytorch_file_holds_both_tied_tables(references, files, tmp_path):
    reference = references["qwen2-tied"]
    tensors = reference.model.state_dict()
    assert tensors[HEAD].data_ptr() == tensors[EMBEDDING].data_ptr()
    model = qmj.from_pretrained(as_bin(reference.folder, tmp_path / "bin", tensors, files))
    assert model.config.tie_word_embeddings and model.lm_head is None
    assert_answers_as(model, reference, reference.logits)


def test_safetensors_are_preferred_to_a_pytorch_file(references, tmp_path):
    """As transformers does: many repositories hold both."""
    source = references["qwen3-plain"].folder
    folder = Path(shutil.copytree(source, tmp_path / "both"))
    (folder / BIN).write_bytes(b"not even a pickle")
    assert_holds(qmj.from_pretrained(folder), load_file(source / SINGLE))


# ---- a decoder saved by itself --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A reference model of every family with its head tied to the embedding: so its decoder is all there is."""
    root, built = tmp_path_factory.mktemp("tied"), {}

    def build(family: str) -> Reference:
        if family not in built:
            built[family] = Reference(CASES[f"{family}-plain"], root, tie_word_embeddings=True)
        return built[family]

    return build


@pytest.mark.parametrize(
    ("family", "fused"), [*((family, False) for family in FAMILIES), *((family, True) for family in SPARSE_FAMILIES)]
)
def test_a_decoder_saved_by_itself_is_read(tied, family, fused, tmp_path):
    """AutoModel saves names without `model.`, transformers 5 fused experts if configured so."""
    reference = tied(family)
    reference.model.model.save_pretrained(tmp_path, save_original_format=not fused)
    names = load_file(tmp_path / SINGLE).keys()
    assert "norm.weight" in names and any(name.endswith("experts.gate_up_proj") for name in names) == fused
    model = qmj.from_pretrained(tmp_path)
    assert_holds(model, load_file(reference.folder / SINGLE))
    assert_answers_as(model, reference, reference.logits)


def test_a_decoder_saved_by_itself_lacks_an_untied_head(references, tmp_path):
    references["qwen3_moe-plain"].model.model.save_pretrained(tmp_path)
    with pytest.raises(qmj.CheckpointError, match=r"\(1 problem\):\n  missing: lm_head\.weight \[97, 32\]"):
        qmj.from_pretrained(tmp_path)


# ---- tied heads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3_moe-tied"])
def test_a_tied_table_under_the_heads_name_alone_is_both(references, name, tmp_path):
    """transformers ties either to the other."""
    reference = references[name]
    tensors = load_file(reference.folder / SINGLE)
    tensors[HEAD] = tensors.pop(EMBEDDING)
    folder = folder_with(reference.folder, tmp_path / "head", tensors)
    expected = logits_of(transformers.AutoModelForCausalLM.from_pretrained(folder), reference.batch)
    real = reference.batch.real
    assert_near(expected[real], reference.logits[real], 1e-5, "transformers' own")
    model = qmj.from_pretrained(folder)
    assert model.config.tie_word_embeddings
    assert_answers_as(model, reference, expected)


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3_moe-tied"])
def test_a_tied_config_with_another_head_in_the_file_is_untied(references, name, tmp_path):
    """As in transformers 5.23: the file is believed. Dropping the head silently would be a third, wrong model."""
    reference = references[name]
    tensors = load_file(reference.folder / SINGLE)
    tensors[HEAD] = tensors[EMBEDDING].flip(0).contiguous()
    folder = folder_with(reference.folder, tmp_path / "other", tensors)
    expected = logits_of(transformers.AutoModelForCausalLM.from_pretrained(folder), reference.batch)
    assert np.abs(expected - reference.logits).max() > 1, "the head must be able to show"
    model = qmj.from_pretrained(folder)
    assert not model.config.tie_word_embeddings
    assert_holds(model, tensors)
    assert_answers_as(model, reference, expected)
    qmj.save_pretrained(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / CONFIG).read_text())["tie_word_embeddings"] is False


def test_a_tied_table_with_a_number_that_is_none_is_still_tied(references, tmp_path):
    """NaN is not equal to itself, but a copy of a table is that table."""
    source = references["qwen2-tied"].folder
    tensors = load_file(source / SINGLE)
    tensors[EMBEDDING][3, 4] = torch.nan
    tensors[HEAD] = tensors[EMBEDDING].clone()
    checkpoint = open_checkpoint(folder_with(source, tmp_path / "nan", tensors))
    assert checkpoint.config.tie_word_embeddings and HEAD not in checkpoint.tensors


# ---- float8 ---------------------------------------------------------------------------------------------------------

FP8_NAMES = ["qwen2_moe-plain", "qwen3-attention_bias", "qwen3_moe-plain", "mixtral-plain"]
#: Rows and columns. Widths are 32, 48, 24 and 40; heads have 64, 32 and 16 rows.
MULTIPLE, RAGGED, LARGE = (8, 8), (16, 20), (128, 128)
#: As in the Qwen3 FP8 checkpoints: projections and experts; no embedding, head, norm, router or gate.
QUANTISED = re.compile(r"\.(self_attn\.\w_proj|\w+_proj|w[123])\.weight$")


def fp8_tensors(
    tensors: dict, block: tuple[int, int], scale_dtype: str = "float32", pattern: re.Pattern = QUANTISED
) -> dict:
    """Every projection as float8 with the largest value of each block at float8's largest; the others as they are."""
    found = {}
    for name, value in tensors.items():
        if not pattern.search(name):
            found[name] = value
            continue
        rows, columns = value.shape
        grid = [-(-rows // block[0]), -(-columns // block[1])]
        padded = torch.zeros(grid[0] * block[0], grid[1] * block[1])
        padded[:rows, :columns] = value
        largest = padded.reshape(grid[0], block[0], grid[1], block[1]).abs().amax((1, 3))
        scale = (largest / 448).to(getattr(torch, scale_dtype))
        found[name] = (value / spread(scale, block, value.shape)).to(torch.float8_e4m3fn)
        found[name + "_scale_inv"] = scale
    return found


def spread(scale, block: tuple[int, int], shape):
    """A scale for every value, in float32."""
    wide = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]]


def widened_tensors(stored: dict, block: tuple[int, int], dtype: str) -> dict:
    """What the float8 tensors stand for: the product in float32, rounded once."""
    found = {}
    for name, value in stored.items():
        if name + "_scale_inv" in stored:
            value = value.float() * spread(stored[name + "_scale_inv"], block, value.shape)
        if not name.endswith("_scale_inv"):
            found[name] = value.to(getattr(torch, dtype))
    return found


def fp8_folder(source: Path, folder: Path, stored: dict, block: tuple[int, int]) -> Path:
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    return folder_with(source, folder, stored, quantization_config=quantised)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", [MULTIPLE, RAGGED, LARGE], ids=str)
@pytest.mark.parametrize("name", FP8_NAMES)
def test_float8_is_widened_exactly(references, name, block, dtype, tmp_path):
    source = references[name].folder
    stored = fp8_tensors(load_file(source / SINGLE), block)
    kinds = {name.rsplit(".", 2)[-2] for name in stored if name.endswith("_scale_inv")}
    assert kinds == ({"q_proj", "k_proj", "v_proj", "o_proj"} | kinds) and len(kinds) == 7
    model = qmj.from_pretrained(fp8_folder(source, tmp_path / "fp8", stored, block), dtype=dtype)
    assert_holds(model, widened_tensors(stored, block, dtype))


def test_float8_is_dequantised_as_transformers_does(references):
    """Its referee is what transformers runs where there is no GPU; it knows blocks that divide the matrix alone."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    stored = fp8_tensors(load_file(references["qwen3_moe-plain"].folder / SINGLE), MULTIPLE)
    expected = widened_tensors(stored, MULTIPLE, "bfloat16")
    names = [name for name in expected if name + "_scale_inv" in stored]
    assert len(names) > 50
    for name in names:
        theirs = Fp8Dequantize(None)._dequantize_one(stored[name], stored[name + "_scale_inv"], torch.bfloat16)
        assert torch.equal(theirs, expected[name]), name


def test_every_value_of_float8_is_widened(references, tmp_path):
    """All 256, zeros of both signs, subnormal numbers and NaN among them."""
    source = references["qwen3_moe-plain"].folder
    name = "model.layers.1.self_attn.q_proj.weight"
    stored = fp8_tensors(load_file(source / SINGLE), LARGE)
    assert stored[name].shape == (64, 32)
    stored[name] = torch.arange(64 * 32).to(torch.uint8).view(torch.float8_e4m3fn).reshape(64, 32)
    stored[name + "_scale_inv"] = torch.tensor([[0.37]])
    model = qmj.from_pretrained(fp8_folder(source, tmp_path / "fp8", stored, LARGE), dtype="float32")
    found = dict(hub_arrays(model))[name]
    bits = np.arange(64 * 32).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    expected = bits.astype(np.float32).reshape(64, 32) * np.float32(0.37)
    assert np.isnan(expected).sum() == 16
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float8_e8m0fnu"])
def test_scales_may_be_stored_in_less(references, scale_dtype, tmp_path):
    """As exponents alone they are DeepSeek-V4's."""
    source = references["qwen3_moe-plain"].folder
    stored = fp8_tensors(load_file(source / SINGLE), MULTIPLE, scale_dtype)
    model = qmj.from_pretrained(fp8_folder(source, tmp_path / "fp8", stored, MULTIPLE), dtype="float32")
    assert_holds(model, widened_tensors(stored, MULTIPLE, "float32"))


@pytest.mark.parametrize("axes", [dict(expert=4, tensor=2), dict(fsdp=8)], ids=str)
def test_a_device_widens_its_own_part(axes, tmp_path):
    """Whose edges are not the blocks' edges."""
    case = Case(name="even-vocabulary", model_type="qwen3_moe", settings={"vocab_size": 96})
    source = Reference(case, tmp_path / "hub").folder
    stored = fp8_tensors(load_file(source / SINGLE), RAGGED)
    folder = fp8_folder(source, tmp_path / "fp8", stored, RAGGED)
    model = qmj.from_pretrained(folder, dtype="float32", mesh=qmj.make_mesh(**axes))
    gates = model.model.layers.segments[0][0].mlp.experts.gate_proj[...]
    part = gates.sharding.shard_shape(gates.shape)
    assert part[2] % RAGGED[0] and part[3] % RAGGED[1]
    assert_holds(model, widened_tensors(stored, RAGGED, "float32"))


def test_what_was_float8_is_written_unquantised(references, tmp_path):
    reference = references["qwen3_moe-plain"]
    stored = fp8_tensors(load_file(reference.folder / SINGLE), RAGGED)
    model = qmj.from_pretrained(fp8_folder(reference.folder, tmp_path / "fp8", stored, RAGGED), dtype="bfloat16")
    qmj.save_pretrained(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / CONFIG).read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert_holds(qmj.from_pretrained(tmp_path / "saved"), widened_tensors(stored, RAGGED, "bfloat16"))
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    assert again.dtype == torch.bfloat16


# ---- other tensors in the files --------------------------------------------------------------------------------------


def test_tensors_that_no_forward_pass_reads_are_reported_and_ignored(references, tmp_path):
    """Rotary frequencies of old files, and layers that predict several tokens."""
    source = references["qwen3_moe-plain"].folder
    tensors = load_file(source / SINGLE)
    extras = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "mtp.layers.0.mlp.gate.weight",
        "model.mtp.norm.weight",
    ]
    folder = folder_with(source, tmp_path / "more", tensors | {name: torch.ones(8) for name in extras})
    assert sorted(open_checkpoint(folder).ignored) == sorted(extras)
    assert open_checkpoint(source).ignored == ()
    assert_holds(qmj.from_pretrained(folder), tensors)


@pytest.mark.parametrize("head", [qmj.SequenceClassifier, qmj.TokenClassifier])
@pytest.mark.parametrize("name", ["qwen3_moe-plain", "qwen3_moe-tied"])
def test_a_classifier_is_made_of_a_language_model(references, name, head, tmp_path):
    folder = references[name].folder
    tensors = {tensor: value for tensor, value in load_file(folder / SINGLE).items() if tensor != HEAD}
    model = head.from_pretrained(folder, rngs=nnx.Rngs(0))
    scores = {tensor: value for tensor, value in hub_arrays(model) if tensor.startswith("score.")}
    assert scores["score.weight"].shape == (model.config.num_labels, 32)
    assert 0.005 < scores["score.weight"].std() < 0.05
    drawn = {tensor: torch.tensor(value) for tensor, value in scores.items()}
    assert_holds(model, tensors | drawn)
    again = head.from_pretrained(folder, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(again.score.weight[...], model.score.weight[...])
    with pytest.raises(qmj.CheckpointError, match=r"missing: score\.weight \[2, 32\]"):
        head.from_pretrained(folder)
