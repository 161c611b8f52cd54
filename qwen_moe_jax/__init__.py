"""Qwen-style mixture-of-experts decoders in JAX: exact, sharded, and back to the Hub's format.

    import qwen_moe_jax as qmj

    model = qmj.from_pretrained("path/to/Qwen3-30B-A3B", mesh=qmj.make_mesh(data=2, expert=4))
    logits_BTV = model(tokens_BT).logits

The names below are the public surface. They are imported on first use, so that a command-line tool can answer `--help`
without waiting for JAX.

Arrays carry their axes as a suffix, `hidden_BTD`; each letter has one meaning everywhere:

    B  batch                 D  hidden size            E  experts               V  vocabulary
    T  query positions       N  query heads            A  experts per token     L  layers
    S  key positions         K  key/value heads        R  routed rows           X  devices of a mesh axis
                             H  head size              G  routing groups
                             F  feed-forward width     C  capacity slots
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_moe_jax.config import ExecutionConfig, GenerationConfig, LoraConfig, ModelConfig, MoEConfig, ShardingRules
    from qwen_moe_jax.errors import CheckpointError, ConfigError, RequestError, ShardingError
    from qwen_moe_jax.huggingface.load import from_pretrained
    from qwen_moe_jax.huggingface.model_card import ModelCard
    from qwen_moe_jax.huggingface.native import save_orbax
    from qwen_moe_jax.huggingface.peft import load_adapter, save_adapter
    from qwen_moe_jax.huggingface.push import push_to_hub
    from qwen_moe_jax.huggingface.save import save_pretrained
    from qwen_moe_jax.inference.engine import Engine
    from qwen_moe_jax.inference.generate import complete, generate
    from qwen_moe_jax.inference.request import Request
    from qwen_moe_jax.inference.score import perplexity, score
    from qwen_moe_jax.inference.session import Session, stream
    from qwen_moe_jax.model.causal_lm import CausalLM, SequenceClassifier, TokenClassifier
    from qwen_moe_jax.model.lora import add_lora, merge_lora
    from qwen_moe_jax.moe.block import SparseMoeBlock
    from qwen_moe_jax.moe.dispatch import register_dispatcher
    from qwen_moe_jax.moe.replay import RecordedRouting
    from qwen_moe_jax.nn.parameters import ParameterFactory
    from qwen_moe_jax.sharding.distributed import initialize_distributed
    from qwen_moe_jax.sharding.explicit import with_explicit_axes
    from qwen_moe_jax.sharding.mesh import make_mesh

__version__ = "0.1.0"

_HOME = {
    "ModelConfig": "config",
    "ExecutionConfig": "config",
    "GenerationConfig": "config",
    "LoraConfig": "config",
    "MoEConfig": "config",
    "ShardingRules": "config",
    "ConfigError": "errors",
    "CheckpointError": "errors",
    "RequestError": "errors",
    "ShardingError": "errors",
    "initialize_distributed": "sharding.distributed",
    "make_mesh": "sharding.mesh",
    "CausalLM": "model.causal_lm",
    "SequenceClassifier": "model.causal_lm",
    "TokenClassifier": "model.causal_lm",
    "SparseMoeBlock": "moe.block",
    "register_dispatcher": "moe.dispatch",
    "RecordedRouting": "moe.replay",
    "ParameterFactory": "nn.parameters",
    "with_explicit_axes": "sharding.explicit",
    "add_lora": "model.lora",
    "merge_lora": "model.lora",
    "from_pretrained": "huggingface.load",
    "save_pretrained": "huggingface.save",
    "push_to_hub": "huggingface.push",
    "ModelCard": "huggingface.model_card",
    "save_orbax": "huggingface.native",
    "save_adapter": "huggingface.peft",
    "load_adapter": "huggingface.peft",
    "generate": "inference.generate",
    "complete": "inference.generate",
    "Engine": "inference.engine",
    "Request": "inference.request",
    "stream": "inference.session",
    "Session": "inference.session",
    "score": "inference.score",
    "perplexity": "inference.score",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
