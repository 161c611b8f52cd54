"""config.json of the hybrid families → ModelConfig → config.json: the rules of transformers, and the refusals."""

import dataclasses
import json

import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.config import LinearAttentionConfig
from qwen_moe_jax.huggingface.export_config import config_to_hub
from qwen_moe_jax.huggingface.unused_fields import say_unused_fields
from tests.cases import ABSENT, HYBRID_FAMILIES, NESTED, Case
from tests.huggingface.test_config import PUBLISHED, meaning, sparse_layers

TEXT_FAMILIES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
#: A full layer with the experts of the others, a projection [D, 2 D] and three norms.
MTP_PARAMETERS = {
    "qwen3-next-80b-a3b-instruct": 1_650_471_424,
    "qwen3.5-0.8b": 20_452_864,
    "qwen3.5-2b": 60_828_160,
    "qwen3.5-4b": 120_599_552,
    "qwen3.5-9b": 243_290_624,
    "qwen3.5-27b": 424_699_392,
    "qwen3.5-35b-a3b": 844_640_768,
    "qwen3.5-122b-a10b": 2_523_679_232,
    "qwen3.5-397b-a17b": 6_595_568_128,
    "qwen3.8-2.4t-a95b": 26_378_027_520,
}


def read(family: str, outer: dict | None = None, **settings) -> qmj.ModelConfig:
    """A small config of a family, with fields of its text model changed or (ABSENT) left out."""
    case = Case(name="", model_type=family, settings=settings, outer=outer or {})
    return qmj.ModelConfig.from_pretrained(case.config)


def published(name: str) -> qmj.ModelConfig:
    return qmj.ModelConfig.from_pretrained(PUBLISHED / f"{name}.json")


def mixers(config: qmj.ModelConfig) -> str:
    return "".join(kind.mixer[0] for kind in config.layers)


@pytest.mark.parametrize("name", MTP_PARAMETERS)
def test_published_config_has_the_next_token_head_of_the_real_model(name):
    config = dataclasses.replace(published(name), num_mtp_layers=1)
    assert config.num_mtp_parameters() == MTP_PARAMETERS[name]


def test_qwen3_5_35b_a3b_is_read_field_by_field():
    config = published("qwen3.5-35b-a3b")
    assert (config.model_type, config.hidden_size, config.vocab_size) == ("qwen3_5_moe_text", 2048, 248_320)
    assert (mixers(config), sparse_layers(config)) == ("lllf" * 10, list(range(40)))
    attention = config.attention
    assert (attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim) == (16, 2, 256)
    assert (attention.output_gate, attention.qk_norm, attention.qkv_bias, attention.o_bias) == (
        True,
        True,
        False,
        False,
    )
    assert (config.rope.rope_type, config.rope.rope_theta, config.rope.partial_rotary_factor) == ("default", 1e7, 0.25)
    assert (config.zero_centered_norm, config.num_mtp_layers, config.tie_word_embeddings) == (True, 1, False)
    assert config.linear_attention == LinearAttentionConfig(
        num_key_heads=16, num_value_heads=32, key_head_dim=128, value_head_dim=128, conv_kernel_dim=4
    )
    moe = config.moe
    assert (moe.num_experts, moe.num_experts_per_tok, moe.moe_intermediate_size) == (256, 8, 512)
    assert (moe.norm_topk_prob, moe.shared_expert_intermediate_size) == (True, 512)
    assert (config.dtype, config.eos_token_id, config.max_position_embeddings) == ("bfloat16", (248_044,), 262_144)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3_next", (151_936, 2048, 5632, 48, 16, 2, 256)),
        ("qwen3_5_text", (248_320, 4096, 12_288, 32, 16, 4, 256)),
        ("qwen3_5_moe_text", (248_320, 2048, 512, 40, 16, 2, 256)),
    ],
)
def test_absent_fields_have_transformers_defaults(family, expected):
    config = qmj.ModelConfig.from_pretrained({"model_type": family})
    attention = config.attention
    assert (
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        attention.num_attention_heads,
        attention.num_key_value_heads,
        attention.head_dim,
    ) == expected
    assert config.linear_attention == LinearAttentionConfig(
        num_key_heads=16, num_value_heads=32, key_head_dim=128, value_head_dim=128, conv_kernel_dim=4
    )
    assert mixers(config) == "lllf" * (config.num_hidden_layers // 4)
    assert (config.rope.rope_theta, config.rope.partial_rotary_factor) == (1e4, 0.25)
    assert (config.rms_norm_eps, config.max_position_embeddings, config.num_mtp_layers) == (1e-6, 32_768, 0)
    assert (config.tie_word_embeddings, config.eos_token_id) == (False, ())
    if config.moe is not None:
        experts = {"qwen3_next": (512, 10), "qwen3_5_moe_text": (256, 8)}[family]
        assert (config.moe.num_experts, config.moe.num_experts_per_tok) == experts
        assert (config.moe.moe_intermediate_size, config.moe.shared_expert_intermediate_size) == (512, 512)
        assert (config.moe.norm_topk_prob, config.moe.router_aux_loss_coef) == (True, 0.001)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "lllf"),
        ({"full_attention_interval": 2}, "lflf"),
        ({"full_attention_interval": 1}, "ffff"),
        ({"full_attention_interval": 9}, "llll"),
        ({"layer_types": ["full_attention", "linear_attention"] * 2, "full_attention_interval": 4}, "flfl"),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, "lllf"),
    ],
)
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_linear_layers_follow_layer_types_or_the_interval(family, settings, expected):
    config = read(family, **settings)
    assert mixers(config) == expected
    assert (config.linear_attention is None) == ("l" not in expected)
    assert meaning(qmj.ModelConfig.from_pretrained(config_to_hub(config))) == meaning(config)


