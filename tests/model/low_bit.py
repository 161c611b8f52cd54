"""Tiny models with weights in few bits, and the models of floats that these stand for."""

import dataclasses

import jax
from jax.sharding import Mesh

import qwen_moe_jax as qmj
from qwen_moe_jax.nn.parameters import parameters_with_paths
from qwen_moe_jax.nn.quantised import Quantised
from tests.cases import COMMON, PLAIN
from tests.model.hybrid_configs import hybrid_config

#: Groups of 16 inputs, of which a mesh shards some.
GROUP = 16


def sparse_config() -> qmj.ModelConfig:
    """A small mixture whose inputs divide into groups over a mesh of two by two by two."""
    sizes = {"vocab_size": 98, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    return qmj.ModelConfig.from_pretrained(
        {**COMMON, **PLAIN["qwen3_moe"], "model_type": "qwen3_moe", "initializer_range": 0.1, **sizes}
    )


def hybrid() -> qmj.ModelConfig:
    """A layer of a gated delta rule and one of full attention, with experts and a shared one."""
    config = hybrid_config("lf")
    return dataclasses.replace(
        config, moe=dataclasses.replace(config.moe, moe_intermediate_size=32, shared_expert_intermediate_size=16)
    )


def low_bit_model(config: qmj.ModelConfig, weights: str, mesh: Mesh | None = None, **settings) -> qmj.CausalLM:
    execution = qmj.ExecutionConfig(weights=weights, weights_group_size=GROUP, dtype="float32", **settings)
    return qmj.CausalLM(config, rngs=0, mesh=mesh, execution=execution)


def dequantised(model: qmj.CausalLM) -> qmj.CausalLM:
    """The model of floats with the same weights."""
    floats = qmj.CausalLM(
        model.config, rngs=None, mesh=model.mesh, execution=dataclasses.replace(model.execution, weights=None)
    )
    own = {path: param.get_value() for path, param in parameters_with_paths(model)}
    for path, param in parameters_with_paths(floats):
        described = param.get_value()
        value = own.get(path)
        if value is None:
            matrix = Quantised(own[f"{path}.integers"], own[f"{path}.scales"])
            value = jax.device_put(matrix.dequantised(described.dtype), described.sharding)
        param.set_value(value)
    return floats
