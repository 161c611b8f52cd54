"""Every layout in which PEFT saves plain LoRA gives PEFT's logits, beside the weights and merged into them."""

import json
import warnings

import jax
import numpy as np
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.convert import convert
from qwen_moe_jax.model.lora import is_adapter
from qwen_moe_jax.nn.parameters import parameters_with_paths
from tests.cases import CASES
from tests.distance import assert_near
from tests.subject import run

peft = pytest.importorskip("peft", reason="the referee of adapters is PEFT, which is not installed here")
from tests.referee import Reference, load_file, save_file, torch  # noqa: E402

TOKENS = np.random.default_rng(0).integers(1, 97, (3, 10))
EXECUTION = qmj.ExecutionConfig(dtype="float32")


def logits(model) -> np.ndarray:
    return np.asarray(run(model, TOKENS).logits)


def with_peft(model, folder) -> np.ndarray:
    """The logits of PEFT's own reading of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(model, folder).eval()
    found = with_torch(theirs)
    theirs.unload()
    return found


def with_torch(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def saved(reference: Reference, folder, *, safe: bool = True, **settings) -> np.ndarray:
    """Saves an adapter of random numbers with PEFT. Returns PEFT's logits after reading it again."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(reference.model, peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | settings)))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder, safe_serialization=safe)
        model.unload()
    return with_peft(reference.model, folder)