def test_an_interval_that_layer_types_overrule_is_not_written():
    other = config_to_hub(read("qwen3_next", layer_types=["linear_attention", "full_attention"] * 2))
    assert "full_attention_interval" not in other
    stale = read("qwen3_next", full_attention_interval=4, layer_types=["linear_attention", "full_attention"] * 2)
    assert "full_attention_interval" not in config_to_hub(stale)
    assert config_to_hub(read("qwen3_next", full_attention_interval=2))["full_attention_interval"] == 2


def test_top_k_weights_are_renormalised_by_the_field_in_qwen3_next_and_always_in_qwen3_5():
    assert read("qwen3_next").moe.norm_topk_prob is True
    assert read("qwen3_next", norm_topk_prob=False).moe.norm_topk_prob is False
    assert read("qwen3_5_moe_text", norm_topk_prob=False).moe.norm_topk_prob is True


def test_every_layer_of_qwen3_5_moe_is_sparse_and_those_of_qwen3_next_by_its_fields():
    settings = dict(mlp_only_layers=[0], decoder_sparse_step=2)
    assert sparse_layers(read("qwen3_5_moe_text", **settings)) == [0, 1, 2, 3]
    assert sparse_layers(read("qwen3_next", **settings)) == [1, 3]
    assert sparse_layers(read("qwen3_next", num_experts=0)) == []
    assert sparse_layers(read("qwen3_5_text")) == []


def test_the_number_of_experts_has_no_second_name():
    for family in ("qwen3_next", "qwen3_5_moe_text"):
        assert read(family, num_local_experts=3).moe.num_experts == 8
        assert "num_local_experts" not in config_to_hub(read(family, num_local_experts=3))


