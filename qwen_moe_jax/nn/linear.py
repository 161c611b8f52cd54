"""Dense projections, kept in the Hub's [out, in] order so that import and export are slicing."""

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.nn.lora import LoraAdapter
from qwen_moe_jax.nn.matmul import weight_einsum
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.nn.quantised import Quantised
from qwen_moe_jax.nn.stacked import layer_at, reads_in_place, stacked_matmul
from qwen_moe_jax.sharding.rules import gather_for_compute, partition_spec, tokens_spec


class Linear(nnx.Module):
    """`x @ weight.T + bias` for activations [B, T, in], plus what the adapter `lora` says, where there is one.

    With a `layer_index`, int32 [], the weight is that of all layers, stacked, and the index says which layer this is
    (`of_layer`); everything else is the layer's own.

    Args:
        name: of the module, for messages.
        axes: logical axes of the weight, (out, in). An output axis along `tensor` leaves the result split over it;
            an input axis along `tensor` ends in a sum over it.
        sizes: of the weight, (out, in).
        bias: whether there is one.
        make: where the parameters come from.
    """

    def __init__(
        self, name: str, axes: tuple[str, str], sizes: tuple[int, int], make: ParameterFactory, *, bias: bool = False
    ):
        self.weight = make.matrix(f"{name}.weight", sizes, axes)
        self.bias = make.zeros(f"{name}.bias", sizes[:1], axes[:1]) if bias else None
        self.lora: LoraAdapter | None = nnx.data(None)  # `model.lora.add_lora` sets one
        self.layer_index: jax.Array | None = nnx.data(None)
        self.axes = axes

    def __call__(self, x_BTI: jax.Array) -> jax.Array:
        """[B, T, in] to [B, T, out], in the dtype of the input."""
        return project(x_BTI, self)[0]

    @property
    def spec(self) -> P:
        """The sharding of the result."""
        return tokens_spec(*partition_spec(self.axes[:1]))

    def of_layer(self, index: jax.Array) -> "Linear":
        """One layer of this stack of projections, whose weight is not copied out of it."""
        layer = jax.tree.map(lambda x: layer_at(x, index), self)
        layer.weight, layer.layer_index = self.weight, index
        return layer


def project(x_BTI: jax.Array, *linears: Linear) -> list[jax.Array]:
    """Several projections of the same activations, each as by itself; decoding on CPUs reads all in one call."""
    index, weights = linears[0].layer_index, [linear.weight[...] for linear in linears]
    if len({isinstance(weight, Quantised) for weight in weights}) > 1:  # strengths and decay rates are floats
        return [project(x_BTI, linear)[0] for linear in linears]
    if index is not None and reads_in_place(x_BTI, weights):
        found = stacked_matmul(x_BTI, weights, index, [linear.spec for linear in linears])
        products = [y_BTO.astype(x_BTI.dtype) for y_BTO in found]
    else:
        weights = weights if index is None else [layer_at(weight, index) for weight in weights]
        products = [
            weight_einsum("BTI,OI->BTO", x_BTI, weight, linear.axes, linear.spec)
            for weight, linear in zip(weights, linears, strict=True)
        ]
    return [_with_additions(x_BTI, y_BTO, linear) for y_BTO, linear in zip(products, linears, strict=True)]


def _with_additions(x_BTI: jax.Array, y_BTO: jax.Array, linear: Linear) -> jax.Array:
    """A product, with what the adapter adds, and the bias."""
    if linear.lora is not None:
        y_BTO = y_BTO + linear.lora(x_BTI, "BTI,OI->BTO", "BTr", tokens_spec(None), linear.spec)
    if linear.bias is not None:
        y_BTO = y_BTO + gather_for_compute(linear.bias[...].astype(x_BTI.dtype), linear.axes[0])
    return y_BTO
