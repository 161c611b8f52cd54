"""Our side of a comparison: running the package's models on a batch, compiled."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import qwen_moe_jax as qmj
from qwen_moe_jax.huggingface.linear_rows import in_published_order
from qwen_moe_jax.huggingface.tensors import hub_parameters, hub_tensors
from qwen_moe_jax.storage.arrays import ArrayTensor


@functools.partial(jax.jit, static_argnames=("output_router_logits", "output_hidden_states"))
def run(
    model,
    tokens,
    segment_ids=None,
    positions=None,
    *,
    noise_key=None,
    output_router_logits=False,
    output_hidden_states=False,
):
    """One compiled forward pass. Models are pytrees, so this compiles once per config and batch shape."""
    return model(
        jnp.asarray(tokens),
        segment_ids=segment_ids,
        positions=positions,
        noise_key=noise_key,
        output_router_logits=output_router_logits,
        output_hidden_states=output_hidden_states,
    )


def hub_arrays(model: qmj.CausalLM) -> Iterator[tuple[str, np.ndarray]]:
    """(Hub name, array) of every tensor of a model, or of gradients with its structure, layer by layer.

    Names and rows are those of the family's published files.
    """
    parameters = hub_parameters(model)
    arrays = {parameter.path: np.asarray(parameter.leaf) for parameter in parameters}
    tensors = {
        name: ArrayTensor(arrays[parameter.path][parameter.window(index)], "the model")
        for name, parameter, index in hub_tensors(parameters)
    }
    for name, tensor in in_published_order(tensors, model.config).items():
        yield name, tensor.read()


def is_sparse(config) -> bool:
    return any(kind.mlp == "sparse" for kind in config.layers)


def on_mesh(model: qmj.CausalLM, mesh: Mesh, execution: qmj.ExecutionConfig | None = None) -> qmj.CausalLM:
    """The same weights on another mesh, under another execution. To draw them there costs a program for each shape."""
    described = qmj.CausalLM(model.config, rngs=None, mesh=mesh, execution=execution or model.execution)
    if model.lora is not None:
        qmj.add_lora(described, model.lora, rngs=None)
    places = [leaf.sharding for leaf in jax.tree.leaves(described)]
    weights = [jax.device_put(weight, place) for weight, place in zip(jax.tree.leaves(model), places, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(described), weights)
