"""The routed experts: stacked SwiGLU weights, and their matmuls over tokens that are already in place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import Activation, GroupedMatmul, MoEConfig
from qwen_moe_jax.moe.grouped_matmul import grouped_matmul
from qwen_moe_jax.nn.bits import rows_at
from qwen_moe_jax.nn.matmul import WEIGHT_MATMUL, weight_einsum
from qwen_moe_jax.nn.mlp import ACTIVATIONS
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.sharding.rules import gathered, is_gathered, spec_of

WIDEN = ("expert", "ffn", "expert_embed")
NARROW = ("expert", "expert_embed", "ffn")

#: Places [E, G, C, D] lie with their experts; [E, G, C, F] between the matmuls.
PLACES = P("expert", ("data", "fsdp"), None, None)
WIDE_PLACES = P("expert", ("data", "fsdp"), None, "tensor")

#: Tokens [B, T, D] gathered over `expert`, for methods that bring every token to every expert.
GATHERED_TOKENS = P(("data", "fsdp"), None, None)
WIDE_TOKENS = P(("data", "fsdp"), None, "expert", "tensor")

#: Rows per expert up to which a layer's experts stay in the stack of all layers. With more, the products outweigh the
#: copy that cutting them out costs, and blocks sized for one layer's experts are better filled. Measured on CPUs in
#: float32: at 8 cutting out takes half as long again, at 16 the two are nearly even (benchmarks/results/decode-cpu.md).
FEW_ROWS = 16

#: The name that remat policies know the arrays by that came over the `expert` axis.
EXCHANGED = "exchanged"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """The weights of experts as plain arrays; inside a shard_map, one device's part.

    Attributes:
        gate_proj, up_proj, down_proj: [E, F, D], [E, F, D], [E, D, F]; of a `layer`, with a leading axis of all layers.
        layer: int32 []; which of the stacked layers is meant. None where they are not stacked.
        wide, narrow: how the first two, and the third, lie at rest.
        act: between the matmuls.
    """

    gate_proj: jax.Array
    up_proj: jax.Array
    down_proj: jax.Array
    layer: jax.Array | None = None
    wide: P = dataclasses.field(metadata={"static": True})
    narrow: P = dataclasses.field(metadata={"static": True})
    act: Activation = dataclasses.field(metadata={"static": True})

    def specs(self) -> "ExpertWeights":
        """How all of it lies at rest, for a shard_map to take it in."""
        layer = None if self.layer is None else P()
        return dataclasses.replace(self, gate_proj=self.wide, up_proj=self.wide, down_proj=self.narrow, layer=layer)

    def on_rows(self, rows_RD: jax.Array, sizes_E: jax.Array, backend: GroupedMatmul) -> jax.Array:
        """Each row through its expert, [R, D] to the same, inside a shard_map.

        Over `tensor`, which splits F, the results are partial sums. Weights are gathered over fsdp, here and again in
        the backward pass.

        Args:
            rows_RD: rows sorted by expert; see `grouped_matmul`.
            sizes_E: rows of each of the device's experts.
            backend: of `grouped_matmul`.
        """

        def multiply(x: jax.Array, weight: jax.Array, spec: P, axes: tuple[str, ...]) -> jax.Array:
            whole = functools.partial(gathered, spec=spec[-3:], axes=axes)

            @functools.partial(jax.checkpoint, prevent_cse=False)
            def product(x: jax.Array, weight: jax.Array) -> jax.Array:
                if self.layer is None:
                    return grouped_matmul(x, whole(weight.astype(x.dtype)), sizes_E, backend)
                layers, experts = weight.shape[:2]
                if not self.lies_ready(x) or len(x) > FEW_ROWS * experts:
                    own = jax.lax.dynamic_index_in_dim(weight, self.layer, keepdims=False)
                    return grouped_matmul(x, whole(own.astype(x.dtype)), sizes_E, backend)
                # All layers' experts in a row, of which those of the other layers have no rows: to cut this layer's out
                # of the stack would copy all of them, and a few tokens ask for few.
                sizes_N = jnp.zeros(layers * experts, sizes_E.dtype)
                sizes_N = jax.lax.dynamic_update_slice_in_dim(sizes_N, sizes_E, self.layer * experts, axis=0)
                return grouped_matmul(x, weight.reshape(layers * experts, *weight.shape[2:]), sizes_N, backend)

            return checkpoint_name(product(x, weight), WEIGHT_MATMUL)

        gated_RF = multiply(rows_RD, self.gate_proj, self.wide, WIDEN)
        raised_RF = multiply(rows_RD, self.up_proj, self.wide, WIDEN)
        return multiply(ACTIVATIONS[self.act](gated_RF) * raised_RF, self.down_proj, self.narrow, NARROW)

    def on_token(self, x_TD: jax.Array, experts_A: jax.Array, weights_A: jax.Array) -> jax.Array:
        """One token through its experts on CPUs, [1, D] to their weighted sum, inside a shard_map.

        Decoding one text is this and little else: no rows are sorted, and the loop reads each chosen expert once, where
        it lies. Over `tensor` the result is a partial sum.

        Args:
            x_TD: the token, T is 1.
            experts_A: int32; the device's experts it chose; a number past them is none.
            weights_A: what each counts.
        """
        matrices = [x.reshape(-1, *x.shape[-2:]) for x in (self.gate_proj, self.up_proj, self.down_proj)]
        experts = self.gate_proj.shape[-3]
        first = 0 if self.layer is None else self.layer * experts

        def times(x_TI: jax.Array, matrix_OI: jax.Array) -> jax.Array:
            product_TO = jnp.einsum("TI,OI->TO", x_TI, matrix_OI, preferred_element_type=jnp.float32)
            return product_TO.astype(x_TI.dtype)

        def add(choice: jax.Array, sum_TD: jax.Array) -> jax.Array:
            expert = experts_A[choice]
            at = first + jnp.minimum(expert, experts - 1)
            gate_FD, up_FD, down_DF = (rows_at(matrix, at, 1)[0] for matrix in matrices)
            hidden_TF = ACTIVATIONS[self.act](times(x_TD, gate_FD)) * times(x_TD, up_FD)
            weighted_TD = times(hidden_TF, down_DF) * weights_A[choice]
            return sum_TD + jnp.where(expert < experts, weighted_TD, 0)

        sum_TD = jnp.zeros(x_TD.shape, jnp.result_type(x_TD, weights_A))
        return jax.lax.fori_loop(0, len(experts_A), add, sum_TD)

    def lies_ready(self, x_TD: jax.Array) -> bool:
        """Whether the weights can be multiplied with as they are stored: in this dtype, and whole but for `tensor`."""
        cut = is_gathered(self.wide[-3:], WIDEN) or is_gathered(self.narrow[-3:], NARROW)
        return self.gate_proj.dtype == x_TD.dtype and not cut


class Experts(nnx.Module):
    """Weights of all experts of a layer, each in the Hub's [out, in] order: [E, F, D], [E, F, D], [E, D, F].

    They are cut over `expert` and never gathered over it: tokens travel instead.
    """

    def __init__(self, name: str, hidden_size: int, moe: MoEConfig, act: Activation, make: ParameterFactory):
        count, width = moe.num_experts, moe.moe_intermediate_size
        self.gate_proj = make.normal(f"{name}.gate_proj", (count, width, hidden_size), WIDEN)
        self.up_proj = make.normal(f"{name}.up_proj", (count, width, hidden_size), WIDEN)
        self.down_proj = make.normal(f"{name}.down_proj", (count, hidden_size, width), NARROW)
        self.act = act

    def weights(self) -> ExpertWeights:
        """The stored arrays, to be handed to a shard_map with their `specs`."""
        gate_EFD, up_EFD, down_EDF = self.gate_proj[...], self.up_proj[...], self.down_proj[...]
        wide, narrow = spec_of(gate_EFD), spec_of(down_EDF)
        return ExpertWeights(
            gate_proj=gate_EFD, up_proj=up_EFD, down_proj=down_EDF, wide=wide, narrow=narrow, act=self.act
        )

    def per_expert(self, x_EGCD: jax.Array) -> jax.Array:
        """Each expert on its own places: [E, G, C, D] to the same, E over `expert` and G over data and fsdp."""
        gated_EGCF = weight_einsum("EGCD,EFD->EGCF", x_EGCD, self.gate_proj[...], WIDEN, WIDE_PLACES)
        raised_EGCF = weight_einsum("EGCD,EFD->EGCF", x_EGCD, self.up_proj[...], WIDEN, WIDE_PLACES)
        hidden_EGCF = ACTIVATIONS[self.act](gated_EGCF) * raised_EGCF
        return weight_einsum("EGCF,EDF->EGCD", hidden_EGCF, self.down_proj[...], NARROW, PLACES)

    def every_expert(self, x_BTD: jax.Array, weights_BTE: jax.Array) -> jax.Array:
        """All experts on all tokens, weighted and summed: [B, T, D] to the same, B over data and fsdp."""
        gated_BTEF = weight_einsum("BTD,EFD->BTEF", x_BTD, self.gate_proj[...], WIDEN, WIDE_TOKENS)
        raised_BTEF = weight_einsum("BTD,EFD->BTEF", x_BTD, self.up_proj[...], WIDEN, WIDE_TOKENS)
        hidden_BTEF = ACTIVATIONS[self.act](gated_BTEF) * raised_BTEF
        weighted_BTEF = (hidden_BTEF * weights_BTE[..., None]).astype(x_BTD.dtype)
        return weight_einsum("BTEF,EDF->BTD", weighted_BTEF, self.down_proj[...], NARROW, GATHERED_TOKENS)


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
