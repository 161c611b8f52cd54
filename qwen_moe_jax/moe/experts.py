"""The routed experts: stacked SwiGLU weights, and their matmuls over rows that a dispatcher laid out."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import Activation, GroupedMatmul, MoEConfig
from qwen_moe_jax.moe.dispatch.overflow import serve_overflow
from qwen_moe_jax.moe.dispatch.rows import (
    AllTokens,
    Assignments,
    Rows,
    SingleToken,
    Slots,
    SortedRows,
    add_device_axis,
    drop_device_axis,
    gathered_spec,
    per_device,
    slots_spec,
)
from qwen_moe_jax.moe.kernels.cpu import matrix_at, ragged_in_place
from qwen_moe_jax.moe.kernels.grouped_matmul import grouped_matmul
from qwen_moe_jax.nn.kernels.cpu import reads_in_place
from qwen_moe_jax.nn.kernels.matmul import is_worth_it
from qwen_moe_jax.nn.matmul import EXPERT_MATMUL, weight_einsum
from qwen_moe_jax.nn.mlp import ACTIVATIONS
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.nn.quantised import Quantised, Weight, quantised_einsum
from qwen_moe_jax.sharding.rules import all_gather_weight, needs_gather, spec_of, with_single_axes

#: The three matrices of an expert, with their logical axes.
MATRICES = {
    "gate_proj": ("expert", "ffn", "expert_embed"),
    "up_proj": ("expert", "ffn", "expert_embed"),
    "down_proj": ("expert", "expert_embed", "ffn"),
}

#: Rows of a buffer for each expert, up to which products of many rows take longer than those that read the weights in
#: place: those of XLA, and those of `nn.kernels.matmul`.
FEW_ROWS, FEW_ROWS_OF_KERNELS = 64, 24

#: A stored weight, the specs of its arrays, and its logical axes.
Matrix = tuple[Weight, Any, tuple[str, ...]]
Multiply = Callable[[jax.Array, Sequence[Matrix]], list[jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """The weights of experts as plain arrays; inside a shard_map, one device's shards.

    Attributes:
        gate_proj, up_proj, down_proj: [E, F, D], [E, F, D], [E, D, F]; of a `layer`, with a leading axis of all layers.
        lora: for each matrix that has a low-rank adapter, A and B, stacked likewise.
        layer: int32 []; which of the stacked layers is meant. None where they are not stacked.
        scaling: of each adapter, as pairs (name of the matrix, factor).
        act: between the matmuls.
    """

    gate_proj: Weight
    up_proj: Weight
    down_proj: Weight
    lora: dict[str, tuple[jax.Array, jax.Array]]
    layer: jax.Array | None = None
    scaling: tuple[tuple[str, float], ...] = dataclasses.field(metadata={"static": True})
    act: Activation = dataclasses.field(metadata={"static": True})

    def swiglu(self, x: jax.Array, specs: Any, multiply: Multiply) -> jax.Array:
        """`down(act(gate(x)) * up(x))`, adapters included, inside a shard_map.

        Args:
            x: rows.
            specs: how the arrays are stored, as a tree of the same form.
            multiply: the same rows with each of several arrays.
        """
        return self._project(self._gated(x, specs, multiply), specs, multiply, "down_proj")[0]

    def _gated(self, x: jax.Array, specs: Any, multiply: Multiply) -> jax.Array:
        gate, up = self._project(x, specs, multiply, "gate_proj", "up_proj")
        return ACTIVATIONS[self.act](gate) * up

    def _project(self, x: jax.Array, specs: Any, multiply: Multiply, *names: str) -> list[jax.Array]:
        """The rows with each of the named matrices, adapters included; linear in the rows."""

        def adapted(x: jax.Array, y: jax.Array, name: str) -> jax.Array:
            if name not in self.lora:
                return y
            lead, rows, columns = MATRICES[name]
            (a, b), (a_spec, b_spec) = self.lora[name], specs.lora[name]
            [x_r] = multiply(x, [(a, a_spec, (lead, "rank", columns))])
            [added] = multiply(x_r * dict(self.scaling)[name], [(b, b_spec, (lead, rows, "rank"))])
            return y + added

        matrices = [(getattr(self, name), getattr(specs, name), MATRICES[name]) for name in names]
        return [adapted(x, y, name) for name, y in zip(names, multiply(x, matrices), strict=True)]

    def _only_down(self) -> "ExpertWeights":
        absent: Any = None
        lora = {name: arrays for name, arrays in self.lora.items() if name == "down_proj"}
        return dataclasses.replace(self, gate_proj=absent, up_proj=absent, lora=lora)

    def on_rows(self, rows: SortedRows, specs: "ExpertWeights", backend: GroupedMatmul) -> jax.Array:
        """Each row through its expert, [R, D] to the same, inside a shard_map.

        Over `tensor`, which shards F, the results are partial sums. Weights are gathered over fsdp, here and again in
        the backward pass.

        Args:
            rows: of this device.
            specs: as in `swiglu`.
            backend: of `grouped_matmul`.
        """
        multiply = self._on_sorted(rows.sizes_XE, backend)
        hidden_RF = self._gated(rows.x_XRD, specs, multiply)
        if rows.weights_XR is None or self.layer is not None:  # stacked layers are not differentiated
            return self._project(hidden_RF, specs, multiply, "down_proj")[0]

        def down(hidden_RF: jax.Array, arrays: tuple[ExpertWeights, jax.Array]) -> jax.Array:
            weights, sizes_E = arrays
            return weights._project(hidden_RF, specs, weights._on_sorted(sizes_E, backend), "down_proj")[0]

        return with_weights_in_gradient(down, hidden_RF, rows.weights_XR, (self._only_down(), rows.sizes_XE))

    def _on_sorted(self, sizes_E: jax.Array, backend: GroupedMatmul) -> Multiply:
        """Products of rows sorted by expert, so many of each."""

        def multiply(x: jax.Array, matrix: Matrix) -> jax.Array:
            array, spec, axes = matrix

            @functools.partial(jax.checkpoint, prevent_cse=False)
            def product(x: jax.Array, weight: Weight) -> jax.Array:
                if isinstance(weight, Quantised):
                    return _quantised_rows(x, weight, sizes_E, self.layer, spec, axes, backend)
                layer, floats = self.layer, weight
                if layer is not None and (weight.dtype != x.dtype or needs_gather(spec[-3:], axes)):
                    floats, layer = jax.lax.dynamic_index_in_dim(weight, layer, keepdims=False), None
                if layer is None:
                    floats = all_gather_weight(floats.astype(x.dtype), spec[-3:], axes)
                return grouped_matmul(x, floats, sizes_E, backend, layer)

            return checkpoint_name(product(x, array), EXPERT_MATMUL)

        def multiply_all(x: jax.Array, matrices: Sequence[Matrix]) -> list[jax.Array]:
            array = matrices[0][0]
            many = not isinstance(array, Quantised) and is_worth_it(x.dtype, *array.shape[-2:])
            few = len(x) <= (FEW_ROWS_OF_KERNELS if many else FEW_ROWS) * len(sizes_E)
            if few and self.layer is not None and backend == "blocks" and _read_in_place(x, matrices):
                experts_E = self.layer * len(sizes_E) + jnp.arange(len(sizes_E), dtype=jnp.int32)
                return ragged_in_place(x, [array for array, _, _ in matrices], experts_E, sizes_E)
            return [multiply(x, matrix) for matrix in matrices]

        return multiply_all

    def on_token(
        self, x_TD: jax.Array, experts_A: jax.Array, weights_A: jax.Array, specs: "ExpertWeights"
    ) -> jax.Array:
        """One token through its experts, [1, D] to their weighted sum, on CPUs inside a shard_map.

        Nothing is sorted, and each chosen expert is read once, from the stack of all layers. Over `tensor` the result
        is a partial sum.

        Args:
            x_TD: the token, T is 1.
            experts_A: int32; the device's experts it chose; a number past them is none.
            weights_A: what each counts.
            specs: as in `swiglu`.
        """
        num_experts = self.gate_proj.shape[-3]

        def weighted(choices: slice | jax.Array, x_AD: jax.Array) -> jax.Array:
            """The results of some of the choices, and zeros where they are none."""
            experts = experts_A[choices]
            multiply = functools.partial(self._multiply_chosen, jnp.minimum(experts, num_experts - 1))
            results_AD = self.swiglu(x_AD, specs, multiply) * weights_A[choices][..., None]
            return jnp.where((experts < num_experts)[..., None], results_AD, 0)

        if _read_in_place(x_TD, [(getattr(self, name), getattr(specs, name), MATRICES[name]) for name in MATRICES]):
            x_AD = jnp.broadcast_to(x_TD, (len(experts_A), x_TD.shape[-1]))
            return jnp.sum(weighted(slice(None), x_AD), axis=0, keepdims=True)

        def add(choice: jax.Array, sum_TD: jax.Array) -> jax.Array:
            return sum_TD + weighted(choice[None], x_TD)

        sum_TD = jnp.zeros(x_TD.shape, jnp.result_type(x_TD, weights_A))
        return jax.lax.fori_loop(0, len(experts_A), add, sum_TD)

    def _multiply_chosen(self, experts_A: jax.Array, x_AI: jax.Array, matrices: Sequence[Matrix]) -> list[jax.Array]:
        """Each row with the matrix of its expert, of each of several arrays."""
        experts = self.gate_proj.shape[-3]
        index_A = experts_A if self.layer is None else self.layer * experts + experts_A
        if _read_in_place(x_AI, matrices):
            return ragged_in_place(x_AI, [array for array, _, _ in matrices], index_A, jnp.ones_like(index_A))

        def multiply(array: Weight, spec: Any, axes: tuple[str, ...]) -> jax.Array:
            if isinstance(array, Quantised):
                own = _quantised_at(array, self.layer, experts_A, spec, axes)
                return quantised_einsum("AI,AOI->AO", x_AI, own)
            if needs_gather(spec[-2:], axes[-2:]):  # whole first: each device may have chosen another expert
                here = array if self.layer is None else jax.lax.dynamic_index_in_dim(array, self.layer, 0, False)
                whole_EOI = all_gather_weight(here.astype(x_AI.dtype), spec[-3:], axes)
                matrices_AOI = whole_EOI[experts_A]
            else:
                matrices_AOI = jnp.stack([matrix_at(array, index).astype(x_AI.dtype) for index in index_A])
            return jnp.einsum("AI,AOI->AO", x_AI, matrices_AOI, preferred_element_type=jnp.float32).astype(x_AI.dtype)

        return [multiply(*matrix) for matrix in matrices]


def _read_in_place(x: jax.Array, matrices: Sequence[Matrix]) -> bool:
    """Whether `ragged_in_place` should multiply such rows with these arrays, as they are stored."""
    gathered = any(
        needs_gather((spec.integers if isinstance(spec, Quantised) else spec)[-3:], axes) for _, spec, axes in matrices
    )
    return not gathered and reads_in_place(x.dtype, [array for array, _, _ in matrices])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_weights_in_gradient(
    linear: Callable[[jax.Array, Any], jax.Array], x_RF: jax.Array, weights_R: jax.Array, arrays: Any
) -> jax.Array:
    """`linear(x, arrays)`, with the gradient of `linear(x * weights, arrays)`.

    The other half of `combine_rows`, which weights the results and leaves the weights out of their gradient. As a row
    is linear in its input, its weight may as well be on the input, and the gradient of that is a product of the input
    and its gradient: the results are not needed.

    Args:
        linear: rows by matrices, of a row at a time. It holds no tracers.
        x_RF: rows.
        weights_R: what the result of each row counts in a sum.
        arrays: a pytree; integers in it have no gradient.
    """
    return linear(x_RF, arrays)


def _with_weights_forward(linear, x_RF: jax.Array, weights_R: jax.Array, arrays: Any):
    return linear(x_RF, arrays), (x_RF, weights_R, arrays)


def _with_weights_backward(linear, saved: tuple[jax.Array, jax.Array, Any], gradient_RD: jax.Array):
    def weighted(x_RF: jax.Array, weights_R: jax.Array, arrays: Any) -> jax.Array:
        return linear((x_RF * weights_R[:, None]).astype(x_RF.dtype), arrays)

    return jax.vjp(weighted, *saved)[1](gradient_RD)


with_weights_in_gradient.defvjp(_with_weights_forward, _with_weights_backward)


class Experts(nnx.Module):
    """Weights of all experts of a layer, each in the Hub's [out, in] order: [E, F, D], [E, F, D], [E, D, F].

    They are sharded over `expert` and never gathered over it: tokens travel instead. `lora` has the low-rank adapters
    of those that have one, by name. With a `layer_index`, int32 [], the arrays are those of all layers, stacked, and
    the index says which layer this is: in decoding, a few tokens then read the few experts they need (`of_layer`).
    """

    def __init__(self, name: str, hidden_size: int, moe: MoEConfig, act: Activation, make: ParameterFactory):
        count, width = moe.num_experts, moe.moe_intermediate_size
        self.gate_proj = make.matrix(f"{name}.gate_proj", (count, width, hidden_size), MATRICES["gate_proj"])
        self.up_proj = make.matrix(f"{name}.up_proj", (count, width, hidden_size), MATRICES["up_proj"])
        self.down_proj = make.matrix(f"{name}.down_proj", (count, hidden_size, width), MATRICES["down_proj"])
        self.lora: Any = nnx.Dict()
        self.layer_index: jax.Array | None = nnx.data(None)
        self.act = act

    def __call__(self, rows: Rows, backend: GroupedMatmul) -> Rows:
        """Each row through its expert; the result has the same layout.

        Args:
            rows: as a dispatcher laid them out. The results are not weighted, except those of `AllTokens` and
                `SingleToken`, which are summed over the experts.
            backend: of `grouped_matmul`, for `SortedRows`.
        """
        if isinstance(rows, Slots):
            return Slots(x_EGCD=layer_alone(self)._per_slot(rows.x_EGCD))
        if isinstance(rows, AllTokens):
            summed_BTD = layer_alone(self)._all_experts(rows.x_BTD, rows.weights_BTE)
            return dataclasses.replace(rows, x_BTD=summed_BTD)
        weights = self.weights()
        specs = jax.tree.map(spec_of, weights)
        multiply: Callable[..., Rows] = _single_token if isinstance(rows, SingleToken) else _sorted_rows
        local = functools.partial(multiply, specs=specs, backend=backend)
        in_specs = jax.tree.map(with_single_axes, specs)
        return jax.shard_map(local, in_specs=(per_device(), in_specs), out_specs=per_device(), check_vma=False)(
            rows, jax.tree.map(jax.sharding.reshard, weights, in_specs)
        )

    def of_layer(self, index: jax.Array) -> "Experts":
        """One layer of this stack of experts, whose weights are not copied out of it."""
        experts = jax.tree.map(lambda x: x, self)
        experts.layer_index = index
        return experts

    def weights(self) -> ExpertWeights:
        """The stored arrays."""
        return ExpertWeights(
            **{name: getattr(self, name)[...] for name in MATRICES},
            lora={name: (lora.lora_A[...], lora.lora_B[...]) for name, lora in self.lora.items()},
            layer=self.layer_index,
            scaling=tuple((name, lora.scaling) for name, lora in self.lora.items()),
            act=self.act,
        )

    def _per_slot(self, x_EGCD: jax.Array) -> jax.Array:
        """Each expert on its own slots: [E, G, C, D] to the same, sharded as `slots_spec` says."""
        between = "EGCr", slots_spec()
        gate_EGCF = self._times("gate_proj", "EGCD,EFD->EGCF", x_EGCD, *between, slots_spec("tensor"))
        up_EGCF = self._times("up_proj", "EGCD,EFD->EGCF", x_EGCD, *between, slots_spec("tensor"))
        hidden_EGCF = ACTIVATIONS[self.act](gate_EGCF) * up_EGCF
        return self._times("down_proj", "EGCF,EDF->EGCD", hidden_EGCF, *between, slots_spec())

    def _all_experts(self, x_BTD: jax.Array, weights_BTE: jax.Array) -> jax.Array:
        """All experts on all tokens, weighted and summed: [B, T, D] to the same, sharded as `gathered_spec` says."""
        between = "BTEr", gathered_spec("expert", None)
        gate_BTEF = self._times("gate_proj", "BTD,EFD->BTEF", x_BTD, *between, gathered_spec("expert", "tensor"))
        up_BTEF = self._times("up_proj", "BTD,EFD->BTEF", x_BTD, *between, gathered_spec("expert", "tensor"))
        hidden_BTEF = ACTIVATIONS[self.act](gate_BTEF) * up_BTEF
        weighted_BTEF = (hidden_BTEF * weights_BTE[..., None]).astype(x_BTD.dtype)
        return self._times("down_proj", "BTEF,EDF->BTD", weighted_BTEF, *between, gathered_spec(None))

    def _times(self, name: str, letters: str, x: jax.Array, narrow: str, narrow_spec: P, out: P) -> jax.Array:
        """A matrix times `x`, in explicitly sharded arrays; `narrow` are the letters between an adapter's A and B."""
        y = weight_einsum(letters, x, getattr(self, name)[...], MATRICES[name], out)
        return y + self.lora[name](x, letters, narrow, narrow_spec, out) if name in self.lora else y


