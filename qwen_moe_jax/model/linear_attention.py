"""Linear attention by the gated delta rule (Gated DeltaNet, arXiv 2412.06464), over packed and padded rows.

Queries, keys and values pass a short causal convolution, and then a recurrence whose state does not grow with the row.

Letters of this file besides the package's: N value heads, C channels of the convolution, W its taps, I channels of a
key head. In the state [B, N, H, H], the sizes are those of a key head and of a value head.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.attention_kernels.causal_conv import causal_conv1d
from qwen_moe_jax.attention_kernels.context_delta import Parts, columns_before, delta_rule_over_context
from qwen_moe_jax.attention_kernels.delta_rule import (
    chunk_gated_delta_rule,
    chunk_size_for,
    recurrent_gated_delta_rule,
)
from qwen_moe_jax.attention_kernels.delta_rule_cpu import step, steps_in_place
from qwen_moe_jax.config import ExecutionConfig, LinearAttentionConfig, ModelConfig
from qwen_moe_jax.model.attention import split_heads
from qwen_moe_jax.model.cache import (
    COLUMNS,
    HEADS,
    STATE,
    STATES,
    LayerCache,
    RecurrentState,
    RecurrentSteps,
    read_state,
    update_state,
    update_steps,
)
from qwen_moe_jax.model.inputs import TokenContext
from qwen_moe_jax.nn.linear import Linear, project
from qwen_moe_jax.nn.mlp import ACTIVATIONS
from qwen_moe_jax.nn.norm import GatedRMSNorm
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.sharding.rules import BATCH, gather_for_compute, require_whole_heads, tokens_spec, with_single_axes

#: The largest initial decay rate, exp(A_log), as transformers draws it.
LARGEST_RATE = 16.0

_Rule = Callable[..., tuple[jax.Array, jax.Array]]


class GatedDeltaNet(nnx.Module):
    """Projections, convolution, gated delta rule, gated norm, output projection.

    Rows of `in_proj_qkv` and channels of `conv1d` are grouped by key head, the unit that is sharded over `tensor`: for
    each, the rows of its query, of its key, and of the values of its value heads.
    """

    def __init__(self, name: str, config: ModelConfig, make: ParameterFactory):
        linear, width = config.linear_attention, config.hidden_size
        assert linear is not None  # checked by ModelConfig
        require_whole_heads(name, {"linear_num_key_heads": linear.num_key_heads}, make.mesh)
        heads, into = linear.num_value_heads, ("heads", "embed")
        own = make.in_float32() if linear.float32_parameters else make
        self.in_proj_qkv = Linear(f"{name}.in_proj_qkv", into, (linear.conv_dim, width), make)
        self.in_proj_z = Linear(f"{name}.in_proj_z", into, (linear.value_dim, width), make)
        # Strengths and decay rates are exponents, from a few rows each.
        self.in_proj_b = Linear(f"{name}.in_proj_b", into, (heads, width), make.of_floats())
        self.in_proj_a = Linear(f"{name}.in_proj_a", into, (heads, width), make.of_floats())
        self.conv1d = DepthwiseConv(f"{name}.conv1d", linear.conv_dim, linear.conv_kernel_dim, make)
        self.A_log = own.log_uniform(f"{name}.A_log", (heads,), ("heads",), LARGEST_RATE)
        self.dt_bias = make.ones(f"{name}.dt_bias", (heads,), ("heads",))
        self.norm = GatedRMSNorm(f"{name}.norm", linear.value_head_dim, config.rms_norm_eps, own)
        self.out_proj = Linear(f"{name}.out_proj", ("embed", "heads"), (width, linear.value_dim), make)
        self.linear, self.act = linear, config.hidden_act
        self.chunk_size = chunk_size_for(make.mesh.devices.flat[0].platform)

    def __call__(
        self,
        hidden_BTD: jax.Array,
        context: TokenContext,
        execution: ExecutionConfig,
        cache: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """The layer's output [B, T, D], and the cache with the new tokens, where there is one.

        Args:
            hidden_BTD: normalised hidden states.
            context: segments of the tokens.
            execution: with no setting None.
            cache: of the previous tokens, one text a row. None: all tokens are given.
        """
        with jax.named_scope("linear_attention"):
            projections = self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a
            qkv_BTC, gate_BTO, b_BTN, a_BTN = project(hidden_BTD, *projections)
            gate_BTNH = split_heads(gate_BTO, self.linear.value_head_dim)
            if cache is not None and self._steps_in_place(qkv_BTC, cache):
                mixed_BTNH, cache = self._one_step(qkv_BTC, b_BTN, a_BTN, context, cache)
            else:
                mixed_BTNH, cache = self._mixed_and_kept(qkv_BTC, b_BTN, a_BTN, context, execution, cache)
            normed_BTNH = self.norm(mixed_BTNH, gate_BTNH)
            batch, length, heads, head_dim = normed_BTNH.shape
            return self.out_proj(jnp.reshape(normed_BTNH, (batch, length, heads * head_dim))), cache

    def _steps_in_place(self, qkv_BTC: jax.Array, cache: LayerCache) -> bool:
        """Whether `_one_step` can be used: one token a row on CPUs."""
        stored = cache.stored
        return (
            isinstance(stored, RecurrentState)
            and qkv_BTC.shape[1] == 1
            and self.act == "silu"
            and steps_in_place(stored.state_LBNHH, stored.conv_LBWC)
        )

    def _one_step(
        self, qkv_BTC: jax.Array, b_BTN: jax.Array, a_BTN: jax.Array, context: TokenContext, cache: LayerCache
    ) -> tuple[jax.Array, LayerCache]:
        """`_mixed_and_kept` for one token of each row, where state and columns are stored."""

        def local(qkv_BTC, b_BTN, a_BTN, mask_BT, weight_C1W, A_log_N, dt_bias_N, stored, layer, lengths_B):
            log_decay_BTN, beta_BTN = _decay_and_strength(b_BTN, a_BTN, A_log_N, dt_bias_N)
            mixed_BNH, state_LBNHH, conv_LBWC = step(
                qkv_BTC[:, 0],
                weight_C1W[:, 0].astype(qkv_BTC.dtype),
                jnp.exp(log_decay_BTN[:, 0]),
                beta_BTN[:, 0],
                stored.state_LBNHH,
                stored.conv_LBWC,
                layer,
                lengths_B,
                mask_BT[:, 0],
            )
            return mixed_BNH[:, None], RecurrentState(state_LBNHH=state_LBNHH, conv_LBWC=conv_LBWC)

        rows, specs = P(BATCH, None, "tensor"), RecurrentState.specs()
        own = P("tensor", None, None), P("tensor"), P("tensor")
        in_specs = (rows, rows, rows, P(BATCH, None), *own, specs, P(), P(BATCH))
        mapped = jax.shard_map(local, in_specs=in_specs, out_specs=(HEADS, specs), check_vma=False)
        kept = cache.stored, cache.layer, cache.lengths_B
        mixed_BTNH, stored = mapped(qkv_BTC, b_BTN, a_BTN, context.token_mask_BT, *self._own_parameters(), *kept)
        return mixed_BTNH, dataclasses.replace(cache, stored=stored)

    def _mixed_and_kept(
        self,
        qkv_BTC: jax.Array,
        b_BTN: jax.Array,
        a_BTN: jax.Array,
        context: TokenContext,
        execution: ExecutionConfig,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """`_mixed`, and the cache with what is to be kept."""
        before = None if cache is None else (*read_state(cache, qkv_BTC.dtype), cache.lengths_B == 0)
        keep_steps = cache is not None and isinstance(cache.stored, RecurrentSteps)
        mixed_BTNH, after = self._mixed(qkv_BTC, b_BTN, a_BTN, context, execution, before, keep_steps=keep_steps)
        if cache is not None and after is not None:
            cache = (update_steps if keep_steps else update_state)(cache, *after)
        return mixed_BTNH, cache

    def _own_parameters(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Weights of the convolution, rates of the decay and its biases, gathered."""
        weight_C1W = gather_for_compute(self.conv1d.weight[...], *self.conv1d.axes)
        A_log_N, dt_bias_N = (gather_for_compute(param[...], "heads") for param in (self.A_log, self.dt_bias))
        return weight_C1W, A_log_N, dt_bias_N

    def _mixed(
        self,
        qkv_BTC: jax.Array,
        b_BTN: jax.Array,
        a_BTN: jax.Array,
        context: TokenContext,
        execution: ExecutionConfig,
        before: tuple[jax.Array, jax.Array, jax.Array] | None,
        *,
        keep_steps: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Convolution and rule [B, T, N, H], and the state and columns after the tokens where there are some before.

        Before the tokens, besides state and columns, it is known which rows are new: their state counts as zeros.
        With `keep_steps`, the state after each token and what entered the convolution at each instead.

        They are computed on each device's own rows and heads: it needs no collective, but for columns and states over
        `context` where positions are sharded over it.
        """
        # With a cache, a row is one text.
        ids_BT = context.row_ids_BT if before is None else (context.row_ids_BT != 0).astype(jnp.int32)
        weight_C1W, A_log_N, dt_bias_N = self._own_parameters()
        one_step = before is not None and qkv_BTC.shape[1] == 1
        mix = _mix_by_steps if keep_steps else functools.partial(_mix, rule=None if one_step else self._rule(execution))
        local = functools.partial(mix, linear=self.linear, act=ACTIVATIONS[self.act])
        rows, head = with_single_axes(tokens_spec("tensor")), with_single_axes(P("tensor"))
        qkv_BTC, b_BTN, a_BTN = (jax.sharding.reshard(x, rows) for x in (qkv_BTC, b_BTN, a_BTN))
        taps = with_single_axes(P("tensor", None, None))
        weight_C1W = jax.sharding.reshard(weight_C1W, taps)
        A_log_N, dt_bias_N = (jax.sharding.reshard(x, head) for x in (A_log_N, dt_bias_N))
        if context.order is not None:
            local = functools.partial(
                _mix_over_context,
                linear=self.linear,
                act=ACTIVATIONS[self.act],
                chunk_size=self.chunk_size,
                shards=context.order.shards,
            )
        given = None if before is None else (STATE, COLUMNS, P(BATCH))
        returned = None if before is None else (STATES if keep_steps else STATE, COLUMNS)
        return jax.shard_map(
            local,
            in_specs=(rows, rows, rows, P(BATCH, None), taps, head, head, given),
            out_specs=(tokens_spec("tensor", None), returned),
            check_vma=False,
        )(qkv_BTC, b_BTN, a_BTN, ids_BT, weight_C1W, A_log_N, dt_bias_N, before)

    def _rule(self, execution: ExecutionConfig) -> _Rule:
        """The gated delta rule over more than one token."""
        if execution.linear_attention == "pallas":
            from qwen_moe_jax.attention_kernels.delta_rule_tpu import pallas_gated_delta_rule  # takes long to import

            return pallas_gated_delta_rule
        return functools.partial(chunk_gated_delta_rule, chunk_size=self.chunk_size)


class DepthwiseConv(nnx.Module):
    """The weight [C, 1, W] of a causal convolution of every channel by itself, in torch's layout, without a bias."""

    def __init__(self, name: str, channels: int, taps: int, make: ParameterFactory):
        self.axes = ("heads", "conv", "conv")
        self.weight = make.normal(f"{name}.weight", (channels, 1, taps), self.axes)


def _mix(qkv_BTC, b_BTN, a_BTN, ids_BT, weight_C1W, A_log_N, dt_bias_N, before, *, linear, act, rule: _Rule | None):
    """`GatedDeltaNet._mixed` on one device's arrays; `rule` is that over several tokens, None for one."""
    state_BNHH, columns_BWC, new_B = (None, None, None) if before is None else before
    qkv_BTC, columns_BWC = causal_conv1d(qkv_BTC, weight_C1W[:, 0].astype(qkv_BTC.dtype), ids_BT, columns_BWC)
    inputs = _inputs_of_rule(act(qkv_BTC), b_BTN, a_BTN, A_log_N, dt_bias_N, linear)
    if rule is None:
        rule = functools.partial(recurrent_gated_delta_rule, new_B=new_B)
    elif before is not None:
        state_BNHH = jnp.where(new_B[:, None, None, None], 0, state_BNHH)
    mixed_BTNH, state_BNHH = rule(*inputs, ids_BT, state_BNHH)
    return mixed_BTNH, None if before is None else (state_BNHH, columns_BWC)


def _mix_over_context(
    qkv_BTC, b_BTN, a_BTN, row_ids_BS, weight_C1W, A_log_N, dt_bias_N, before, *, linear, act, chunk_size, shards
):
    """`_mix` of one device's part of rows that are sharded over `context`; `row_ids_BS` are of whole rows."""
    state_BNHH, columns_BWC, new_B = (None, None, None) if before is None else before
    if state_BNHH is not None:
        state_BNHH = jnp.where(new_B[:, None, None, None], 0, state_BNHH)
    # With a cache, a row is one text, of segment 1, and so is what is before it.
    parts = Parts.of(row_ids_BS, shards, segment_before=0 if before is None else 1)
    own_BWC, columns_BWC = columns_before(qkv_BTC, parts, weight_C1W.shape[-1] - 1, columns_BWC)
    qkv_BTC, _ = causal_conv1d(qkv_BTC, weight_C1W[:, 0].astype(qkv_BTC.dtype), parts.own(), own_BWC)
    inputs = _inputs_of_rule(act(qkv_BTC), b_BTN, a_BTN, A_log_N, dt_bias_N, linear)
    mixed_BTNH, state_BNHH = delta_rule_over_context(inputs, parts, state_BNHH, chunk_size=chunk_size)
    return mixed_BTNH, None if before is None else (state_BNHH, columns_BWC)


_RuleInputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def _inputs_of_rule(qkv_BTC, b_BTN, a_BTN, A_log_N, dt_bias_N, linear: LinearAttentionConfig) -> _RuleInputs:
    """Queries, keys, values, logarithms of the decay and betas, from what leaves the convolution and projections."""
    return *_by_head(qkv_BTC, linear), *_decay_and_strength(b_BTN, a_BTN, A_log_N, dt_bias_N)


def _decay_and_strength(b_BTN, a_BTN, A_log_N, dt_bias_N) -> tuple[jax.Array, jax.Array]:
    """The logarithm of what the state decays by, float32, and how much of a difference is written."""
    time_BTN = jax.nn.softplus(a_BTN.astype(jnp.float32) + dt_bias_N.astype(jnp.float32))
    return -jnp.exp(A_log_N.astype(jnp.float32)) * time_BTN, jax.nn.sigmoid(b_BTN)


def _mix_by_steps(qkv_BTC, b_BTN, a_BTN, ids_BT, weight_C1W, A_log_N, dt_bias_N, before, *, linear, act):
    """`_mix` token by token; instead of the last state, the state [B, T, N, H, H] after each, and the inputs."""
    mixed, states, rest = [], [], (weight_C1W, A_log_N, dt_bias_N)
    for token in range(qkv_BTC.shape[1]):
        qkv, b, a, ids = (x[:, token : token + 1] for x in (qkv_BTC, b_BTN, a_BTN, ids_BT))
        mixed_B1NH, after = _mix(qkv, b, a, ids, *rest, before, linear=linear, act=act, rule=None)
        before = (*after, before[2] & (ids[:, 0] == 0))
        mixed.append(mixed_B1NH)
        states.append(after[0])
    return jnp.concatenate(mixed, axis=1), (jnp.stack(states, axis=1), qkv_BTC)


def _by_head(qkv_BTC: jax.Array, linear: LinearAttentionConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys [B, T, K, H] and values [B, T, N, H] of channels that are grouped by key head."""
    batch, length, channels = qkv_BTC.shape
    key_size, rows = linear.key_head_dim, linear.conv_dim // linear.num_key_heads
    qkv_BTKI = qkv_BTC.reshape(batch, length, channels // rows, rows)
    q_BTKH, k_BTKH, v_BTKI = jnp.split(qkv_BTKI, [key_size, 2 * key_size], axis=-1)
    return q_BTKH, k_BTKH, v_BTKI.reshape(batch, length, -1, linear.value_head_dim)
