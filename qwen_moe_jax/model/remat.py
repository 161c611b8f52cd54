"""What the backward pass of a layer recomputes, what is kept for it, and in which memory (`ExecutionConfig.remat`).

Values are known to these policies by the names that `checkpoint_name` gives them where they are computed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
from jax.ad_checkpoint import checkpoint_name

from qwen_moe_jax.attention_kernels.blockwise import ATTENDED
from qwen_moe_jax.config import ExecutionConfig
from qwen_moe_jax.moe.dispatch.rows import EXCHANGED
from qwen_moe_jax.nn.matmul import EXPERT_MATMUL, WEIGHT_MATMUL

#: The name of the hidden states that enter a layer. They are kept under every policy, being its input.
LAYER_INPUT = "layer_input"

#: The names of what is kept in addition, by `ExecutionConfig.remat`.
KEPT = {
    "full": (),
    "exchange": (EXCHANGED,),
    "experts": (WEIGHT_MATMUL, ATTENDED),
    "dots": (EXCHANGED, WEIGHT_MATMUL, EXPERT_MATMUL, ATTENDED),
}


def with_remat(run_layer: Callable[..., Any], execution: ExecutionConfig, *, unrolled: bool) -> Callable[..., Any]:
    """`run_layer` with a backward pass that recomputes what `execution.remat` says.

    Args:
        run_layer: of (layer, hidden_BTD, …).
        execution: of which `remat` and `activation_offloading` are read.
        unrolled: whether the program has the layer outside of loops. The compiler would then undo the recomputation
            without a barrier (prevent_cse), which in a loop would only cost.
    """

    def run(layer: Any, hidden_BTD: jax.Array, *rest: Any) -> Any:
        return run_layer(layer, checkpoint_name(hidden_BTD, LAYER_INPUT), *rest)

    barrier = unrolled and execution.remat != "none"
    return jax.checkpoint(run, policy=remat_policy(execution), prevent_cse=barrier)


def remat_policy(execution: ExecutionConfig) -> Callable[..., Any]:
    """What `jax.checkpoint` may keep for the backward pass, by `remat` and `activation_offloading`."""
    if execution.remat == "none":
        return _all_but_reshards
    names = KEPT[execution.remat]
    if not execution.activation_offloading:
        return jax.checkpoint_policies.save_only_these_names(*names)
    # Where the named input is kept, the backward pass has no use for the one that the scan would stack on the devices.
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT, *names],
        offload_src="device",
        offload_dst="pinned_host",
    )


def _all_but_reshards(primitive: jax.extend.core.Primitive, *_: Any, **__: Any) -> bool:
    """Everything may be saved but the results of reshards: a weight whose sharding is only written differently
    would be copied into the residuals of every layer.
    """
    return primitive.name != "reshard"