def layer_alone(experts: Experts) -> Experts:
    """The same experts, copied out of the stack of all layers if they are in one."""
    index = experts.layer_index
    if index is None:
        return experts
    stacked = jax.tree.map(lambda x: x, experts)
    stacked.layer_index = None
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stacked)


def _quantised_rows(
    x: jax.Array,
    weight: Quantised,
    sizes_E: jax.Array,
    layer: jax.Array | None,
    spec: Quantised,
    axes: tuple[str, ...],
    backend: GroupedMatmul,
) -> jax.Array:
    """`grouped_matmul` with integers; the arguments are those of `ExpertWeights.on_rows`.

    The kernel for CPUs dequantises an expert at a time, from the stack; the others multiply floats, those of a layer.
    """
    gathers = needs_gather(spec.integers[-3:], axes)
    if layer is not None and (gathers or backend != "blocks"):
        weight, layer = _layer_of(weight, layer), None
    if gathers:
        weight = weight.all_gathered(_of_experts(spec), axes)
    whole = jax.tree.map(jax.lax.stop_gradient, weight)
    return grouped_matmul(x, whole if backend == "blocks" else whole.dequantised(x.dtype), sizes_E, backend, layer)


def _quantised_at(
    weight: Quantised, layer: jax.Array | None, experts_A: jax.Array, spec: Quantised, axes: tuple[str, ...]
) -> Quantised:
    """The integers and scales of some experts, [A, …], gathered over fsdp where they are sharded over it."""
    if needs_gather(spec.integers[-3:], axes):  # whole first: each device may have chosen another expert
        whole = (weight if layer is None else _layer_of(weight, layer)).all_gathered(_of_experts(spec), axes)
        return jax.tree.map(lambda array: array[experts_A], whole)
    index_A = experts_A if layer is None else layer * weight.shape[-3] + experts_A
    return jax.tree.map(lambda array: jnp.stack([matrix_at(array, index) for index in index_A]), weight)


