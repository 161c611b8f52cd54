"""Attention on TPUs by JAX's own Pallas kernels, splash attention: scores never leave the chip.

As in `blockwise.py`, blocks of queries meet blocks of keys, and the backward pass computes the scores again from a
logarithm for each query; but here a block's scores live and die in the core's vector memory. What XLA makes of that
loop writes them to the chip's memory and reads them back, several times over (`benchmarks/compile_kernels.py`).

Source: jax.experimental.pallas.ops.tpu.splash_attention. Of its two backward passes this takes the one with a kernel
for the queries' gradient and one for the keys' and values'. The fused one computes the scores once for all three, but
writes a gradient of all queries for each block of keys, rounded, and sums them afterwards.
"""

import functools

import jax
import jax.numpy as jnp

from qwen_moe_jax.attention_kernels.blockwise import ATTENDED, Blocks
from qwen_moe_jax.nn.matmul import matmul_precision

#: Tokens of a block are a multiple of this, the width of a vector register.
LANES = 128

#: Before the number in the scope of the kernels: FLOPs of one product of all blocks. The kernels do not say
#: what they compute; `plan.hlo` reads it there.
PRODUCT_FLOPS = "product_flops_"


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
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
    with matmul_precision(q_BTNH.dtype):
        return _attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, blocks, interpret)


def _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, blocks: Blocks, interpret: bool):
    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        return _attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, blocks, interpret)

    with matmul_precision(q_BTNH.dtype):
        return jax.vjp(attend, q_BTNH, k_BTKH, v_BTKH)


def _backward(blocks: Blocks, interpret: bool, pull, gradient_BTNH):
    with matmul_precision(gradient_BTNH.dtype):
        return *pull(gradient_BTNH), None


attend_by_splash.defvjp(_forward, _backward)


def _attend(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array, blocks: Blocks, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    batch, tokens, heads, width = q_BTNH.shape
    missing = blocks.count * blocks.length - tokens

    def for_kernel(x_BTNH: jax.Array) -> jax.Array:
        return jnp.pad(x_BTNH, ((0, 0), (0, missing), (0, 0), (0, 0))).swapaxes(1, 2)

    # In float32: in bfloat16 the factor itself would be rounded, and all scores be off by as much.
    scaled_BTNH = (q_BTNH.astype(jnp.float32) * width**-0.5).astype(q_BTNH.dtype)
    ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, missing)))
    scores = batch * heads * len(blocks.pairs()) * blocks.length**2
    with jax.named_scope(f"{PRODUCT_FLOPS}{2 * scores * width}"):
        mixed_BNTH = jax.vmap(_kernel(heads, blocks, interpret))(
            for_kernel(scaled_BTNH), for_kernel(k_BTKH), for_kernel(v_BTKH), SegmentIds(ids_BT, ids_BT)
        )
    mixed_BTNH = mixed_BNTH.swapaxes(1, 2)[:, :tokens]
    return jnp.where((segment_ids_BT != 0)[..., None, None], mixed_BTNH, 0)


def _kernel(heads: int, blocks: Blocks, interpret: bool):
    """Queries [N, T, H], keys and values [K, T, H] and segments of one row to the result [N, T, H]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block, whole = blocks.length, (blocks.count * blocks.length,) * 2
    mask: masks.CausalMask | masks.LocalMask
    if blocks.window is None:
        mask = masks.CausalMask(whole)
    else:
        mask = masks.LocalMask(whole, (blocks.window - 1, 0), offset=0)  # so many before a query, and none after it
    return kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )
