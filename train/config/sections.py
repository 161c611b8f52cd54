"""The sections of a run's TOML file that belong to training, one frozen dataclass each.

Their `Attributes:` are the help of `python -m train --help`. `[execution]`, `[sharding]` and `[lora]` are the package's
own `ExecutionConfig`, `ShardingRules` and `LoraConfig`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from qwen_moe_jax.config import MESH_AXES, DTypeLike
from qwen_moe_jax.config.checks import Checks
from train.config.columns import ColumnsConfig

#: Ranges that several fields have, in words.
ABOVE_ZERO, NOT_NEGATIVE = "a number above 0", "0 or more"

#: The steps of a run that says neither `max_steps` nor `num_train_epochs`.
DEFAULT_STEPS = 500


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The number of devices along each mesh axis.

    Attributes:
        data: devices that share the batch and hold a copy of everything else.
        fsdp: devices that share the batch and split the weights.
        expert: devices that share the batch and split the experts.
        context: devices that share the positions of each row; see docs/long-context.md.
        tensor: devices that split attention heads, the width of feed-forward layers and the vocabulary.
        simulated: simulate data x fsdp x expert x context x tensor devices on this machine's CPU.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    simulated: bool = False

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check.at_least(1, "data", "fsdp", "expert", "context", "tensor")

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the axes by name, as `qmj.make_mesh` takes them."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    @property
    def batch_shards(self) -> int:
        """The number of devices that share the rows of a batch."""
        return self.data * self.fsdp * self.expert

    @property
    def devices(self) -> int:
        """The number of devices of the mesh."""
        return self.batch_shards * self.context * self.tensor


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The losses besides the cross entropy, and the balancing of experts.

    Attributes:
        load_balancing_type: what the load-balancing loss evens out: pooled (the load of all layers together, as in
            transformers), global_batch (the load of each layer) or sequence (of each layer within each row).
        router_aux_loss_coef: weight of the load-balancing loss; left out, the model's own router_aux_loss_coef.
        z_loss_coef: weight of the mean squared logsumexp of the model's logits (z-loss; 1e-4 in PaLM).
        router_z_loss_coef: weight of the mean squared logsumexp of the router's logits.
        router_bias_update_rate: above 0, routers have a bias that only chooses experts, changed by this much a step
            (DeepSeek-V3's balancing without a loss); needs run.export = false.
        mtp_coef: weight of the cross entropy of the next-token head (mtp), which predicts the token after the next; 0
            carries the head along as it is, untrained.
    """

    load_balancing_type: Literal["pooled", "global_batch", "sequence"] = "pooled"
    router_aux_loss_coef: float | None = None
    z_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0
    router_bias_update_rate: float = 0.0
    mtp_coef: float = 0.0

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check.literals()
            for field in (
                "router_aux_loss_coef",
                "z_loss_coef",
                "router_z_loss_coef",
                "router_bias_update_rate",
                "mtp_coef",
            ):
                check(0 <= (getattr(self, field) or 0.0) < math.inf, field, NOT_NEGATIVE)


