"""Adapters in PEFT's layout: PEFT over transformers reads ours; we read them beside the weights, or into them."""

import json
import re
import warnings

import jax
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.convert import convert
from qwen_moe_jax.huggingface.tensors import hub_parameters
from qwen_moe_jax.model.lora import is_adapter
from tests.cases import CASES
from tests.distance import assert_near
from tests.subject import run

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TOKENS = np.random.default_rng(0).integers(1, 97, (3, 10))
EXECUTION = qmj.ExecutionConfig(dtype="float32")


def adapted(folder, targets, mesh=None, **settings) -> qmj.CausalLM:
    """A checkpoint with adapters of large random numbers, A and B."""
    model = qmj.from_pretrained(folder, mesh=mesh, execution=EXECUTION)
    qmj.add_lora(model, qmj.LoraConfig(r=4, lora_alpha=6.0, target_modules=targets, **settings), rngs=nnx.Rngs(1))
    for number, parameter in enumerate(hub_parameters(model)):
        if parameter.path.endswith("lora_B"):
            drawn = 0.3 * jax.random.normal(jax.random.key(number), parameter.leaf.shape)
            at = jax.device_put(drawn, parameter.leaf.sharding)
            model = jax.tree.unflatten(
                jax.tree.structure(model),
                [at if leaf is parameter.leaf else leaf for leaf in jax.tree.leaves(model)],
            )
    return model


def logits(model) -> np.ndarray:
    return np.asarray(run(model, TOKENS).logits)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of a sparse model with a shared expert: folders of the base and the adapter, and both models' logits."""
    folder = tmp_path_factory.mktemp("peft")
    config = qmj.ModelConfig.from_pretrained(
        {
            **{"model_type": "qwen2_moe", "vocab_size": 98, "hidden_size": 32, "intermediate_size": 48},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4},
            **{"num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
            **{"initializer_range": 0.2, "mlp_only_layers": [1]},
        }
    )
    base = qmj.CausalLM(config, rngs=nnx.Rngs(0), execution=EXECUTION)
    qmj.save_pretrained(base, folder / "base")
    model = adapted(folder / "base", ("self_attn", "mlp.experts", "shared_expert.down_proj"), use_rslora=True)
    qmj.save_adapter(model, folder / "adapter", base="someone/base", experts="separate")
    return folder, logits(base), logits(model)


def test_an_adapter_is_read_back_beside_its_weights_on_any_mesh(saved):
    folder, without, wanted = saved
    mesh = qmj.make_mesh(expert=4, tensor=2)
    model = qmj.from_pretrained(folder / "base", mesh=mesh, execution=EXECUTION, adapter=folder / "adapter")
    assert_near(logits(model), wanted, 1e-5, "read back")
    assert np.abs(wanted - without).max() > 0.1
    found = {parameter.path: parameter.leaf for parameter in hub_parameters(model) if is_adapter(parameter.path)}
    assert {leaf.dtype.name for leaf in found.values()} == {"float32"}


@pytest.mark.parametrize("to", ["hub", "orbax"])
def test_converting_with_an_adapter_writes_the_sum(saved, tmp_path, to):
    folder, _, wanted = saved
    convert(folder / "base", tmp_path / "merged", to=to, adapter=folder / "adapter")
    assert_near(logits(qmj.from_pretrained(tmp_path / "merged", execution=EXECUTION)), wanted, 1e-5, "converted")


def test_merging_in_the_model_gives_the_same_weights_as_converting(saved, tmp_path):
    folder, _, _ = saved
    model = qmj.from_pretrained(folder / "base", execution=EXECUTION, adapter=folder / "adapter")
    with pytest.raises(qmj.ConfigError, match="save_adapter writes them alone"):
        qmj.save_pretrained(model, tmp_path / "no")
    qmj.merge_lora(model)
    convert(folder / "base", tmp_path / "merged", adapter=folder / "adapter")
    other = qmj.from_pretrained(tmp_path / "merged", execution=EXECUTION)
    for one, two in zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)  # one sum of products in two orders


def test_a_list_of_last_words_where_that_is_all_and_a_pattern_where_others_end_in_them_too(saved):
    folder, _, _ = saved
    written = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "someone/base" and written["use_rslora"] is True
    pattern = written["target_modules"]  # down_proj of the dense layer has no adapter, those of the experts have
    for path, meant in {"mlp.down_proj": False, "mlp.experts.7.down_proj": True, "mlp.experts.down_proj": True}.items():
        assert bool(re.fullmatch(pattern, f"model.layers.1.{path}")) == meant
    assert re.fullmatch(pattern, "model.layers.0.mlp.shared_expert.down_proj")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj has lora_A \[4, 32\] and lora_B \[32, 4\], expected rank 2 of both"),
        ({"r": 8}, r"q_proj has lora_A \[4, 32\] and lora_B \[32, 4\], expected rank 8 of both"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_and_the_model_left_as_it_was(saved, tmp_path, change, message):
    folder, without, _ = saved
    (tmp_path / "adapter").mkdir()
    written = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(written | change))
    tensors = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(tensors)
    model = qmj.from_pretrained(folder / "base", execution=EXECUTION)
    with pytest.raises((qmj.ConfigError, qmj.CheckpointError), match=message):
        qmj.load_adapter(model, tmp_path / "adapter")
    assert model.lora is None
    np.testing.assert_array_equal(logits(model), without)


@pytest.mark.parametrize(
    "family, targets",
    [
        ("qwen3", ("all-linear",)),
        ("qwen3_moe", (*ATTENTION, "experts")),
        # Experts' adapters of this family PEFT 0.21 does not convert for transformers 5, and leaves out.
        ("qwen2_moe", (*ATTENTION, "shared_expert")),
        ("mixtral", (*ATTENTION, "experts")),
    ],
)
def test_peft_over_transformers_gives_our_logits(family, targets, tmp_path):
    peft = pytest.importorskip("peft", reason="the referee of adapters is PEFT, which is not installed here")
    from tests.referee import Reference, torch

    reference = Reference(CASES[f"{family}-plain"], tmp_path)
    model = adapted(reference.folder, targets)
    qmj.save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(reference.model, tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = theirs(torch.tensor(TOKENS)).logits.numpy()
    assert_near(logits(model), wanted, 1e-5, family)
