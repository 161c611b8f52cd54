"""Capacity-based dispatch: one-hot einsums that carry tokens to a fixed number of places per expert, and back.

GShard (Lepikhin et al., 2020): tokens are routed in groups; in each group every expert has `capacity` places. Over the
`expert` axis the exchange is one all-to-all there and one back. Tokens that find their expert full are dropped for that
expert (their other experts still count), and are counted.

Within a group, places are given in the order of the tokens, and for one token in the order of its choices: the last
tokens of a group are the ones dropped. Groups never span devices, and padding takes no place.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.moe.experts import PLACES, Experts
from qwen_moe_jax.moe.router import Routing
from qwen_moe_jax.sharding.rules import BATCH


def expert_capacity(group_size: int, num_experts_per_tok: int, num_experts: int, capacity_factor: float) -> int:
    """Places per expert and group: a balanced share times the factor, at least one, at most one per token."""
    share = math.ceil(group_size * num_experts_per_tok / num_experts * capacity_factor)
    return min(max(share, 1), group_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """Where every assignment of a group goes. A one-hot row of zeros is an assignment without a place.

    Attributes:
        expert_GgAE: one-hot of the expert.
        place_GgAC: one-hot of the place within the expert.
        dropped_E: int32, assignments without a place.
    """

    expert_GgAE: jax.Array
    place_GgAC: jax.Array
    dropped_E: jax.Array


def run(
    hidden_BTD: jax.Array, routing: Routing, experts: Experts, *, capacity_factor: float, group_size: int
) -> tuple[jax.Array, jax.Array]:
    """Applies the chosen experts, as far as they have places.

    Args:
        hidden_BTD: tokens, B over `BATCH`.
        routing: their experts and weights.
        experts: the layer's experts.
        capacity_factor, group_size: see `ExecutionConfig`. Fewer tokens on a device than `group_size` are one group.

    Returns:
        The weighted sum [B, T, D] in the dtype of `hidden_BTD`, and the dropped tokens per expert, int32 [E].
    """
    batch, length, _ = hidden_BTD.shape
    num_experts, chosen = routing.probs_BTE.shape[-1], routing.experts_BTA.shape[-1]
    local_tokens = batch * length // _ways(hidden_BTD)
    group_size = min(group_size, local_tokens)
    capacity = expert_capacity(group_size, chosen, num_experts, capacity_factor)

    def group(x: jax.Array) -> jax.Array:
        return _into_groups(x, group_size)

    places = _assign(group(routing.experts_BTA), group(routing.real_BT), num_experts, capacity, hidden_BTD.dtype)
    # The dispatch einsum multiplies every token with zeros: a NaN or infinity would reach its whole group. The token's
    # own result is NaN all the same, through the router's weights.
    sound_BT1 = jnp.isfinite(hidden_BTD).all(axis=-1, keepdims=True)
    x_EGCD = _dispatch(group(jnp.where(sound_BT1, hidden_BTD, 0)), places)
    y_EGCD = experts.per_expert(x_EGCD)
    combined_GgD = _combine(y_EGCD, places, group(routing.weights_BTA))
    return _out_of_groups(combined_GgD.astype(hidden_BTD.dtype), batch, length), places.dropped_E


def _dispatch(x_GgD: jax.Array, places: Places) -> jax.Array:
    """Tokens to places, and the places to the devices of their experts (an all-to-all)."""
    mask_GgEC = jnp.einsum("GgAE,GgAC->GgEC", places.expert_GgAE, places.place_GgAC)
    x_EGCD = jnp.einsum("GgEC,GgD->EGCD", mask_GgEC, x_GgD)
    return jax.sharding.reshard(x_EGCD, PLACES)


def _combine(y_EGCD: jax.Array, places: Places, weights_GgA: jax.Array) -> jax.Array:
    """The places back to the devices of their tokens (an all-to-all), and each token's weighted sum."""
    y_EGCD = jax.sharding.reshard(y_EGCD, P(None, BATCH, None, None))
    weighted_GgAE = places.expert_GgAE.astype(weights_GgA.dtype) * weights_GgA[..., None]
    mask_GgEC = jnp.einsum("GgAE,GgAC->GgEC", weighted_GgAE, places.place_GgAC.astype(weights_GgA.dtype))
    return jnp.einsum("GgEC,EGCD->GgD", mask_GgEC, y_EGCD)


def _assign(experts_GgA: jax.Array, real_Gg: jax.Array, num_experts: int, capacity: int, dtype: jnp.dtype) -> Places:
    """Gives out the places: an assignment's place is the number of earlier assignments to its expert."""

    def local(experts_GgA: jax.Array, real_Gg: jax.Array) -> Places:
        groups, group_size, chosen = experts_GgA.shape
        wanted_GgAE = jax.nn.one_hot(experts_GgA, num_experts, dtype=jnp.int32) * real_Gg[..., None, None]
        wanted_GRE = wanted_GgAE.reshape(groups, group_size * chosen, num_experts)
        earlier_GRE = jnp.cumsum(wanted_GRE, axis=1) - wanted_GRE
        place_GR = jnp.sum(earlier_GRE * wanted_GRE, axis=-1)
        fits_GRE = wanted_GRE * (place_GR < capacity)[..., None]
        return Places(
            expert_GgAE=fits_GRE.reshape(wanted_GgAE.shape).astype(dtype),
            place_GgAC=jax.nn.one_hot(place_GR.reshape(experts_GgA.shape), capacity, dtype=dtype),
            dropped_E=jax.lax.psum(jnp.sum(wanted_GRE - fits_GRE, axis=(0, 1)), BATCH),
        )

    hot = P(BATCH, None, None, None)
    out = Places(expert_GgAE=hot, place_GgAC=hot, dropped_E=P(None))
    return jax.shard_map(local, in_specs=(P(BATCH, None, None), P(BATCH, None)), out_specs=out)(experts_GgA, real_Gg)


def _ways(x: jax.Array) -> int:
    """Over how many devices the tokens are split."""
    shape = jax.typeof(x).sharding.mesh.shape
    return math.prod(shape[axis] for axis in BATCH)


def _into_groups(x: jax.Array, group_size: int) -> jax.Array:
    """[B, T, …] to [G, g, …]: each device fills groups with its own tokens, the last one up with zeros (padding)."""

    def local(x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, *x.shape[2:])
        missing = -len(rows) % group_size
        rows = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
        return rows.reshape(-1, group_size, *rows.shape[1:])

    spec = P(BATCH, *[None] * (x.ndim - 1))
    return jax.shard_map(local, in_specs=spec, out_specs=spec)(x)


def _out_of_groups(x_GgD: jax.Array, batch: int, length: int) -> jax.Array:
    """The inverse of `_into_groups`."""
    local_batch = batch // _ways(x_GgD)

    def local(x_GgD: jax.Array) -> jax.Array:
        rows = x_GgD.reshape(-1, x_GgD.shape[-1])
        return rows[: local_batch * length].reshape(local_batch, length, -1)

    spec = P(BATCH, None, None)
    return jax.shard_map(local, in_specs=spec, out_specs=spec)(x_GgD)
