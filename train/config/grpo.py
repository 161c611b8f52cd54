"""`[grpo]`: learning from rewards of completions that the model itself samples."""

import math
from dataclasses import dataclass
from typing import Literal

from qwen_moe_jax.config.checks import Checks

_ABOVE_ZERO, _NOT_NEGATIVE = "a number above 0", "0 or more"


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One reward function.

    Attributes:
        function: package.module:function, found from the current directory too, or a built-in one: exact_match, regex,
            arithmetic or balanced_brackets. It is called with (prompt, completion, row) and returns a number.
        weight: what its reward is multiplied by before those of all functions are summed.
    """

    function: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check(self.function != "", "function", "package.module:function, or the name of a built-in reward")
            check(math.isfinite(self.weight), "weight", "a finite number")


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Group relative policy optimization, by the names and meanings of TRL's GRPOConfig.

    A step samples data.batch_size completions, num_generations of each prompt, and learns to make those likelier whose
    reward is above the mean of their prompt.

    Attributes:
        reward: the reward function, if there is one; see function in rewards.
        rewards: several instead: tables of function and weight.
        reward_timeout: seconds that a reward function may take for one completion; then its reward is 0.
        reward_workers: processes that compute rewards.
        num_generations: completions of each prompt, a divisor of data.batch_size.
        max_completion_length: the largest number of tokens of a completion.
        rollout_batch_size: completions that are generated at a time; left out, all of a step.
        temperature: of sampling; log-probabilities are those of the divided logits.
        top_k: sample among the k most probable tokens; 0 is all.
        top_p: sample among the fewest most probable tokens whose probabilities sum to this.
        min_p: sample among the tokens at least this times as probable as the most probable one.
        repetition_penalty: as in transformers; 1 is none.
        num_iterations: optimizer steps that learn from the same completions.
        loss_type: grpo (the mean over the tokens of each completion, then over completions), dapo (the mean over the
            tokens of all) or dr_grpo (the sum over tokens, divided by max_completion_length and by completions).
        epsilon: the ratio of new and old probability is clipped from below at 1 - epsilon.
        epsilon_high: and from above at 1 + epsilon_high; left out, epsilon.
        importance_sampling_level: token (a ratio for each token) or sequence (their geometric mean, as in GSPO).
        scale_rewards: what advantages are divided by: the standard deviation of the rewards of a prompt (group) or of a
            step (batch), or none.
        mask_truncated_completions: learn nothing from completions that have no end.
        beta: weight of the KL divergence to the reference, which is the model at the start; under a [lora] table it is
            the base without adapters, and needs no memory. 0 is no reference.
        use_bias_correction_kl: multiply that divergence by the ratio, which makes its gradient unbiased.
        routing_replay: a step uses the experts that generated each token, not those that its routers would choose.
    """

    reward: str = ""
    rewards: tuple[RewardConfig, ...] = ()
    reward_timeout: float = 10.0
    reward_workers: int = 2
    num_generations: int = 8
    max_completion_length: int = 128
    rollout_batch_size: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_iterations: int = 1
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    importance_sampling_level: Literal["token", "sequence"] = "token"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    mask_truncated_completions: bool = False
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    routing_replay: bool = True

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check.literals()
            expected = "one of reward and [[grpo.rewards]]: what a completion is worth"
            found = "neither" if not self.reward and not self.rewards else "both"
            check(bool(self.reward) != bool(self.rewards), "reward", expected, found=found)
            check.at_least(1, "reward_workers", "max_completion_length", "rollout_batch_size", "num_iterations")
            check.at_least(2, "num_generations")
            check.at_least(0, "top_k")
            for name in ("reward_timeout", "temperature", "repetition_penalty"):
                check(0 < getattr(self, name) < math.inf, name, _ABOVE_ZERO)
            for name in ("top_p", "min_p"):
                check(0 <= getattr(self, name) <= 1, name, "from 0 to 1")
            for name in ("epsilon", "epsilon_high", "beta"):
                check(0 <= (getattr(self, name) or 0) < math.inf, name, _NOT_NEGATIVE)

    def longest_prompt(self, seq_len: int) -> int:
        """The tokens that the longest completion leaves for its prompt in a row."""
        return seq_len - self.max_completion_length

    @property
    def reward_functions(self) -> tuple[RewardConfig, ...]:
        """All of them, with their weights."""
        return self.rewards or (RewardConfig(function=self.reward),)
