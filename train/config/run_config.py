"""One run, whole: the sections together, and the checks that need several of them."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from qwen_moe_jax.config import ExecutionConfig, LoraConfig, ShardingRules
from qwen_moe_jax.config.checks import Checks
from train.config.grpo import GRPOConfig
from train.config.objectives import ClassificationConfig, DistillationConfig, DpoConfig, RewardModelConfig
from train.config.sections import DataConfig, LossConfig, MeshConfig, OptimizerConfig, RunConfig

#: What a run from a TOML file has otherwise than the package's config classes; the file's tables are laid over it.
TRAINER_DEFAULTS: dict[str, dict[str, Any]] = {
    "execution": {"dtype": "float32", "param_dtype": "float32", "remat": "dots"},
}

#: The typed sections of a TOML file, in the order of `--help`. [model] is a Hub config.json.
SECTIONS: dict[str, type] = {
    "mesh": MeshConfig,
    "execution": ExecutionConfig,
    "sharding": ShardingRules,
    "data": DataConfig,
    "loss": LossConfig,
    "optimizer": OptimizerConfig,
    "lora": LoraConfig,
    "grpo": GRPOConfig,
    "run": RunConfig,
    "classification": ClassificationConfig,
    "reward": RewardModelConfig,
    "dpo": DpoConfig,
    "distillation": DistillationConfig,
}

#: The sections that choose an objective, of which a file has one at most; without one it is language modelling.
OBJECTIVE_TABLES: tuple[str, ...] = ("classification", "reward", "dpo", "grpo", "distillation")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run.

    Attributes:
        model: a Hub config.json as a table; empty where `run.model_name_or_path` names a checkpoint.
        mesh: the devices.
        execution: how the model is run; [sharding] is its `sharding`.
        data: documents, tokenizer and batches.
        loss: what is minimised besides the cross entropy.
        optimizer: AdamW and its schedule.
        lora: low-rank adapters, which are trained instead of the weights; None trains the weights.
        grpo: learning from rewards; None learns something else.
        run: steps, checkpoints and reports.
        classification, reward, dpo, distillation: the objective, one of them at most; none is language modelling.

    Raises:
        ConfigError: sections that contradict each other; the message names all contradictions.
    """

    model: dict[str, Any]
    mesh: MeshConfig = MeshConfig()
    execution: ExecutionConfig = ExecutionConfig(**TRAINER_DEFAULTS["execution"])
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig | None = None
    grpo: GRPOConfig | None = None
    run: RunConfig = RunConfig()
    classification: ClassificationConfig | None = None
    reward: RewardModelConfig | None = None
    dpo: DpoConfig | None = None
    distillation: DistillationConfig | None = None

    def __post_init__(self) -> None:
        if self.run.model_name_or_path and not self.data.tokenizer:
            data = dataclasses.replace(self.data, tokenizer=self.run.model_name_or_path)
            object.__setattr__(self, "data", data)
        with Checks(self) as check:
            self._check_model(check)
            self._check_batch(check)
            self._check_schedule(check)
            self._check_trained(check)
            self._check_objective(check)
            self._check_grpo(check)

    @property
    def objective(self) -> str:
        """The section that chooses the objective; "" for language modelling."""
        return next((table for table in OBJECTIVE_TABLES if getattr(self, table) is not None), "")

    def with_steps_of(self, rows: int) -> "TrainConfig":
        """The same run with `run.max_steps`, computed from `run.num_train_epochs` where that is given.

        Args:
            rows: of the training text, all of which an epoch reads once.

        Raises:
            ConfigError: the steps contradict the schedule.
        """
        epochs = self.run.num_train_epochs
        if epochs is None:
            return self
        # Rounded, so that 0.1 + 0.2 epochs of 10 rows are 3 rows, and not a little more.
        steps = math.ceil(round(epochs * rows / self.data.batch_size, 6))
        return dataclasses.replace(
            self, run=dataclasses.replace(self.run, max_steps=max(steps, 1), num_train_epochs=None)
        )

    def _check_model(self, check: Checks) -> None:
        source = self.run.model_name_or_path
        if bool(self.model) == bool(source):
            both = "a [model] table", "run.model_name_or_path"
            expected = (
                "one of them: the keys of a Hub config.json, model_type first, or a checkpoint to start from, whose "
                "config it is then"
            )
            found = f"both {both[0]} and {both[1]}" if source else f"neither {both[0]} nor {both[1]}"
            check(False, "model", expected, found=found, given=("run.model_name_or_path",))
        expected = "false: a [model] table says by mtp_num_hidden_layers whether there is a next-token head"
        check(bool(source) or not self.run.drop_mtp, "run.drop_mtp", expected)
        for number, text in enumerate(self.data.mixture):
            field = f"data.sources[{number}].format" if self.data.sources else "data.format"
            expected = "another one, or the tokenizer of the token ids: name it in data.tokenizer"
            check(text.format != "tokens" or self.data.tokenizer != "", field, expected, found="'tokens'")
        size = self.model.get("vocab_size", self.data.vocab_size)
        expected = f"it to be left out: the tokenizer decides it, and data.vocab_size is {self.data.vocab_size}"
        holds = self.data.tokenizer != "" or size == self.data.vocab_size
        check(holds, "model.vocab_size", expected, found=repr(size), given=("data.vocab_size", "data.tokenizer"))

    def _check_batch(self, check: Checks) -> None:
        mesh, rows, shards = self.mesh, self.data.batch_size, self.mesh.batch_shards
        axes = ("mesh.data", "mesh.fsdp", "mesh.expert")
        expected = (
            f"a multiple of {shards}, the mesh's data x fsdp x expert ({mesh.data} x {mesh.fsdp} x {mesh.expert}), "
            "which share the rows evenly"
        )
        if check(rows % shards == 0, "data.batch_size", expected, given=axes):
            micro_batches = self.run.gradient_accumulation_steps
            expected = (
                f"a divisor of {rows // shards}, the rows of data.batch_size ({rows}) that each of the mesh's "
                f"data x fsdp x expert ({shards}) has"
            )
            given = ("data.batch_size", *axes)
            check(rows % (shards * micro_batches) == 0, "run.gradient_accumulation_steps", expected, given=given)

    def _check_grpo(self, check: Checks) -> None:
        """Prompts are records, completions of a prompt are learned together, and nothing else is learned."""
        if self.grpo is None:
            return
        for number, text in enumerate(self.data.mixture):
            field = f"data.sources[{number}].format" if self.data.sources else "data.format"
            expected = "'jsonl' with a [grpo] table: a prompt a line, with what the reward reads"
            check(text.format == "jsonl", field, expected, found=repr(text.format), given=("grpo",))
        expected = "the model's, with a [grpo] table: prompts alone are too little text to train one on"
        check(self.data.tokenizer != "", "data.tokenizer", expected, given=("grpo",))
        rows, generations = self.data.batch_size, self.grpo.num_generations
        expected = f"a divisor of data.batch_size, {rows}: the completions of a prompt are learned from in one step"
        check(rows % generations == 0, "grpo.num_generations", expected, given=("data.batch_size",))
        expected = f"less than data.seq_len, {self.data.seq_len}, which is of prompt and completion"
        fits = self.grpo.longest_prompt(self.data.seq_len) >= 1
        check(fits, "grpo.max_completion_length", expected, given=("data.seq_len",))
        for name in ("z_loss_coef", "mtp_coef", "router_bias_update_rate"):
            check(getattr(self.loss, name) == 0, f"loss.{name}", "0 with a [grpo] table", given=("grpo",))

    def _check_schedule(self, check: Checks) -> None:
        optimizer, steps = self.optimizer, self.run.max_steps
        if optimizer.decay_steps is not None and steps is not None:
            left = steps - optimizer.warmup_of(steps)
            expected = f"at most run.max_steps less the steps of the warm-up ({left})"
            given = ("run.max_steps", "optimizer.warmup_steps")
            check(optimizer.decay_steps <= left, "optimizer.decay_steps", expected, given=given)

    def _check_trained(self, check: Checks) -> None:
        """Adapters leave everything else as it is, and a Hub folder cannot hold a balancing bias."""
        biased = self.loss.router_bias_update_rate > 0
        if self.lora is not None:
            expected = "none with a [lora] table, for only the adapters are trained. Leave one of the two out"
            check(not self.optimizer.frozen, "optimizer.frozen", expected, given=("lora",))
            expected = expected.replace("none", "0")
            check(not biased, "loss.router_bias_update_rate", expected, given=("lora",))
        expected = (
            "it to be left out without a [lora] table and run.model_name_or_path: integers are not trained, adapters "
            "over those of a checkpoint are"
        )
        holds = self.execution.weights is None or (self.lora is not None and self.run.model_name_or_path != "")
        check(holds, "execution.weights", expected, given=("lora", "run.model_name_or_path"))
        for table in ("classification", "reward"):
            expected = f"it to be left out with a [{table}] table, whose head is exported with weights of floats"
            holds = self.execution.weights is None or getattr(self, table) is None
            check(holds, "execution.weights", expected, given=(table,))
        expected = (
            "0 with run.export = true: a Hub folder cannot hold a balancing bias. Set run.export to false (the "
            "checkpoints hold the model), or the rate to 0"
        )
        check(not (biased and self.run.export), "loss.router_bias_update_rate", expected, given=("run.export",))
        expected = "0 with run.model_name_or_path: the routers of a Hub checkpoint have no bias. Leave one of them out"
        given = ("run.model_name_or_path",)
        check(not (biased and self.run.model_name_or_path), "loss.router_bias_update_rate", expected, given=given)

    def _check_objective(self, check: Checks) -> None:
        given = [table for table in OBJECTIVE_TABLES if getattr(self, table) is not None]
        for table in given[1:]:
            expected = f"one objective, and there is a [{given[0]}] table. Leave one of the two out"
            check(False, table, expected, found=f"a [{table}] table", given=(given[0],))
        if self.objective in ("classification", "reward", "dpo") or self.grpo is not None:
            expected = "it to be left out: an example has a row of its own, and nothing is packed"
            given_by = (self.objective or "grpo",)
            check(self.data.packing_strategy == "wrapped", "data.packing_strategy", expected, given=given_by)
        if self.objective in ("classification", "reward", "dpo"):
            self._check_examples(check)
        if self.objective in ("classification", "reward", "dpo", "distillation"):
            for key in ("z_loss_coef", "mtp_coef"):
                expected = f"0 with [{self.objective}]: it belongs to language modelling"
                check(getattr(self.loss, key) == 0, f"loss.{key}", expected, given=(self.objective,))

    def _check_examples(self, check: Checks) -> None:
        """Examples are records with more than a text, and are batches of whole texts."""
        for number, text in enumerate(self.data.mixture):
            field = f"data.sources[{number}].format" if self.data.sources else "data.format"
            expected = f"jsonl, datasets or docstrings with [{self.objective}]"
            holds = text.format in ("jsonl", "datasets", "docstrings")
            check(holds, field, expected, found=repr(text.format), given=(self.objective,))
