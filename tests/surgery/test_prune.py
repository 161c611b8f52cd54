"""Mixtures of fewer experts: which are left out is measured as the model itself routes, and the rest is as it was."""

import json

import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.cli.main import main
from qwen_moe_jax.huggingface.checkpoint import open_checkpoint
from qwen_moe_jax.huggingface.sparse_families import sparse_layers
from qwen_moe_jax.surgery import calibration
from qwen_moe_jax.surgery import prune as module
from qwen_moe_jax.surgery.clusters import Cluster, clusters
from qwen_moe_jax.surgery.prune import merge, prune, statistics_of
from qwen_moe_jax.surgery.saliency import by_statistics
from tests.inference.checkpoints import make_checkpoint
from tests.surgery.folders import arrays_of, config_of, write

TOKENS = np.random.default_rng(0).integers(0, 90, (10, 24))
MATRICES = ("gate", "up", "down")


def folder_of(name, tmp_path):
    return write(tmp_path / "source", arrays_of(name), config_of(name))


@pytest.mark.parametrize("name", ["qwen2_moe-mlp_only_layers", "qwen3_next-plain"])
def test_statistics_are_those_of_the_model(name, tmp_path):
    folder = folder_of(name, tmp_path)
    found = statistics_of(folder, TOKENS)
    out = qmj.from_pretrained(folder, dtype="float32")(TOKENS, output_router_logits=True)
    counts = np.asarray(out.router.stats.tokens_per_expert)
    assert [layer.tokens.tolist() for layer in found] == counts.tolist()
    logits = np.asarray(out.router.trace.logits).reshape(len(found), TOKENS.size, -1)
    for layer, own in zip(found, logits, strict=True):
        np.testing.assert_allclose(layer.logits, own, atol=2e-5)


