"""Updates of the routers' balancing biases: DeepSeek-V3's balancing without an auxiliary loss (arXiv 2408.15664)."""

from typing import TypeVar

import jax

from qwen_moe_jax.model.base import Model
from qwen_moe_jax.model.decoder import sparse_blocks
from qwen_moe_jax.moe.router import update_balancing_bias
from qwen_moe_jax.moe.stats import RouterStats

AnyModel = TypeVar("AnyModel", bound=Model)


def update_balancing_biases(model: AnyModel, stats: RouterStats, rate: float) -> AnyModel:
    """The model after a step towards an even load; all its other weights are the same arrays.

    Args:
        model: with `config.moe.balancing_bias`.
        stats: `out.router.stats` of a step's batch (`moe.stats.sum_stats` of its micro-steps).
        rate: see `moe.router.update_balancing_bias`.
    """
    model = jax.tree.map(lambda leaf: leaf, model)
    for block, loads_LE in sparse_blocks(model.model.layers, stats.tokens_per_expert):
        bias = block.e_score_correction_bias
        bias.set_value(update_balancing_bias(bias.get_value(), loads_LE, rate))
    return model
