"""Skewed routings to force on a block or a model, for tests and benchmarks of dispatchers.

Each is derived from its name, a seed and a step alone, so it is the same on every machine and every mesh.
"""

import zlib
from collections.abc import Callable

import numpy as np

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.suggest import did_you_mean

#: Steps between two bursts.
_BURST_PERIOD = 4
#: Added to the logarithm of a popularity: such an expert is chosen by every token.
_HOT = 1e3


def workload(
    name: str, shape: tuple[int, int], *, num_experts: int, chosen: int, devices: int = 1, seed: int = 0, step: int = 0
) -> np.ndarray:
    """The experts of every token under a named routing, all different, int32 [B, T, A].

    Args:
        name: one of `WORKLOADS`.
        shape: B and T.
        num_experts: E.
        chosen: A, at most E.
        devices: over which the experts are sharded, for "hot_device".
        seed: another one is another draw of the same kind.
        step: of a training run; "rotating" and "bursts" depend on it by their nature, the others draw anew.

    Raises:
        RequestError: there is no workload of this name.
    """
    if name not in WORKLOADS:
        known = ", ".join(WORKLOADS)
        raise RequestError(f"there is no workload {name!r}; {did_you_mean(name, WORKLOADS)}expected one of {known}.")
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed, step])
    preferences = WORKLOADS[name](rng, num_experts, chosen, devices, step)
    if preferences is None:
        assignments_BTA = np.arange(shape[0] * shape[1] * chosen).reshape(*shape, chosen)
        return (assignments_BTA % num_experts).astype(np.int32)
    # Gumbel noise: experts drawn without replacement, each in proportion to exp(preference).
    scores_BTE = preferences + rng.gumbel(size=(*shape, num_experts))
    return np.argsort(-scores_BTE, axis=-1)[..., :chosen].astype(np.int32)


def _in_turn(rng: np.random.Generator, num_experts: int, chosen: int, devices: int, step: int) -> None:
    return None


def _uniform(rng: np.random.Generator, num_experts: int, chosen: int, devices: int, step: int) -> np.ndarray:
    return np.zeros(num_experts)


def _zipf(rng: np.random.Generator, num_experts: int, chosen: int, devices: int, step: int) -> np.ndarray:
    return -1.2 * np.log(np.arange(1, num_experts + 1))


def _hot_expert(rng: np.random.Generator, num_experts: int, chosen: int, devices: int, step: int) -> np.ndarray:
    return _HOT * (np.arange(num_experts) == 0)


def _hot_device(rng: np.random.Generator, num_experts: int, chosen: int, devices: int, step: int) -> np.ndarray:
    # Where a device has fewer experts than a token needs, its neighbours have the others.
    return -_HOT * (np.arange(num_experts) // max(num_experts // devices, 1))


def _ragged(rng: np.random.Generator, num_experts: int, chosen: int, devices: int, step: int) -> np.ndarray:
    return rng.normal(scale=1.5, size=num_experts)


def _empty(rng: np.random.Generator, num_experts: int, chosen: int, devices: int, step: int) -> np.ndarray:
    used = rng.permutation(num_experts)[: max(num_experts // 2, chosen)]
    return np.where(np.isin(np.arange(num_experts), used), 0.0, -_HOT)


def _rotating(rng: np.random.Generator, num_experts: int, chosen: int, devices: int, step: int) -> np.ndarray:
    return _HOT * (np.arange(num_experts) == step % num_experts)


def _bursts(rng: np.random.Generator, num_experts: int, chosen: int, devices: int, step: int) -> np.ndarray:
    is_burst = step % _BURST_PERIOD == _BURST_PERIOD - 1
    return (_hot_expert if is_burst else _uniform)(rng, num_experts, chosen, devices, step)


#: By name, the logarithm of each expert's popularity [E]; None is all in turn.
WORKLOADS: dict[str, Callable[[np.random.Generator, int, int, int, int], np.ndarray | None]] = {
    "balanced": _in_turn,  # every expert has as many tokens
    "uniform": _uniform,  # every expert is as likely
    "zipf": _zipf,  # an expert's popularity is one over its rank to the power of 1.2
    "hot_expert": _hot_expert,  # every token has expert 0 first
    "hot_device": _hot_device,  # every token has its experts on the first device
    "ragged": _ragged,  # loads of all sizes: popularities are log-normal
    "empty": _empty,  # half of the experts have no token
    "rotating": _rotating,  # every token has the same expert first, the next one in the next step
    "bursts": _bursts,  # uniform, and in every fourth step as "hot_expert"
}
