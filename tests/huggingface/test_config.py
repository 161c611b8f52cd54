"""config.json → ModelConfig → config.json: every rule of transformers 5.23, old keys and new, and the refusals."""

import json
from pathlib import Path

import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.export_config import config_to_hub
from tests.cases import ABSENT, CASES, COMMON, FAMILIES, HYBRID_CASES, PLAIN

PUBLISHED = Path(__file__).parents[2] / "configs" / "models"

# Counted on transformers 5.23 modules built on torch's meta device: all parameters with tied ones once; those one token
# passes through (of the routed experts, num_experts_per_tok); and these without an untied input embedding.
PARAMETERS = {
    "mixtral-8x22b-instruct-v0.1": (140_630_071_296, 39_161_468_928, 38_960_142_336),
    "mixtral-8x7b-v0.1": (46_702_792_704, 12_879_925_248, 12_748_853_248),
    "qwen1.5-moe-a2.7b-chat": (14_315_784_192, 2_689_173_504, 2_378_008_576),
    "qwen2-0.5b-instruct": (494_032_768, 494_032_768, 494_032_768),
    "qwen2-57b-a14b": (57_408_658_944, 14_249_270_784, 13_704_732_160),
    "qwen2.5-7b-instruct": (7_615_616_512, 7_615_616_512, 7_070_619_136),
    "qwen3-0.6b": (596_049_920, 596_049_920, 596_049_920),
    "qwen3-235b-a22b": (235_093_634_560, 22_190_763_520, 21_568_433_664),
    "qwen3-235b-a22b-instruct-2507": (235_093_634_560, 22_190_763_520, 21_568_433_664),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704, 3_041_867_776),
    "qwen3-8b": (8_190_735_360, 8_190_735_360, 7_568_405_504),
    "qwen3-coder-30b-a3b-instruct": (30_532_122_624, 3_353_032_704, 3_041_867_776),
    "qwen3-coder-480b-a35b-instruct": (480_154_875_392, 35_474_765_312, 34_541_270_528),
    "qwen3-next-80b-a3b-instruct": (79_674_391_296, 3_874_929_408, 3_563_764_480),
    "qwen3.5-0.8b": (752_393_024, 752_393_024, 752_393_024),
    "qwen3.5-2b": (1_881_825_088, 1_881_825_088, 1_881_825_088),
    "qwen3.5-4b": (4_205_751_296, 4_205_751_296, 4_205_751_296),
    "qwen3.5-9b": (8_953_803_264, 8_953_803_264, 7_936_684_544),
    "qwen3.5-27b": (26_895_998_464, 26_895_998_464, 25_624_600_064),
    "qwen3.5-35b-a3b": (34_660_610_688, 3_454_988_928, 2_946_429_568),
    "qwen3.5-122b-a10b": (122_111_526_912, 9_771_288_576, 9_008_449_536),
    "qwen3.5-397b-a17b": (396_346_350_336, 17_349_040_896, 16_331_922_176),
    "qwen3.8-2.4t-a95b": (2_419_804_697_984, 95_287_866_752, 93_253_629_312),
}


def hub(family: str, **settings) -> dict:
    """A small config.json of a family, with fields changed or (ABSENT) left out."""
    merged = {"model_type": family, **COMMON, **PLAIN[family], **settings}
    return {key: value for key, value in merged.items() if value is not ABSENT}


def read(family: str, **settings) -> qmj.ModelConfig:
    return qmj.ModelConfig.from_pretrained(hub(family, **settings))


def sliding_layers(config: qmj.ModelConfig) -> list[int]:
    return [index for index, kind in enumerate(config.layers) if kind.mixer == "sliding"]


def sparse_layers(config: qmj.ModelConfig) -> list[int]:
    return [index for index, kind in enumerate(config.layers) if kind.mlp == "sparse"]