#: The values of data.format, and which files of a folder are read where data.pattern is left out.
FORMATS = {
    "text": "*.py",
    "docstrings": "*.py",
    "jsonl": "*.jsonl",
    "tokens": "*.npy",
    "datasets": "*.parquet",
    "parquet": "*.parquet",
}


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Where documents come from.

    Attributes:
        path: a folder or file of documents; left out, Python's own standard library.
        pattern: file names that are read in the folder; left out, *.py, *.jsonl, *.npy or *.parquet, by format.
        format: text (a document per file), docstrings (of Python files: conversations that ask what a name is or does
            and answer with the start of its docstring), jsonl (a record per line, or per item of the array in a .json
            file; .gz and .zst are decompressed), tokens (.npy of ids, documents split by the end id), parquet (read by
            pyarrow) or datasets (Hugging Face's: a folder of save_to_disk or of parquet, or a name on the Hub).
        split: with format datasets, the split that is read.
        columns: with formats jsonl, parquet and datasets, which column of a record is which field: a table of text,
            messages, prompt, completion, instruction, input, output, history, system, tools and chat_template_kwargs.
    """

    path: str = ""
    pattern: str | None = None
    format: Literal["text", "docstrings", "jsonl", "tokens", "datasets", "parquet"] = "text"
    split: str = "train"
    columns: ColumnsConfig = ColumnsConfig()

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self._check_text(check)

    def _check_text(self, check: Checks) -> None:
        check.literals()
        if self.format not in ("text", "docstrings"):
            check(self.path != "", "path", f"the file or folder to read as {self.format}", given=("format",))
        if self.format not in ("jsonl", "datasets", "parquet"):
            found = ", ".join(self.columns.given)
            expected = f"none with format {self.format}: only records of jsonl, parquet and datasets have columns"
            check(not found, "columns", expected, found=found, given=("format",))


@dataclass(frozen=True, kw_only=True)
class SourceConfig(TextConfig):
    """One source of a mixture.

    Attributes:
        weight: its share of the rows, relative to the weights of the other sources.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self._check_text(check)
            check(0 < self.weight < math.inf, "weight", ABOVE_ZERO)


@dataclass(frozen=True, kw_only=True)
class DataConfig(TextConfig):
    """The documents, their tokenizer and the shape of a batch.

    Attributes:
        sources: a mixture instead of one source: tables of path, pattern, format, split, columns and weight.
        megabytes: of each source, stop reading after this much text; inf for all of it.
        tokenizer: a folder with tokenizer.json, or a model's name on the Hub; left out, one is trained on the text.
        vocab_size: entries of the byte-level BPE that is trained on the text, and of the model.
        seq_len: tokens in a row, T.
        packing_strategy: how documents become rows: wrapped (one after the other, cut every seq_len tokens) or bfd
            (whole ones, by best-fit decreasing: only those of more than seq_len tokens are cut).
        too_long: what to do with documents of more than seq_len tokens: split (they continue in the next row, without
            the tokens before), truncate (keep the first seq_len tokens) or drop (leave them out).
        batch_size: rows of a step on all devices together, B; a multiple of data x fsdp x expert.
        heldout_fraction: share of each source's documents that is held out of training, for evaluation.
        heldout_rows: rows of held-out documents, evenly spread, that the held-out loss is computed on.
        eval_path: a file or folder whose documents are held out, instead of a share of the training documents; it is
            read as path is (of a mixture, as its first source).
        cache_dir: a folder of tokenized documents that several runs share; left out, each run has its own.
        num_proc: processes that tokenize; left out, one for each core, and with little text the trainer's own alone.
    """

    sources: tuple[SourceConfig, ...] = ()
    megabytes: float = 6.0
    tokenizer: str = ""
    vocab_size: int = 4096
    seq_len: int = 256
    packing_strategy: Literal["wrapped", "bfd"] = "wrapped"
    too_long: Literal["split", "truncate", "drop"] = "split"
    batch_size: int = 16
    heldout_fraction: float = 0.05
    heldout_rows: int = 64
    eval_path: str = ""
    cache_dir: str = ""
    num_proc: int | None = None

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self._check_text(check)
            check.at_least(1, "batch_size", "heldout_rows", "num_proc")
            default = DataConfig.heldout_fraction
            expected = "none with data.eval_path, which says what is held out. Leave one of the two out"
            both = self.eval_path and self.heldout_fraction != default
            check(not both, "heldout_fraction", expected, given=("eval_path",))
            check(self.megabytes > 0, "megabytes", ABOVE_ZERO)
            check(0 < self.heldout_fraction < 1, "heldout_fraction", "a number between 0 and 1, exclusive")
            check(self.seq_len >= 2, "seq_len", "at least 2, a token and the one after it")
            least = "at least 259: all bytes, the end of a text, and the two marks around a message"
            check(self.vocab_size >= 259, "vocab_size", least)
            for field in dataclasses.fields(TextConfig):
                own = self.sources and getattr(self, field.name) != field.default
                expected = f"one of {field.name} and sources. Give each source of the mixture its own {field.name}"
                check(not own, field.name, expected, given=("sources",))

    @property
    def mixture(self) -> tuple[SourceConfig, ...]:
        """The sources that are read, of which a config without `sources` has one."""
        if self.sources:
            return self.sources
        return (SourceConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TextConfig)}),)

    @property
    def validation(self) -> SourceConfig | None:
        """The source of `eval_path`; None where a share of the training documents is held out."""
        return dataclasses.replace(self.mixture[0], path=self.eval_path) if self.eval_path else None


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, with a linear warm-up of its rate and a decay.

    Attributes:
        type: adamw; muon, which makes the updates of matrices orthogonal and leaves the rest to AdamW; or adafactor,
            which keeps sums over rows and columns for a second moment, and no first.
        learning_rate: the highest rate, after the warm-up.
        final_learning_rate: the rate at the last step; left out, a tenth of learning_rate.
        warmup_steps: steps from zero to the highest rate; in a run of no more steps than that, a tenth of its steps.
        schedule: how the rate decays after the warm-up: cosine, linear, or wsd (stays constant, then linear).
        decay_steps: with schedule wsd, the number of last steps in which the rate decays.
        weight_decay: of matrices; norms, biases and the decay rates of linear layers (A_log) have none.
        beta1: decay rate of the first moment, with muon of the momentum; adafactor has none.
        beta2: decay rate of the second moment; adafactor's follows the step, 1 - step^-0.8.
        max_grad_norm: gradients with a larger norm, over all parameters, are scaled down to it.
        mu_dtype: of the first moment, float32 or bfloat16; left out, that of the parameters.
        memory_kind: where the state is between steps: device, or pinned_host, the memory of the host, from which every
            step copies it to the devices and back, with adamw one layer at a time.
        ema_decay: of a moving average of the trained weights in float32, as 0.999; evaluations, samples and the export
            take it in place of the last weights. Left out, there is none.
        frozen: regular expressions; parameters with matching names on the Hub are not trained and have no moments.
    """

    type: Literal["adamw", "muon", "adafactor"] = "adamw"
    learning_rate: float = 3e-3
    final_learning_rate: float | None = None
    warmup_steps: int = 40
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    decay_steps: int | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    mu_dtype: DTypeLike | None = None
    memory_kind: Literal["device", "pinned_host"] = "device"
    ema_decay: float | None = None
    frozen: tuple[str, ...] = ()

    @property
    def lowest_learning_rate(self) -> float:
        """The rate at the last step."""
        return self.learning_rate / 10 if self.final_learning_rate is None else self.final_learning_rate

    def warmup_of(self, max_steps: int) -> int:
        """The steps of the warm-up in a run of `max_steps`."""
        return self.warmup_steps if self.warmup_steps < max_steps else max_steps // 10

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check.literals()
            check(0 < self.learning_rate < math.inf, "learning_rate", ABOVE_ZERO)
            expected = "a number from 0 to optimizer.learning_rate, or none, which is a tenth of it"
            final = self.final_learning_rate
            falls = final is None or 0 <= final <= self.learning_rate
            check(falls, "final_learning_rate", expected, given=("learning_rate",))
            check(self.max_grad_norm > 0, "max_grad_norm", ABOVE_ZERO)
            check(0 <= self.weight_decay < math.inf, "weight_decay", NOT_NEGATIVE)
            for field in ("beta1", "beta2"):
                check(0 <= getattr(self, field) < 1, field, "at least 0 and less than 1")
            check(self.warmup_steps >= 0, "warmup_steps", NOT_NEGATIVE)
            if self.ema_decay is not None:
                check(0 < self.ema_decay < 1, "ema_decay", "between 0 and 1, as 0.999")
            if self.schedule == "wsd":
                found = self.decay_steps
                check(
                    found is not None, "decay_steps", "the steps of the decay, with schedule wsd", given=("schedule",)
                )
                check(found is None or found >= 1, "decay_steps", "at least 1")
            else:
                expected = f"none with schedule {self.schedule}: it belongs to wsd"
                check(self.decay_steps is None, "decay_steps", expected, given=("schedule",))
            if self.type == "adafactor":
                expected = "none with type adafactor, which has no first moment"
                check(self.mu_dtype is None, "mu_dtype", expected, given=("type",))
            check.dtypes("mu_dtype")
            check(self.mu_dtype != "float16", "mu_dtype", "float32 or bfloat16")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long to train, what to save and what to report.

    Attributes:
        output_dir: folder that receives config.toml, metrics.jsonl, checkpoints/ and hub/.
        max_steps: optimizer steps, total; left out, 500, or those of num_train_epochs.
        num_train_epochs: passes over the rows of the training text instead of max_steps, fractions allowed; the start
            of the run says how many steps that is.
        seed: of the initial weights and of the order of the data.
        model_name_or_path: a checkpoint to start from, a folder or a name on the Hub, instead of a [model] table and
            random weights; its tokenizer is the data's, unless data.tokenizer names one.
        drop_mtp: leave out the next-token head (mtp.*) that the checkpoint to start from may have.
        gradient_accumulation_steps: micro-batches that the rows of a step are split into, to save memory; loss and
            gradient are those of all rows together. Of the load-balancing losses, pooled becomes the mean over
            micro-batches, as in transformers; global_batch stays exact, for one more pass through the layers.
        nonfinite: what to do where the loss or the gradient is not finite: stop, or skip the step. Neither changes
            the weights.
        max_skipped: with nonfinite skip, the run stops after more skipped steps than this since its start.
        logging_steps: steps between two progress lines, and between two records of the load of every expert.
        eval_steps: steps between two evaluations of the held-out loss.
        metric_for_best_model: a held-out metric, as loss: the checkpoint in which it is best is kept, and exported in
            the end; left out, the last is exported.
        greater_is_better: of that metric; left out, false for one whose name ends with loss, else true.
        early_stopping_patience: end the run after so many evaluations in which that metric was not the best so far.
        save_steps: steps between two checkpoints; the last step always has one.
        save_total_limit: the newest checkpoints that are kept.
        sample_prompt: text that the model continues at intervals and in the end.
        sample_tokens: tokens that it adds.
        sample_steps: steps between two such samples; left out, with every evaluation; 0, only in the end.
        export: write hub/, for transformers, in the end, with adapters merged; adapters are also written to adapter/.
        export_dtype: of the weights in hub/; left out, that of the checkpoint that the run started from, else
            execution.param_dtype.
        tensorboard: write TensorBoard's events to tensorboard/ as well (extra `tensorboard`).
        report_to: trackers that get the metrics as well: tensorboard, wandb, trackio (extras of these names).
        tracker_project: the project of the run in wandb and trackio; its name there is that of its folder.
        profile: first:end, as 10:13 for steps 10, 11 and 12: write JAX's trace of them to profile/.
        plan: a JSON file that --plan TARGET --json FILE wrote: the run says whether the memory of its step and the time
            of its first steps are as planned, and warns where they are 5 % over or under.
        async_collectives: compile the train step, and its plans, with options for the kind of device under which
            collectives run next to products (v5p and v6e; no other kind has any).
    """

    output_dir: str = "runs/default"
    max_steps: int | None = None
    num_train_epochs: float | None = None
    seed: int = 0
    model_name_or_path: str = ""
    drop_mtp: bool = False
    gradient_accumulation_steps: int = 1
    nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10
    logging_steps: int = 10
    eval_steps: int = 100
    metric_for_best_model: str = ""
    greater_is_better: bool | None = None
    early_stopping_patience: int | None = None
    save_steps: int = 200
    save_total_limit: int = 2
    sample_prompt: str = "def"
    sample_tokens: int = 96
    sample_steps: int | None = None
    export: bool = True
    export_dtype: DTypeLike | None = None
    tensorboard: bool = False
    report_to: tuple[str, ...] = ()
    tracker_project: str = "qwen-moe-jax"
    profile: str = ""
    plan: str = ""
    async_collectives: bool = True

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check.literals()
            check.at_least(1, "gradient_accumulation_steps", "logging_steps", "eval_steps", "save_steps")
            check.at_least(1, "save_total_limit", "sample_tokens")
            epochs = self.num_train_epochs
            if epochs is None:
                object.__setattr__(self, "max_steps", DEFAULT_STEPS if self.max_steps is None else self.max_steps)
                check.at_least(1, "max_steps")
            else:
                check(0 < epochs < math.inf, "num_train_epochs", ABOVE_ZERO)
                expected = "none with run.num_train_epochs, which says how many they are. Leave one of the two out"
                check(self.max_steps is None, "max_steps", expected, given=("num_train_epochs",))
            check(0 <= self.seed < 2**32, "seed", "an integer from 0 to 2**32 - 1")
            for field in ("max_skipped", "sample_steps"):
                check((getattr(self, field) or 0) >= 0, field, NOT_NEGATIVE)
            for field in ("greater_is_better", "early_stopping_patience"):
                expected = "it to be left out without run.metric_for_best_model"
                given = ("metric_for_best_model",)
                check(bool(self.metric_for_best_model) or getattr(self, field) is None, field, expected, given=given)
            patience = self.early_stopping_patience
            check(patience is None or patience >= 1, "early_stopping_patience", "at least 1")
            check(self.sample_prompt != "", "sample_prompt", "at least one character to continue")
            unknown = [name for name in self.report_to if name not in ("tensorboard", "wandb", "trackio")]
            check(not unknown, "report_to", "some of tensorboard, wandb, trackio", found=", ".join(unknown))
            expected = "first:end with 1 <= first < end, as 10:13 for steps 10, 11 and 12"
            check(_steps(self.profile) is not None, "profile", expected)
            check.dtypes("export_dtype")

    @property
    def trackers(self) -> list[str]:
        """The names of all trackers."""
        return list(dict.fromkeys([*(["tensorboard"] if self.tensorboard else []), *self.report_to]))

    @property
    def steps(self) -> int:
        """`max_steps`, where it is known: `TrainConfig.with_steps_of` computes it from `num_train_epochs`."""
        assert self.max_steps is not None
        return self.max_steps

    @property
    def profile_steps(self) -> range:
        """The steps, counted from 1, that `profile` asks a trace of; none where it is empty."""
        return _steps(self.profile) or range(0)


def _steps(text: str) -> range | None:
    """`first:end` as a range; None where it is none."""
    if not text:
        return range(0)
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and 1 <= int(first) < int(end)):
        return None
    return range(int(first), int(end))
