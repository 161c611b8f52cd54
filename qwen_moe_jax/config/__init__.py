"""Config classes: what a model means, how it is run and sharded, how text is generated. All are frozen dataclasses.

Nothing here knows a Hub name or imports JAX: `huggingface/` translates config.json into these fields, and no layer asks
which family it belongs to.
"""

from qwen_moe_jax.config.dtypes import DTYPES, Dtype, DTypeLike
from qwen_moe_jax.config.execution import (
    Attention,
    CapacityBy,
    ContextParallel,
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
    LayerKind,
    LinearAttentionConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)
from qwen_moe_jax.config.sharding import INFERENCE_SHARDING, MESH_AXES, SHARDING_RULES, ShardingRules

__all__ = [
    "DTYPES",
    "INFERENCE_SHARDING",
    "MESH_AXES",
    "SHARDING_RULES",
    "DTypeLike",
    "Activation",
    "Attention",
    "AttentionConfig",
    "CapacityBy",
    "ContextParallel",
    "DropPolicy",
    "Dtype",
    "Exchange",
    "ExecutionConfig",
    "GenerationConfig",
    "GroupedMatmul",
    "LayerKind",
    "LinearAttentionConfig",
    "LoraConfig",
    "MoEConfig",
    "ModelConfig",
    "RopeConfig",
    "RoutingMode",
    "ShardingRules",
]
