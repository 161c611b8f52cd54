"""How many tokens each expert of an engine was given: counted on the devices, read when somebody asks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.model.output import RouterOutput


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ExpertLoads:
    """Tokens that an engine's experts were given since it was made.

    Attributes:
        layers: the numbers in the model of the L sparse layers.
        tokens_LE: int64 [L, E]; real tokens that chose the expert.
        dropped: those choices, of all layers, that did not reach their expert; 0 except under `dispatch="capacity"`.
    """

    layers: tuple[int, ...]
    tokens_LE: np.ndarray
    dropped: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Counters:
    """The counts on the devices, each of 64 bits in two halves, for JAX has no 64-bit integers by default.

    Attributes:
        tokens_2LE, dropped_2: uint32; the low halves and the high ones.
    """

    tokens_2LE: jax.Array
    dropped_2: jax.Array

    def plus(self, chosen_LE: jax.Array, dropped: jax.Array) -> "Counters":
        """With what one call counted."""
        return Counters(tokens_2LE=_plus(self.tokens_2LE, chosen_LE), dropped_2=_plus(self.dropped_2, dropped))


def _plus(count_2: jax.Array, more: jax.Array) -> jax.Array:
    low = count_2[0] + more.astype(jnp.uint32)
    return jnp.stack([low, count_2[1] + (low < count_2[0])])


def sparse_layers(config: ModelConfig) -> tuple[int, ...]:
    """The numbers of the layers with experts."""
    return tuple(number for number, kind in enumerate(config.layers) if kind.mlp == "sparse")


def no_counts(config: ModelConfig) -> Counters | None:
    """Zeros, on the host; None for a model without experts."""
    layers = len(sparse_layers(config))
    if not layers:
        return None
    zeros = np.zeros((2, layers, config.moe.num_experts), np.uint32)
    return Counters(tokens_2LE=zeros, dropped_2=np.zeros(2, np.uint32))  # type: ignore[arg-type]


def chosen_by(experts_BTLA: jax.Array, token_mask_BT: jax.Array, num_experts: int) -> jax.Array:
    """Real tokens that chose each expert, int32 [L, E]."""
    is_chosen_BTLAE = experts_BTLA[..., None] == jnp.arange(num_experts, dtype=jnp.int32)
    return jnp.sum(is_chosen_BTLAE & token_mask_BT[:, :, None, None, None], axis=(0, 1, 3), dtype=jnp.int32)


def dropped_of_rows(router: RouterOutput) -> jax.Array:
    """Choices in each row that did not reach their expert, int32 [B]."""
    return jnp.sum(router.trace.dropped, axis=(0, 2, 3), dtype=jnp.int32)


def on_host(counters: Counters, config: ModelConfig) -> ExpertLoads:
    """The counts as numbers."""
    tokens_2LE, dropped_2 = (np.asarray(x).astype(np.int64) for x in (counters.tokens_2LE, counters.dropped_2))
    low, high = dropped_2.tolist()
    return ExpertLoads(
        layers=sparse_layers(config), tokens_LE=tokens_2LE[0] + (tokens_2LE[1] << 32), dropped=low + (high << 32)
    )
