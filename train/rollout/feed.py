"""The batches of a GRPO run: prompts are continued by the parameters of the moment, and the completions rewarded."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from qwen_moe_jax.sharding.distributed import is_process_zero, num_processes
from train.config import TrainConfig
from train.data.batches import Mixture, rows_of_devices
from train.data.feed import Setting, to_devices
from train.objectives.policy_gradient import group_advantages
from train.parameters import Params
from train.program import Program
from train.reporting.start import bytes_per_device
from train.rollout.batch import Rollout, RolloutBatch, rollout_batch
from train.rollout.corpus import PromptCorpus
from train.rollout.generate import Sampling, seed_of
from train.rollout.prompts import Prompt
from train.rollout.reference import keeps_copy, scorer
from train.rollout.rewarded import Rewards
from train.rollout.stored import StoredRollouts

#: Completions of held-out prompts that an evaluation shows.
_SHOWN = 4


class RolloutFeed:
    """A batch for every step: new rollouts for the first of `num_iterations` steps, the same for the others.

    Which prompts a rollout has, and the random numbers of each completion, follow from seed and step alone. A rollout
    that a checkpoint is taken in the middle of is stored. See `train.data.feed.Feed`.

    Attributes:
        num_rows: of an epoch: completions of all prompts, times the steps that learn from them.
        num_tokens: of all prompts.
        notes: none.
        heldout: none; held-out prompts are continued, see `evaluate`.
    """

    def __init__(self, config: TrainConfig, corpus: PromptCorpus, mesh: Mesh, sharding: NamedSharding) -> None:
        assert config.grpo is not None
        self._config, self._grpo, self._corpus, self._sharding = config, config.grpo, corpus, sharding
        self._own_rows = rows_of_devices(mesh.local_devices, sharding, config.data.batch_size)
        weights = [source.weight for source in config.data.mixture]
        self._prompts = Mixture([part.training for part in corpus.prompts], weights)
        self._heldout_prompts = heldout_prompts(corpus, config.data.heldout_rows)
        self._batch: tuple[int, RolloutBatch] | None = None  # of a rollout, by its number
        self._numbers: dict[str, float] = {}  # of that rollout, for the report; none where it was stored
        self.num_rows = self._prompts.num_rows * config.grpo.num_generations * config.grpo.num_iterations
        self.num_tokens = self._prompts.num_tokens
        self.notes: list[str] = []
        self.heldout: list[Any] = []

    def memory(self, program: Program) -> dict[str, int]:
        """See `Feed`: the cache that completions are sampled in, and a copy of the model as reference."""
        sizes = {"cache": bytes_per_device(Sampling.of(self._config, program, self._corpus).cache(program))}
        if keeps_copy(self._config):
            sizes["reference"] = bytes_per_device((program.state.params, program.fixed))
        return sizes

    def prepare(self, setting: Setting, params: Params) -> "RolloutFeed":
        """See `Feed`: starts the workers of the rewards, and keeps the reference.

        Raises:
            ConfigError: a reward function cannot be imported.
        """
        config, program = setting.config, setting.program
        self._report = setting.report
        self._sampling = Sampling.of(config, program, self._corpus)
        self._scorer = scorer(config, program, self._sharding, params, first_step=setting.first_step)
        self._stored = StoredRollouts(setting.folder.path / "rollouts", setting.folder.checkpoints)
        self._rewards = Rewards(self._grpo)
        return self

    def close(self) -> None:
        """Ends the processes that compute rewards."""
        self._rewards.close()

    def training(self, step: int, params: Params) -> RolloutBatch:
        """See `Feed`."""
        number, iteration = divmod(step, self._grpo.num_iterations)
        if self._batch is None or self._batch[0] != number:
            if iteration:  # a run that goes on in the middle of a rollout
                self._batch = number, self._on_devices(self._stored.load(step))
            else:
                self._batch = number, self._rollout(number, step, params)
        self._report.add(self._numbers)
        return self._batch[1]

    def saved(self, step: int) -> None:
        """See `Feed`: stores the rollout that the next step learns from, too."""
        if self._batch is None or step % self._grpo.num_iterations == 0:
            return
        batch = self._batch[1]
        on_host = multihost_utils.process_allgather(batch, tiled=True) if num_processes() > 1 else jax.device_get(batch)
        if is_process_zero():
            self._stored.save(step, on_host)

    def describe(self, step: int) -> str:
        """See `Feed`."""
        number = step // self._grpo.num_iterations
        return f"rollout {number} of {', '.join(prompt.name for prompt in self._prompts_of(number))}"

    def evaluate(self, step: int, params: Params) -> Mapping[str, float]:
        """Samples a completion of every held-out prompt, always with the same random numbers.

        Returns:
            The mean `reward`, `loss` (minus the reward), mean `completion_length` in tokens, and `truncated`, the share
            of completions without an end; of several reward functions, the mean of each as `reward_` and its name.
        """
        requests = [
            (prompt, seed_of(self._config.run.seed, "held out", prompt.name)) for prompt in self._heldout_prompts
        ]
        rollouts = self._sampling.sample(params, requests)
        rewards, numbers = self._scored(step, rollouts)
        self._report.completions(step, shown(rollouts[:_SHOWN], rewards))
        return {
            "loss": -float(rewards.mean()),
            "reward": float(rewards.mean()),
            "completion_length": float(np.mean([len(rollout.token_ids) for rollout in rollouts])),
            "truncated": float(np.mean([rollout.truncated for rollout in rollouts])),
            **{name: mean for name, mean in numbers.items() if name.startswith("reward_")},
        }

    def _prompts_of(self, number: int) -> list[Prompt]:
        """The prompts of a rollout, each once."""
        count = self._config.data.batch_size // self._grpo.num_generations
        order = self._prompts.references(self._config.run.seed)
        chosen = [order[index] for index in range(number * count, (number + 1) * count)]
        return [reference.rows[reference.number] for reference in chosen]

    def _rollout(self, number: int, step: int, params: Params) -> RolloutBatch:
        grpo, seed = self._grpo, self._config.run.seed
        prompts = [prompt for prompt in self._prompts_of(number) for _ in range(grpo.num_generations)]
        requests = [
            (prompt, seed_of(seed, number, prompt.name, completion)) for completion, prompt in enumerate(prompts)
        ]
        with self._report.aside("rollout"):
            began = time.perf_counter()
            rollouts = self._sampling.sample(params, requests)
            sampled = time.perf_counter()
            rewards, numbers = self._scored(step + 1, rollouts)
            rewarded = time.perf_counter()
        advantages = group_advantages(rewards, grpo.num_generations, grpo.scale_rewards)
        batch = rollout_batch(
            rollouts, advantages, self._config.data.seq_len, mask_truncated=grpo.mask_truncated_completions
        )
        self._numbers = {
            **numbers,
            **statistics(rollouts, rewards, grpo.num_generations),
            "rollout_tokens_per_second": sum(len(one.token_ids) for one in rollouts) / (sampled - began),
            "reward_seconds": rewarded - sampled,
        }
        return self._scorer(params, self._on_devices(batch))

    def _scored(self, step: int, rollouts: Sequence[Rollout]) -> tuple[np.ndarray, dict[str, float]]:
        """Rewards [B] and numbers for the report; failures of reward functions are said."""
        rewards, numbers, said = self._rewards.of(rollouts)
        if said:
            self._report.say(f"step {step}  {said}")
        return rewards, numbers

    def _on_devices(self, batch: RolloutBatch) -> RolloutBatch:
        return to_devices(jax.tree.map(lambda array: array[self._own_rows], batch), self._sharding)


def heldout_prompts(corpus: PromptCorpus, count: int) -> list[Prompt]:
    """About `count` held-out prompts, evenly spread over those of each source."""
    parts = [part.heldout for part in corpus.prompts if len(part.heldout)]
    share = max(1, count // len(parts))
    chosen = [(part, np.linspace(0, len(part) - 1, min(share, len(part)))) for part in parts]
    return [part[int(number)] for part, numbers in chosen for number in numbers]


def statistics(rollouts: Sequence[Rollout], rewards: np.ndarray, num_generations: int) -> dict[str, float]:
    """What the report has about the completions of a rollout, those of a prompt next to each other."""
    spread = rewards.reshape(-1, num_generations).std(axis=1, ddof=1)
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(spread.mean()),
        "prompts_without_spread": float(np.mean(spread == 0)),
        "completion_length": float(np.mean([len(rollout.token_ids) for rollout in rollouts])),
        "completions_truncated": float(np.mean([rollout.truncated for rollout in rollouts])),
    }


def shown(rollouts: Sequence[Rollout], rewards: np.ndarray) -> list[dict[str, Any]]:
    """Completions with their rewards, for the report."""
    return [
        {"prompt": rollout.prompt.text, "completion": rollout.text, "reward": float(reward)}
        for rollout, reward in zip(rollouts, rewards, strict=False)
    ]
