"""What a model means, how it is run, how text is made: frozen dataclasses, and what their fields may be.

Nothing here knows a Hub name or imports JAX: `huggingface/` translates config.json into these fields, and no layer ever
asks which family it belongs to.
"""

from qwen_moe_jax.config.execution import (
    CapacityBy,
    Dispatch,
    DropPolicy,
    Exchange,
    ExecutionConfig,
    GroupedMatmul,
    RoutingMode,
)
from qwen_moe_jax.config.generation import GenerationConfig
from qwen_moe_jax.config.lora import LoraConfig
from qwen_moe_jax.config.model import (
    Activation,
    AttentionConfig,
    Dtype,
    LayerKind,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)
from qwen_moe_jax.config.sharding import INFERENCE_SHARDING, SHARDING_RULES, ShardingRules

__all__ = [
    "INFERENCE_SHARDING",
    "SHARDING_RULES",
    "Activation",
    "AttentionConfig",
    "CapacityBy",
    "Dispatch",
    "DropPolicy",
    "Dtype",
    "Exchange",
    "ExecutionConfig",
    "GenerationConfig",
    "GroupedMatmul",
    "LayerKind",
    "LoraConfig",
    "MoEConfig",
    "ModelConfig",
    "RopeConfig",
    "RoutingMode",
    "ShardingRules",
]
