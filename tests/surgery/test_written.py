"""What is written is read back: by `convert` with verify's words, by `save_*` bit for bit."""

import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.main import main
from qwen_moe_jax.huggingface import convert as conversion
from qwen_moe_jax.huggingface import native, save
from qwen_moe_jax.huggingface.linear_rows import in_published_order
from qwen_moe_jax.storage.tensor import CastTensor
from tests.surgery.folders import arrays_of, config_of, write

CASE = "qwen3_moe-plain"
UP, GATE = (f"model.layers.1.mlp.experts.2.{matrix}_proj.weight" for matrix in ("up", "gate"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("a") / "A", arrays_of(CASE), config_of(CASE))


def exchanging(tensors, config):
    """A writer that exchanges two matrices of an expert."""
    found = dict(in_published_order(tensors, config))
    found[UP], found[GATE] = found[GATE], found[UP]
    return found


def test_convert_compares_what_it_wrote_with_the_source(folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "same")]) == 0
    assert "verified: 102 tensors equal to SRC in every bit." in " ".join(capsys.readouterr().out.split())
    assert main(["convert", str(folder), str(tmp_path / "half"), "--to", "orbax", "--dtype", "bfloat16"]) == 0
    assert "equal to SRC up to rounding." in " ".join(capsys.readouterr().out.split())


def test_a_conversion_that_differs_leaves_the_target_as_it_was(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(conversion, "in_published_order", exchanging)
    (tmp_path / "B").mkdir()
    (tmp_path / "B/tokenizer.json").write_text("")
    assert main(["convert", str(folder), str(tmp_path / "B")]) == 1
    said = capsys.readouterr().err
    assert "B is unchanged: what would be written is not the same model" in said
    assert "exchanged: the gate and up matrices of experts are exchanged" in said and "--no-verify" in said
    assert [path.name for path in (tmp_path / "B").iterdir()] == ["tokenizer.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["B"]
    assert main(["convert", str(folder), str(tmp_path / "B"), "--no-verify"]) == 0
    assert "verified" not in capsys.readouterr().out


def test_saving_compares_bit_for_bit_where_it_is_asked_to(tmp_path, monkeypatch):
    model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(config_of("qwen3-plain")), rngs=nnx.Rngs(0))
    qmj.save_pretrained(model, tmp_path / "hub", verify=True)
    qmj.save_orbax(model, tmp_path / "native", verify=True)
    honest = save.write_safetensors

    def rounding(path, tensors, advance):
        name = "model.norm.weight"
        honest(path, tensors | {name: CastTensor(tensors[name], "float16")}, advance)

    monkeypatch.setattr(save, "write_safetensors", rounding)
    with pytest.raises(qmj.CheckpointError, match=r"differs from the model \(1 tensors\)[\s\S]*model\.norm\.weight: "):
        qmj.save_pretrained(model, tmp_path / "hub", verify=True)
    monkeypatch.setattr(native, "unpadded", lambda array, shape: array + np.float32(0))
    qmj.save_orbax(model, tmp_path / "native", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "native"]


def test_an_orbax_array_with_other_values_is_named(tmp_path):
    import jax

    from qwen_moe_jax.huggingface.readback import require_same_arrays
    from qwen_moe_jax.storage.arrays import ArrayTensor

    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    stored = {"a": ArrayTensor(values, "file"), "b": ArrayTensor(values.T.copy(), "file")}
    require_same_arrays(tmp_path, {"a": jax.device_put(values)}, stored)
    with pytest.raises(qmj.CheckpointError, match=r"\(3 tensors\)[\s\S]*a: other values\n  b: other values\n  c: miss"):
        require_same_arrays(tmp_path, dict.fromkeys("abc", jax.device_put(values + 1)), stored)