def test_keys_that_a_family_does_not_have_are_not_written():
    absent = {"intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}
    written = config_to_hub(read("qwen3_5_moe_text", norm_topk_prob=False, mlp_only_layers=[0], intermediate_size=7))
    assert not absent & written.keys()
    assert {"intermediate_size", "norm_topk_prob"} <= config_to_hub(read("qwen3_next")).keys()


# ---- rope -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "theta", "factor"),
    [
        pytest.param({"rope_parameters": None}, 1e4, 0.25, id="absent"),
        pytest.param({"rope_parameters": None, "rope_theta": 5e6}, 5e6, 0.25, id="theta-alone"),
        pytest.param(
            {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e6, "partial_rotary_factor": 0.5},
            5e6, 0.5, id="top-level-fills-in",
        ),
        pytest.param(
            {
                "rope_parameters": {"rope_theta": 3e5, "partial_rotary_factor": 1.0},
                "rope_theta": 5e6,
                "partial_rotary_factor": 0.5,
            },
            3e5, 1.0, id="rope-parameters-win",
        ),
        pytest.param(
            {
                "rope_parameters": {"rope_theta": 3e5, "partial_rotary_factor": 1.0},
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
            1e4, 0.25, id="rope-scaling-replaces-rope-parameters",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe"])
def test_the_rotated_share_of_a_head_is_read_from_old_and_new_keys(family, settings, theta, factor):
    config = read(family, **settings)
    assert (config.rope.rope_theta, config.rope.partial_rotary_factor) == (theta, factor)
    written = config_to_hub(config)
    assert written["rope_parameters"]["partial_rotary_factor"] == written["partial_rotary_factor"] == factor
    assert meaning(qmj.ModelConfig.from_pretrained(written)) == meaning(config)


def test_the_sections_of_a_multimodal_rope_mean_nothing_in_a_text_and_are_kept():
    config = read("qwen3_5")
    plain = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    assert meaning(config) == meaning(read("qwen3_5", rope_parameters=plain))
    written = config_to_hub(config)["rope_parameters"]
    assert written == plain | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}


# ---- multimodal configs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NESTED)
def test_of_a_multimodal_config_the_text_part_is_read_and_written(family):
    config = read(family)
    assert meaning(config) == meaning(read(NESTED[family]))
    written = config_to_hub(config)
    assert written["model_type"] == NESTED[family] and written["architectures"][0].endswith("ForCausalLM")
    assert not {"text_config", "vision_config", "image_token_id"} & written.keys()


@pytest.mark.parametrize("family", NESTED)
def test_the_head_is_tied_by_the_text_configs_own_flag(family):
    """As AutoModelForCausalLM takes it; ForConditionalGeneration takes the outer flag."""
    assert not read(family, outer={"tie_word_embeddings": True}).tie_word_embeddings
    assert read(family, tie_word_embeddings=True).tie_word_embeddings


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_may_be_outside_the_text_config(key):
    assert read("qwen3_5", torch_dtype=ABSENT, outer={key: "bfloat16"}).dtype == "bfloat16"
    assert read("qwen3_5", torch_dtype="float16", outer={key: "bfloat16"}).dtype == "float16"


def test_a_text_config_of_another_model_or_none_is_refused():
    with pytest.raises(qmj.ConfigError, match="text_config=None.*expected an object.*qwen3_5_text"):
        qmj.ModelConfig.from_pretrained({"model_type": "qwen3_5", "hidden_size": 64})
    with pytest.raises(qmj.ConfigError, match="text_config: model_type='qwen2'.*expected 'qwen3_5_text'"):
        read("qwen3_5", model_type="qwen2")


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_text"])
def test_the_text_config_may_name_either_model_type(model_type):
    assert meaning(read("qwen3_5", model_type=model_type)) == meaning(read("qwen3_5"))


def test_a_misspelt_key_of_a_text_config_is_refused():
    with pytest.raises(qmj.ConfigError, match="num_expert_per_tok.*expected num_experts_per_tok"):
        read("qwen3_5_moe", num_expert_per_tok=2)


def test_keys_of_a_text_config_that_are_not_acted_on_are_named(tmp_path, capsys):
    case = Case(name="", model_type="qwen3_5_moe", settings={"mlp_only_layers": [1], "attn_temperature": 2.0})
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    say_unused_fields(tmp_path)
    said = capsys.readouterr().err
    assert "not acted on: mlp_only_layers=[1], attn_temperature=2.0." in said


def test_keys_of_the_published_configs_are_all_known(tmp_path, capsys):
    for name in ("qwen3.5-35b-a3b", "qwen3.5-27b", "qwen3.8-2.4t-a95b", "qwen3-next-80b-a3b-instruct"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes((PUBLISHED / f"{name}.json").read_bytes())
        say_unused_fields(folder)
    assert capsys.readouterr().err == ""


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        pytest.param(
            "qwen3_next", {"layer_types": ["sliding_attention"] * 4},
            ("layer_types", "sliding_attention", "full_attention", "linear_attention"), id="sliding",
        ),
        pytest.param("qwen3_5", {"layer_types": ["full_attention"]}, ("layer_types", "4 entries"), id="too-short"),
        pytest.param("qwen3_5_text", {"full_attention_interval": 0}, ("full_attention_interval", "0"), id="interval"),
        pytest.param("qwen3_next", {"head_dim": None}, ("head_dim", "None", "integer"), id="head-dim-null"),
        pytest.param(
            "qwen3_next", {"linear_num_value_heads": 3},
            ("linear_num_value_heads", "3", "linear_num_key_heads=2"), id="value-heads",
        ),
        pytest.param(
            "qwen3_5_text", {"mtp_num_hidden_layers": 2}, ("mtp_num_hidden_layers", "2", "without"), id="two-heads",
        ),
        pytest.param(
            "qwen3_next", {"partial_rotary_factor": 0.2}, ("partial_rotary_factor", "0.2", "even"), id="odd-rotary",
        ),
    ],
)  # fmt: skip
def test_refusal_names_field_value_and_what_is_supported(family, settings, words):
    with pytest.raises(qmj.ConfigError) as failure:
        read(family, **settings)
    for word in words:
        assert word in str(failure.value)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen4_exp", "hyper-connections"),
        ("qwen4_exp_text", "hyper-connections"),
        ("qwen3_vl", "images or sound"),
        ("qwen3_vl_moe", "images or sound"),
        ("qwen3_vl_moe_text", "images or sound"),
        ("qwen2_5_vl", "images or sound"),
        ("qwen3_omni_moe", "images or sound"),
        ("qwen3_omni_moe_talker_text", "images or sound"),
        ("qwen2_audio", "images or sound"),
        ("qwen3_5_moe_vision", "images or sound"),
    ],
)
def test_relatives_are_refused_by_name_with_what_is_supported(model_type, reason):
    with pytest.raises(qmj.ConfigError) as failure:
        qmj.ModelConfig.from_pretrained({"model_type": model_type})
    for word in (f"model_type={model_type!r}", reason, *HYBRID_FAMILIES, "qwen3_moe"):
        assert word in str(failure.value)


