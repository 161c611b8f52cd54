"""Log-probabilities of given tokens under the output head, computed in chunks of tokens.

A vocabulary has some 150,000 entries: float32 logits of 16,384 tokens take 10 GB, and their gradient as much again.
Here a scan takes a few tokens of each row at a time, in the forward and in the backward pass.

Letters of this file: `N` chunks of `C` tokens of each row, `V` the entries of the vocabulary that one device holds.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.model import cross_entropy_cpu
from qwen_moe_jax.nn.embedding import TABLE
from qwen_moe_jax.nn.lora import LoraAdapter
from qwen_moe_jax.nn.many_rows import local_matmul, multiplies_local
from qwen_moe_jax.sharding.rules import all_gather_weight, spec_of, tokens_spec, with_single_axes

#: How many logits (float32, 256 MiB) a device may hold at a time. The gradient of the table is accumulated once per
#: chunk: smaller chunks would spend their time on that.
MAX_LOGITS = 2**26
#: The name by which remat keeps the logits for the backward pass.
LOGITS = "logits"
#: The logit of a row of padding. Finite, since all rows of a device may be padding: the logsumexp of nothing but -inf
#: has no gradient.
_MASKED = jnp.finfo(jnp.float32).min


def target_log_probs(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    vocab_size: int,
    chunk: int | None,
    lora: LoraAdapter | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Log-probability of each target under `softmax(hidden @ table.T / temperature)`, on arrays with explicit axes.

    Products are in the dtype of `hidden_BTD` with float32 results, as those of the head. The gradient of the table is
    accumulated over the chunks in float32, and rounded to that dtype once.

    Args:
        hidden_BTD: sharded as `tokens_spec` says.
        table_VD: as stored; rows from `vocab_size` on are padding and count nowhere.
        targets_BT: int32; one outside the vocabulary becomes NaN.
        vocab_size: of the model.
        chunk: tokens of each row whose logits are held at a time; None chooses by `MAX_LOGITS`.
        lora: low-rank adapter of the head.
        temperature: what the logits are divided by.
        entropy: also return that of each token's distribution.

    Returns:
        log p(target), the logsumexp of the divided logits, and the entropy in nats, without a gradient, or None;
        float32 [B, T] each.
    """
    # Each of the X devices of `tensor` computes with its shard of the vocabulary.
    per_shard_XBT = P("tensor", *tokens_spec())
    # Factors of the logits: hidden states and table; and those of the head's adapter, A x and B.
    hidden, tables = [hidden_BTD], [table_VD]
    axes: list[tuple[str, ...]] = [TABLE]
    if lora is not None:
        hidden.append(lora.narrowed(hidden_BTD, "BTD,rD->BTr", tokens_spec(None)))
        tables.append(lora.lora_B[...])
        axes.append(lora.b_axes)
    table_specs = [spec_of(table) for table in tables]
    device_log_probs = functools.partial(
        _device_log_probs,
        vocab_size=vocab_size,
        table_rows=table_VD.shape[0],
        stored=list(zip(table_specs, axes, strict=True)),
        chunk=chunk,
        temperature=temperature,
        entropy=entropy,
    )
    tokens = with_single_axes(tokens_spec(None))
    hidden = [jax.sharding.reshard(x_BTD, tokens) for x_BTD in hidden]
    parts_XBT = jax.shard_map(
        device_log_probs,
        in_specs=([tokens] * len(hidden), table_specs, tokens_spec()),
        out_specs=(per_shard_XBT,) * (3 if entropy else 2),
        check_vma=False,
    )(hidden, tables, targets_BT)
    # X numbers per token, gathered on every device.
    target_XBT, logsumexp_XBT, *means_XBT = (jax.sharding.reshard(x, P(None, *tokens_spec())) for x in parts_XBT)
    logsumexp_BT = jax.nn.logsumexp(logsumexp_XBT, axis=0)
    entropy_BT = None
    if entropy:
        shares_XBT = jax.lax.stop_gradient(jnp.exp(logsumexp_XBT - logsumexp_BT))
        entropy_BT = jax.lax.stop_gradient(logsumexp_BT) - jnp.sum(shares_XBT * means_XBT[0], axis=0)
    is_known_BT = (targets_BT >= 0) & (targets_BT < vocab_size)
    log_probs_BT = jnp.where(is_known_BT, jnp.sum(target_XBT, axis=0) - logsumexp_BT, jnp.nan)
    return log_probs_BT, logsumexp_BT, entropy_BT


