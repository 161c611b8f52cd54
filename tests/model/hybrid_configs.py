"""Configs of tiny hybrids, and models with random weights, without torch."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

import qwen_moe_jax as qmj
from qwen_moe_jax.config import AttentionConfig, LayerKind, LinearAttentionConfig, MoEConfig, RopeConfig
from qwen_moe_jax.nn.parameters import parameters_with_paths

#: By letter: linear and full layers, with experts and (capitals) with a dense MLP.
KINDS = {
    "l": LayerKind(mixer="linear", mlp="sparse"),
    "L": LayerKind(mixer="linear", mlp="dense"),
    "f": LayerKind(mixer="full", mlp="sparse"),
    "F": LayerKind(mixer="full", mlp="dense"),
    "W": LayerKind(mixer="sliding", mlp="dense"),
}
LINEAR = LinearAttentionConfig(num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=12, conv_kernel_dim=4)


def hybrid_config(layers: str, *, linear: dict[str, Any] | None = None, **settings: Any) -> qmj.ModelConfig:
    """A hybrid with a layer for each letter of `KINDS`; its vocabulary and heads divide over tensor=2."""
    defaults: dict[str, Any] = dict(
        model_type="qwen3_next",
        vocab_size=98,
        hidden_size=32,
        intermediate_size=48,
        layers=tuple(KINDS[letter] for letter in layers),
        attention=AttentionConfig(
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, qk_norm=True, output_gate=True, sliding_window=5
        ),
        rope=RopeConfig(rope_theta=100.0, partial_rotary_factor=0.25),
        moe=MoEConfig(
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=20,
            norm_topk_prob=True,
        ),
        linear_attention=dataclasses.replace(LINEAR, **linear or {}) if "l" in layers.lower() else None,
        zero_centered_norm=True,
        initializer_range=0.1,
    )
    return qmj.ModelConfig(**defaults | settings)


def hybrid_model(
    config: qmj.ModelConfig,
    mesh: Mesh | None = None,
    execution: qmj.ExecutionConfig = qmj.ExecutionConfig(),
) -> qmj.CausalLM:
    """A model with random weights of every kind: new norms and dt_bias are constant, which would hide errors."""
    model = qmj.CausalLM(config, rngs=nnx.Rngs(0), mesh=mesh, execution=execution)
    for index, (path, param) in enumerate(parameters_with_paths(model)):
        if path.endswith(("norm.weight", "dt_bias")):
            value = param.get_value()
            noise = 0.3 * jax.random.normal(jax.random.key(index), value.shape, value.dtype)
            param.set_value(jax.device_put(value + noise, value.sharding))
    return model
