"""How a model is run: dtypes, dispatch, kernels, rematerialisation and sharding."""

import dataclasses
import math
from typing import Literal

from qwen_moe_jax.config.checks import Checks
from qwen_moe_jax.config.dtypes import DTypeLike
from qwen_moe_jax.config.sharding import SHARDING_RULES, ShardingRules
from qwen_moe_jax.config.weights import SMALLEST_GROUP, WeightFormat, Weights
from qwen_moe_jax.suggest import did_you_mean

#: Names of dispatchers; `moe.dispatch.register_dispatcher` adds to them.
DISPATCHERS = ["dropless", "capacity", "dense"]

#: Rows of a dropless buffer as a multiple of a balanced load, where none is asked for.
BUFFER_FACTOR = 2.0

CapacityBy = Literal["einsum", "index"]
DropPolicy = Literal["position", "probs"]
Exchange = Literal["all_gather", "all_to_all", "ragged_all_to_all"]
GroupedMatmul = Literal["blocks", "megablox", "triton"]
Attention = Literal["blocks", "splash"]
LinearAttention = Literal["chunks", "pallas"]
ContextParallel = Literal["all_gather", "ring"]
RoutingMode = Literal["learned", "balanced"]
Remat = Literal["none", "full", "dots", "exchange", "experts"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a model is run. Any checkpoint runs under any of these; results differ by rounding and by dropped tokens.

    A field that is None is chosen for the model, its mesh and its mode; `model.execution_in_use` shows the choices.

    Attributes:
        dtype: of activations and matmuls; None takes the checkpoint's. Logits are always float32. Any of the dtypes is
            given as anything `jnp.dtype` takes, and kept as its name.
        param_dtype: of the stored weights; None takes `dtype`.
        weights: int8 or int4 store the matrices of the layers, routed experts included, rounded to integers with
            scales, a quarter or an eighth of their bytes in float32; they are multiplied without a float copy of all.
            Routers, norms, embedding, head, convolutions and decay rates stay as they are. Such weights are not
            trained; adapters over them are. None stores floats.
        weights_group_size: with weights int4, inputs of a matrix that share a scale.
        router_dtype: of the router's matmul; None takes `dtype`, as in transformers. float32 is more stable in bfloat16
            training, and routes a few tokens otherwise than transformers does.
        dispatch: how tokens reach their experts. dropless sorts them by expert and multiplies ragged groups; capacity
            gives each expert a fixed number of slots per group of tokens, and drops the rest; dense runs every expert
            on every token, the reference; or a name given to `moe.dispatch.register_dispatcher`. None takes dropless in
            eval mode (`model.eval()`, how every model starts) and capacity in training mode (`model.train()`).
        capacity_factor: under capacity in training mode, slots per expert and group as a multiple of a perfectly
            balanced load (`ceil(group_size * num_experts_per_tok / num_experts * capacity_factor)`).
        eval_capacity_factor: the same in eval mode.
        min_capacity: slots that an expert has at least in every group (more than the group has tokens are never used).
        group_size: tokens routed together under capacity. The einsums that move them cost 2/3 * group_size /
            moe_intermediate_size of the experts' own matmuls; small groups drop more tokens. None takes the largest
            power of two that keeps the cost at a third, or all tokens of a device where they are moved by index.
        drop_policy: which tokens are dropped when an expert is full: position, the last ones of the group, or probs,
            those with the smallest router weight (batch-prioritised routing, arXiv 2106.05974).
        capacity_by: "einsum" moves tokens by one-hot matmuls (GShard), "index" by gathers: the same tokens to the same
            slots. None takes "einsum" where it costs at most a third of the experts' matmuls, and "index" else, and on
            CPUs with one shard of experts.
        buffer_factor: under dropless on several expert devices, rows of a device's buffer as a multiple of a perfectly
            balanced load. Nothing is dropped: rows beyond the buffer are served in further rounds. None sizes buffers
            for the worst case where that is at most 1024 rows, and otherwise takes 2.
        exchange: under dropless, how rows cross the `expert` axis. all_gather brings every token to every device of
            the axis and sums what they return; all_to_all sends each row to its expert, in buffers of fixed size;
            ragged_all_to_all sends only the rows there are (not on CPUs). None takes all_gather where it sends less.
        grouped_matmul: the kernel that multiplies ragged groups: "blocks" (any device), "megablox" (TPU), "triton"
            (NVIDIA). None takes the fastest on the platform.
        routing: "balanced" sends tokens to experts in turn, whatever the router says: for benchmarks.
        attention: the attention kernel: blocks (any device), blockwise in XLA's operations, or splash (TPU, bfloat16 or
            float32), JAX's kernel, which keeps the scores in on-chip memory. None takes splash where it runs.
        attention_block: tokens of the longest block of queries and of keys whose scores exist at a time, for "splash"
            128 at least (and 1024 at most on a v5p: scores of 2048 do not fit into its vector memory). None takes 128
            on CPUs and 512 elsewhere.
        linear_attention: the kernel of the gated delta rule over more than one token: chunks (any device), matmuls in
            XLA's operations, or pallas (TPU, bfloat16 or float32, head sizes in multiples of 128), a kernel that keeps
            states and chunks in on-chip memory. None takes pallas where it runs.
        context_parallel: how queries meet the keys of the other devices of the mesh axis `context`. all_gather brings
            keys and values of whole rows to every device; ring passes each device's part around, so that a device
            holds two parts at a time. None takes all_gather with splash, and where keys and values of a row are no more
            than a device's own queries and results: on at most as many devices as query heads share a key head. But
            for splash, sliding windows that are shorter than a chunk take only the keys before it, under both.
        remat: what the backward pass recomputes, per layer: none; full, the whole layer from its input; exchange, all
            but what came over the `expert` axis; experts, the routed experts and their exchange, but neither attention
            nor other matmuls with weights; dots, none of these. Weights gathered over fsdp are gathered again in any
            case.
        activation_offloading: whether what is kept for the backward pass, the layers' inputs included, waits in the
            memory of the host ("pinned_host"), to which the devices copy it, and from which they copy it back, layer by
            layer. It needs a `remat` that says what is kept. CPUs have one memory.
        sharding: the mesh axes that weights are stored sharded over, a `ShardingRules` or the name of one
            (`SHARDING_RULES`).

    Raises:
        ConfigError: values outside their ranges; the message names all of them.
    """

    dtype: DTypeLike | None = None
    param_dtype: DTypeLike | None = None
    weights: Weights | None = None
    weights_group_size: int = 64
    router_dtype: DTypeLike | None = None
    dispatch: str | None = None
    capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    min_capacity: int = 4
    group_size: int | None = None
    drop_policy: DropPolicy = "position"
    capacity_by: CapacityBy | None = None
    buffer_factor: float | None = None
    exchange: Exchange | None = None
    grouped_matmul: GroupedMatmul | None = None
    routing: RoutingMode = "learned"
    attention: Attention | None = None
    attention_block: int | None = None
    linear_attention: LinearAttention | None = None
    context_parallel: ContextParallel | None = None
    remat: Remat = "none"
    activation_offloading: bool = False
    sharding: ShardingRules | str = ShardingRules()

    @property
    def rules(self) -> ShardingRules:
        """`sharding` as a table of rules."""
        assert isinstance(self.sharding, ShardingRules)  # a name was replaced by its table
        return self.sharding

    @property
    def weight_format(self) -> WeightFormat | None:
        """`weights` with its group size; None of floats."""
        if self.weights is None:
            return None
        return WeightFormat(bits=8 if self.weights == "int8" else 4, group_size=self.weights_group_size)

    def __post_init__(self) -> None:
        with Checks(self) as check:
            if isinstance(self.sharding, str):
                expected = f"one of {', '.join(map(repr, SHARDING_RULES))}, or ShardingRules"
                if check(self.sharding in SHARDING_RULES, "sharding", expected):
                    object.__setattr__(self, "sharding", SHARDING_RULES[self.sharding])
            names = ", ".join(map(repr, DISPATCHERS))
            hint = did_you_mean(str(self.dispatch), DISPATCHERS)
            expected = f"one of {names}, a name given to register_dispatcher before, or None" + (
                f"; {hint}".rstrip() if hint else ""
            )
            check(self.dispatch is None or self.dispatch in DISPATCHERS, "dispatch", expected)
            check.literals()
            check.dtypes("dtype", "param_dtype", "router_dtype")
            for name in ("capacity_factor", "eval_capacity_factor"):
                check(getattr(self, name) > 0, name, "a positive number")
            factor = self.buffer_factor
            check(factor is None or 1 <= factor < math.inf, "buffer_factor", "a number of at least 1, or None")
            expected = "False under remat='none', which names nothing to keep: take remat='dots', 'experts' or 'full'"
            check(not self.activation_offloading or self.remat != "none", "activation_offloading", expected)
            check.at_least(1, "min_capacity", "group_size", "attention_block")
            check.at_least(SMALLEST_GROUP, "weights_group_size")
            check(self.weights_group_size % 2 == 0, "weights_group_size", "an even number: two are stored in a byte")