def meaning(config: qmj.ModelConfig) -> dict:
    """The config without the fields that are only carried along for export."""
    return {name: value for name, value in vars(config).items() if name != "hub_fields"}


# ---- published configurations ---------------------------------------------------------------------------------------


def test_the_table_of_parameters_names_every_published_config():
    assert sorted(PARAMETERS) == sorted(path.stem for path in PUBLISHED.glob("*.json"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_config_has_the_parameters_of_the_real_model(name):
    config = qmj.ModelConfig.from_pretrained(json.loads((PUBLISHED / f"{name}.json").read_text()))
    total, active, active_without_embeddings = PARAMETERS[name]
    assert config.num_parameters() == total
    assert config.num_active_parameters() == active
    assert config.num_active_parameters(exclude_embeddings=True) == active_without_embeddings


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_config_survives_the_way_back_to_the_hub(name):
    config = qmj.ModelConfig.from_pretrained(json.loads((PUBLISHED / f"{name}.json").read_text()))
    assert meaning(qmj.ModelConfig.from_pretrained(config_to_hub(config))) == meaning(config)


def test_qwen3_30b_a3b_is_read_field_by_field():
    config = qmj.ModelConfig.from_pretrained(json.loads((PUBLISHED / "qwen3-30b-a3b.json").read_text()))
    assert (config.hidden_size, config.vocab_size, config.intermediate_size) == (2048, 151_936, 6144)
    assert (config.num_hidden_layers, sparse_layers(config)) == (48, list(range(48)))
    assert sliding_layers(config) == []
    assert (config.rms_norm_eps, config.hidden_act, config.initializer_range) == (1e-6, "silu", 0.02)
    assert (config.max_position_embeddings, config.dtype) == (40_960, "bfloat16")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (151_643, (151_645,), None)
    assert not config.tie_word_embeddings
    attention = config.attention
    assert (attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim) == (32, 4, 128)
    assert (attention.qkv_bias, attention.o_bias, attention.qk_norm) == (False, False, True)
    assert attention.sliding_window is None
    assert (config.rope.rope_type, config.rope.rope_theta) == ("default", 1e6)
    moe = config.moe
    assert (moe.num_experts, moe.num_experts_per_tok, moe.moe_intermediate_size) == (128, 8, 768)
    assert (moe.norm_topk_prob, moe.float32_weights, moe.shared_expert_intermediate_size) == (True, False, 0)
    assert (moe.router_aux_loss_coef, moe.router_jitter_noise) == (0.001, 0.0)


def test_config_is_read_from_a_folder_a_file_and_a_dict_alike(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hub("qwen3_moe")))
    expected = read("qwen3_moe")
    assert qmj.ModelConfig.from_pretrained(tmp_path) == expected
    assert qmj.ModelConfig.from_pretrained(str(tmp_path)) == expected
    assert qmj.ModelConfig.from_pretrained(tmp_path / "config.json") == expected


# ---- attention: biases, norms, heads --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "qkv_bias", "o_bias", "qk_norm"),
    [
        ("qwen2", {}, True, False, False),
        ("qwen2", {"attention_bias": False, "qkv_bias": False}, True, False, False),
        ("qwen2_moe", {}, True, False, False),
        ("qwen2_moe", {"qkv_bias": False}, False, False, False),
        ("qwen3", {}, False, False, True),
        ("qwen3", {"attention_bias": True}, True, True, True),
        ("qwen3_moe", {}, False, False, True),
        ("qwen3_moe", {"attention_bias": True}, True, True, True),
        ("qwen3_moe", {"qkv_bias": True, "use_qk_norm": False}, False, False, True),
        ("mixtral", {}, False, False, False),
        ("mixtral", {"attention_bias": True}, False, False, False),
    ],
)
def test_biases_and_head_norms_follow_the_family(family, settings, qkv_bias, o_bias, qk_norm):
    attention = read(family, **settings).attention
    assert (attention.qkv_bias, attention.o_bias, attention.qk_norm) == (qkv_bias, o_bias, qk_norm)


