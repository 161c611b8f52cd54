"""Model FLOPs agree with a count by hand and with what XLA counts; chips are recognised by JAX's names for them."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import qwen_moe_jax as qmj
from qwen_moe_jax.model import attention
from qwen_moe_jax.nn.kernels import matmul
from qwen_moe_jax.plan.chips import peak_flops
from qwen_moe_jax.plan.compile import plan_step, target_mesh
from qwen_moe_jax.plan.cpu_kernels import product_flops
from qwen_moe_jax.plan.flops import (
    extend_flops_per_token,
    forward_flops_per_token,
    rule_flops_per_token,
    training_flops_per_token,
)
from qwen_moe_jax.plan.inference import forward_step
from qwen_moe_jax.plan.targets import parse_target

HUB_CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 1,  # layers are scanned, and XLA counts the body of a scan once
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "moe_intermediate_size": 192,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
}


def read(**changes) -> qmj.ModelConfig:
    return qmj.ModelConfig.from_pretrained({**HUB_CONFIG, **changes})


def test_a_token_costs_its_active_weights_and_half_of_the_attention_three_times():
    width, heads, kv_heads, head_dim, length = 256, 4, 2, 64, 100
    projections = width * (heads + 2 * kv_heads) * head_dim + heads * head_dim * width
    experts = 2 * 3 * width * 192
    norms = 3 * width + 2 * head_dim
    weights = projections + experts + width * 8 + norms + width * 512  # the router, and the head of two tables
    seen = (1 + length) / 2
    by_hand = 3 * (2 * weights + 2 * 2 * heads * head_dim * seen)
    assert training_flops_per_token(read(), length) == by_hand
    # A tied table is the head all the same.
    assert training_flops_per_token(read(tie_word_embeddings=True), length) == by_hand


def test_weights_that_stay_have_no_gradient_of_their_own():
    config, length = read(), 100
    whole, none = (training_flops_per_token(config, length, share) for share in (1.0, 0.0))
    assert whole - none == 2 * config.num_active_parameters(exclude_embeddings=True)


def test_a_sliding_layer_costs_its_window():
    tables = {"num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}
    sliding = qmj.ModelConfig.from_pretrained({**HUB_CONFIG, **tables, "model_type": "qwen2", "intermediate_size": 64})
    assert {kind.mixer for kind in sliding.layers} == {"sliding"}

    def attention(seq_len):
        return forward_flops_per_token(sliding, seq_len) - 2 * sliding.num_active_parameters(exclude_embeddings=True)

    seen = (1 + 2 + 3 + 3 + 3) / 5
    assert attention(5) == pytest.approx(2 * 4 * 4 * 64 * seen)
    assert attention(2) == pytest.approx(2 * 4 * 4 * 64 * 1.5)  # the window is longer than the row


def test_the_rule_costs_82_thousand_multiply_adds_a_value_head_in_chunks_and_49_thousand_alone():
    """Whatever the context: a token costs the same after ten tokens and after a million."""
    config = qmj.ModelConfig.from_pretrained("configs/models/qwen3.5-35b-a3b.json")
    linear_layers, value_heads = 30, 32
    assert rule_flops_per_token(config, 4096) == 2 * linear_layers * value_heads * 81_920
    assert rule_flops_per_token(config, 1) == 2 * linear_layers * value_heads * 3 * 128**2
    one, far = (extend_flops_per_token(config, before, 1) for before in (10, 1_000_000))
    assert far - one == pytest.approx(10 * 4 * 16 * 256 * (1_000_000 - 10))  # the ten layers of full attention
    assert forward_flops_per_token(config, 64) < forward_flops_per_token(config, 4096)
    assert rule_flops_per_token(read(), 4096) == 0


@pytest.mark.parametrize("value_heads", [2, 4], ids=["one_a_key_head", "two_a_key_head"])
def test_the_compiled_rule_has_the_formula_s_flops_within_a_third(value_heads):
    """Heads of the published sizes. All that the program multiplies besides the weights is the rule."""
    width, inner, vocabulary, rows, length = 64, 32, 512, 2, 512
    tables = {"model_type": "qwen3_5_text", "num_hidden_layers": 1, "layer_types": ["linear_attention"]}
    tables |= {"hidden_size": width, "intermediate_size": inner, "linear_num_key_heads": 2}
    config = read(**tables, linear_num_value_heads=value_heads)
    request = parse_target("cpu:1")
    execution = qmj.ExecutionConfig(dtype="float32")
    mesh = target_mesh(request, {})
    plan = plan_step(forward_step(config, "linear", mesh, execution, rows=rows, length=length), request, mesh)
    keys, values = 2 * 128, value_heads * 128
    weights = (
        width * (2 * keys + 2 * values + 2 * value_heads) + values * width + 3 * width * inner + vocabulary * width
    )
    of_rule = plan.flops.program / (rows * length) - 2 * weights
    assert 1 / 1.3 < of_rule / rule_flops_per_token(config, length) < 1.3


@pytest.mark.parametrize(
    "changes",
    [{"model_type": "qwen3", "intermediate_size": 768}, {"num_experts": 4, "num_experts_per_tok": 4}],
    ids=["dense", "sparse"],  # the sparse one's experts are all active, so that no arithmetic is the dispatch's own
)
def test_xla_counts_the_same_in_a_compiled_forward_pass(changes, monkeypatch):
    monkeypatch.setattr(matmul, "is_worth_it", lambda *_: False)  # XLA counts no FLOPs of C functions
    monkeypatch.setattr(attention, "attends_rows", lambda *_: False)
    config = read(**changes)
    model = qmj.CausalLM(config, rngs=nnx.Rngs(0), execution=qmj.ExecutionConfig(dispatch="dense"))
    rows, length = 2, 64
    tokens_BT = jnp.zeros((rows, length), jnp.int32)
    counted = jax.jit(lambda tokens_BT: model(tokens_BT).logits).lower(tokens_BT).compile().cost_analysis()["flops"]
    masked = 4 * 4 * 64 * (length - (length + 1) / 2)  # scores of later keys are computed, and belong to no model
    assert counted / (rows * length) == pytest.approx(forward_flops_per_token(config, length) + masked, rel=0.02)


def test_a_plan_counts_the_same_where_c_functions_multiply():
    """Without llvmlite there are none, and the count is the same but for keys that no query sees: 2 %."""
    config = read(model_type="qwen3", intermediate_size=768)
    request, rows, length = parse_target("cpu:1"), 2, 64
    mesh = target_mesh(request, {})
    plan = plan_step(forward_step(config, "x", mesh, qmj.ExecutionConfig(), rows=rows, length=length), request, mesh)
    masked = 4 * 4 * 64 * (length - (length + 1) / 2)
    expected = forward_flops_per_token(config, length) + masked
    assert plan.flops.program / (rows * length) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("device_kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA B200", 2250e12),
        ("cpu", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_are_known_by_the_names_that_jax_gives(device_kind, peak):
    assert peak_flops(device_kind) == peak


def test_the_kernels_of_cpus_count_the_rows_of_a_balanced_load():
    """8 experts' rows in a buffer of 200, of which 120 are filled; one group's rows are all there."""
    experts, dense = [(200, 32), (8, 64, 32), (8,), (1,)], [(200, 32), (1, 64, 32), (1,), (1,)]
    name = "qwen_moe_jax_transposed_matmul_float_4x2"
    assert product_flops(name, experts, [(200, 64)], 120) == 2 * 120 * 32 * 64
    assert product_flops(name, experts, [(200, 64)], None) == product_flops(name, dense, [(200, 64)], 120) == 819200
    outer = [(200, 64), (200, 32), (8,)]
    assert product_flops("qwen_moe_jax_outer_matmul_float_4x2", outer, [(8, 64, 32)], 120) == 2 * 120 * 32 * 64
    picked = [(4, 32), (4,), (4,), (8, 64, 32), (8, 16, 32)]
    assert product_flops("qwen_moe_jax_picked_matmul_float32", picked, [(4, 64), (4, 16)], 9) == 2 * 4 * 32 * 80
    assert product_flops("TopK", picked, [(4, 64)], 9) is None


def test_attention_on_cpus_counts_the_keys_that_are_seen():
    """3 rows of 5 tokens with 8 heads of 16: 15 pairs of a query and a key each; or all 64 slots of a cache."""
    small = [(4,), (1,), (3,), (3,), (3, 1), (3, 5)]
    name, slots = "qwen_moe_jax_flash_attention_float32", (2, 3, 64, 4, 16)
    assert product_flops(name, [(3, 5, 8, 16), *small, (1, 3, 5, 4, 16)], [], None) == 2 * 2 * 15 * 3 * 8 * 16
    assert product_flops(name, [(3, 5, 8, 16), *small, slots], [], None) == 2 * 2 * 5 * 64 * 3 * 8 * 16
    paged = [*small[:4], (3, 2), small[5]]
    assert product_flops(name, [(3, 5, 8, 16), *paged, slots], [], None) == 2 * 2 * 5 * 128 * 3 * 8 * 16
    stored = [(3, 1, 8, 16), (3, 1, 4, 16), (3, 1, 4, 16), (3,), (3,), (3,), (3, 2), (2, 9, 64, 4, 16)]
    assert product_flops("qwen_moe_jax_attention_bfloat16", stored, [], None) == 2 * 2 * 128 * 3 * 8 * 16
    gradients = [(3, 5, 8, 16), (3, 5, 8, 16), (3, 5, 4, 16), (3, 5, 4, 16)]
    assert product_flops("qwen_moe_jax_flash_gradients_float32", gradients, [], None) == 2 * 5 * 15 * 3 * 8 * 16


def test_a_token_of_the_rule_costs_three_products_with_its_state_and_its_taps():
    """3 rows with 4 value heads of 16 × 8, and 96 channels of 5 taps."""
    operands = [(3, 96), (3, 96), (5, 96), (3, 4), (3, 4), (1,), (3,), (3,), (2, 3, 4, 16, 8), (2, 3, 4, 96)]
    assert product_flops("qwen_moe_jax_delta_rule_float32", operands, [], None) == 2 * 3 * (3 * 4 * 16 * 8 + 5 * 96)
