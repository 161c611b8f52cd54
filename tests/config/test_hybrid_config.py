"""Hybrid configs: the checks of their fields, and their numbers of parameters.

The counts are those of the published models, built by transformers 5.23 without allocating them.
"""

import dataclasses

import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.config import AttentionConfig, LayerKind, LinearAttentionConfig, ModelConfig, MoEConfig, RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A published model: its sizes, and its parameters in all, of one token, and of the next-token head."""

    hidden_size: int
    num_hidden_layers: int
    heads: tuple[int, int]
    value_heads: int
    total: int
    mtp: int
    intermediate_size: int = 1
    experts: tuple[int, int, int] | None = None
    active: int | None = None
    active_without_table: int | None = None
    vocab_size: int = 248_320
    tied: bool = False

    def config(self) -> ModelConfig:
        mlp = "sparse" if self.experts else "dense"
        kinds = (LayerKind(mixer="linear", mlp=mlp),) * 3 + (LayerKind(mlp=mlp),)
        heads, kv_heads = self.heads
        return ModelConfig(
            model_type="qwen3_next",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            layers=kinds * (self.num_hidden_layers // 4),
            attention=AttentionConfig(
                num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=256, qk_norm=True, output_gate=True
            ),
            rope=RopeConfig(rope_theta=1e7, partial_rotary_factor=0.25),
            moe=self._moe(),
            linear_attention=LinearAttentionConfig(
                num_key_heads=16,
                num_value_heads=self.value_heads,
                key_head_dim=128,
                value_head_dim=128,
                conv_kernel_dim=4,
            ),
            zero_centered_norm=True,
            num_mtp_layers=1,
            tie_word_embeddings=self.tied,
        )

    def _moe(self) -> MoEConfig | None:
        if self.experts is None:
            return None
        count, chosen, width = self.experts
        return MoEConfig(
            num_experts=count,
            num_experts_per_tok=chosen,
            moe_intermediate_size=width,
            shared_expert_intermediate_size=width,
            norm_topk_prob=True,
        )


SIZES = {
    "Qwen3-Next-80B-A3B": Size(
        hidden_size=2048, num_hidden_layers=48, heads=(16, 2), value_heads=32, experts=(512, 10, 512),
        vocab_size=151_936, total=79_674_391_296, active=3_874_929_408, active_without_table=3_252_599_552,
        mtp=1_650_471_424,
    ),
    "Qwen3.5-0.8B": Size(
        hidden_size=1024, num_hidden_layers=24, heads=(8, 2), value_heads=16, intermediate_size=3584, tied=True,
        total=752_393_024, active_without_table=498_113_344, mtp=20_452_864,
    ),
    "Qwen3.5-2B": Size(
        hidden_size=2048, num_hidden_layers=24, heads=(8, 2), value_heads=16, intermediate_size=6144, tied=True,
        total=1_881_825_088, active_without_table=1_373_265_728, mtp=60_828_160,
    ),
    "Qwen3.5-4B": Size(
        hidden_size=2560, num_hidden_layers=32, heads=(16, 4), value_heads=32, intermediate_size=9216, tied=True,
        total=4_205_751_296, active_without_table=3_570_052_096, mtp=120_599_552,
    ),
    "Qwen3.5-9B": Size(
        hidden_size=4096, num_hidden_layers=32, heads=(16, 4), value_heads=32, intermediate_size=12288,
        total=8_953_803_264, active_without_table=6_919_565_824, mtp=243_290_624,
    ),
    "Qwen3.5-27B": Size(
        hidden_size=5120, num_hidden_layers=64, heads=(24, 4), value_heads=48, intermediate_size=17408,
        total=26_895_998_464, active_without_table=24_353_201_664, mtp=424_699_392,
    ),
    "Qwen3.5-35B-A3B": Size(
        hidden_size=2048, num_hidden_layers=40, heads=(16, 2), value_heads=32, experts=(256, 8, 512),
        total=34_660_610_688, active=3_454_988_928, active_without_table=2_437_870_208, mtp=844_640_768,
    ),
    "Qwen3.5-122B-A10B": Size(
        hidden_size=3072, num_hidden_layers=48, heads=(32, 2), value_heads=64, experts=(256, 8, 1024),
        total=122_111_526_912, active=9_771_288_576, active_without_table=8_245_610_496, mtp=2_523_679_232,
    ),
    "Qwen3.5-397B-A17B": Size(
        hidden_size=4096, num_hidden_layers=60, heads=(32, 2), value_heads=64, experts=(512, 10, 1024),
        total=396_346_350_336, active=17_349_040_896, active_without_table=15_314_803_456, mtp=6_595_568_128,
    ),
    "Qwen3.8-2.4T-A95B": Size(
        hidden_size=8192, num_hidden_layers=92, heads=(64, 4), value_heads=128, experts=(512, 10, 2048),
        total=2_419_804_697_984, active=95_287_866_752, active_without_table=91_219_391_872, mtp=26_378_027_520,
    ),
}  # fmt: skip

LINEAR = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 8, "value_head_dim": 8, "conv_kernel_dim": 4}


@pytest.mark.parametrize("name", SIZES)
def test_published_hybrid_has_the_parameters_of_the_real_model(name):
    size, config = SIZES[name], SIZES[name].config()
    tables = (1 if size.tied else 2) * size.vocab_size * size.hidden_size
    assert config.num_parameters() == size.total
    assert config.num_active_parameters() == (size.active or size.total)
    assert config.num_active_parameters() - tables == size.active_without_table
    assert config.num_mtp_parameters() == size.mtp


def test_a_model_without_the_next_token_head_counts_none_of_its_parameters():
    config = dataclasses.replace(SIZES["Qwen3.5-0.8B"].config(), num_mtp_layers=0)
    assert config.num_mtp_parameters() == 0
    assert config.num_parameters() == SIZES["Qwen3.5-0.8B"].total


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_value_heads": 3}, "linear_num_value_heads=3.*multiple of linear_num_key_heads=2"),
        ({"num_key_heads": 0}, "linear_num_key_heads=0"),
        ({"conv_kernel_dim": 0}, "linear_conv_kernel_dim=0"),
    ],
)
def test_a_wrong_size_of_linear_attention_is_refused(changes, named):
    with pytest.raises(qmj.ConfigError, match=named):
        LinearAttentionConfig(**LINEAR | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"linear_attention": None}, "linear_attention=None.*since some layers are linear"),
        ({"layers": (LayerKind(),)}, "linear_attention=.*expected None, since no layer is linear"),
        ({"rope": RopeConfig(partial_rotary_factor=0.004)}, "partial_rotary_factor=0.004.*even"),
        ({"num_mtp_layers": 2}, "num_mtp_layers=2.*0 or 1"),
    ],
)
def test_fields_that_contradict_the_layers_are_refused(changes, named):
    with pytest.raises(qmj.ConfigError, match=named):
        dataclasses.replace(SIZES["Qwen3.5-0.8B"].config(), **changes)


@pytest.mark.parametrize("factor", [0.0, 1.5])
def test_a_share_of_rotated_dimensions_outside_of_0_to_1_is_refused(factor):
    with pytest.raises(qmj.ConfigError, match=f"partial_rotary_factor={factor}"):
        RopeConfig(partial_rotary_factor=factor)
