"""Input arrays of a model: checks, padding to the mesh, and the per-token context of the layers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.model.rotary import RotaryTables
from qwen_moe_jax.moe.router import ForcedRouting, forced_specs
from qwen_moe_jax.sharding.positions import RowOrder
from qwen_moe_jax.sharding.rules import BATCH, positions_axis, tokens_spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """A batch of tokens, int32.

    Attributes:
        tokens_BT: token ids.
        segment_ids_BT: tokens attend within their own segment; 0 is padding.
        positions_BT: of each token in its text; None where a cache gives them.
        targets_BT: the token that should follow each one, where losses are asked for.
        logits_at_B: the one token of each row whose logits are asked for; None for all.
        next_tokens_BT, next_targets_BT, is_followed_BT: for a next-token head: token and target of the token after each
            one, and 1 where that is of its segment, else 0.
        row_segment_ids_BT, row_followed_ids_BT: `segment_ids_BT` of whole rows on every device of `context`; the second
            0 where a token is not followed. None where `context` has one device.
        order: the positions that [B, T] are sharded by; None where `context` has one device.
        forced: what is prescribed to the routers, stacked [L_sparse, …] in layer order; None where nothing is.
    """

    tokens_BT: jax.Array
    segment_ids_BT: jax.Array
    positions_BT: jax.Array | None = None
    targets_BT: jax.Array | None = None
    logits_at_B: jax.Array | None = None
    next_tokens_BT: jax.Array | None = None
    next_targets_BT: jax.Array | None = None
    is_followed_BT: jax.Array | None = None
    row_segment_ids_BT: jax.Array | None = None
    row_followed_ids_BT: jax.Array | None = None
    order: RowOrder | None = dataclasses.field(default=None, metadata={"static": True})
    forced: ForcedRouting | None = None


def input_specs(inputs: ModelInputs, mesh: Mesh) -> ModelInputs:
    """How they are sharded: rows over the mesh axes that share the batch, positions over `context`."""
    whole_rows = ("logits_at_B", "row_segment_ids_BT", "row_followed_ids_BT")
    specs: dict[str, Any] = {}
    for field in dataclasses.fields(inputs):
        spec = P(BATCH) if field.name in whole_rows else tokens_spec(mesh=mesh)
        specs[field.name] = None if getattr(inputs, field.name) is None else spec
    specs |= {"forced": forced_specs(inputs.forced, stacked=True, mesh=mesh), "order": inputs.order}
    return ModelInputs(**specs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenContext:
    """Per-token context of a batch that every layer reads, apart from the hidden states.

    Attributes:
        segment_ids_BT: int32; tokens attend within their own segment; 0 is padding.
        rotary: cosines and sines of the tokens' positions.
        row_segment_ids_BT, order: see `ModelInputs`.
    """

    segment_ids_BT: jax.Array
    rotary: RotaryTables
    row_segment_ids_BT: jax.Array | None = None
    order: RowOrder | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def token_mask_BT(self) -> jax.Array:
        """False for padding."""
        return self.segment_ids_BT != 0

    @property
    def row_ids_BT(self) -> jax.Array:
        """Segments of whole rows, on every device of `context`."""
        return self.segment_ids_BT if self.row_segment_ids_BT is None else self.row_segment_ids_BT


def checked_inputs(
    tokens: Any, segment_ids: Any = None, positions: Any = None, targets: Any = None, logits_at: Any = None
) -> ModelInputs:
    """Arrays, or lists of numbers, as a caller gives them; JAX arrays stay on their devices.

    Raises:
        RequestError: there are no tokens; they are not integers, or not all [B, T] (`logits_at` [B]).
    """
    if tokens is None:
        raise RequestError("there are no tokens, expected integers [batch, length] as the first argument.")
    arrays = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions, "targets": targets}
    arrays = {name: _as_array(x) for name, x in arrays.items() if x is not None}
    shape = jnp.shape(arrays["tokens"])
    if len(shape) != 2 or 0 in shape:
        raise RequestError(f"tokens have shape {shape}, expected [batch, length], neither of them 0.")
    if logits_at is not None:
        arrays["logits_at"] = _as_array(logits_at)
    for name, array in arrays.items():
        if name == "logits_at" and array.shape != shape[:1]:
            raise RequestError(f"logits_at has shape {array.shape}, expected {shape[:1]}: one token of each row.")
        if name != "logits_at" and array.shape != shape:
            raise RequestError(f"{name} has shape {array.shape}, expected that of the tokens, {shape}.")
        if not (jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.bool_)):
            raise RequestError(f"{name} has dtype {array.dtype}, expected integers.")
    return ModelInputs(
        tokens_BT=arrays["tokens"],
        segment_ids_BT=arrays.get("segment_ids", np.ones(shape, np.int32)),
        positions_BT=arrays.get("positions"),
        targets_BT=arrays.get("targets"),
        logits_at_B=arrays.get("logits_at"),
    )


def pad_rows(inputs: ModelInputs, num_shards: int, *, cached: bool) -> ModelInputs:
    """The inputs as int32, with rows of padding up to a multiple of the devices that share the batch.

    Args:
        inputs: as `checked_inputs` gives them.
        num_shards: number of those devices.
        cached: whether positions come from a cache.
    """
    forced, inputs = inputs.forced, dataclasses.replace(inputs, forced=None)
    inputs = jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.int32), inputs)
    if not cached:
        positions_BT = inputs.positions_BT
        positions_BT = positions_in_segments(inputs.segment_ids_BT) if positions_BT is None else positions_BT
        # Padding must not lengthen a dynamic rope.
        positions_BT = jnp.where(inputs.segment_ids_BT != 0, positions_BT, 0)
        inputs = dataclasses.replace(inputs, positions_BT=positions_BT)
    missing = -inputs.tokens_BT.shape[0] % num_shards
    inputs = jax.tree.map(lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), inputs)
    if forced is not None and forced.experts is not None and missing:
        forced = dataclasses.replace(forced, experts=jnp.pad(forced.experts, [(0, 0), (0, missing), (0, 0), (0, 0)]))
    return dataclasses.replace(inputs, forced=forced)


def in_order(inputs: ModelInputs, order: RowOrder | None) -> ModelInputs:
    """The inputs, padded and stored in this order; None is that of the rows. Call it outside of explicit axes.

    The arrays are a few integers for each token. On the devices of `context` they are whole, and each takes its part.
    """
    if order is None:
        return inputs
    forced, logits_at_B = inputs.forced, inputs.logits_at_B
    inputs = jax.tree.map(order.store, dataclasses.replace(inputs, forced=None, logits_at_B=None))
    if logits_at_B is not None:
        logits_at_B = jnp.asarray(order.stored_at())[logits_at_B]
    if forced is not None and forced.experts is not None:
        forced = dataclasses.replace(forced, experts=order.store(forced.experts, axis=2))
    ids_BT, is_followed_BT = inputs.segment_ids_BT, inputs.is_followed_BT
    return dataclasses.replace(
        inputs,
        forced=forced,
        logits_at_B=logits_at_B,
        row_segment_ids_BT=ids_BT,
        row_followed_ids_BT=None if is_followed_BT is None else ids_BT * is_followed_BT,
        order=order,
    )


def positions_in_segments(segment_ids_BT: jax.Array) -> jax.Array:
    """Positions counted from the first token of each segment, [B, T]; padding inside a segment counts as well."""
    index_BT = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32), segment_ids_BT.shape)
    last_token_BT = jax.lax.cummax(jnp.where(segment_ids_BT != 0, index_BT, 0), axis=1)
    filled_BT = jnp.take_along_axis(segment_ids_BT, last_token_BT, axis=1)  # padding belongs to the segment before it
    before_BT = jnp.pad(filled_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts_BT = jnp.where(filled_BT != before_BT, index_BT, 0)
    return index_BT - jax.lax.cummax(starts_BT, axis=1)


def positions_behind(lengths_B: jax.Array, token_mask_BT: jax.Array) -> jax.Array:
    """Positions [B, T] of new tokens behind those of a cache, 0 for padding, sharded as their mask."""
    index_T = jax.sharding.reshard(jnp.arange(token_mask_BT.shape[1], dtype=jnp.int32), P(positions_axis()))
    return jnp.where(token_mask_BT, lengths_B[:, None] + index_T, 0)


def _as_array(x: Any) -> Any:
    if isinstance(x, jax.Array):
        return x
    try:
        return np.asarray(x)
    except ValueError:
        raise RequestError(
            "the rows have different lengths: pad them to one length, and pass segment_ids that are 0 on the padding."
        ) from None
