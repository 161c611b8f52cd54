"""Grouped-query self-attention over packed, padded, possibly sliding sequences."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.attention_kernels.blockwise import Blocks, attend_in_blocks
from qwen_moe_jax.attention_kernels.context import attend_over_context
from qwen_moe_jax.attention_kernels.flash_cpu import attend_rows, attends_rows
from qwen_moe_jax.attention_kernels.splash import LANES, attend_by_splash
from qwen_moe_jax.config import ExecutionConfig, ModelConfig
from qwen_moe_jax.model.cache import LayerCache, update_and_attend
from qwen_moe_jax.model.inputs import TokenContext
from qwen_moe_jax.model.rotary import apply_rotary
from qwen_moe_jax.nn.linear import Linear, project
from qwen_moe_jax.nn.norm import rms_norm
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.sharding.rules import BATCH, require_whole_heads, tokens_spec, with_single_axes


class Attention(nnx.Module):
    """Projections, optional per-head norms, rotation, attention, optional gate, output projection.

    With `output_gate`, the rows of `q_proj` are, for each head, those of its query and then those of its gate.
    """

    def __init__(self, name: str, config: ModelConfig, make: ParameterFactory):
        heads, kv_heads = config.attention.num_attention_heads, config.attention.num_key_value_heads
        require_whole_heads(name, {"num_attention_heads": heads, "num_key_value_heads": kv_heads}, make.mesh)
        head_dim, width = config.attention.head_dim, config.hidden_size
        into, out = ("heads", "embed"), ("embed", "heads")
        qkv_bias, gates = config.attention.qkv_bias, heads if config.attention.output_gate else 0
        self.q_proj = Linear(f"{name}.q_proj", into, ((heads + gates) * head_dim, width), make, bias=qkv_bias)
        self.k_proj = Linear(f"{name}.k_proj", into, (kv_heads * head_dim, width), make, bias=qkv_bias)
        self.v_proj = Linear(f"{name}.v_proj", into, (kv_heads * head_dim, width), make, bias=qkv_bias)
        self.o_proj = Linear(f"{name}.o_proj", out, (width, heads * head_dim), make, bias=config.attention.o_bias)
        norm = functools.partial(
            rms_norm, size=head_dim, eps=config.rms_norm_eps, make=make, zero_centered=config.zero_centered_norm
        )
        qk_norm = config.attention.qk_norm
        self.q_norm = norm(f"{name}.q_norm") if qk_norm else None
        self.k_norm = norm(f"{name}.k_norm") if qk_norm else None
        self.head_dim, self.output_gate = head_dim, config.attention.output_gate

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
            q_BTNH, gate_BTNH, k_BTKH, v_BTKH = self._projected(hidden_BTD, context)
            if cache is None:
                mixed_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, context, sliding_window, execution)
            else:
                mixed_BTNH, cache = update_and_attend(
                    q_BTNH, k_BTKH, v_BTKH, cache, context.row_ids_BT != 0, sliding_window
                )
            if gate_BTNH is not None:
                mixed_BTNH = mixed_BTNH * jax.nn.sigmoid(gate_BTNH)
            batch, length, heads, head_dim = mixed_BTNH.shape
            return self.o_proj(jnp.reshape(mixed_BTNH, (batch, length, heads * head_dim))), cache

    def _projected(
        self, hidden_BTD: jax.Array, context: TokenContext
    ) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
        """Queries and gates [B, T, N, H], keys and values [B, T, K, H]; queries and keys normed and rotated."""
        gate_BTNH = None
        q_BTO, k_BTO, v_BTO = project(hidden_BTD, self.q_proj, self.k_proj, self.v_proj)
        if self.output_gate:
            q_BTNH, gate_BTNH = jnp.split(split_heads(q_BTO, 2 * self.head_dim), 2, axis=-1)
        else:
            q_BTNH = split_heads(q_BTO, self.head_dim)
        k_BTKH, v_BTKH = split_heads(k_BTO, self.head_dim), split_heads(v_BTO, self.head_dim)
        if self.q_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        return apply_rotary(q_BTNH, context.rotary), gate_BTNH, apply_rotary(k_BTKH, context.rotary), v_BTKH


def split_heads(x_BTO: jax.Array, head_dim: int) -> jax.Array:
    """The rows of a projection by head, [B, T, rows / head_dim, head_dim]; heads are sharded over `tensor`."""
    batch, length, rows = x_BTO.shape
    return jnp.reshape(x_BTO, (batch, length, rows // head_dim, head_dim), out_sharding=tokens_spec("tensor", None))


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    context: TokenContext,
    sliding_window: int | None,
    execution: ExecutionConfig,
) -> jax.Array:
    """Causal attention within segments, of each device's own rows and heads.

    It needs no collective, but for keys and values over `context` where positions are sharded over it.
    """
    heads = tokens_spec("tensor", None)
    if context.order is not None:
        over = functools.partial(
            attend_over_context,
            order=context.order,
            window=sliding_window,
            method=execution.context_parallel,
            attention=execution.attention,
        )
        specs = (heads, heads, heads, P(BATCH, None))
        return jax.shard_map(over, in_specs=specs, out_specs=heads, check_vma=False)(
            q_BTNH, k_BTKH, v_BTKH, context.row_segment_ids_BT
        )
    methods: dict[str, tuple[Callable[..., jax.Array], int]]
    methods = {"blocks": (attend_in_blocks, 1), "splash": (attend_by_splash, LANES)}
    method, multiple = methods[execution.attention]
    blocks = Blocks.of(q_BTNH.shape[1], execution.attention_block, sliding_window, multiple)
    # A gradient is summed over the axes that no spec names: over one device that is nothing, but a copy.
    in_specs = tuple(map(with_single_axes, (heads, heads, heads, P(BATCH, None))))
    local: Callable[..., jax.Array] = functools.partial(method, blocks=blocks)
    if execution.attention == "blocks" and attends_rows(q_BTNH, k_BTKH, v_BTKH):
        local = functools.partial(attend_rows, window=sliding_window)
    inputs = map(jax.sharding.reshard, (q_BTNH, k_BTKH, v_BTKH, context.segment_ids_BT), in_specs)
    return jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=False)(*inputs)
