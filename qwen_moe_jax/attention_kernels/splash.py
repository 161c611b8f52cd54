"""Attention on TPUs by JAX's own Pallas kernels, splash attention: scores never leave the chip.

As in `blockwise.py`, blocks of queries meet blocks of keys, and the backward pass computes the scores again from a
logarithm for each query; but here a block's scores live and die in the core's vector memory. What XLA makes of that
loop writes them to the chip's memory and reads them back, several times over (`benchmarks/compile_kernels.py`).

Source: jax.experimental.pallas.ops.tpu.splash_attention. Of its two backward passes this takes the one with a kernel
for the queries' gradient and one for the keys' and values'. The fused one computes the scores once for all three, but
writes a gradient of all queries for each block of keys, rounded, and sums them afterwards.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.attention_kernels.blockwise import ATTENDED, Blocks
from qwen_moe_jax.nn.matmul import matmul_precision
from qwen_moe_jax.sharding.positions import RowOrder
from qwen_moe_jax.sharding.rules import CONTEXT

#: Tokens of a block are a multiple of this, the width of a vector register.
LANES = 128

#: Before the number in the scope of the kernels: FLOPs of one product of all blocks. The kernels do not say
#: what they compute; `plan.hlo` reads it there.
PRODUCT_FLOPS = "product_flops_"


def attend_by_splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    blocks: Blocks,
    interpret: bool = False,
) -> jax.Array:
    """Causal grouped-query attention within segments, on one device's rows and heads.

    Scores, softmax and sums are float32; products are of the arrays' dtype. The kernels do not scale, so queries are
    scaled before them, and rounded once more than by `attend_in_blocks`. To them padding is a segment like any other,
    in which every query sees itself at least: its results are finite, and are made zeros here, so that it passes no
    gradient on.

    Args:
        q_BTNH: queries, bfloat16 or float32, N a multiple of K.
        k_BTKH: keys.
        v_BTKH: values.
        segment_ids_BT: int32; 0 is padding.
        blocks: `Blocks.of` T, in multiples of `LANES`.
        interpret: run the kernels as ordinary operations, to test them where there is no TPU.

    Returns:
        [B, T, N, H] in the dtype of the queries.
    """
    tokens = q_BTNH.shape[1]
    whole = blocks.count * blocks.length

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BT: jax.Array) -> jax.Array:
        filling = ((0, 0), (0, whole - tokens), (0, 0), (0, 0))
        q_BTNH, k_BTKH, v_BTKH = (jnp.pad(x, filling) for x in (q_BTNH, k_BTKH, v_BTKH))
        ids_BT = jnp.pad(ids_BT, ((0, 0), (0, whole - tokens)))
        positions_T = np.arange(whole, dtype=np.int32)
        kernel = _kernel(q_BTNH.shape[2], positions_T, whole, blocks, shards=1, interpret=interpret)
        seen = len(blocks.pairs()) * blocks.length**2
        return _mix(kernel, q_BTNH, k_BTKH, v_BTKH, (ids_BT, ids_BT), seen)[:, :tokens]

    return _in_one_precision(attend, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def attend_rows_by_splash(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    row_segment_ids_BS: jax.Array,
    order: RowOrder,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """`attend_by_splash` of this device's queries with the keys of whole rows, in a `jax.shard_map` over `context`.

    Args:
        q_BTNH: this device's queries.
        k_BSKH: keys of whole rows, as they are stored.
        v_BSKH: values of whole rows, likewise.
        row_segment_ids_BS: int32; likewise.
        order: the positions of each device, in blocks of multiples of `LANES`.
        window: keys that a query sees, itself included; None sees all before it.
        interpret: see `attend_by_splash`.
    """
    blocks = Blocks(count=order.padded // order.block, length=order.block, window=window)

    def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, row_ids_BS: jax.Array) -> jax.Array:
        device = jax.lax.axis_index(CONTEXT)
        ids_BT = jax.lax.dynamic_slice_in_dim(row_ids_BS, device * order.local, order.local, axis=1)
        k_BSKH, v_BSKH, row_ids_BS = map(order.in_row_order, (k_BSKH, v_BSKH, row_ids_BS))
        kernel = _kernel(
            q_BTNH.shape[2], order.positions(), order.padded, blocks, shards=order.shards, interpret=interpret
        )
        seen = len(blocks.pairs()) * blocks.length**2 // order.shards
        return _mix(_of_device(kernel, device, order.shards), q_BTNH, k_BSKH, v_BSKH, (ids_BT, row_ids_BS), seen)

    return _in_one_precision(attend, q_BTNH, k_BSKH, v_BSKH, row_segment_ids_BS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_one_precision(
    attend: Callable[..., jax.Array], q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ids: jax.Array
) -> jax.Array:
    """`attend` of the others, whose products have the precision of the queries' dtype in both passes."""
    with matmul_precision(q_BTNH.dtype):
        return attend(q_BTNH, k_BSKH, v_BSKH, ids)


def _forward(attend: Callable[..., jax.Array], q_BTNH, k_BSKH, v_BSKH, ids):
    with matmul_precision(q_BTNH.dtype):
        return jax.vjp(lambda *arrays: attend(*arrays, ids), q_BTNH, k_BSKH, v_BSKH)


def _backward(attend: Callable[..., jax.Array], pull, gradient_BTNH):
    with matmul_precision(gradient_BTNH.dtype):
        return *pull(gradient_BTNH), None


_in_one_precision.defvjp(_forward, _backward)


def _mix(
    kernel, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ids: tuple[jax.Array, jax.Array], seen: int
) -> jax.Array:
    """The results of a kernel; `seen` are the pairs of a query and a key in the blocks that one head computes."""
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    batch, _, heads, width = q_BTNH.shape
    # In float32: in bfloat16 the factor itself would be rounded, and all scores be off by as much.
    scaled_BTNH = (q_BTNH.astype(jnp.float32) * width**-0.5).astype(q_BTNH.dtype)
    with jax.named_scope(f"{PRODUCT_FLOPS}{2 * batch * heads * seen * width}"):
        mixed_BNTH = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (scaled_BTNH, k_BSKH, v_BSKH)), SegmentIds(*ids))
    return jnp.where((ids[0] != 0)[..., None, None], mixed_BNTH.swapaxes(1, 2), 0)


def _kernel(heads: int, positions_T: np.ndarray, keys: int, blocks: Blocks, *, shards: int, interpret: bool):
    """Queries [N, T, H], keys and values [K, S, H] and segments of one row to the result [N, T, H].

    With several shards, `positions_T` are the queries of all of them, and `_of_device` gives one its kernel.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    from qwen_moe_jax.attention_kernels.splash_mask import SeenKeys

    block = blocks.length
    return kernels.make_splash_mha(
        masks.MultiHeadMask([SeenKeys(positions_T, keys, blocks.window)] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )


def _of_device(kernel, device: jax.Array, shards: int):
    """The kernel with one device's part of its tables: their rows of blocks, and the positions of its queries."""

    def part(table: jax.Array | None, axis: int) -> jax.Array | None:
        if table is None:
            return None
        size = table.shape[axis] // shards
        return jax.lax.dynamic_slice_in_dim(table, device * size, size, axis)

    def own(info):
        return info._replace(
            data_next=part(info.data_next, 1),
            block_mask=part(info.block_mask, 1),
            q_sequence=part(info.q_sequence, 0),
        )

    tables = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
    return type(kernel)(*map(own, tables), **kernel.kwargs)
