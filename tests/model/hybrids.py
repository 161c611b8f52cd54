"""Tiny hybrid models of transformers, and the same weights in this package's.

The copy below is written apart from `huggingface/`, so that a model's numbers do not depend on the loader's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import qwen_moe_jax as qmj
from qwen_moe_jax.config import AttentionConfig, LayerKind, LinearAttentionConfig, MoEConfig, RopeConfig
from qwen_moe_jax.nn.parameters import parameters_with_paths
from tests.referee import routing_gap, torch, transformers

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25},
    "use_cache": False,
}
FAMILIES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
#: Router logits nearer than this, as a share of their size, may be ranked otherwise by rounding alone.
SMALLEST_GAP = 3e-5


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """A hybrid of transformers with random weights, drawn so that no expert is chosen by rounding alone.

    Attributes:
        hub: transformers' model, float32, eager.
        config: the same for this package.
        model: this package's with the same weights, on one device.
    """

    hub: Any
    config: qmj.ModelConfig
    model: qmj.CausalLM

    def ask(self, tokens_BT: np.ndarray, mask_BT: np.ndarray | None = None, **options: Any) -> Any:
        """transformers' output."""
        mask = None if mask_BT is None else torch.tensor(mask_BT, dtype=torch.long)
        tokens = torch.tensor(tokens_BT, dtype=torch.long)
        return self.hub(input_ids=tokens, attention_mask=mask, use_cache=False, **options)

    def hub_logits(self, tokens_BT: np.ndarray, mask_BT: np.ndarray | None = None) -> np.ndarray:
        """Float32 logits of transformers."""
        with torch.no_grad():
            return self.ask(tokens_BT, mask_BT).logits.float().numpy()

    def hub_hidden_states(self, tokens_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
        """What enters each layer of transformers' model, and its last result, [L+1, B, T, D]."""
        with torch.no_grad():
            states = self.ask(tokens_BT, mask_BT, output_hidden_states=True).hidden_states
        return torch.stack(states).numpy()


def hybrid(
    family: str,
    *,
    scale: float,
    batch: tuple[np.ndarray, np.ndarray] | None = None,
    execution: qmj.ExecutionConfig = qmj.ExecutionConfig(),
    **settings: Any,
) -> Hybrid:
    """A hybrid of this family with weights N(0, scale²).

    Args:
        family: its model_type.
        scale: standard deviation of its matrices.
        batch: tokens and mask [B, T] that must be routed without near-ties; None does not ask.
        execution: of this package's model.
        settings: on top of `COMMON`.
    """
    hub_config = transformers.AutoConfig.for_model(family, **{**COMMON, **settings})
    eager = {"attn_implementation": "eager"}
    if family != "qwen3_5_text":
        eager["experts_implementation"] = "eager"
    hub = transformers.AutoModelForCausalLM.from_config(hub_config, dtype=torch.float32, **eager).eval()
    for seed in range(30):
        randomise(hub, seed, scale)
        if batch is None or _is_clear(hub, *batch):
            break
    else:
        raise AssertionError(f"{family} {settings}: no seed without near-ties in routing")
    config = config_of(hub_config)
    tensors = {name: parameter.detach().numpy() for name, parameter in hub.named_parameters()}
    return Hybrid(hub, config, copied(tensors, config, execution))


def randomise(hub: Any, seed: int, scale: float) -> None:
    """Random weights of every kind: also of the norms, which new models have at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(hub.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                parameter.copy_(torch.log(0.01 + 15.99 * torch.rand(parameter.shape, generator=generator)))
            elif name.endswith("linear_attn.norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("norm.weight"):
                parameter.copy_(0.2 * noise)
            elif name.endswith("dt_bias"):
                parameter.copy_(noise)
            else:
                parameter.copy_(scale * noise)


def _is_clear(hub: Any, tokens_BT: np.ndarray, mask_BT: np.ndarray) -> bool:
    if not _sparse_layers(hub.config):
        return True
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(tokens_BT), "attention_mask": torch.tensor(mask_BT)}
        routers = hub.model(**inputs, output_router_logits=True, use_cache=False).router_logits
    for logits in routers:
        logits = logits.numpy().reshape(*tokens_BT.shape, -1)[mask_BT.astype(bool)]
        if routing_gap(logits, hub.config.num_experts_per_tok) < SMALLEST_GAP * np.std(logits):
            return False
    return True


def config_of(hub: Any) -> qmj.ModelConfig:
    """This package's config of a transformers config, field by field."""
    sparse = _sparse_layers(hub)
    mixers = ["linear" if kind == "linear_attention" else "full" for kind in hub.layer_types]
    rope = hub.rope_parameters
    return qmj.ModelConfig(
        model_type=hub.model_type,
        vocab_size=hub.vocab_size,
        hidden_size=hub.hidden_size,
        intermediate_size=getattr(hub, "intermediate_size", 1),
        layers=tuple(
            LayerKind(mixer=mixer, mlp="sparse" if layer in sparse else "dense") for layer, mixer in enumerate(mixers)
        ),
        attention=AttentionConfig(
            num_attention_heads=hub.num_attention_heads,
            num_key_value_heads=hub.num_key_value_heads,
            head_dim=hub.head_dim,
            qkv_bias=hub.attention_bias,
            o_bias=hub.attention_bias,
            qk_norm=True,
            output_gate=True,
        ),
        rope=RopeConfig(
            **{key: value for key, value in rope.items() if key not in ("mrope_section", "mrope_interleaved")}
        ),
        moe=MoEConfig(
            num_experts=hub.num_experts,
            num_experts_per_tok=hub.num_experts_per_tok,
            moe_intermediate_size=hub.moe_intermediate_size,
            shared_expert_intermediate_size=hub.shared_expert_intermediate_size,
            norm_topk_prob=getattr(hub, "norm_topk_prob", True),
        )
        if sparse
        else None,
        linear_attention=LinearAttentionConfig(
            num_key_heads=hub.linear_num_key_heads,
            num_value_heads=hub.linear_num_value_heads,
            key_head_dim=hub.linear_key_head_dim,
            value_head_dim=hub.linear_value_head_dim,
            conv_kernel_dim=hub.linear_conv_kernel_dim,
        )
        if "linear" in mixers
        else None,
        zero_centered_norm=True,
        rms_norm_eps=hub.rms_norm_eps,
        hidden_act=hub.hidden_act,
        max_position_embeddings=hub.max_position_embeddings,
        tie_word_embeddings=hub.tie_word_embeddings,
    )


def _sparse_layers(hub: Any) -> set[int]:
    if hub.model_type == "qwen3_5_text":
        return set()
    dense, step = getattr(hub, "mlp_only_layers", []), getattr(hub, "decoder_sparse_step", 1)
    return {layer for layer in range(hub.num_hidden_layers) if layer not in dense and (layer + 1) % step == 0}


def copied(
    tensors: Mapping[str, np.ndarray],
    config: qmj.ModelConfig,
    execution: qmj.ExecutionConfig = qmj.ExecutionConfig(),
) -> qmj.CausalLM:
    """A model of this package with the tensors of a transformers model of the same config, on one device."""
    model = qmj.CausalLM(config, rngs=None, execution=execution)
    values = by_path(tensors, model)
    for path, param in parameters_with_paths(model):
        abstract = param.get_value()
        assert values[path].shape == abstract.shape, f"{path}: {values[path].shape}, expected {abstract.shape}"
        param.set_value(jax.device_put(values[path].astype(abstract.dtype), abstract.sharding))
    return model


def by_path(tensors: Mapping[str, np.ndarray], model: qmj.CausalLM) -> dict[str, np.ndarray]:
    """The tensors, or gradients with their names and shapes, by the paths of this package's parameters."""
    found = {
        "model.embed_tokens.weight": tensors["model.embed_tokens.weight"],
        "model.norm.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors.get("lm_head.weight"),
    }
    for number, segment in enumerate(model.model.layers.plan):
        for position in range(len(segment.period)):
            layers = []
            for repeat in range(segment.repeats):
                prefix = f"model.layers.{segment.layer_index(position, repeat)}."
                own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
                layers.append(_layer(own, model.config.linear_attention))
            for name in layers[0]:
                path = f"model.layers.segments.{number}.{position}.{name}"
                found[path] = np.stack([layer[name] for layer in layers])
    return {path: value for path, value in found.items() if value is not None}


def _layer(own: dict[str, np.ndarray], linear: LinearAttentionConfig | None) -> dict[str, np.ndarray]:
    """One layer's tensors by this package's names: rows of linear attention grouped by key head, experts apart."""
    found = {}
    for name, value in own.items():
        if name == "mlp.experts.gate_up_proj":
            found["mlp.experts.gate_proj"], found["mlp.experts.up_proj"] = np.split(value, 2, axis=1)
        elif name == "linear_attn.in_proj_qkvz.weight":
            heads, values = linear.num_key_heads, linear.value_dim // linear.num_key_heads
            of_z = 2 * linear.key_head_dim + values
            rows = value.reshape(heads, of_z + values, -1)
            found["linear_attn.in_proj_qkv.weight"] = rows[:, :of_z].reshape(linear.conv_dim, -1)
            found["linear_attn.in_proj_z.weight"] = rows[:, of_z:].reshape(linear.value_dim, -1)
        elif name == "linear_attn.in_proj_ba.weight":
            rows = value.reshape(linear.num_key_heads, 2, -1, value.shape[-1])
            for part, letter in enumerate("ba"):
                found[f"linear_attn.in_proj_{letter}.weight"] = rows[:, part].reshape(linear.num_value_heads, -1)
        elif name in ("linear_attn.in_proj_qkv.weight", "linear_attn.conv1d.weight"):
            found[name] = value[grouped_rows(linear)]
        else:
            found[name] = value
    return found


def grouped_rows(linear: LinearAttentionConfig) -> np.ndarray:
    """The rows of q, then k, then v, in the order of this package: for each key head those of its q, k and v."""
    starts = (0, linear.key_dim, 2 * linear.key_dim, linear.conv_dim)
    parts = [np.arange(*pair).reshape(linear.num_key_heads, -1) for pair in zip(starts, starts[1:], strict=False)]
    return np.concatenate(parts, axis=1).ravel()