@pytest.mark.parametrize(
    ("family", "given", "expected"),
    [
        *((family, 12, 12) for family in FAMILIES),
        ("qwen2", ABSENT, 8),
        ("qwen2_moe", ABSENT, 8),
        ("qwen3", ABSENT, 128),
        ("qwen3_moe", ABSENT, 8),
        ("mixtral", ABSENT, 8),
        ("mixtral", None, 8),
    ],
)
def test_head_dim_is_the_field_or_the_familys_default(family, given, expected):
    assert read(family, head_dim=given).attention.head_dim == expected


def test_key_value_heads_given_as_null_are_one_per_query_head():
    assert read("qwen2", num_key_value_heads=None).attention.num_key_value_heads == 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param(dict(use_sliding_window=False, sliding_window=4), {"mixtral": [0, 1, 2]}, id="not-used"),
        pytest.param(dict(sliding_window=4), {"mixtral": [0, 1, 2]}, id="use-absent"),
        pytest.param(
            dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
            {"qwen2": [1, 2], "qwen2_moe": [0], "qwen3": [1, 2], "qwen3_moe": [0, 1, 2], "mixtral": [0, 1, 2]},
            id="from-layer-1",
        ),
        pytest.param(
            dict(use_sliding_window=True, sliding_window=4, max_window_layers=3),
            {"qwen2_moe": [0, 2], "qwen3_moe": [0, 1, 2], "mixtral": [0, 1, 2]},
            id="from-layer-3",
        ),
        pytest.param(
            dict(use_sliding_window=True, sliding_window=4),
            {"qwen2_moe": [0, 2], "qwen3_moe": [0, 1, 2], "mixtral": [0, 1, 2]},
            id="max-window-layers-absent-is-28",
        ),
        pytest.param(
            dict(
                use_sliding_window=True,
                sliding_window=4,
                max_window_layers=0,
                layer_types=["full_attention", "sliding_attention", "full_attention"],
            ),
            {"qwen2": [1], "qwen2_moe": [1], "qwen3": [1], "qwen3_moe": [0, 1, 2], "mixtral": [0, 1, 2]},
            id="layer-types",
        ),
    ],
)
def test_sliding_layers_follow_the_familys_own_rule(family, settings, expected):
    config = read(family, **settings)
    assert sliding_layers(config) == expected.get(family, [])
    assert config.attention.sliding_window == (4 if family in expected else None)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "mixtral"])
def test_a_window_given_as_null_slides_nowhere(family):
    config = read(family, use_sliding_window=True, sliding_window=None, max_window_layers=0)
    assert sliding_layers(config) == []


def test_a_window_given_as_null_is_refused_where_transformers_cannot_run_it():
    """qwen2_moe chooses sliding layers without looking at the window, and then finds none."""
    with pytest.raises(qmj.ConfigError, match="sliding_window"):
        read("qwen2_moe", use_sliding_window=True, sliding_window=None)


# ---- sparse layers and routing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"mlp_only_layers": None}, [0, 1, 2, 3]),
        ({"mlp_only_layers": [0, 2]}, [1, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [3]),
        ({"decoder_sparse_step": 5}, []),
        ({"num_experts": 0}, []),
    ],
)
def test_sparse_layers_follow_step_exceptions_and_expert_count(family, settings, expected):
    config = read(family, num_hidden_layers=4, **settings)
    assert sparse_layers(config) == expected
    assert (config.moe is None) == (not expected)


def test_mixtral_is_sparse_in_every_layer_whatever_else_is_said():
    assert sparse_layers(read("mixtral", decoder_sparse_step=2, mlp_only_layers=[0])) == [0, 1, 2]


