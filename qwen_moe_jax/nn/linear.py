"""Dense projections, kept in the Hub's [out, in] order so that import and export are slicing."""

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.nn.lora import LoraAdapter
from qwen_moe_jax.nn.matmul import weight_einsum
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.sharding.rules import BATCH, gather_for_compute, partition_spec


class Linear(nnx.Module):
    """`x @ weight.T + bias` for activations [B, T, in], plus what the adapter `lora` says, where there is one.

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
        self.weight = make.normal(f"{name}.weight", sizes, axes)
        self.bias = make.zeros(f"{name}.bias", sizes[:1], axes[:1]) if bias else None
        self.lora: LoraAdapter | None = nnx.data(None)  # `model.lora.add_lora` sets one
        self.axes = axes

    def __call__(self, x_BTI: jax.Array) -> jax.Array:
        """[B, T, in] to [B, T, out], in the dtype of the input."""
        out = P(BATCH, None, *partition_spec(self.axes[:1]))
        y_BTO = weight_einsum("BTI,OI->BTO", x_BTI, self.weight[...], self.axes, out)
        if self.lora is not None:
            y_BTO = y_BTO + self.lora(x_BTI, "BTI,OI->BTO", "BTr", P(BATCH, None, None), out)
        if self.bias is not None:
            y_BTO = y_BTO + gather_for_compute(self.bias[...].astype(x_BTI.dtype), self.axes[0])
        return y_BTO
