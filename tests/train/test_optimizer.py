"""The schedule's shape, what weight decay leaves alone, and what is left alone by all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.tensors import hub_parameters
from qwen_moe_jax.model.lora import is_adapter
from tests.cases import CASES
from tests.model.hybrid_configs import hybrid_config
from train.config import OptimizerConfig
from train.optimizer import decays, frozen_paths, make_optimizer, make_schedule, schedule_notes, stack_axes
from train.parameters import paths
from train.per_matrix import muon

PARAMS = {
    "embed_tokens": {"weight": jnp.ones((8, 4))},
    "layers": {
        "input_layernorm": {"weight": jnp.ones((2, 4))},  # stacked: two axes, and still a norm
        "self_attn": {
            "q_norm": {"weight": jnp.ones((2, 4))},
            "q_proj": {"weight": jnp.ones((2, 4, 4)), "bias": jnp.ones((2, 4))},
        },
        "mlp": {
            "gate": {"weight": jnp.ones((2, 4, 3))},
            "e_score_correction_bias": jnp.ones((2, 4)),
            "experts": {"gate_proj": jnp.ones((2, 3, 4, 4))},
        },
    },
    "linear_attn": {
        "A_log": jnp.ones((2, 3)),
        "dt_bias": jnp.ones((2, 3)),
        "conv1d": {"weight": jnp.ones((2, 4, 1, 4))},
    },
    "norm": {"weight": jnp.ones(4)},
}
BALANCING_BIAS = "layers.mlp.e_score_correction_bias"
LEFT_ALONE = {
    BALANCING_BIAS,
    "layers.input_layernorm.weight",
    "layers.self_attn.q_norm.weight",
    "layers.self_attn.q_proj.bias",
    "linear_attn.A_log",
    "linear_attn.dt_bias",
    "norm.weight",
}


def by_name(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def test_norms_and_biases_do_not_decay_and_all_matrices_do():
    assert {name for name, decay in by_name(decays(PARAMS)).items() if not decay} == LEFT_ALONE


def test_without_gradients_only_matrices_shrink():
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.1)
    optimizer = make_optimizer(config, steps=10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS), PARAMS)
    for name, update in by_name(updates).items():
        np.testing.assert_allclose(update, 0.0 if name in LEFT_ALONE else -0.05, rtol=1e-6)


def test_a_balancing_bias_stays_where_it_is_whatever_its_gradient():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.5, warmup_steps=0), steps=10)
    updates, _ = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
    moved = {name for name, update in by_name(updates).items() if update.any()}
    assert by_name(PARAMS).keys() - moved == {BALANCING_BIAS}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(schedule="linear"), [0, 0.5, 1, 0.55, 0.325, 0.1]),
        (dict(schedule="wsd", decay_steps=50), [0, 0.5, 1, 1, 0.55, 0.1]),
        (dict(schedule="wsd", decay_steps=100), [0, 0.5, 1, 0.55, 0.325, 0.1]),
    ],
    ids=["linear", "wsd", "wsd that falls at once"],
)
def test_other_schedules_fall_in_a_line_at_once_or_in_the_end(settings, expected):
    config = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10, **settings)
    schedule = make_schedule(config, steps=110)
    np.testing.assert_allclose([schedule(step) for step in (0, 5, 10, 60, 85, 110)], expected, rtol=1e-6)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (9, 0), (10, 1), (40, 4), (41, 40)])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_run_of_no_more_steps_than_the_warm_up_has_a_shorter_one_and_says_so(schedule, steps, warmup):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=40, schedule=schedule)
    rates = [float(make_schedule(config, steps)(step)) for step in range(steps + 1)]
    assert max(rates) == rates[warmup] == 1.0
    notes = schedule_notes(config, steps)
    if warmup == 40:
        assert notes == []
    else:
        assert notes[0].startswith(f"the warm-up takes {warmup} steps, not 40 (optimizer.warmup_steps)")


def test_the_first_moment_alone_has_the_dtype_of_moments():
    state = make_optimizer(OptimizerConfig(mu_dtype="bfloat16"), steps=100).init(PARAMS)
    assert {leaf.dtype for leaf in jax.tree.leaves(state[1][0].mu)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state[1][0].nu)} == {jnp.dtype("float32")}


MODEL = qmj.CausalLM(
    qmj.ModelConfig.from_pretrained(
        {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    rngs=None,
)


def test_patterns_are_searched_for_in_the_names_of_the_familys_files():
    layer = "model.layers.segments.0.0"
    assert frozen_paths(["block_sparse_moe", "^lm_head"], MODEL) == {
        f"{layer}.mlp.gate.weight",
        f"{layer}.mlp.experts.gate_proj",
        f"{layer}.mlp.experts.up_proj",
        f"{layer}.mlp.experts.down_proj",
        "lm_head.weight",
    }
    assert frozen_paths([], MODEL) == frozenset()


def test_a_pattern_finds_the_matrix_of_the_files_that_holds_rows_of_several():
    model = qmj.CausalLM(hybrid_config("lf"), rngs=None)
    found = {path.split(".")[-2] for path in frozen_paths(["in_proj_qkvz", r"in_proj_a\."], model)}
    assert found == {"in_proj_qkv", "in_proj_z", "in_proj_a"}


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("embed_token.weight", ["matches no parameter", "model.embed_tokens.weight"]),
        (r"layers\.0\.input", ["model.layers.0.input_layernorm.weight and not model.layers.1.", "all of them"]),
        ("(", ["no regular expression"]),
    ],
)
def test_a_pattern_that_means_nothing_is_refused_with_what_is_near(pattern, parts):
    with pytest.raises(qmj.ConfigError) as refusal:
        frozen_paths([pattern], MODEL)
    for part in ["optimizer.frozen", *parts]:
        assert part in str(refusal.value)


def test_without_a_last_rate_the_learning_rate_falls_to_a_tenth_of_its_highest():
    schedule = make_schedule(OptimizerConfig(learning_rate=1e-5, warmup_steps=10), 110)
    rates = [float(schedule(step)) for step in range(111)]
    assert max(rates) == rates[10] and rates[10] == pytest.approx(1e-5) and rates[110] == pytest.approx(1e-6)


def test_the_learning_rate_climbs_then_falls_to_its_end():
    config = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10)
    schedule = make_schedule(config, steps=110)
    np.testing.assert_allclose([schedule(step) for step in (0, 5, 10, 60, 110)], [0, 0.5, 1, 0.55, 0.1], rtol=1e-6)


def test_muon_and_adafactor_see_the_matrices_of_adapters_one_by_one():
    """A and B of every layer and expert, which are trained alone; a start with B = 0 moves B and leaves A."""
    config = qmj.ModelConfig.from_pretrained(CASES["qwen3_moe-plain"].config)
    model = qmj.CausalLM(config, rngs=None)
    qmj.add_lora(model, qmj.LoraConfig(r=2, target_modules=("q_proj", "experts")), rngs=None)
    axes = stack_axes(model)
    adapters = {parameter.path: parameter.shape for parameter in hub_parameters(model) if is_adapter(parameter.path)}
    assert len(adapters) == 8
    for path, shape in adapters.items():
        assert axes[path] == (2 if "experts" in path else 1) and 2 in shape[axes[path] :]
        assert len(shape) - axes[path] == 2

    path = next(path for path in adapters if "experts" in path and path.endswith("lora_B"))
    optimizer = muon(OptimizerConfig(type="muon", weight_decay=0.0), lambda step: 0.1, lambda path: True, {"B": 2})
    gradients = {"B": np.random.default_rng(0).normal(size=adapters[path]).astype(np.float32)}
    params = jax.tree.map(np.zeros_like, gradients)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    values = np.linalg.svd(np.asarray(updates["B"]), compute_uv=False)
    assert (values.min(axis=-1) > 0.5 * values.max(axis=-1)).all()  # orthogonal, up to Newton and Schulz's five steps


@pytest.mark.parametrize("kind", ["adamw", "muon", "adafactor"])
def test_no_state_has_64_bits_where_jax_enables_them(kind):
    axes = {path: 0 for path in paths(PARAMS)}
    optimizer = make_optimizer(OptimizerConfig(type=kind), 10, axes)
    params = jax.tree.map(np.asarray, PARAMS)
    with jax.enable_x64(True):
        updates, state = jax.eval_shape(lambda: optimizer.update(params, optimizer.init(params), params))
    assert {x.dtype.name for x in jax.tree.leaves((updates, state))} <= {"float32", "int32"}
