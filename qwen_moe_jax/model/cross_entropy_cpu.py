"""The logits of targets and logsumexp on CPUs, each in one pass over the logits, and their gradient in another.

XLA writes an array as large as the logits for each of them, and takes exponentials on the way that are not vectorised.
The C functions are those of `nn.kernels.functions.softmax`.

Letters of this file: `C` tokens of each row, `V` the entries of the vocabulary that one device holds.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_moe_jax.nn.kernels import LANES, cpu

#: The name by which remat keeps the logsumexp for the backward pass, where it keeps the logits (`model.cross_entropy`).
LOGSUMEXP = "logsumexp"


def is_worth_it(logits_BCV: jax.Array) -> bool:
    """Whether `target_and_logsumexp` should be used for these logits; call it as `nn.kernels.cpu.is_available`."""
    return (
        logits_BCV.dtype == jnp.float32
        and logits_BCV.shape[-1] % LANES == 0
        and logits_BCV.size >= cpu.WORTH_A_CALL
        and cpu.on_cpu()
        and cpu.target("log_softmax", "float32") is not None
    )


@jax.custom_vjp
def target_and_logsumexp(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logit of each token's target, and the logsumexp of its logits, on one device.

    Args:
        logits_BCV: float32, for which it `is_worth_it`.
        targets_BC: int32; one that is no column has the logit 0, and no gradient of it.

    Returns:
        Two arrays [B, C], float32.
    """
    return _forward(logits_BCV, targets_BC)[0]


def _forward(logits_BCV: jax.Array, targets_BC: jax.Array):
    rows = jax.ShapeDtypeStruct((math.prod(targets_BC.shape),), jnp.float32)
    call = jax.ffi.ffi_call(_target("log_softmax"), [rows] * 3, vmap_method="sequential")
    found = call(logits_BCV.reshape(-1, logits_BCV.shape[-1]), targets_BC.reshape(-1).astype(jnp.int32))
    target_BC, largest_BC, sum_BC = (x_R.reshape(targets_BC.shape) for x_R in found)
    logsumexp_BC = checkpoint_name(largest_BC + jnp.log(sum_BC), LOGSUMEXP)
    return (target_BC, logsumexp_BC), (logits_BCV, targets_BC, logsumexp_BC)


def _backward(saved: tuple[jax.Array, jax.Array, jax.Array], gradients: tuple[jax.Array, jax.Array]):
    logits_BCV, targets_BC, logsumexp_BC = saved
    logits_RV = logits_BCV.reshape(-1, logits_BCV.shape[-1])
    rows = (targets_BC.astype(jnp.int32), logsumexp_BC, *(gradient.astype(jnp.float32) for gradient in gradients))
    call = jax.ffi.ffi_call(
        _target("softmax_gradient"), jax.typeof(logits_RV), vmap_method="sequential", input_output_aliases={0: 0}
    )
    return call(logits_RV, *(x_BC.reshape(-1) for x_BC in rows)).reshape(logits_BCV.shape), None


target_and_logsumexp.defvjp(_forward, _backward)


def _target(kernel: str) -> str:
    name = cpu.target(kernel, "float32")
    assert name is not None  # is_worth_it
    return name
