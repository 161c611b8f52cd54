"""The routed experts: stacked SwiGLU weights, and their matmuls over tokens that are already in place."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import Activation, GroupedMatmul, MoEConfig
from qwen_moe_jax.moe.kernels.grouped_matmul import grouped_matmul
from qwen_moe_jax.nn.bits import rows_at
from qwen_moe_jax.nn.matmul import WEIGHT_MATMUL, weight_einsum
from qwen_moe_jax.nn.mlp import ACTIVATIONS
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.sharding.rules import all_gather_weight, needs_gather, spec_of

#: The three matrices of an expert, with their logical axes.
MATRICES = {
    "gate_proj": ("expert", "ffn", "expert_embed"),
    "up_proj": ("expert", "ffn", "expert_embed"),
    "down_proj": ("expert", "expert_embed", "ffn"),
}

#: Places [E, G, C, D] lie with their experts; [E, G, C, F] between the matmuls.
SLOTS = P("expert", ("data", "fsdp"), None, None)
WIDE_SLOTS = P("expert", ("data", "fsdp"), None, "tensor")

#: Tokens [B, T, D] gathered over `expert`, for methods that bring every token to every expert.
GATHERED_TOKENS = P(("data", "fsdp"), None, None)
WIDE_TOKENS = P(("data", "fsdp"), None, "expert", "tensor")
NARROW_TOKENS = P(("data", "fsdp"), None, "expert", None)

#: Rows per expert up to which a layer's experts stay in the stack of all layers. With more, the products outweigh the
#: copy that cutting them out costs, and blocks sized for one layer's experts are better filled. Measured on CPUs in
#: float32: at 8 cutting out takes half as long again, at 16 the two are nearly even (benchmarks/results/decode-cpu.md).
FEW_ROWS = 16

#: The name that remat policies know the arrays by that came over the `expert` axis.
EXCHANGED = "exchanged"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stacked:
    """One array of all experts as it is stored; inside a shard_map, one device's part.

    Attributes:
        value: [E, out, in]; of a layer that is left in the stack of all, with a leading axis of layers.
        spec: how the whole lies.
        axes: the logical axes of the last three.
    """

    value: jax.Array
    spec: P = dataclasses.field(metadata={"static": True})
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def cut(self) -> bool:
        """Whether a device has to gather it, inside a shard_map."""
        return needs_gather(self.spec[-3:], self.axes)

    def used(self, value: jax.Array) -> jax.Array:
        """One layer's part of it, gathered for use, inside a shard_map."""
        return all_gather_weight(value, self.spec[-3:], self.axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertMatrix:
    """One of the three matrices of every expert, and its low-rank adapter, (A, B), if it has one."""

    weight: Stacked
    adapter: tuple[Stacked, Stacked] | None = None
    scaling: float = dataclasses.field(default=1.0, metadata={"static": True})

    def times(self, multiply: Callable[[jax.Array, Stacked], jax.Array], x: jax.Array) -> jax.Array:
        """The matrix times `x`, by whatever multiplies rows with one of its arrays."""
        y = multiply(x, self.weight)
        if self.adapter is None:
            return y
        a, b = self.adapter
        return y + multiply(multiply(x, a) * self.scaling, b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """The weights of experts as plain arrays; inside a shard_map, one device's part.

    Attributes:
        gate_proj, up_proj, down_proj: [E, F, D], [E, F, D], [E, D, F]; of a `layer`, with a leading axis of all layers.
        layer: int32 []; which of the stacked layers is meant. None where they are not stacked.
        act: between the matmuls.
    """

    gate_proj: ExpertMatrix
    up_proj: ExpertMatrix
    down_proj: ExpertMatrix
    layer: jax.Array | None = None
    act: Activation = dataclasses.field(metadata={"static": True})

    def specs(self) -> "ExpertWeights":
        """How all of it lies at rest, for a shard_map to take it in."""
        arrays = dataclasses.replace(self, layer=None)
        specs = jax.tree.map(lambda array: dataclasses.replace(array, value=array.spec), arrays, is_leaf=_is_stacked)
        return dataclasses.replace(specs, layer=None if self.layer is None else P())

    def on_rows(self, rows_RD: jax.Array, sizes_E: jax.Array, backend: GroupedMatmul) -> jax.Array:
        """Each row through its expert, [R, D] to the same, inside a shard_map.

        Over `tensor`, which splits F, the results are partial sums. Weights are gathered over fsdp, here and again in
        the backward pass.

        Args:
            rows_RD: rows sorted by expert; see `grouped_matmul`.
            sizes_E: rows of each of the device's experts.
            backend: of `grouped_matmul`.
        """

        def multiply(x: jax.Array, array: Stacked) -> jax.Array:
            @functools.partial(jax.checkpoint, prevent_cse=False)
            def product(x: jax.Array, weight: jax.Array) -> jax.Array:
                if self.layer is None:
                    return grouped_matmul(x, array.used(weight.astype(x.dtype)), sizes_E, backend)
                layers, experts = weight.shape[:2]
                if weight.dtype != x.dtype or array.cut or len(x) > FEW_ROWS * experts:
                    own = jax.lax.dynamic_index_in_dim(weight, self.layer, keepdims=False)
                    return grouped_matmul(x, array.used(own.astype(x.dtype)), sizes_E, backend)
                # All layers' experts in a row, of which those of the other layers have no rows: to cut this layer's out
                # of the stack would copy all of them, and a few tokens ask for few.
                sizes_N = jnp.zeros(layers * experts, sizes_E.dtype)
                sizes_N = jax.lax.dynamic_update_slice_in_dim(sizes_N, sizes_E, self.layer * experts, axis=0)
                return grouped_matmul(x, weight.reshape(layers * experts, *weight.shape[2:]), sizes_N, backend)

            return checkpoint_name(product(x, array.value), WEIGHT_MATMUL)

        gated_RF = self.gate_proj.times(multiply, rows_RD)
        raised_RF = self.up_proj.times(multiply, rows_RD)
        return self.down_proj.times(multiply, ACTIVATIONS[self.act](gated_RF) * raised_RF)

    def on_token(self, x_TD: jax.Array, experts_A: jax.Array, weights_A: jax.Array) -> jax.Array:
        """One token through its experts on CPUs, [1, D] to their weighted sum, inside a shard_map.

        Decoding one text is this and little else: no rows are sorted, and the loop reads each chosen expert once, where
        it lies. Over `tensor` the result is a partial sum.

        Args:
            x_TD: the token, T is 1.
            experts_A: int32; the device's experts it chose; a number past them is none.
            weights_A: what each counts.
        """
        experts = self.gate_proj.weight.value.shape[-3]
        first = 0 if self.layer is None else self.layer * experts

        def add(choice: jax.Array, sum_TD: jax.Array) -> jax.Array:
            expert = experts_A[choice]
            at = first + jnp.minimum(expert, experts - 1)

            def times(x_TI: jax.Array, array: Stacked) -> jax.Array:
                matrices = array.value.reshape(-1, *array.value.shape[-2:])
                matrix_OI = rows_at(matrices, at, 1)[0].astype(x_TI.dtype)
                product_TO = jnp.einsum("TI,OI->TO", x_TI, matrix_OI, preferred_element_type=jnp.float32)
                return product_TO.astype(x_TI.dtype)

            gated_TF, raised_TF = self.gate_proj.times(times, x_TD), self.up_proj.times(times, x_TD)
            mixed_TD = self.down_proj.times(times, ACTIVATIONS[self.act](gated_TF) * raised_TF)
            return sum_TD + jnp.where(expert < experts, mixed_TD * weights_A[choice], 0)

        sum_TD = jnp.zeros(x_TD.shape, jnp.result_type(x_TD, weights_A))
        return jax.lax.fori_loop(0, len(experts_A), add, sum_TD)

    def lies_ready(self, x_TD: jax.Array) -> bool:
        """Whether the weights can be multiplied with as they are stored: in this dtype, and whole but for `tensor`.

        Adapters may be of another dtype: a row or two of them is soon cast.
        """
        arrays = jax.tree.leaves(dataclasses.replace(self, layer=None), is_leaf=_is_stacked)
        return not any(array.cut for array in arrays) and self.gate_proj.weight.value.dtype == x_TD.dtype


def _is_stacked(node: object) -> bool:
    return isinstance(node, Stacked)


class Experts(nnx.Module):
    """Weights of all experts of a layer, each in the Hub's [out, in] order: [E, F, D], [E, F, D], [E, D, F].

    They are cut over `expert` and never gathered over it: tokens travel instead. `lora` has the low-rank adapters of
    those that have one, by name.
    """

    def __init__(self, name: str, hidden_size: int, moe: MoEConfig, act: Activation, make: ParameterFactory):
        count, width = moe.num_experts, moe.moe_intermediate_size
        self.gate_proj = make.normal(f"{name}.gate_proj", (count, width, hidden_size), MATRICES["gate_proj"])
        self.up_proj = make.normal(f"{name}.up_proj", (count, width, hidden_size), MATRICES["up_proj"])
        self.down_proj = make.normal(f"{name}.down_proj", (count, hidden_size, width), MATRICES["down_proj"])
        self.lora = nnx.Dict()
        self.act = act

    def weights(self) -> ExpertWeights:
        """The stored arrays, to be handed to a shard_map with their `specs`."""
        return ExpertWeights(**{name: self._matrix(name) for name in MATRICES}, act=self.act)

    def per_expert(self, x_EGCD: jax.Array) -> jax.Array:
        """Each expert on its own places: [E, G, C, D] to the same, E over `expert` and G over data and fsdp."""
        between = "EGCr", SLOTS
        gated_EGCF = self._times("gate_proj", "EGCD,EFD->EGCF", x_EGCD, *between, WIDE_SLOTS)
        raised_EGCF = self._times("up_proj", "EGCD,EFD->EGCF", x_EGCD, *between, WIDE_SLOTS)
        hidden_EGCF = ACTIVATIONS[self.act](gated_EGCF) * raised_EGCF
        return self._times("down_proj", "EGCF,EDF->EGCD", hidden_EGCF, *between, SLOTS)

    def every_expert(self, x_BTD: jax.Array, weights_BTE: jax.Array) -> jax.Array:
        """All experts on all tokens, weighted and summed: [B, T, D] to the same, B over data and fsdp."""
        between = "BTEr", NARROW_TOKENS
        gated_BTEF = self._times("gate_proj", "BTD,EFD->BTEF", x_BTD, *between, WIDE_TOKENS)
        raised_BTEF = self._times("up_proj", "BTD,EFD->BTEF", x_BTD, *between, WIDE_TOKENS)
        hidden_BTEF = ACTIVATIONS[self.act](gated_BTEF) * raised_BTEF
        weighted_BTEF = (hidden_BTEF * weights_BTE[..., None]).astype(x_BTD.dtype)
        return self._times("down_proj", "BTEF,EDF->BTD", weighted_BTEF, *between, GATHERED_TOKENS)

    def _times(self, name: str, letters: str, x: jax.Array, narrow: str, narrow_spec: P, out: P) -> jax.Array:
        """A matrix times `x`, in explicitly sharded arrays; `narrow` is what an adapter has between its two."""
        y = weight_einsum(letters, x, getattr(self, name)[...], MATRICES[name], out)
        return y + self.lora[name](x, letters, narrow, narrow_spec, out) if name in self.lora else y

    def _matrix(self, name: str) -> ExpertMatrix:
        weight = _stacked(getattr(self, name), MATRICES[name])
        if name not in self.lora:
            return ExpertMatrix(weight=weight)
        lora = self.lora[name]
        adapter = (_stacked(lora.lora_A, lora.a_axes), _stacked(lora.lora_B, lora.b_axes))
        return ExpertMatrix(weight=weight, adapter=adapter, scaling=lora.scaling)


def _stacked(param: nnx.Param, axes: tuple[str, ...]) -> Stacked:
    value = param[...]
    return Stacked(value=value, spec=spec_of(value), axes=axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerOfExperts:
    """The experts of one layer, left in the stack of all of them: what `Experts` is to the dispatch methods.

    Attributes:
        stacked: weights with a leading axis of layers.
        layer: int32 []; which of them.
    """

    stacked: Experts
    layer: jax.Array

    def weights(self) -> ExpertWeights:
        """As `Experts.weights`, with the layer beside them."""
        return dataclasses.replace(self.stacked.weights(), layer=self.layer)

    def per_expert(self, x_EGCD: jax.Array) -> jax.Array:
        """See `Experts.per_expert`."""
        return self._alone().per_expert(x_EGCD)

    def every_expert(self, x_BTD: jax.Array, weights_BTE: jax.Array) -> jax.Array:
        """See `Experts.every_expert`."""
        return self._alone().every_expert(x_BTD, weights_BTE)

    def _alone(self) -> Experts:
        """Cut out of the stack, for methods that need all of them anyway."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False), self.stacked)