CONFIGS = {
    "all-linear of Qwen3-MoE": ("qwen3_moe", {"target_modules": "all-linear"}),
    "all-linear of Mixtral": ("mixtral", {"target_modules": "all-linear"}),
    "fused experts of Qwen2-MoE": (
        "qwen2_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "one fused parameter": ("qwen3_moe", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
    "ranks and alphas by pattern": (
        "qwen3",
        {
            "target_modules": ["q_proj", "down_proj", "o_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
            "alpha_pattern": {r"model\.layers\.0\.self_attn\.o_proj": 3, "down_proj": 16},
        },
    ),
    "rank-stabilised": ("qwen3", {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 9}, "use_rslora": True}),
    "some layers": ("qwen3", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "head and token table": ("qwen3", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "a router's own rank": (
        "qwen3_moe",
        {"target_modules": "all-linear", "rank_pattern": {"gate.weight": 2}, "alpha_pattern": {r"mlp\.gate": 99}},
    ),
    "another initialisation without effect": ("qwen3", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_peft_saves_gives_its_logits_read_written_again_and_merged(kind, tmp_path):
    family, settings = CONFIGS[kind]
    reference = Reference(CASES[f"{family}-plain"], tmp_path)
    wanted = saved(reference, tmp_path / "adapter", **settings)
    model = qmj.from_pretrained(reference.folder, execution=EXECUTION, adapter=tmp_path / "adapter")
    plain = logits(qmj.from_pretrained(reference.folder, execution=EXECUTION))
    assert np.abs(wanted - plain).max() > 0.01
    assert_near(logits(model), wanted, 1e-5, kind)
    for experts in (None, "separate", "fused"):
        qmj.save_adapter(model, tmp_path / str(experts), experts=experts)
        again = qmj.from_pretrained(reference.folder, execution=EXECUTION, adapter=tmp_path / str(experts))
        assert_near(logits(again), wanted, 1e-5, f"{kind}, written {experts}")
        # PEFT drops separate experts of Qwen2-MoE, and does not convert those of which one matrix is adapted. What is
        # written without a choice it loads.
        if experts != "separate" or "fused" not in kind:
            found = with_peft(reference.model, tmp_path / str(experts))
            assert_near(found, wanted, 1e-5, f"{kind}, PEFT reads {experts}")
    convert(reference.folder, tmp_path / "merged", adapter=tmp_path / "adapter")
    assert_near(logits(qmj.from_pretrained(tmp_path / "merged", execution=EXECUTION)), wanted, 1e-5, f"{kind}, merged")


def test_fused_experts_written_and_read_again_keep_their_ranks(tmp_path):
    reference = Reference(CASES["qwen3_moe-plain"], tmp_path)
    model = qmj.from_pretrained(reference.folder, execution=EXECUTION)
    qmj.add_lora(model, qmj.LoraConfig(r=4, target_modules=("experts", "q_proj")), rngs=nnx.Rngs(0))
    qmj.save_adapter(model, tmp_path / "adapter", experts="fused")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert written["rank_pattern"] == {r".*\.gate_up_proj": 8, r".*\.down_proj": 4}
    again = qmj.from_pretrained(reference.folder, execution=EXECUTION, adapter=tmp_path / "adapter")
    shapes = {path: param.shape for path, param in parameters_with_paths(model) if is_adapter(path)}
    assert {path: param.shape for path, param in parameters_with_paths(again) if is_adapter(path)} == shapes


def test_adapters_in_a_pytorch_file_are_read(tmp_path):
    reference = Reference(CASES["qwen3-plain"], tmp_path)
    wanted = saved(reference, tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    model = qmj.from_pretrained(reference.folder, execution=EXECUTION, adapter=tmp_path / "adapter")
    assert_near(logits(model), wanted, 1e-5, "adapter_model.bin")


def test_an_adapter_of_a_tied_token_table_leaves_the_head_as_it_was(tmp_path):
    reference = Reference(CASES["qwen3_moe-tied"], tmp_path)
    wanted = saved(reference, tmp_path / "adapter", target_modules=["embed_tokens"])
    model = qmj.from_pretrained(reference.folder, execution=EXECUTION, adapter=tmp_path / "adapter")
    assert_near(logits(model), wanted, 1e-5, "beside")
    convert(reference.folder, tmp_path / "merged", adapter=tmp_path / "adapter")
    assert_near(logits(qmj.from_pretrained(tmp_path / "merged", execution=EXECUTION)), wanted, 1e-5, "merged")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"])
def test_an_adapter_that_changes_the_base_is_refused_with_the_way_out(init, tmp_path):
    reference = Reference(CASES["qwen3-plain"], tmp_path)
    saved(reference, tmp_path / "adapter", target_modules=["q_proj"])
    refused = refusal(reference, tmp_path, {"init_lora_weights": init})
    assert f"init_lora_weights='{init}' is not supported" in refused and "merge_and_unload" in refused


def test_peft_does_change_the_base_for_pissa_and_its_own_conversion_is_read(tmp_path):
    reference = Reference(CASES["qwen3-plain"], tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
        model = peft.get_peft_model(type(reference.model).from_pretrained(reference.folder), config)
        model.save_pretrained(tmp_path / "initial")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data *= 1.5
        trained = with_torch(model.eval())
        model.peft_config["default"].init_lora_weights = True  # as PEFT's guide on PiSSA does before it converts
        model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=tmp_path / "initial")
    ours = qmj.from_pretrained(reference.folder, execution=EXECUTION, adapter=tmp_path / "adapter")
    assert_near(logits(ours), trained, 1e-4, "converted by PEFT")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens=[5, 6] is not supported"),
        ({"kasa_config": {"x": 1}}, "kasa_config={'x': 1} is not supported: expected it to be absent"),
        ({"a_field_of_tomorrow": "on"}, "a_field_of_tomorrow='on' is not supported: expected it to be absent, null"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"velora_config": {"scale": 2}}, "velora_config"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"modules_to_save": ["lm_head"]}, "Whole modules were trained along with the adapters: merge it there"),
        ({"bias": "all"}, "bias='all' is not supported: expected 'none'"),
        ({"init_lora_weights": "mystery"}, "init_lora_weights='mystery'"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern"),
        ({"r": 8}, "q_proj has lora_A [4, 32] and lora_B [64, 4], expected rank 8"),
    ],
)
def test_a_field_that_peft_may_act_on_is_refused_by_name_in_both_ways_of_reading(change, message, tmp_path):
    reference = Reference(CASES["qwen3-plain"], tmp_path)
    saved(reference, tmp_path / "adapter", target_modules=["q_proj"])
    assert message in refusal(reference, tmp_path, change)


def test_fields_that_are_unknown_and_neutral_are_taken(tmp_path):
    reference = Reference(CASES["qwen3-plain"], tmp_path)
    wanted = saved(reference, tmp_path / "adapter", target_modules=["q_proj"])
    edit(tmp_path / "adapter", {"of_tomorrow": None, "another": False, "third": {}, "fourth": [], "lora_dropout": 0.1})
    model = qmj.from_pretrained(reference.folder, execution=EXECUTION, adapter=tmp_path / "adapter")
    assert_near(logits(model), wanted, 1e-5, "neutral")


def test_an_adapter_of_another_base_is_refused_where_it_carries_embeddings(tmp_path):
    reference = Reference(CASES["qwen3-plain"], tmp_path)
    saved(reference, tmp_path / "adapter", target_modules=["embed_tokens"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][3] += 1
    save_file(tensors, file)
    assert "model.embed_tokens.weight in adapter_model.safetensors is not the base's" in refusal(
        reference, tmp_path, {}
    )


def test_adapters_of_head_and_token_table_are_sharded_and_count_in_the_losses(tmp_path):
    reference = Reference(CASES["qwen3-plain"], tmp_path)
    wanted = saved(reference, tmp_path / "adapter", target_modules=["lm_head", "embed_tokens"])
    mesh = qmj.make_mesh(fsdp=2, tensor=2, data=2)
    model = qmj.from_pretrained(reference.folder, mesh=mesh, execution=EXECUTION, adapter=tmp_path / "adapter")
    tokens = np.concatenate([TOKENS, TOKENS[:1]])
    wanted = np.concatenate([wanted, wanted[:1]])
    assert_near(run(model, tokens).logits, wanted, 1e-5, "logits")
    log_probs = wanted - np.log(np.exp(wanted).sum(-1, keepdims=True))
    losses = jax.jit(lambda model: model.token_losses(tokens, tokens, chunk=3).losses)(model)
    assert_near(losses, -np.take_along_axis(log_probs, tokens[..., None], -1)[..., 0], 1e-5, "losses")


def edit(folder, change) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def refusal(reference, tmp_path, change) -> str:
    """The message with which both ways of reading refuse an adapter."""
    edit(tmp_path / "adapter", change)
    with pytest.raises((qmj.ConfigError, qmj.CheckpointError)) as loading:
        qmj.from_pretrained(reference.folder, execution=EXECUTION, adapter=tmp_path / "adapter")
    with pytest.raises((qmj.ConfigError, qmj.CheckpointError)) as converting:
        convert(reference.folder, tmp_path / "merged", adapter=tmp_path / "adapter")
    assert str(loading.value) == str(converting.value) and not (tmp_path / "merged").exists()
    return str(loading.value)
