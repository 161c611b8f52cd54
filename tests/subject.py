"""Our side of a comparison: running the package's models on a batch, compiled."""

import functools

import jax
import jax.numpy as jnp


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


def is_sparse(config) -> bool:
    return any(kind.mlp == "sparse" for kind in config.layers)
