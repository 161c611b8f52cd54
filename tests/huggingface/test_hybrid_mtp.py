"""The next-token head of a folder, `mtp.*`, comes in by every layout and goes out again; or is dropped, on request."""

import json

import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.checkpoint import open_checkpoint
from qwen_moe_jax.huggingface.convert import convert
from qwen_moe_jax.huggingface.linear_rows import published_name
from qwen_moe_jax.huggingface.summary import summarize
from qwen_moe_jax.huggingface.tensors import hub_parameters
from tests.huggingface.test_checkpoint import assert_bit_equal, read_tensors
from tests.huggingface.test_config import PUBLISHED
from tests.huggingface.test_hybrid_checkpoints import (
    DENSE,
    NEXT,
    SPARSE,
    fused,
    multimodal,
    tensors_of,
    write,
    write_every_way,
)
from tests.huggingface.test_layouts import CONFIG, assert_holds
from tests.referee import logits_of, torch, transformers


def with_head(reference, dtype: str = "bfloat16") -> dict:
    """The tensors of a reference, and a next-token head whose layer is like its full one, with experts one by one."""
    tensors = tensors_of(reference, dtype, float32=True)
    full, generator = "model.layers.1.", torch.Generator().manual_seed(0)
    head = {f"mtp.layers.0.{name.removeprefix(full)}" for name in tensors if name.startswith(full)}
    shapes = {name: tensors[name.replace("mtp.layers.0.", full)].shape for name in head}
    shapes |= {f"mtp.{name}.weight": (32,) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
    shapes["mtp.fc.weight"] = (32, 64)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in sorted(shapes.items())}
    return tensors | {name: value.to(getattr(torch, dtype)) for name, value in drawn.items()}


LAYOUTS = {
    "per-expert": lambda tensors: tensors,
    "fused": fused,
    # Qwen3.5-35B-A3B has fused experts in its layers and single ones in its head; Qwen3.6's are fused in both.
    "fused-layers": lambda tensors: (
        fused({name: value for name, value in tensors.items() if not name.startswith("mtp.")})
        | {name: value for name, value in tensors.items() if name.startswith("mtp.")}
    ),
    "multimodal": lambda tensors: multimodal(fused(tensors)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [NEXT, DENSE, SPARSE])
def test_every_layout_of_a_next_token_head_is_read_bit_equal(references, name, layout, tmp_path):
    reference = references[name]
    tensors = with_head(reference)
    model = qmj.from_pretrained(write(tmp_path / "hub", reference, LAYOUTS[layout](tensors), "bfloat16"))
    assert model.config.num_mtp_layers == 1
    assert_holds(model, tensors)


@pytest.mark.parametrize("name", [NEXT, SPARSE])
def test_a_next_token_head_is_kept_by_every_way_out(references, name, tmp_path):
    reference = references[name]
    tensors = with_head(reference)
    hub = write(tmp_path / "hub", reference, multimodal(fused(tensors)), "bfloat16")
    write_every_way(hub, tmp_path)
    for folder in ("saved", "converted", "back"):
        assert_bit_equal(read_tensors(tmp_path / folder), tensors)
        assert json.loads((tmp_path / folder / CONFIG).read_text())["mtp_num_hidden_layers"] == 1
    for folder in ("saved", "native", "back"):
        assert_holds(qmj.from_pretrained(tmp_path / folder), tensors)


def without_head(tensors: dict) -> dict:
    return {name: value for name, value in tensors.items() if not name.startswith("mtp.")}


@pytest.mark.parametrize("kind", ["hub", "native"])
def test_a_next_token_head_is_dropped_on_request(references, kind, tmp_path):
    tensors = with_head(references[SPARSE])
    folder = write(tmp_path / "hub", references[SPARSE], tensors, "bfloat16")
    if kind == "native":
        convert(folder, tmp_path / "native", to="orbax")
        folder = tmp_path / "native"
    model = qmj.from_pretrained(folder, drop_mtp=True)
    assert model.config.num_mtp_layers == 0
    assert_holds(model, without_head(tensors))
    convert(folder, tmp_path / "converted", drop_mtp=True)
    assert_bit_equal(read_tensors(tmp_path / "converted"), without_head(tensors))


def test_a_config_that_says_none_drops_a_next_token_head(references, tmp_path):
    reference = references[DENSE]
    content = reference.case.config
    content["text_config"]["mtp_num_hidden_layers"] = 0
    folder = write(tmp_path / "hub", reference, with_head(reference), "bfloat16", **content)
    assert_holds(qmj.from_pretrained(folder), without_head(with_head(reference)))
    assert len(open_checkpoint(folder).ignored) == 4 + 11


def test_a_config_with_a_next_token_head_and_files_without_one_is_loaded_without_and_said(references, tmp_path, capsys):
    reference = references[DENSE]
    content = reference.case.config
    content["text_config"]["mtp_num_hidden_layers"] = 1
    folder = write(tmp_path / "hub", reference, tensors_of(reference), **content)
    model = qmj.from_pretrained(folder)
    assert model.config.num_mtp_layers == 0
    said = capsys.readouterr().err
    assert said == f"note: {folder}: it has no tensors mtp.*: the model is loaded without its next-token head.\n"
    qmj.save_pretrained(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / CONFIG).read_text())["mtp_num_hidden_layers"] == 0


