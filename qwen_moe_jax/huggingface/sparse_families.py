"""Which sparse family a dense one becomes, and its config."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen_moe_jax.config import ModelConfig, MoEConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.checkpoint import Checkpoint, open_checkpoint
from qwen_moe_jax.huggingface.families import FAMILIES
from qwen_moe_jax.huggingface.fields import freeze, read_json, thaw
from qwen_moe_jax.huggingface.layouts import prefixed
from qwen_moe_jax.huggingface.tensors import renamer
from qwen_moe_jax.storage.arrays import ArrayTensor
from qwen_moe_jax.storage.tensor import StoredTensor

#: The sparse family with the same attention.
_SPARSE = {"qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
#: Defaults of dense families that are read as Mixtrals of one expert, where they are not Mixtral's.
_AS_MIXTRAL: dict[str, dict[str, Any]] = {
    "mistral": {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "sliding_window": 4096},
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "sliding_window": None, "max_position_embeddings": 2048},
}
_MATRICES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_MLP = re.compile(r"(model\.layers\.\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight")


#: Matrices of an expert, of a shared expert and of a dense layer.
MATRICES = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """Names of the tensors of a layer's feed-forward part, under the names of `hub_parameters`.

    Attributes:
        config: of the model.
        path: of the layer, as model.layers.3.
    """

    config: ModelConfig
    path: str

    def dense(self, matrix: str) -> str:
        """Of a dense layer: "gate", "up" or "down"."""
        return self._name(f"{matrix}_proj")

    def expert(self, expert: int, matrix: str) -> str:
        """Of an expert."""
        return self._name(f"experts.{expert}.{matrix}_proj")

    def shared(self, matrix: str) -> str:
        """Of the shared expert."""
        return self._name(f"shared_expert.{matrix}_proj")

    @property
    def router(self) -> str:
        return self._name("gate")

    @property
    def shared_gate(self) -> str:
        return self._name("shared_expert_gate")

    def _name(self, rest: str) -> str:
        return renamer(self.config.model_type)(f"{self.path}.mlp.{rest}.weight")


def sparse_layers(config: ModelConfig) -> list[FeedForward]:
    """The sparse layers in their order, those of the next-token head at the end."""
    paths = [f"model.layers.{layer}" for layer, kind in enumerate(config.layers) if kind.mlp == "sparse"]
    paths += [f"mtp.layers.{layer}" for layer in range(config.num_mtp_layers)]
    return [FeedForward(config, path) for path in paths]


def open_for_upcycling(folder: Path) -> Checkpoint:
    """A dense checkpoint; Mistral's and Llama's as Mixtrals of one expert, which are the same function.

    Raises:
        ConfigError: no sparse family has the model's attention.
        CheckpointError: as `open_checkpoint`.
    """
    hub = read_json(folder / "config.json")
    model_type = hub.get("model_type")
    if model_type not in _AS_MIXTRAL:
        checkpoint = open_checkpoint(folder)
        if checkpoint.config.moe is not None or model_type not in _SPARSE:
            known = ", ".join([*_SPARSE, *_AS_MIXTRAL])
            raise ConfigError(
                f"{folder}: model_type={model_type!r} cannot be upcycled: expected a dense model, one of {known}. "
                "`grow` and `split` change mixtures."
            )
        return checkpoint
    for name in ("attention_bias", "mlp_bias"):
        if hub.get(name):
            raise ConfigError(f"{folder}: {name}=true cannot be upcycled: Mixtral has no biases.")
    given = {**_AS_MIXTRAL[model_type], **hub}
    if model_type == "llama":
        given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    architectures = [
        re.sub("^(Mistral|Llama)", "Mixtral", name) for name in hub.get("architectures") or () if isinstance(name, str)
    ]
    content = given | {
        "model_type": "mixtral",
        "architectures": architectures,
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
    }
    return open_checkpoint(folder, content=content, adapt=lambda tensors: _one_expert(tensors, content))


def _one_expert(tensors: dict[str, StoredTensor], hub: Mapping[str, Any]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        matrix = _MLP.fullmatch(prefixed(name))
        if matrix is None:
            found[name] = tensor
            continue
        block = f"{matrix[1]}.block_sparse_moe"
        found[f"{block}.experts.0.{_MATRICES[matrix[2]]}.weight"] = tensor
        router = np.zeros((1, int(hub["hidden_size"])), tensor.dtype)
        found[f"{block}.gate.weight"] = ArrayTensor(router, tensor.source)
    return found


def sparse_config(
    config: ModelConfig, *, num_experts: int, num_experts_per_tok: int, moe_intermediate_size: int
) -> ModelConfig:
    """The config of the sparse model that a dense one becomes: all layers sparse, top-k weights that sum to one.

    Args:
        config: of a dense model, or of a Mixtral.
        num_experts, num_experts_per_tok, moe_intermediate_size: of every layer.

    Raises:
        ConfigError: the numbers do not fit each other.
    """
    model_type = _SPARSE.get(config.model_type, config.model_type)
    mixtral = config.moe is not None
    has_shared = "shared_expert_intermediate_size" in FAMILIES[model_type].defaults
    moe = MoEConfig(
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        moe_intermediate_size=moe_intermediate_size,
        norm_topk_prob=True,
        float32_weights=mixtral,
        shared_expert_intermediate_size=config.intermediate_size if has_shared else 0,
    )
    changed: dict[str, Any] = {"model_type": model_type, "moe": moe}
    if mixtral:  # whose intermediate_size is that of an expert
        changed |= {"intermediate_size": moe_intermediate_size}
    layers = tuple(dataclasses.replace(kind, mlp="sparse") for kind in config.layers)
    without = {"layer_types", "num_local_experts", "num_experts"}
    fields = freeze({name: value for name, value in thaw(config.hub_fields).items() if name not in without})
    return dataclasses.replace(config, **changed, layers=layers, hub_fields=fields)


def with_experts(config: ModelConfig, moe: MoEConfig) -> ModelConfig:
    """A sparse config with other numbers of experts."""
    family = FAMILIES[config.model_type]
    # The width of an expert is that of dense layers, too, where the family has one key for both.
    shared = "intermediate_size" in family.without or "moe_intermediate_size" not in family.defaults
    width = moe.moe_intermediate_size if shared else config.intermediate_size
    without = {"num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size"}
    fields = freeze({name: value for name, value in thaw(config.hub_fields).items() if name not in without})
    return dataclasses.replace(config, intermediate_size=width, moe=moe, hub_fields=fields)
