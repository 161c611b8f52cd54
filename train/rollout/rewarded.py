"""The rewards of rollouts: computed by process 0's workers, weighted and summed, the same in all processes."""

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np

from qwen_moe_jax.sharding.distributed import broadcast, is_process_zero
from train.config import GRPOConfig
from train.rewards.pool import RewardPool, Sample
from train.rollout.batch import Rollout


class Rewards:
    """Worker processes with the reward functions of a config; `close` ends them.

    Raises:
        ConfigError: a function cannot be imported.
    """

    def __init__(self, config: GRPOConfig) -> None:
        self._functions = config.reward_functions
        self._pool: RewardPool | None = None
        if is_process_zero():
            names = [function.function for function in self._functions]
            self._pool = RewardPool(names, timeout=config.reward_timeout, workers=config.reward_workers)

    def close(self) -> None:
        """Ends the processes."""
        if self._pool is not None:
            self._pool.close()

    def of(self, rollouts: Sequence[Rollout]) -> tuple[np.ndarray, dict[str, float], str]:
        """The weighted sum of the rewards of each rollout.

        Returns:
            float64 [B]; numbers for the report: how many calls failed, and of several functions the mean of each; a
            line about the failures, or "".
        """
        found = broadcast(self._computed(rollouts) if self._pool is not None else "")
        answer = json.loads(found)
        rewards_BF, failures = np.array(answer["rewards"], np.float64), Counter[str](answer["failures"])
        numbers = {"rewards_failed": float(failures.total())}
        if len(self._functions) > 1:
            means = rewards_BF.mean(axis=0)
            numbers |= {
                f"reward_{function.function}": float(mean)
                for function, mean in zip(self._functions, means, strict=True)
            }
        weights = np.array([function.weight for function in self._functions])
        return rewards_BF @ weights, numbers, _failures(failures, answer["example"], rewards_BF.size)

    def _computed(self, rollouts: Sequence[Rollout]) -> str:
        assert self._pool is not None
        scores = self._pool.score(
            [
                Sample(prompt=rollout.prompt.prompt, completion=rollout.text, row=rollout.prompt.row)
                for rollout in rollouts
            ]
        )
        return json.dumps({"rewards": scores.rewards.tolist(), "failures": scores.failures, "example": scores.example})


def _failures(failures: Counter[str], example: dict[str, str], calls: int) -> str:
    if not failures:
        return ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in failures.most_common())
    [(kind, _)] = failures.most_common(1)
    return f"{failures.total()} of {calls} rewards failed and are 0: {kinds}; for example {example[kind]}"