def test_a_part_of_a_next_token_head_is_refused_with_the_way_out(references, tmp_path):
    reference = references[DENSE]
    tensors = with_head(reference)
    del tensors["mtp.layers.0.self_attn.k_proj.weight"]
    folder = write(tmp_path / "hub", reference, tensors, "bfloat16")
    with pytest.raises(
        qmj.CheckpointError, match=r"\(1 problem\):\n  missing: mtp\.layers\.0\.self_attn\.k_proj"
    ) as no:
        qmj.from_pretrained(folder)
    assert "or load without the next-token head (drop_mtp=True in Python, convert --drop-mtp, " in str(no.value)
    qmj.from_pretrained(folder, drop_mtp=True)


def test_a_classifier_is_made_without_the_next_token_head(references, tmp_path):
    reference = references[DENSE]
    folder = write(tmp_path / "hub", reference, with_head(reference), "bfloat16")
    model = qmj.SequenceClassifier.from_pretrained(folder, rngs=nnx.Rngs(0))
    assert model.config.num_mtp_layers == 0
    qmj.save_pretrained(model, tmp_path / "saved")
    assert not any(name.startswith("mtp.") for name in read_tensors(tmp_path / "saved"))


def test_transformers_reads_what_we_save_with_a_next_token_head(references, tmp_path):
    reference = references[SPARSE]
    qmj.save_pretrained(
        qmj.from_pretrained(write(tmp_path / "hub", reference, with_head(reference, "float32"))), tmp_path / "saved"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    theirs.set_experts_implementation("eager")
    assert (logits_of(theirs, reference.batch) == reference.logits).all()


def test_a_summary_counts_a_next_token_head_apart(references, tmp_path):
    reference = references[NEXT]
    summary = summarize(write(tmp_path / "hub", reference, with_head(reference), "bfloat16"))
    config = qmj.ModelConfig.from_pretrained(reference.folder)
    assert (summary.parameters, summary.active_parameters) == (config.num_parameters(), config.num_active_parameters())
    assert summary.mtp_parameters == sum(
        value.numel() for name, value in with_head(reference).items() if name.startswith("mtp.")
    )
    assert "mtp.layers.0.mlp.experts.{0-7}.gate_proj.weight" in {row.names for row in summary.rows}


@pytest.mark.parametrize(
    ("name", "layers", "head"),
    [("qwen3-next-80b-a3b-instruct", 74_391, 1_553), ("qwen3.5-27b", 851, 15), ("qwen3.5-35b-a3b", 31_333, 785)],
)
def test_published_models_have_as_many_tensors(name, layers, head):
    """Those of Qwen3.5's heads and of its 27B as counted in the published files, experts one by one."""
    content = json.loads((PUBLISHED / f"{name}.json").read_text())
    content.get("text_config", content)["mtp_num_hidden_layers"] = 1
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(content), rngs=None)
    names = {published_name(str(name), model.config) for of in hub_parameters(model) for name in of.names.flat}
    found = sum(name.startswith("mtp.") for name in names)
    assert (len(names) - found, found) == (layers, head)
