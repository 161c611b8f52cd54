"""Dropless dispatch: rows sorted by expert, ragged groups multiplied, each token's results weighted and summed.

Over the `expert` axis a token reaches its experts in one of two ways, with the same result:

- *all-gather*: every token goes to every device of the axis, each device runs its own experts, a reduce-scatter sums
  the results. It sends X - 1 times the tokens of a device (X the size of the axis), however many experts they chose.
- *all-to-all*: every row goes to its expert's device and back. It sends A * buffer_factor * (X - 1) / X times the
  tokens, so it is the cheaper one on a long axis.

Nothing is ever dropped. Shapes are fixed when the program is compiled, so a device has a buffer for a fixed number of
rows: `buffer_factor` times a balanced load. Rows beyond it are served in further rounds through the same buffers
(`overflow`), as many as the fullest device of the mesh needs. Where the buffer covers the worst case, on one expert
shard and for few tokens, the program has no such loop.

Letters of this file besides the package's: h, half of D.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import Exchange, ExecutionConfig
from qwen_moe_jax.config.execution import BUFFER_FACTOR
from qwen_moe_jax.moe.dispatch.rows import (
    EXCHANGED,
    Assignments,
    Overflow,
    RowPlan,
    SingleToken,
    SortedRows,
    add_device_axis,
    combine_rows,
    drop_device_axis,
    per_device,
    plan_rows,
    ranks,
    sort_rows,
    to_rows,
    weights_to_rows,
)
from qwen_moe_jax.moe.kernels.grouped_matmul import buffer_rows
from qwen_moe_jax.moe.router import Routing
from qwen_moe_jax.moe.stats import Drops, no_drops
from qwen_moe_jax.sharding.rules import position_shards, token_shards, tokens_spec, with_single_axes

#: Where no `buffer_factor` is given, buffers of up to this many rows are sized for the worst case: 4 MiB in bfloat16 at
#: a hidden size of 2048.
WORST_CASE_ROWS = 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """How one round's rows go back; inside a shard_map, of one device.

    Attributes:
        rows: of the rows sorted by expert: from gathered tokens, or from received rows.
        weights_TA: of the tokens that `receive` sums for: gathered, or the device's own.
        rounds: int32 []; how many rounds this device needs.
        outgoing: under all-to-all, from the device's tokens to the rows it sends; else None.
        sent_X, received_X: under all-to-all, int32; rows to and from each device of the `expert` axis.
    """

    rows: RowPlan
    weights_TA: jax.Array
    rounds: jax.Array
    outgoing: RowPlan | None = None
    sent_X: jax.Array | None = None
    received_X: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DroplessPlan:
    """What `combine` needs.

    Attributes:
        first: the first round's plan, each array with a leading axis X; None where there are no sorted rows.
        routing: of the tokens.
        rounds: int32 []; rounds of the fullest device.
        buffers: sizes.
    """

    first: RoundPlan | None
    routing: Routing
    rounds: jax.Array
    buffers: "Buffers" = dataclasses.field(metadata={"static": True})


def dispatch(
    hidden_BTD: jax.Array, routing: Routing, execution: ExecutionConfig
) -> tuple[SortedRows | SingleToken, DroplessPlan]:
    """Sends every token to its experts' devices, as far as it fits into the first round.

    Args:
        hidden_BTD: tokens, sharded as `tokens_spec` says.
        routing: their experts and weights.
        execution: `buffer_factor`, `exchange` and `grouped_matmul` are read.

    Returns:
        The first round's rows, with the overflow, and the plan of the way back.
    """
    width, num_experts = hidden_BTD.shape[-1], routing.probs_BTE.shape[-1]
    buffers = Buffers.of(hidden_BTD, routing, execution)
    single = buffers.num_shards == buffers.tokens == 1 and execution.grouped_matmul == "blocks"

    def local(hidden_BTD, experts_BTA, weights_BTA, token_mask_BT):
        experts_BTA = jnp.where(token_mask_BT[..., None], experts_BTA, num_experts)
        tokens = Assignments(
            x_TD=hidden_BTD.reshape(-1, width),
            experts_TA=experts_BTA.reshape(-1, buffers.chosen),
            weights_TA=weights_BTA.reshape(-1, buffers.chosen),
        )
        if single:
            token = SingleToken(x_XTD=tokens.x_TD, experts_XA=tokens.experts_TA[0], weights_XA=tokens.weights_TA[0])
            return add_device_axis((token, None)), jnp.int32(1)
        rows, plan = buffers.send(0, tokens)
        if buffers.one_round:
            return add_device_axis((rows, plan)), jnp.int32(1)
        rounds = jax.lax.pmax(plan.rounds, jax.sharding.get_abstract_mesh().axis_names)
        rows = dataclasses.replace(rows, overflow=Overflow(tokens=tokens, rounds_X=rounds, exchange=buffers))
        return add_device_axis((rows, plan)), rounds

    tokens = tokens_spec(None)
    inputs = hidden_BTD, routing.experts_BTA, routing.weights_BTA, routing.token_mask_BT
    specs = jax.tree.map(with_single_axes, (tokens, tokens, tokens, tokens_spec()))
    (rows, first), rounds = jax.shard_map(local, in_specs=specs, out_specs=(per_device(), P()), check_vma=False)(
        *jax.tree.map(jax.sharding.reshard, inputs, specs)
    )
    return rows, DroplessPlan(first=first, routing=routing, rounds=rounds, buffers=buffers)


def combine(rows: SortedRows | SingleToken, plan: DroplessPlan) -> tuple[jax.Array, Drops]:
    """Each token's weighted sum over its experts [B, T, D]. Nothing is dropped."""
    length = plan.routing.experts_BTA.shape[1] // position_shards()

    def local(rows, first):
        rows, first = drop_device_axis((rows, first))
        sums_TD = rows.x_XTD if first is None else plan.buffers.receive(rows.x_XRD, first)
        if first is not None and rows.served_XTD is not None:
            sums_TD = sums_TD + rows.served_XTD
        return sums_TD.reshape(1, -1, length, sums_TD.shape[-1])

    # Partial sums over `tensor` leave as a leading axis and are summed outside, where the sum and its gradient are in
    # the types. Kernels do not say over which axes their results vary, so that is not checked.
    sums_XBTD = jax.shard_map(
        local,
        in_specs=(per_device(), per_device()),
        out_specs=P("tensor", *tokens_spec(None)),
        check_vma=False,
    )(rows, plan.first)
    return jnp.sum(sums_XBTD, axis=0), dataclasses.replace(no_drops(plan.routing), rounds=plan.rounds)


