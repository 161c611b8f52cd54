"""Dense models made sparse, mixtures made larger: logits are kept where that is promised, by transformers."""

import json

import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.main import main
from qwen_moe_jax.huggingface.checkpoint import open_checkpoint
from qwen_moe_jax.surgery.upcycle import grow, split, upcycle
from tests.surgery.folders import arrays_of, config_of, write

TOKENS = np.arange(24).reshape(2, 12) * 5 % 90


def mistral():
    """A Mistral, from a Mixtral's tensors: one layer's expert is its feed-forward part."""
    arrays, config = arrays_of("mixtral-plain"), config_of("mixtral-plain")
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    found = {name: value for name, value in arrays.items() if "block_sparse_moe" not in name}
    for name, value in arrays.items():
        if ".experts.0." in name:
            head, matrix = name.split("block_sparse_moe.experts.0.")
            found[f"{head}mlp.{names[matrix.split('.')[0]]}.weight"] = value
    without = ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef")
    kept = {name: value for name, value in config.items() if name not in without}
    return found, kept | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


def source(family, folder):
    if family == "mistral":
        return write(folder, *mistral())
    return write(folder, arrays_of(family), config_of(family))


def logits(folder):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def assert_same(first, second):
    assert np.abs(first - second).max() <= 1e-5 * max(np.abs(first).max(), 1)


DENSE = ["qwen2-plain", "qwen3-plain", "mistral"]
RECIPES = {
    "copies": dict(num_experts=4, num_experts_per_tok=2),
    "slices": dict(num_experts=6, num_experts_per_tok=4, moe_intermediate_size=0.5),
    "shuffled": dict(num_experts=8, num_experts_per_tok=4, moe_intermediate_size=0.25, shuffle=True, seed=3),
}


def sized(recipe, folder):
    """The recipe with an expert's share of the dense layer as a number of hidden units."""
    width = json.loads((folder / "config.json").read_text())["intermediate_size"]
    size = recipe.get("moe_intermediate_size")
    return recipe | ({} if size is None else {"moe_intermediate_size": int(width * size)})


@pytest.mark.parametrize("family", DENSE)
def test_an_upcycled_model_has_the_logits_of_the_dense_one_by_transformers(family, tmp_path):
    dense = source(family, tmp_path / "dense")
    expected = logits(dense)
    for name, recipe in RECIPES.items():
        grown = upcycle(dense, tmp_path / name, **sized(recipe, dense))
        assert grown.preserved and grown.difference < 1e-5
        assert bool(grown.moe.shared_expert_intermediate_size) == (grown.model_type == "qwen2_moe")
        assert_same(expected, logits(tmp_path / name))


@pytest.mark.parametrize("family", ["qwen2_moe-plain", "qwen3_moe-plain", "mixtral-plain"])
def test_grown_and_split_mixtures_have_the_logits_of_the_old_one(family, tmp_path):
    old = source(family, tmp_path / "old")
    moe = open_checkpoint(old).config.moe
    grown = grow(old, tmp_path / "grown", num_experts=2 * moe.num_experts)
    assert grown.preserved and grown.moe.num_experts_per_tok == 2 * moe.num_experts_per_tok
    finer = split(old, tmp_path / "split", parts=2, shuffle=True)
    assert finer.preserved and finer.moe.moe_intermediate_size * 2 == moe.moe_intermediate_size
    expected = logits(old)
    assert_same(expected, logits(tmp_path / "grown"))
    assert_same(expected, logits(tmp_path / "split"))


def test_what_does_not_keep_the_function_says_why(tmp_path, capsys):
    dense = source("qwen3-plain", tmp_path / "dense")
    words = ["upcycle", str(dense), str(tmp_path / "out"), "--experts", "4", "--top-k", "1", "--expert-size"]
    assert main([*words, "24", "--redraw", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "Logits are not those of SRC:" in said and "50% of the new experts' values are drawn anew" in said
    assert "1 experts a token are no whole number of copies, each of which is 2 experts" in said
    mixture = tmp_path / "out"
    assert main(["grow", str(mixture), str(tmp_path / "more"), "--experts", "6"]) == 0
    assert "6 experts are no whole number of copies of 4" in capsys.readouterr().out
    assert main(["grow", str(mixture), str(tmp_path / "more"), "--top-k", "2"]) == 0
    assert "2 experts a token, where 1 would choose the same ones" in capsys.readouterr().out
    assert main(["split", str(mixture), str(tmp_path / "parts"), "--parts", "3"]) == 0
    assert "12 experts of 8 hidden units in each layer, 3 a token" in capsys.readouterr().out


def test_redrawn_values_have_their_share_and_spread_whatever_is_drawn_first(tmp_path):
    dense = source("qwen3-plain", tmp_path / "dense")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    for out in ("one", "two"):
        upcycle(dense, tmp_path / out, num_experts=4, num_experts_per_tok=2, redraw=0.25, shuffle=False, seed=5)
    first, second = (open_checkpoint(tmp_path / out).tensors[name].read() for out in ("one", "two"))
    assert (first == second).all()
    before = open_checkpoint(dense).tensors["model.layers.1.mlp.up_proj.weight"].read()
    drawn = first != before
    assert 0.2 < drawn.mean() < 0.3
    assert 0.8 < first[drawn].std() / open_checkpoint(dense).config.initializer_range < 1.2


def test_the_check_refuses_before_anything_is_written(tmp_path, monkeypatch):
    from qwen_moe_jax.surgery import upcycle as module

    dense = source("qwen3-plain", tmp_path / "dense")
    honest = module.layer_tensors
    monkeypatch.setattr(module, "layer_tensors", lambda *a, factor, **k: honest(*a, factor=factor * 1.01, **k))
    with pytest.raises(qmj.CheckpointError, match="differs from the old one by 1.0e-02 of its norm"):
        upcycle(dense, tmp_path / "out", num_experts=4, num_experts_per_tok=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["upcycle", "qwen3_moe-plain", "--experts", "4", "--top-k", "2"],
            "cannot be upcycled: expected a dense model",
        ),
        (["upcycle", "qwen3-plain", "--experts", "4", "--top-k", "5"], "num_experts_per_tok=5"),
        (["upcycle", "qwen3-plain", "--experts", "4", "--top-k", "2", "--expert-size", "99"], "expected 1 to 48"),
        (["upcycle", "qwen3-plain", "--experts", "4", "--top-k", "2", "--redraw", "2"], "expected a share from 0 to 1"),
        (["grow", "qwen3-plain", "--experts", "4"], "the model is dense"),
        (["grow", "qwen3_moe-plain", "--experts", "4"], "the model has 8. `prune` and `merge`"),
        (["split", "qwen3_moe-plain", "--parts", "7"], "expected a divisor of the experts' 24 hidden units"),
    ],
)
def test_what_cannot_be_is_refused(words, said, tmp_path, capsys):
    folder = source(words[1], tmp_path / "src")
    assert main([words[0], str(folder), str(tmp_path / "out"), *words[2:]]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