@pytest.mark.parametrize(
    ("family", "given", "expected"),
    [
        ("qwen2_moe", ABSENT, False),
        ("qwen2_moe", True, True),
        ("qwen3_moe", ABSENT, False),
        ("qwen3_moe", True, True),
        ("mixtral", ABSENT, True),
        ("mixtral", False, True),
    ],
)
def test_top_k_weights_are_renormalised_by_the_field_and_always_in_mixtral(family, given, expected):
    moe = read(family, norm_topk_prob=given).moe
    assert moe.norm_topk_prob is expected
    assert moe.float32_weights is (family == "mixtral")


def test_expert_widths_come_from_each_familys_own_field():
    assert read("qwen2_moe").moe.moe_intermediate_size == 24
    assert read("qwen3_moe").moe.moe_intermediate_size == 24
    assert read("mixtral").moe.moe_intermediate_size == 48
    assert read("qwen2_moe").moe.shared_expert_intermediate_size == 40
    assert read("qwen3_moe", shared_expert_intermediate_size=40).moe.shared_expert_intermediate_size == 0


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_expert_count_is_read_under_old_and_new_names_and_the_new_name_wins(family):
    for settings in (
        {"num_experts": 5, "num_local_experts": ABSENT},
        {"num_experts": ABSENT, "num_local_experts": 5},
        {"num_experts": 8, "num_local_experts": 5},
    ):
        assert read(family, **settings).moe.num_experts == 5


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen2", (151_936, 4096, 22_016, 32, 32, 32, 32_768, 1e-6, 1e4)),
        ("qwen2_moe", (151_936, 2048, 5632, 24, 16, 16, 32_768, 1e-6, 1e4)),
        ("qwen3", (151_936, 4096, 22_016, 32, 32, 32, 32_768, 1e-6, 1e4)),
        ("qwen3_moe", (151_936, 2048, 6144, 24, 32, 4, 32_768, 1e-6, 1e4)),
        ("mixtral", (32_000, 4096, 14_336, 32, 32, 8, 131_072, 1e-5, 1e6)),
    ],
)
def test_absent_fields_have_transformers_defaults(family, expected):
    config = qmj.ModelConfig.from_pretrained({"model_type": family})
    assert (
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.attention.num_attention_heads,
        config.attention.num_key_value_heads,
        config.max_position_embeddings,
        config.rms_norm_eps,
        config.rope.rope_theta,
    ) == expected
    assert (config.hidden_act, config.initializer_range, config.tie_word_embeddings) == ("silu", 0.02, False)
    assert (config.rope.rope_type, config.num_labels, config.dtype) == ("default", 2, None)


@pytest.mark.parametrize(
    ("family", "experts", "top_k", "width"),
    [("qwen2_moe", 60, 4, 1408), ("qwen3_moe", 128, 8, 768), ("mixtral", 8, 2, 14_336)],
)
def test_absent_expert_fields_have_transformers_defaults(family, experts, top_k, width):
    moe = qmj.ModelConfig.from_pretrained({"model_type": family}).moe
    assert (moe.num_experts, moe.num_experts_per_tok, moe.moe_intermediate_size) == (experts, top_k, width)
    assert (moe.router_aux_loss_coef, moe.router_jitter_noise) == (0.001, 0.0)


# ---- tokens, dtypes, labels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "bos", "eos"),
    [
        ("qwen3", {}, None, ()),
        ("qwen3", {"eos_token_id": 7}, None, (7,)),
        ("qwen3", {"eos_token_id": [7, 9], "bos_token_id": 3}, 3, (7, 9)),
        ("mixtral", {}, 1, (2,)),
        ("mixtral", {"eos_token_id": None, "bos_token_id": None}, None, ()),
        ("mixtral", {"eos_token_id": 0, "bos_token_id": 0}, 0, (0,)),
    ],
)
def test_stop_tokens_may_be_one_several_or_none(family, settings, bos, eos):
    config = read(family, **settings)
    assert (config.bos_token_id, config.eos_token_id) == (bos, eos)
    again = qmj.ModelConfig.from_pretrained(config_to_hub(config))
    assert (again.bos_token_id, again.eos_token_id) == (bos, eos)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_is_read_under_old_and_new_keys(key):
    settings = {"torch_dtype": ABSENT, key: "bfloat16"}
    assert read("qwen2", **settings).dtype == "bfloat16"
    assert read("qwen2", torch_dtype=ABSENT).dtype is None