def test_weighted_norms_are_those_of_the_definition(tmp_path):
    """Of the first layer, token by token in float64; and their weighted sum is what the layer adds."""
    folder = folder_of("qwen3_moe-plain", tmp_path)
    out = qmj.from_pretrained(folder, dtype="float32")(TOKENS, output_hidden_states=True, output_router_logits=True)
    left = np.asarray(out.hidden_states[1], np.float64).reshape(TOKENS.size, -1)
    trace = out.router.trace
    experts, weights = (np.asarray(x)[0].reshape(TOKENS.size, -1) for x in (trace.experts, trace.weights))
    checkpoint = open_checkpoint(folder)
    tensors = {name: tensor.read().astype(np.float64) for name, tensor in checkpoint.tensors.items()}
    alone = calibration._layer_alone(checkpoint.config, checkpoint.config.layers[0])
    embedded = calibration._embedded(checkpoint.tensors["model.embed_tokens.weight"], TOKENS)
    mixed = calibration._mixed(alone, embedded, checkpoint.tensors, 0).reshape(TOKENS.size, -1).astype(np.float64)
    scale = np.sqrt((mixed**2).mean(1, keepdims=True) + checkpoint.config.rms_norm_eps)
    normed = mixed / scale * tensors["model.layers.0.post_attention_layernorm.weight"]
    norms, total = np.zeros(8), mixed.copy()
    for token, slot in np.ndindex(*experts.shape):
        path = f"model.layers.0.mlp.experts.{experts[token, slot]}"
        gate, up, down = (tensors[f"{path}.{matrix}_proj.weight"] for matrix in MATRICES)
        x = gate @ normed[token]
        output = down @ (x / (1 + np.exp(-x)) * (up @ normed[token]))
        norms[experts[token, slot]] += weights[token, slot] * np.linalg.norm(output)
        total[token] += weights[token, slot] * output
    found = statistics_of(folder, TOKENS)[0]
    np.testing.assert_allclose(found.weighted_norms, norms, rtol=1e-4)
    np.testing.assert_allclose(total, left, atol=1e-5)
    saliency = by_statistics("reap", [found])[0]
    np.testing.assert_allclose(saliency, norms / np.maximum(found.tokens, 1), rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_moe-plain", "qwen3_moe-plain", "mixtral-plain"])
def test_what_is_kept_is_as_it_was(name, tmp_path):
    folder = folder_of(name, tmp_path)
    old = open_checkpoint(folder)
    count = old.config.moe.num_experts
    reduced = prune(folder, tmp_path / "out", num_experts=count - 1, method="magnitude")
    new = open_checkpoint(tmp_path / "out")
    assert new.config.moe.num_experts == count - 1 and reduced.moe == new.config.moe
    for layer, (before, after) in enumerate(zip(sparse_layers(old.config), sparse_layers(new.config), strict=True)):
        squares = [
            sum((old.tensors[before.expert(e, m)].read().astype(float) ** 2).sum() for m in MATRICES)
            for e in range(count)
        ]
        kept = [expert for expert in range(count) if expert != int(np.argmin(squares))]
        assert [members for (members,) in reduced.groups[layer]] == kept
        assert (new.tensors[after.router].read() == old.tensors[before.router].read()[kept]).all()
        for at, expert in enumerate(kept):
            for matrix in MATRICES:
                same = new.tensors[after.expert(at, matrix)].read() == old.tensors[before.expert(expert, matrix)].read()
                assert same.all()
    rest = {key for key in old.tensors if ".experts." not in key and ".gate." not in key}
    assert all((new.tensors[key].read() == old.tensors[key].read()).all() for key in rest)


def test_pruning_an_expert_that_nobody_chooses_changes_nothing(tmp_path):
    """Expert 5's row of the router is far below all others for every token; by transformers."""
    config = config_of("qwen3_moe-plain") | {"num_experts_per_tok": 2, "norm_topk_prob": True}
    arrays = {key: value.copy() for key, value in arrays_of("qwen3_moe-plain").items()}
    for layer in range(3):
        arrays[f"model.layers.{layer}.mlp.gate.weight"][:, 0] = 0
        arrays[f"model.layers.{layer}.mlp.gate.weight"][5] = np.eye(1, 32)[0] * -50
    arrays["model.embed_tokens.weight"][:, 0] = 0.1
    folder = write(tmp_path / "source", arrays, config)
    for method in ("frequency", "reap"):
        reduced = prune(folder, tmp_path / method, num_experts=7, method=method, tokens=TOKENS)
        for layer, statistics in zip(reduced.groups, statistics_of(folder, TOKENS), strict=True):
            (gone,) = set(range(8)) - {expert for members in layer for expert in members}
            assert statistics.tokens[gone] == statistics.tokens[5] == 0
    import torch
    from transformers import AutoModelForCausalLM

    def logits(path):
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(path).eval()(torch.from_numpy(TOKENS)).logits.numpy()

    np.testing.assert_allclose(logits(tmp_path / "reap"), logits(folder), atol=1e-5)


def test_merging_copies_in_another_order_gives_them_back(tmp_path, monkeypatch):
    """Experts 4 to 7 are 0 to 3 with their hidden units in another order."""
    arrays = {key: value.copy() for key, value in arrays_of("qwen3_moe-plain").items()}
    rng = np.random.default_rng(2)
    for layer, expert in np.ndindex(3, 4):
        order = rng.permutation(24)
        for matrix in MATRICES:
            one, two = (f"model.layers.{layer}.mlp.experts.{e}.{matrix}_proj.weight" for e in (expert, expert + 4))
            arrays[two] = arrays[one][:, order] if matrix == "down" else arrays[one][order]
    folder = write(tmp_path / "source", arrays, config_of("qwen3_moe-plain"))
    pairs = [Cluster(expert, (expert, expert + 4), (0.25, 0.75)) for expert in range(4)]
    monkeypatch.setattr(module, "clusters", lambda tokens, logits, count: pairs)
    merge(folder, tmp_path / "out", num_experts=4, tokens=TOKENS)
    new = {name: tensor.read() for name, tensor in open_checkpoint(tmp_path / "out").tensors.items()}
    for name, value in new.items():
        if ".experts." in name:
            np.testing.assert_allclose(value, arrays[name], atol=1e-7)
    assert (new["model.layers.1.mlp.gate.weight"] == arrays["model.layers.1.mlp.gate.weight"][:4]).all()


def test_clusters_have_the_most_chosen_as_centres_and_weights_that_sum_to_one():
    tokens = np.array([5, 0, 9, 1])
    logits = np.random.default_rng(0).standard_normal((50, 4))
    logits[:, 1] = 2 * logits[:, 2] + 7
    logits[:, 3] = logits[:, 0] - 1
    first, second = clusters(tokens, logits, 2)
    assert (first.centre, first.members, first.weights) == (0, (0, 3), (5 / 6, 1 / 6))
    assert (second.centre, second.members, second.weights) == (2, (1, 2), (0.0, 1.0))


def test_the_commands_calibrate_and_report_what_it_costs(tmp_path, capsys):
    folder = make_checkpoint(tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 40)
    words = [str(folder), str(tmp_path / "out"), "--experts", "6", "--calibrate", str(text), "--window", "32"]
    assert main(["prune", *words, "--heldout", str(text)]) == 0
    said = capsys.readouterr().out
    assert "6 experts in each layer" in said and "sparse layer 0: " in said and " after (" in said
    assert main(["merge", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    members = [sorted(sum(layer, [])) for layer in found["groups"]]
    assert members == [list(range(8))] * len(members)
    assert (tmp_path / "out/tokenizer.json").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["prune", "--experts", "6"], "method='reap' is measured on a text: give one (--calibrate FILE"),
        (["prune", "--experts", "8", "--method", "random"], "num_experts=8: expected 1 to 7"),
        (["prune", "--experts", "1", "--method", "random", "--top-k", "2"], "num_experts_per_tok=2"),
        (["merge", "--experts", "4"], "--calibrate is missing"),
    ],
)
def test_what_cannot_be_is_refused(words, said, tmp_path, capsys):
    folder = folder_of("qwen3_moe-plain", tmp_path)
    assert main([words[0], str(folder), str(tmp_path / "out"), *words[1:]]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