# ---- the way back ---------------------------------------------------------------------------------------------------


def test_that_files_have_float32_parameters_is_no_reason_to_refuse_the_config():
    config = read("qwen3_5_text")
    linear = dataclasses.replace(config.linear_attention, float32_parameters=True)
    assert config_to_hub(dataclasses.replace(config, linear_attention=linear)) == config_to_hub(config)


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_the_next_token_head_is_in_the_config_that_is_written(family):
    config = read(family, mtp_num_hidden_layers=1)
    assert config.num_mtp_layers == 1 and config_to_hub(config)["mtp_num_hidden_layers"] == 1
    without = dataclasses.replace(config, num_mtp_layers=0)
    assert config_to_hub(without)["mtp_num_hidden_layers"] == 0
    assert "mtp_num_hidden_layers" not in config_to_hub(read(family))


def test_what_a_family_cannot_express_is_refused():
    moe = read("qwen3_5_moe_text")
    unnormalised = dataclasses.replace(moe, moe=dataclasses.replace(moe.moe, norm_topk_prob=False))
    with pytest.raises(qmj.ConfigError, match="moe=.*cannot be written as model_type='qwen3_5_moe_text'"):
        config_to_hub(unnormalised)
    with pytest.raises(qmj.ConfigError, match="cannot be written as model_type='qwen3_moe'"):
        config_to_hub(dataclasses.replace(moe, model_type="qwen3_moe", linear_attention=None, layers=moe.layers[3:]))
