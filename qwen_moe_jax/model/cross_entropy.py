"""The head under a loss: log-probabilities of given tokens, without the logits of all tokens ever lying in memory.

A vocabulary is some 150,000 entries wide: float32 logits of 16,384 tokens take 10 GB, and their gradient as much again.
Here a scan takes a few tokens of each row at a time, forward and again backward.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.nn.embedding import TABLE
from qwen_moe_jax.sharding.rules import BATCH, all_gather_weight, spec_of

#: How many logits (float32, 256 MiB) a device may hold at a time. The gradient of the table is added up once for every
#: chunk: smaller ones would spend their time on that.
MAX_LOGITS = 2**26
#: The name that they are kept for the backward pass by.
LOGITS = "logits"


def target_log_probs(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, chunk: int | None
) -> tuple[jax.Array, jax.Array]:
    """How probable each target is under `softmax(hidden @ table.T)`, on explicitly sharded arrays.

    Products are in the dtype of `hidden_BTD` with float32 results, as those of the head. The gradient of the table is
    added up in float32 from chunk to chunk, and rounded to that dtype once.

    Args:
        hidden_BTD: B over `BATCH`.
        table_VD: as stored.
        targets_BT: int32; one outside the vocabulary becomes NaN.
        chunk: tokens of each row whose logits are held at a time; None chooses by `MAX_LOGITS`.

    Returns:
        log p(target) and the logsumexp of the logits, float32 [B, T] each.
    """
    # Each device of `tensor` answers for its part of the vocabulary, X of them.
    per_part_XBT = P("tensor", BATCH, None)
    hidden_spec, table_spec, targets_spec = P(BATCH, None, None), spec_of(table_VD), P(BATCH, None)
    target_XBT, logsumexp_XBT = jax.shard_map(
        functools.partial(_device_log_probs, vocab_size=table_VD.shape[0], table_spec=table_spec, chunk=chunk),
        in_specs=(hidden_spec, table_spec, targets_spec),
        out_specs=(per_part_XBT, per_part_XBT),
        check_vma=False,
    )(hidden_BTD, table_VD, targets_BT)
    # A few numbers for each token: all of them come together on each of the devices.
    target_XBT, logsumexp_XBT = (jax.sharding.reshard(x, P(None, BATCH, None)) for x in (target_XBT, logsumexp_XBT))
    logsumexp_BT = jax.nn.logsumexp(logsumexp_XBT, axis=0)
    known_BT = (targets_BT >= 0) & (targets_BT < table_VD.shape[0])
    return jnp.where(known_BT, jnp.sum(target_XBT, axis=0) - logsumexp_BT, jnp.nan), logsumexp_BT


def _device_log_probs(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    vocab_size: int,
    table_spec: P,
    chunk: int | None,
) -> tuple[jax.Array, jax.Array]:
    """One device's part: logits of the targets it knows (else 0), and logsumexp over its vocabulary; [1, B, T] each."""
    batch, length, _ = hidden_BTD.shape
    dtype = hidden_BTD.dtype
    known = vocab_size // jax.lax.axis_size("tensor")
    first = jax.lax.axis_index("tensor") * known

    if chunk is None:
        chunk = max(1, MAX_LOGITS // (batch * known))
    chunks = math.ceil(length / chunk)
    chunk = math.ceil(length / chunks)  # all of one size, the last one filled with as little as can be
    # Of several chunks nothing is kept for the backward pass. The logits of a single one are: it begins with them.
    kept = jax.checkpoint_policies.save_only_these_names(*([LOGITS] if chunks == 1 else []))
    recomputed = functools.partial(jax.checkpoint, prevent_cse=False, policy=kept)

    # Nor is the gathered table kept, as no weight is. It is widened again, so that its gradient is added up in float32.
    @recomputed
    def all_chunks(table_VD: jax.Array, hidden_NBCD: jax.Array, targets_NBC: jax.Array):
        whole_VD = all_gather_weight(table_VD.astype(dtype), table_spec, TABLE).astype(jnp.float32)
        vocabulary_V = first + jnp.arange(known)

        @recomputed
        def one_chunk(whole_VD: jax.Array, hidden_BCD: jax.Array, targets_BC: jax.Array):
            logits_BCV = jnp.einsum(
                "BCD,VD->BCV", hidden_BCD, whole_VD.astype(dtype), preferred_element_type=jnp.float32
            )
            logits_BCV = checkpoint_name(logits_BCV, LOGITS)
            target_BCV = targets_BC[..., None] == vocabulary_V
            target_BC = jnp.sum(jnp.where(target_BCV, logits_BCV, 0), axis=-1)
            return target_BC, jax.nn.logsumexp(logits_BCV, axis=-1)

        def body(_: None, part: tuple[jax.Array, jax.Array]):
            return None, one_chunk(whole_VD, *part)

        return jax.lax.scan(body, None, (hidden_NBCD, targets_NBC))[1]

    def cut(x_BT: jax.Array) -> jax.Array:
        """[B, T, …] to [N, B, C, …]."""
        missing = chunks * chunk - length
        padded = jnp.pad(x_BT, ((0, 0), (0, missing), *[(0, 0)] * (x_BT.ndim - 2)))
        return jnp.moveaxis(padded.reshape(batch, chunks, chunk, *x_BT.shape[2:]), 1, 0)

    def join(x_NBC: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_NBC, 0, 1).reshape(batch, chunks * chunk)[None, :, :length]

    target_NBC, logsumexp_NBC = all_chunks(table_VD, cut(hidden_BTD), cut(targets_BT))
    return join(target_NBC), join(logsumexp_NBC)