def _device_log_probs(
    hidden: list[jax.Array],
    tables: list[jax.Array],
    targets_BT: jax.Array,
    *,
    vocab_size: int,
    table_rows: int,
    stored: list[tuple[P, tuple[str, ...]]],
    chunk: int | None,
    temperature: float,
    entropy: bool,
) -> tuple[jax.Array, ...]:
    """One shard: logits of the targets in it (0 of the others), and logsumexp over it; [1, B, T] each.

    With `entropy`, also the mean of the logits under the shard's own softmax, without a gradient. The logits are the
    sum of `hidden @ table.T` over the pairs; `stored` has the spec and the axes of each table.
    """
    batch, length, _ = hidden[0].shape
    dtype = hidden[0].dtype
    rows = table_rows // jax.lax.axis_size("tensor")
    first = jax.lax.axis_index("tensor") * rows

    if chunk is None:
        chunk = max(1, MAX_LOGITS // (batch * rows))
    chunks = math.ceil(length / chunk)
    # With several chunks, nothing is kept for the backward pass. The logits of a single one are: it begins with them.
    names = [LOGITS, cross_entropy_cpu.LOGSUMEXP] if chunks == 1 else []
    kept = jax.checkpoint_policies.save_only_these_names(*names)
    recomputed = functools.partial(jax.checkpoint, prevent_cse=False, policy=kept)

    # Nor is the gathered table kept, as no weight is. It is widened again, so that its gradient is summed in float32.
    @recomputed
    def all_chunks(tables: list[jax.Array], hidden_chunks: list[jax.Array], targets_NBC: jax.Array):
        gathered = [
            all_gather_weight(table.astype(dtype), spec, axes).astype(jnp.float32)
            for table, (spec, axes) in zip(tables, stored, strict=True)
        ]
        vocabulary_V = first + jnp.arange(rows, dtype=jnp.int32)

        @recomputed
        def one_chunk(gathered: list[jax.Array], hidden: list[jax.Array], targets_BC: jax.Array):
            logits_BCV = sum(_product(x_BCD, table_VD, dtype) for x_BCD, table_VD in zip(hidden, gathered, strict=True))
            logits_BCV = checkpoint_name(logits_BCV, LOGITS)
            if temperature != 1:
                logits_BCV = logits_BCV / temperature
            if table_rows > vocab_size:
                logits_BCV = jnp.where(vocabulary_V < vocab_size, logits_BCV, _MASKED)
            if not entropy and cross_entropy_cpu.is_worth_it(logits_BCV):
                return cross_entropy_cpu.target_and_logsumexp(logits_BCV, targets_BC - first)
            is_target_BCV = targets_BC[..., None] == vocabulary_V
            target_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0), axis=-1)
            logsumexp_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
            if not entropy:
                return target_BC, logsumexp_BC
            still_BCV = jax.lax.stop_gradient(logits_BCV)
            probs_BCV = jax.nn.softmax(still_BCV, axis=-1)
            return target_BC, logsumexp_BC, jnp.sum(jnp.where(probs_BCV > 0, probs_BCV * still_BCV, 0), axis=-1)

        def body(_: None, part: tuple[list[jax.Array], jax.Array]):
            return None, one_chunk(gathered, *part)

        return jax.lax.scan(body, None, (hidden_chunks, targets_NBC))[1]

    parts_NBC = all_chunks(tables, [_split(x_BTD, chunks) for x_BTD in hidden], _split(targets_BT, chunks))
    return tuple(_joined(x_NBC, length)[None] for x_NBC in parts_NBC)


def _product(x_BCD: jax.Array, table_VD: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Logits float32 [B, C, V] of hidden states and a table, widened numbers of a dtype, on one device."""
    if multiplies_local(wide_BCD := x_BCD.astype(jnp.float32), table_VD):
        return local_matmul(wide_BCD, table_VD)
    return jnp.einsum("BCD,VD->BCV", x_BCD, table_VD.astype(dtype), preferred_element_type=jnp.float32)


def _split(x_BT: jax.Array, chunks: int) -> jax.Array:
    """[B, T, …] to [N, B, C, …]; chunks of one size, the last one padded as little as possible."""
    batch, length, *rest = x_BT.shape
    size = math.ceil(length / chunks)
    padded = jnp.pad(x_BT, ((0, 0), (0, chunks * size - length), *[(0, 0)] * len(rest)))
    return jnp.moveaxis(padded.reshape(batch, chunks, size, *rest), 1, 0)


def _joined(x_NBC: jax.Array, length: int) -> jax.Array:
    """[N, B, C] to [B, T]: the inverse of `_split`."""
    chunks, batch, size = x_NBC.shape
    return jnp.moveaxis(x_NBC, 0, 1).reshape(batch, chunks * size)[:, :length]
