"""Grouped-query self-attention over packed, padded, possibly sliding sequences."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.attention_kernels.blockwise import Blocks, attend_in_blocks
from qwen_moe_jax.attention_kernels.splash import LANES, attend_by_splash
from qwen_moe_jax.config import ExecutionConfig, ModelConfig
from qwen_moe_jax.errors import ShardingError
from qwen_moe_jax.model.cache import HEADS, LayerCache, cached_attention, update_cache
from qwen_moe_jax.model.inputs import TokenContext
from qwen_moe_jax.model.rotary import apply_rotary
from qwen_moe_jax.nn.linear import Linear
from qwen_moe_jax.nn.norm import RMSNorm
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.sharding.rules import BATCH


class Attention(nnx.Module):
    """Projections, optional per-head norms, rotation, attention, output projection."""

    def __init__(self, name: str, config: ModelConfig, make: ParameterFactory):
        heads, kv_heads = config.attention.num_attention_heads, config.attention.num_key_value_heads
        _check_whole_heads(name, {"num_attention_heads": heads, "num_key_value_heads": kv_heads}, make)
        head_dim, width = config.attention.head_dim, config.hidden_size
        into, out = ("heads", "embed"), ("embed", "heads")
        qkv_bias = config.attention.qkv_bias
        self.q_proj = Linear(f"{name}.q_proj", into, (heads * head_dim, width), make, bias=qkv_bias)
        self.k_proj = Linear(f"{name}.k_proj", into, (kv_heads * head_dim, width), make, bias=qkv_bias)
        self.v_proj = Linear(f"{name}.v_proj", into, (kv_heads * head_dim, width), make, bias=qkv_bias)
        self.o_proj = Linear(f"{name}.o_proj", out, (width, heads * head_dim), make, bias=config.attention.o_bias)
        qk_norm = config.attention.qk_norm
        self.q_norm = RMSNorm(f"{name}.q_norm", head_dim, config.rms_norm_eps, make) if qk_norm else None
        self.k_norm = RMSNorm(f"{name}.k_norm", head_dim, config.rms_norm_eps, make) if qk_norm else None
        self.head_dim = head_dim

    def __call__(
        self,
        hidden_BTD: jax.Array,
        context: TokenContext,
        sliding_window: int | None,
        execution: ExecutionConfig,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attention output [B, T, D], and the cache with the new tokens, where there is one.

        Args:
            hidden_BTD: normalised hidden states.
            context: segments and rotations of the tokens.
            sliding_window: number of keys a query sees, itself included; None for all.
            execution: with no setting None.
            cache: of the previous tokens, one text a row. None: all tokens are given.
        """
        with jax.named_scope("attention"):
            q_BTNH, k_BTKH, v_BTKH = self._projected(hidden_BTD, context)
            if cache is None:
                mixed_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, context.segment_ids_BT, sliding_window, execution)
            else:
                cache = update_cache(cache, k_BTKH, v_BTKH, context.token_mask_BT)
                mixed_BTNH = cached_attention(q_BTNH, cache, context.token_mask_BT, sliding_window)
            batch, length, heads, head_dim = mixed_BTNH.shape
            return self.o_proj(jnp.reshape(mixed_BTNH, (batch, length, heads * head_dim))), cache

    def _projected(self, hidden_BTD: jax.Array, context: TokenContext) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H]; queries and keys normed and rotated."""
        q_BTNH = self._heads(self.q_proj(hidden_BTD))
        k_BTKH = self._heads(self.k_proj(hidden_BTD))
        v_BTKH = self._heads(self.v_proj(hidden_BTD))
        if self.q_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        return apply_rotary(q_BTNH, context.rotary), apply_rotary(k_BTKH, context.rotary), v_BTKH

    def _heads(self, x_BTO: jax.Array) -> jax.Array:
        batch, length, rows = x_BTO.shape
        shape = (batch, length, rows // self.head_dim, self.head_dim)
        return jnp.reshape(x_BTO, shape, out_sharding=HEADS)


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    sliding_window: int | None,
    execution: ExecutionConfig,
) -> jax.Array:
    """Causal attention within segments, of each device's own rows and heads: it needs no collective."""
    method, multiple = {"blocks": (attend_in_blocks, 1), "splash": (attend_by_splash, LANES)}[execution.attention]
    blocks = Blocks.of(q_BTNH.shape[1], execution.attention_block, sliding_window, multiple)
    specs = (HEADS, HEADS, HEADS, P(BATCH, None))
    local = functools.partial(method, blocks=blocks)
    return jax.shard_map(local, in_specs=specs, out_specs=HEADS, check_vma=False)(
        q_BTNH, k_BTKH, v_BTKH, segment_ids_BT
    )


def _check_whole_heads(name: str, counts: dict[str, int], make: ParameterFactory) -> None:
    num_shards = make.mesh.shape["tensor"]
    for field, count in counts.items():
        if count % num_shards:
            raise ShardingError(
                f"{name}: {field}={count} does not divide over the mesh axis tensor={num_shards}: a head is on one "
                f"device. Choose a tensor size that divides {count}."
            )