def test_number_of_labels_comes_from_id2label_or_num_labels():
    assert read("qwen3", num_labels=5).num_labels == 5
    assert read("qwen3", id2label={"0": "a", "1": "b", "2": "c"}).num_labels == 3


# ---- rotary embedding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "rope_type", "theta", "factor"),
    [
        pytest.param({}, "default", 1e4, 1.0, id="absent"),
        pytest.param({"rope_theta": 5_000_000}, "default", 5e6, 1.0, id="theta-as-integer"),
        pytest.param({"rope_scaling": None, "rope_theta": 1e6}, "default", 1e6, 1.0, id="scaling-null"),
        pytest.param({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear", 1e4, 2.0, id="type-alias"),
        pytest.param({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "linear", 1e4, 2.0, id="rope-type"),
        pytest.param(
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e5}},
            "linear", 3e5, 2.0, id="new-keys",
        ),
        pytest.param({"rope_parameters": {"rope_theta": 3e5}}, "default", 3e5, 1.0, id="new-keys-theta-alone"),
        pytest.param(
            {"rope_parameters": {"rope_type": "default", "rope_theta": 3e5}, "rope_theta": 7.0},
            "default", 3e5, 1.0, id="new-key-wins-over-theta",
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": "default"}, "rope_theta": 77.0},
            "default", 77.0, 1.0, id="theta-fills-in",
        ),
        pytest.param(
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 3e5},
                "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
            },
            "dynamic", 1e4, 4.0, id="rope-scaling-replaces-rope-parameters",
        ),
    ],
)  # fmt: skip
def test_rope_is_read_from_old_and_new_keys(settings, rope_type, theta, factor):
    rope = read("qwen3", **settings).rope
    assert (rope.rope_type, rope.rope_theta, rope.factor) == (rope_type, theta, factor)


@pytest.mark.parametrize("rope_type", ["yarn", "llama3"])
def test_pretraining_length_of_scaled_rope_defaults_to_the_longest_position(rope_type):
    scaling = {"rope_type": rope_type, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = read("qwen3", max_position_embeddings=40_960, rope_scaling=scaling)
    assert config.rope.original_max_position_embeddings == 40_960
    scaling["original_max_position_embeddings"] = 32_768
    config = read("qwen3", max_position_embeddings=40_960, rope_scaling=scaling)
    assert config.rope.original_max_position_embeddings == 32_768


# ---- refusals: the message names the field, the value, and what is supported ----------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        pytest.param("qwen3", {"model_type": "llama"}, ("model_type", "llama", *FAMILIES), id="model-type"),
        pytest.param("qwen3", {"model_type": ABSENT}, ("model_type", *FAMILIES), id="model-type-absent"),
        pytest.param("qwen3_moe", {"model_type": "qwen4_exp"}, ("model_type", "qwen4_exp", "qwen3_moe"), id="later"),
        pytest.param(
            "qwen3", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            ("rope_type", "longrope", "default", "linear", "dynamic", "yarn", "llama3"), id="rope-type",
        ),
        pytest.param("qwen3", {"rope_scaling": {"type": "linear"}}, ("factor",), id="rope-factor-missing"),
        pytest.param("qwen3", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5"), id="partial-rotary"),
        pytest.param(
            "qwen3_moe", {"quantization_config": {"quant_method": "hqq", "bits": 4}},
            ("quantization_config", "hqq", "unquantised checkpoint"), id="quantised",
        ),
        pytest.param(
            "qwen3_moe", {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}},
            ("quantization_config", "weight_block_size", "None", "two positive integers"), id="fp8-without-blocks",
        ),
        pytest.param("qwen2", {"num_attention_heads": 5}, ("num_attention_heads", "5", "32"), id="heads-of-width"),
        pytest.param("qwen3", {"num_key_value_heads": 3}, ("num_key_value_heads", "3", "4"), id="kv-heads"),
        pytest.param("qwen3", {"head_dim": 15}, ("head_dim", "15", "even"), id="odd-head-dim"),
        pytest.param("qwen3_moe", {"num_experts_per_tok": 9}, ("num_experts_per_tok", "9", "8"), id="top-k"),
        pytest.param("qwen3", {"hidden_act": "swoosh"}, ("hidden_act", "swoosh", "silu", "gelu"), id="activation"),
        pytest.param("qwen3", {"hidden_size": "32"}, ("hidden_size", "'32'", "integer"), id="wrong-type"),
        pytest.param("qwen3", {"num_hidden_layers": 0}, ("num_hidden_layers", "0"), id="no-layer"),
        pytest.param(
            "qwen3", {"layer_types": ["full_attention"], "use_sliding_window": True}, ("layer_types", "3"),
            id="layer-types-too-short",
        ),
        pytest.param(
            "qwen3", {"layer_types": ["linear_attention"] * 3}, ("layer_types", "linear_attention", "full_attention"),
            id="layer-types-unknown",
        ),
        pytest.param("qwen3", {"attention_dropout": 1.5}, ("attention_dropout", "1.5"), id="attention-dropout"),
        pytest.param("qwen3", {"torch_dtype": "float64"}, ("dtype", "float64", "bfloat16"), id="dtype"),
    ],
)  # fmt: skip
def test_refusal_names_field_value_and_what_is_supported(family, settings, words):
    with pytest.raises(qmj.ConfigError) as failure:
        read(family, **settings)
    for word in words:
        assert word in str(failure.value)


def test_refusal_names_the_file(tmp_path):
    with pytest.raises(qmj.ConfigError, match="config.json"):
        qmj.ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(qmj.ConfigError, match="config.json"):
        qmj.ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hub("qwen3", num_key_value_heads=3)))
    with pytest.raises(qmj.ConfigError, match=f"{tmp_path}.*num_key_value_heads"):
        qmj.ModelConfig.from_pretrained(tmp_path)


# ---- the way back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES.values(), *HYBRID_CASES.values()], ids=lambda case: case.name)
def test_config_survives_the_way_to_the_hubs_form_and_back(case):
    config = qmj.ModelConfig.from_pretrained(case.config)
    written = json.loads(json.dumps(config_to_hub(config)))
    assert meaning(qmj.ModelConfig.from_pretrained(written)) == meaning(config)


def test_written_config_serves_readers_of_transformers_4_and_5():
    written = config_to_hub(qmj.ModelConfig.from_pretrained(CASES["qwen3_moe-yarn_mscale"].config))
    assert written["num_experts"] == written["num_local_experts"] == 8
    assert written["dtype"] == written["torch_dtype"] == "float32"
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 100.0
    assert written["rope_scaling"]["rope_type"] == written["rope_parameters"]["rope_type"] == "yarn"
    assert written["architectures"] == ["Qwen3MoeForCausalLM"]


def test_fields_that_mean_nothing_to_the_model_are_kept():
    written = config_to_hub(read("qwen3", finetuned_from="someone/something"))
    assert written["finetuned_from"] == "someone/something"


@pytest.mark.parametrize(("found", "read"), [("swish", "silu"), ("gelu_python_tanh", "gelu_pytorch_tanh")])
def test_an_activation_has_all_of_its_names(found, read):
    hub = json.loads((PUBLISHED / "qwen3-0.6b.json").read_text())
    assert qmj.ModelConfig.from_pretrained({**hub, "hidden_act": found}).hidden_act == read