def _layer_of(weight: Quantised, layer: jax.Array) -> Quantised:
    """One layer of stacked integers and scales, copied."""
    return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, layer, keepdims=False), weight)


def _of_experts(spec: Quantised) -> Quantised:
    """The specs of one layer's arrays [E, …]."""
    return Quantised(P(*spec.integers[-3:]), P(*spec.scales[-3:]))


def _sorted_rows(
    rows: SortedRows, weights: ExpertWeights, *, specs: ExpertWeights, backend: GroupedMatmul
) -> SortedRows:
    """One device's rows of the first round, and all of the further ones."""
    rows = drop_device_axis(rows)
    served_TD = None
    if (overflow := rows.overflow) is not None:

        def serve(turn: jax.Array, tokens: Assignments, weights: ExpertWeights) -> jax.Array:
            sent, plan = overflow.exchange.send(turn, tokens)
            y_RD = weights.on_rows(sent, specs, backend)
            return overflow.exchange.receive(y_RD, plan)

        weights, served_TD = serve_overflow(serve, overflow.rounds_X, overflow.tokens, weights)
    y_RD = weights.on_rows(rows, specs, backend)
    return add_device_axis(SortedRows(x_XRD=y_RD, sizes_XE=rows.sizes_XE, served_XTD=served_TD))


def _single_token(
    rows: SingleToken, weights: ExpertWeights, *, specs: ExpertWeights, backend: GroupedMatmul
) -> SingleToken:
    """One device's token."""
    rows = drop_device_axis(rows)
    summed_TD = weights.on_token(rows.x_XTD, rows.experts_XA, rows.weights_XA, specs)
    return add_device_axis(dataclasses.replace(rows, x_XTD=summed_TD))