def device_rows(tokens: int, chosen: int, num_experts: int, num_shards: int, buffer_factor: float | None) -> int:
    """Rows of a device's buffer, on an `expert` axis of `num_shards`, for `tokens` tokens; a factor of None: all."""
    worst = tokens * min(chosen, num_experts // num_shards)
    if buffer_factor is None:
        return worst
    return min(worst, math.ceil(buffer_factor * tokens * chosen / num_shards))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffers:
    """The sizes of a round, and its two exchanges.

    Attributes:
        exchange: as in `ExecutionConfig`.
        tokens: of one device.
        chosen: experts per token.
        num_experts: of the layer.
        num_shards: devices of the `expert` axis.
        rows: under all-gather, rows that a device takes a round; under all-to-all, rows from each device to each other.
        one_round: whether the buffer covers the worst case.
    """

    exchange: Exchange
    tokens: int
    chosen: int
    num_experts: int
    num_shards: int
    rows: int
    one_round: bool

    @classmethod
    def of(cls, hidden_BTD: jax.Array, routing: Routing, execution: ExecutionConfig) -> "Buffers":
        """The buffers for these tokens on the mesh in their type."""
        batch, length, chosen = routing.experts_BTA.shape
        tokens = batch * length // token_shards()
        num_experts, num_shards = routing.probs_BTE.shape[-1], jax.sharding.get_abstract_mesh().shape["expert"]
        senders = num_shards if execution.exchange == "all_gather" else 1
        sizes = tokens * senders, chosen, num_experts, num_shards
        factor, worst = execution.buffer_factor, tokens * num_shards * min(chosen, num_experts // num_shards)
        rows = device_rows(*sizes, BUFFER_FACTOR if factor is None and worst > WORST_CASE_ROWS else factor)
        return cls(
            exchange=execution.exchange,
            tokens=tokens,
            chosen=chosen,
            num_experts=num_experts,
            num_shards=num_shards,
            rows=rows,
            one_round=rows >= tokens * senders * min(chosen, num_experts // num_shards),
        )

    @property
    def own(self) -> int:
        """Experts of one device."""
        return self.num_experts // self.num_shards

    def send(self, turn: jax.Array | int, tokens: Assignments) -> tuple[SortedRows, RoundPlan]:
        """One device's tokens to the rows of round `turn` on their experts' devices, inside a shard_map."""
        return (self._send_to_all if self.exchange == "all_gather" else self._send_rows)(turn, tokens)

    def receive(self, y_RD: jax.Array, plan: RoundPlan) -> jax.Array:
        """The experts' results back to the device's own tokens' weighted sums [T, D], inside a shard_map."""
        if self.exchange == "all_gather":
            return _reduce_scatter(combine_rows(y_RD, plan.weights_TA, plan.rows))
        ones = jnp.ones((self.num_shards * self.rows, 1), y_RD.dtype)
        y_R2h = combine_rows(_in_halves(y_RD), ones, plan.rows)
        y_R2h = exchange_rows(y_R2h, plan.received_X, plan.sent_X, self.exchange)
        sum_T2h = combine_rows(checkpoint_name(y_R2h, EXCHANGED), plan.weights_TA, plan.outgoing)
        return sum_T2h.reshape(len(sum_T2h), -1)

    def _send_to_all(self, turn: jax.Array | int, tokens: Assignments) -> tuple[SortedRows, RoundPlan]:
        """All-gather: of all tokens of the axis, those that chose an expert of this device."""
        tokens = jax.tree.map(lambda x: checkpoint_name(_all_gather(x), EXCHANGED), tokens)
        served_TA, rounds = self._in_round(turn, tokens.experts_TA)
        expert_here_TA = tokens.experts_TA - jax.lax.axis_index("expert") * self.own
        here_TA = served_TA & (expert_here_TA >= 0) & (expert_here_TA < self.own)
        plan, sizes_E = sort_rows(jnp.where(here_TA, expert_here_TA, self.own), self.own, buffer_rows(self.rows))
        weights_R = weights_to_rows(tokens.weights_TA, plan)
        rows = SortedRows(x_XRD=to_rows(tokens.x_TD, plan), sizes_XE=sizes_E, weights_XR=weights_R)
        return rows, RoundPlan(rows=plan, weights_TA=tokens.weights_TA, rounds=rounds)

    def _send_rows(self, turn: jax.Array | int, tokens: Assignments) -> tuple[SortedRows, RoundPlan]:
        """All-to-all: this device's rows to the devices of their experts."""
        # Rows [X, S]: chunk x has those for device x, sorted by expert.
        total = self.num_shards * self.rows
        served_TA, rounds = self._in_round(turn, tokens.experts_TA)
        served_experts_TA = jnp.where(served_TA, tokens.experts_TA, self.num_experts)
        by_expert, sizes_E = sort_rows(served_experts_TA, self.num_experts, served_experts_TA.size)
        sizes_XE = sizes_E.reshape(self.num_shards, self.own)
        sent_X = jnp.sum(sizes_XE, axis=1, dtype=jnp.int32)
        start_X = jnp.cumsum(sent_X, dtype=jnp.int32) - sent_X
        device_TA = jnp.minimum(served_experts_TA // self.own, self.num_shards - 1)
        row_TA = device_TA * self.rows + by_expert.row_TA - start_X[device_TA]
        outgoing = plan_rows(jnp.where(served_TA, row_TA, total), total)
        received_XE = checkpoint_name(jax.lax.all_to_all(sizes_XE, "expert", 0, 0, tiled=True), EXCHANGED)
        received_X = jnp.sum(received_XE, axis=1, dtype=jnp.int32)
        x_R2h = exchange_rows(to_rows(_in_halves(tokens.x_TD), outgoing), sent_X, received_X, self.exchange)
        weights_R = weights_to_rows(tokens.weights_TA, outgoing)
        weights_R = jax.lax.all_to_all(weights_R, "expert", 0, 0, tiled=True)
        x_R2h, weights_R = (checkpoint_name(x, EXCHANGED) for x in (x_R2h, weights_R))

        # Each received chunk is sorted by expert; all of them together are sorted here.
        end_XE = jnp.cumsum(received_XE, axis=1, dtype=jnp.int32)
        position_1S1 = jnp.arange(self.rows, dtype=jnp.int32)[None, :, None]
        expert_XS = jnp.sum(position_1S1 >= end_XE[:, None, :], axis=-1, dtype=jnp.int32)
        plan, own_sizes_E = sort_rows(expert_XS.reshape(-1, 1), self.own, buffer_rows(total))
        weights_R = weights_to_rows(weights_R[:, None], plan)
        x_R2h = to_rows(x_R2h, plan)
        rows = SortedRows(x_XRD=x_R2h.reshape(len(x_R2h), -1), sizes_XE=own_sizes_E, weights_XR=weights_R)
        return rows, RoundPlan(
            rows=plan,
            weights_TA=tokens.weights_TA,
            rounds=rounds,
            outgoing=outgoing,
            sent_X=sent_X,
            received_X=received_X,
        )

    def _in_round(self, turn: jax.Array | int, experts_TA: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which assignments round `turn` serves, in the order of the tokens for each device; and how many rounds."""
        device_TA = experts_TA // self.own
        routed_TA = device_TA < self.num_shards  # padding is not
        if self.one_round:
            return routed_TA, jnp.int32(1)
        round_TA = ranks(device_TA.reshape(-1), self.num_shards).reshape(device_TA.shape) // self.rows
        return routed_TA & (round_TA == turn), jnp.max(jnp.where(routed_TA, round_TA, 0)) + 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def exchange_rows(rows_R2h: jax.Array, sent_X: jax.Array, received_X: jax.Array, kind: Exchange) -> jax.Array:
    """Sends chunk x of the rows to device x of the `expert` axis; chunk x of the result came from device x.

    Args:
        rows_R2h: [X * S, …]; of chunk x, the first `sent_X[x]` rows mean something.
        sent_X, received_X: int32; how many rows go to, and come from, each device.
        kind: "ragged_all_to_all" sends only those; the rows after them are then anything, in gradients, too.
    """
    if kind == "all_to_all":
        return jax.lax.all_to_all(rows_R2h, "expert", 0, 0, tiled=True)
    size = len(rows_R2h) // len(sent_X)
    starts_X = jnp.arange(len(sent_X), dtype=jnp.int32) * size
    there_X = jnp.full_like(starts_X, size) * jax.lax.axis_index("expert")
    received_R2h = jax.lax.empty(rows_R2h.shape, rows_R2h.dtype)
    return jax.lax.ragged_all_to_all(rows_R2h, received_R2h, starts_X, sent_X, there_X, received_X, axis_name="expert")


def _exchange_rows_forward(rows_R2h: jax.Array, sent_X: jax.Array, received_X: jax.Array, kind: Exchange):
    return exchange_rows(rows_R2h, sent_X, received_X, kind), (sent_X, received_X)


def _exchange_rows_backward(kind: Exchange, saved: tuple[jax.Array, jax.Array], gradient_R2h: jax.Array):
    sent_X, received_X = saved
    return exchange_rows(gradient_R2h, received_X, sent_X, kind), None, None


exchange_rows.defvjp(_exchange_rows_forward, _exchange_rows_backward)


def _in_halves(x_RD: jax.Array) -> jax.Array:
    """Rows [R, 2, D / 2]. An odd D is one part.

    A TPU stores numbers of two bytes in pairs of rows. Its ragged all-to-all needs each row for itself, as the two
    halves of one are, and would copy rows [R, D] into that form, and what it received back.
    """
    parts = 2 - x_RD.shape[-1] % 2
    return x_RD.reshape(len(x_RD), parts, -1)


def _all_gather(x_TD: jax.Array) -> jax.Array:
    """The tokens of all devices of the `expert` axis. XLA would copy them where there is only one."""
    alone = jax.lax.axis_size("expert") == 1
    return x_TD if alone else jax.lax.all_gather(x_TD, "expert", axis=0, tiled=True)


def _reduce_scatter(x_TD: jax.Array) -> jax.Array:
    """The sum over the devices of the `expert` axis, each device keeping that of its own tokens."""
    alone = jax.lax.axis_size("expert") == 1
    return x_TD if alone else jax.lax.psum_scatter(x_TD, "expert", scatter_dimension=0, tiled=True)
