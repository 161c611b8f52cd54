"""Layers are stacked by kind and scanned: the plan of it, and what it costs to compile."""

import jax
import jax.extend.core
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import qwen_moe_jax as qmj
from qwen_moe_jax.config import LayerKind
from qwen_moe_jax.model.segments import plan_segments
from tests.cases import CASES

KINDS = {
    "d": LayerKind(mlp="dense"),
    "s": LayerKind(mlp="sparse"),
    "w": LayerKind(mixer="sliding", mlp="sparse"),
}


def plan(text):
    names = {kind: letter for letter, kind in KINDS.items()}
    segments = plan_segments([KINDS[letter] for letter in text])
    return [("".join(names[kind] for kind in segment.period), segment.repeats) for segment in segments]


@pytest.mark.parametrize(
    "kinds, segments",
    [
        ("ssss", [("s", 4)]),
        ("dsdsds", [("ds", 3)]),
        ("dsss", [("d", 1), ("s", 3)]),
        ("ddssss", [("d", 2), ("s", 4)]),
        ("swswsws", [("sw", 3), ("s", 1)]),
        ("d", [("d", 1)]),
    ],
)
def test_the_smallest_repeating_period_is_scanned(kinds, segments):
    assert plan(kinds) == segments


@given(st.text("dsw", min_size=1, max_size=30))
def test_a_plan_covers_every_layer_once_in_order(kinds):
    covered = {}
    for segment in plan_segments([KINDS[letter] for letter in kinds]):
        for repeat in range(segment.repeats):
            for position, kind in enumerate(segment.period):
                layer = segment.layer_index(position, repeat)
                assert layer not in covered
                covered[layer] = kind
    assert [covered[layer] for layer in range(len(kinds))] == [KINDS[letter] for letter in kinds]


def test_a_thousand_layers_are_planned():
    """Neither Python's stack nor the square of their number is in the way."""
    assert plan("s" * 1000) == [("s", 1000)]
    drawn = "".join(np.random.default_rng(0).choice(list("ds"), 1000))
    assert "".join(period * repeats for period, repeats in plan(drawn)) == drawn


def test_depth_does_not_grow_the_program():
    """Compile time of 32 layers is that of 2: the compiled training step has the same instructions."""

    def instructions(layers):
        hub = dict(
            model_type="qwen3_moe",
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        )
        model = qmj.CausalLM(qmj.ModelConfig.from_pretrained(hub), rngs=None)
        model.train()
        step = jax.jit(jax.grad(lambda model, tokens: model(tokens).logits.mean()))
        tokens = jax.ShapeDtypeStruct((2, 8), np.int32)
        return len(step.lower(model, tokens).as_text().splitlines())

    assert instructions(32) == instructions(2)


@pytest.mark.parametrize("remat", ["none", "dots"])
@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_no_weight_is_copied_for_the_backward_pass(dispatch, remat):
    """The scan forward hands activations on, layer by layer; a matrix among them would be all weights once more."""
    config = qmj.ModelConfig.from_pretrained(CASES["qwen3_moe-plain"].config)
    execution = qmj.ExecutionConfig(dispatch=dispatch, remat=remat)
    model = qmj.CausalLM(config, rngs=nnx.Rngs(0), execution=execution)
    model.train()
    tokens = np.ones((1, 19), np.int32)  # so that no activation has the shape of a weight
    traced = jax.make_jaxpr(jax.grad(lambda model: model.token_losses(tokens, tokens).losses.sum()))(model)
    [forward, backward] = _scans_over(traced.jaxpr, config.num_hidden_layers)
    matrices = {leaf.shape for leaf in jax.tree.leaves(model.model.layers) if leaf.ndim > 2}
    assert matrices <= {output.aval.shape for output in backward.outvars}  # their gradients
    assert not matrices & {output.aval.shape for output in forward.outvars}


def _scans_over(jaxpr, length):
    """All of that length in a program, the functions that it calls included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == length:
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _scans_over(inner, length)
