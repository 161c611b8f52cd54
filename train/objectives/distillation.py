"""Distillation (arXiv 1503.02531): a model learns a teacher's distributions over the next token.

Of the teacher's distribution, the K most probable tokens are kept, and the probability of all others together, the
tail. The divergence is that of the two distributions over these K + 1 outcomes: with K the size of the vocabulary, the
whole one's, and never more than it. Renormalising the K tokens instead would teach a model to be too sure (arXiv
2503.16870).

Letters of this file: `K` tokens that are kept, `C` tokens of each row whose logits are held at a time.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

import qwen_moe_jax as qmj
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.huggingface.checkpoint import open_checkpoint
from qwen_moe_jax.huggingface.hub import local_folder, tokenizer_folder
from qwen_moe_jax.inference.tokenizer import load_tokenizer
from qwen_moe_jax.model.base import Model, ReadOut, router_output
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.model.cross_entropy import MAX_LOGITS
from qwen_moe_jax.model.decoder import DecoderOutput
from qwen_moe_jax.model.inputs import ModelInputs, checked_inputs
from qwen_moe_jax.model.output import RouterOutput
from qwen_moe_jax.sharding.positions import RowOrder
from train.config import DistillationConfig, LossConfig, TrainConfig
from train.data.batches import Batch, blank_batch
from train.data.corpus import Corpus, load_corpus
from train.data.feed import BatchFeed, Feed, Setting, make_feed
from train.objectives import language_modelling
from train.objectives.contract import Description, Loss, WholeBatch, abstract
from train.objectives.router import resolve_router_losses, router_losses
from train.parameters import Params

if TYPE_CHECKING:
    from train.program import Program


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopK:
    """The distributions over the next token, of their K most probable tokens and of all others together.

    Attributes:
        ids_BTK: int32; empty in the log-probabilities of a model at the tokens of another.
        log_probs_BTK: float32.
        log_tail_BT: float32, log of the probability of all others; -inf where there are none.
    """

    ids_BTK: Any
    log_probs_BTK: Any
    log_tail_BT: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DistillationBatch:
    """Packed rows, and what the teacher says of them."""

    batch: Batch
    teacher: TopK


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Compared:
    """What `Distillation.forward` returns, float32 [B, T] each: the divergence, and -log p of the target."""

    divergence: jax.Array
    cross_entropy: jax.Array
    router: RouterOutput | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hidden:
    """The hidden states of all tokens after the final norm, [B, T, D]."""

    hidden: jax.Array
    router: RouterOutput | None

    def first_rows(self, batch: int) -> "Hidden":
        """The same without the rows of padding that filled the mesh."""
        return dataclasses.replace(self, hidden=self.hidden[:batch])

    def restored(self, order: RowOrder) -> "Hidden":
        """The same with tokens in the order of their rows."""
        return dataclasses.replace(self, hidden=order.restore(self.hidden))


@dataclass(frozen=True, kw_only=True)
class HiddenOf(ReadOut):
    """Reads out the hidden states."""

    def __call__(self, model: Model, out: DecoderOutput, inputs: ModelInputs) -> Hidden:
        """See `ReadOut`."""
        return Hidden(out.hidden_BTD, router_output(out))


@dataclass(frozen=True)
class Distillation:
    """The objective of `[distillation]`; see `train.objectives`."""

    settings: DistillationConfig

    @property
    def description(self) -> Description:
        """See `Objective`."""
        return Description(
            name=f"distillation from {self.settings.teacher}",
            table="distillation",
            model_class=CausalLM,
            loss="divergence",
            shown=("cross_entropy",),
            captions={
                "divergence": f"{self.settings.divergence} in nats per token, at distillation.temperature",
                "cross_entropy": "of the text, in nats per token",
            },
        )

    def load_corpus(self, folder: Path, config: TrainConfig) -> Corpus:
        """The documents.

        Raises:
            ConfigError: the teacher has another tokenizer.
        """
        corpus = load_corpus(folder, config.data)
        teacher = self.settings.teacher
        if load_tokenizer(tokenizer_folder(teacher)).get_vocab() != corpus.tokenizer.get_vocab():
            raise ConfigError(
                f"distillation.teacher: {teacher} has another tokenizer than the run, expected the same: their tokens "
                "are compared one by one. Name it in data.tokenizer for a model with fresh weights."
            )
        return corpus

    def feed(self, config: TrainConfig, corpus: Corpus, mesh: Mesh, sharding: NamedSharding) -> Feed:
        """The batches of packed rows, with the teacher's distributions."""
        return TeacherFeed.of(make_feed(config.data, corpus, mesh, sharding, config.run.seed), self.settings)

    def abstract_batch(self, config: TrainConfig, model: ModelConfig) -> DistillationBatch:
        """The shapes of a batch."""
        batch = abstract(blank_batch(config.data.batch_size, config.data.seq_len))
        shape = batch.tokens_BT.shape
        kept = (*shape, min(self.settings.top_k, model.vocab_size))
        ids, log_probs, tail = [
            jax.ShapeDtypeStruct(one, dtype)
            for one, dtype in ((kept, jnp.int32), (kept, jnp.float32), (shape, jnp.float32))
        ]
        return DistillationBatch(batch, TopK(ids, log_probs, tail))

    def model_config(self, model: ModelConfig, corpus: Corpus) -> ModelConfig:
        """The model's config as it is."""
        return model

    def resolve_loss(self, config: LossConfig, model: ModelConfig) -> LossConfig:
        """The settings of the routers' losses."""
        return resolve_router_losses(config, model)

    def whole_batch(self, batch: DistillationBatch, micro_batches: int) -> WholeBatch:
        """The counts of a batch."""
        return language_modelling.whole_batch(batch.batch, micro_batches)

    def forward(self, model: CausalLM, batch: DistillationBatch, noise_key: jax.Array | None = None) -> Compared:
        """Divergence and cross entropy of all tokens of a micro-batch."""
        out = hidden_states(model, batch.batch, noise_key)
        temperature, kind = self.settings.temperature, self.settings.divergence

        def compare(logits_BCV: jax.Array, targets_BC: jax.Array, teacher: TopK) -> tuple[jax.Array, jax.Array]:
            losses_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - _at(logits_BCV, targets_BC[..., None])[..., 0]
            own = log_probs_at(logits_BCV / temperature, teacher.ids_BTK)
            return divergence(teacher, own, kind), losses_BC

        seen, losses = in_chunks(model, out.hidden, compare, (batch.batch.targets_BT, batch.teacher))
        return Compared(divergence=seen, cross_entropy=losses, router=out.router)

    def training_loss(self, out: Compared, batch: DistillationBatch, whole: WholeBatch, config: LossConfig) -> Loss:
        """Divergence and cross entropy, mixed, plus the routers' losses."""
        terms = {name: value / jnp.maximum(whole.targets, 1) for name, value in self._sums(out, batch).items()}
        router, share = router_losses(out.router, whole, config), self.settings.cross_entropy_coef
        of_teacher = self.settings.temperature**2 * terms["divergence"]
        total = (1 - share) * of_teacher + share * terms["cross_entropy"] + router.total
        return Loss(total, {**terms, **router.terms})

    def heldout_sum(self, out: Compared, batch: DistillationBatch) -> dict[str, jax.Array]:
        """The summed divergence and cross entropy of a batch, and its number of targets."""
        return {**self._sums(out, batch), "targets": jnp.sum(batch.batch.target_mask_BT, dtype=jnp.int32)}

    def heldout_metrics(self, sums: Any) -> dict[str, float]:
        """The means over all targets."""
        means = {name: float(sums[name] / sums["targets"]) for name in ("divergence", "cross_entropy")}
        return {"loss": means["divergence"], "cross_entropy": means["cross_entropy"]}

    def _sums(self, out: Compared, batch: DistillationBatch) -> dict[str, jax.Array]:
        mask = batch.batch.target_mask_BT
        return {name: jnp.sum(getattr(out, name), where=mask) for name in ("divergence", "cross_entropy")}


@dataclass(frozen=True, kw_only=True)
class TeacherFeed(BatchFeed):
    """A feed of packed rows with the teacher's distributions; see `Feed`.

    Attributes:
        settings: of the run.
        ask: (batch on its devices) → with the teacher's distributions; None before `prepare`.
    """

    settings: DistillationConfig
    ask: Callable[[Batch], DistillationBatch] | None = None

    @classmethod
    def of(cls, rows: BatchFeed, settings: DistillationConfig) -> "TeacherFeed":
        """That of a feed of packed rows."""
        return cls(**vars(rows), settings=settings)

    def memory(self, program: "Program") -> dict[str, int]:
        """The teacher's weights."""
        from train.reporting.start import bytes_per_device

        config = open_checkpoint(local_folder(self.settings.teacher), drop_mtp=True).config
        model = CausalLM(config, rngs=None, mesh=program.model.mesh, execution=_execution(program))
        return {"teacher": bytes_per_device(nnx.to_pure_dict(nnx.state(model)))}

    def prepare(self, setting: Setting, params: Params) -> "TeacherFeed":
        """The feed with the teacher loaded."""
        student = setting.program.model
        with setting.report.aside("reference"):
            teacher = qmj.from_pretrained(
                self.settings.teacher, mesh=setting.mesh, execution=_execution(setting.program), drop_mtp=True
            )
        graph, weights = nnx.split(teacher)
        size = min(teacher.config.vocab_size, student.config.vocab_size)
        count, temperature = min(self.settings.top_k, size), self.settings.temperature

        @jax.jit
        def asked(weights: Any, batch: Batch) -> DistillationBatch:
            model = nnx.merge(graph, weights)

            def top(logits_BCV: jax.Array) -> TopK:
                return top_k(logits_BCV[..., :size] / temperature, count)

            return DistillationBatch(batch, in_chunks(model, hidden_states(model, batch).hidden, top, ()))

        def ask(batch: Batch) -> DistillationBatch:
            return asked(weights, batch)

        return dataclasses.replace(self, ask=ask, heldout=[ask(batch) for batch in self.heldout])

    def training(self, step: int, params: Params) -> DistillationBatch:
        """See `Feed`."""
        assert self.ask is not None, "prepare was not called"
        return self.ask(super().training(step, params))


def hidden_states(model: CausalLM, batch: Batch, noise_key: jax.Array | None = None) -> Hidden:
    """The hidden states of all tokens of packed rows.

    Raises:
        ConfigError: the head has an adapter, which is not applied here.
    """
    if model.lora_head is not None:
        raise ConfigError("lora.target_modules: found lm_head, expected none with [distillation]. Leave it out.")
    inputs = checked_inputs(batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT)
    return model.run(inputs, HiddenOf(), noise_key=noise_key)


def in_chunks(model: CausalLM, hidden_BTD: jax.Array, function: Callable[..., Any], arguments: Any) -> Any:
    """`function(logits_BCV, *arguments)` for a few tokens of each row at a time, in the backward pass too.

    Args:
        model: whose head makes the logits, float32.
        hidden_BTD: of all tokens.
        function: returns a pytree of arrays [B, C, …].
        arguments: a tuple of pytrees of arrays [B, T, …].

    Returns:
        The same with T instead of C.
    """
    size, table_VD = model.config.vocab_size, model.table_VD
    batch, length, _ = hidden_BTD.shape
    chunk = max(1, min(length, MAX_LOGITS // (batch * table_VD.shape[0])))
    while length % chunk:
        chunk -= 1

    def split(x_BT: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_BT.reshape(batch, length // chunk, chunk, *x_BT.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(part: tuple[jax.Array, Any]) -> Any:
        hidden_BCD, arguments = part
        logits_BCV = jnp.einsum(
            "BCD,VD->BCV", hidden_BCD, table_VD.astype(hidden_BCD.dtype), preferred_element_type=jnp.float32
        )
        return function(logits_BCV[..., :size], *arguments)

    parts = jax.lax.map(one, (split(hidden_BTD), jax.tree.map(split, arguments)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, length, *x.shape[3:]), parts)


def top_k(logits_BTV: jax.Array, count: int) -> TopK:
    """The `count` most probable tokens of each distribution, and the tail."""
    _, ids_BTK = jax.lax.top_k(logits_BTV, count)
    return log_probs_at(logits_BTV, ids_BTK.astype(jnp.int32))


def log_probs_at(logits_BTV: jax.Array, ids_BTK: jax.Array) -> TopK:
    """The log-probabilities of given tokens, and that of all others together."""
    whole_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    others_BTV = jnp.put_along_axis(logits_BTV, ids_BTK, -jnp.inf, axis=-1, inplace=False)
    if ids_BTK.shape[-1] == logits_BTV.shape[-1]:
        tail_BT = jnp.full_like(whole_BT, -jnp.inf)
    else:
        tail_BT = jax.nn.logsumexp(others_BTV, axis=-1) - whole_BT
    return TopK(ids_BTK, _at(logits_BTV, ids_BTK) - whole_BT[..., None], tail_BT)


def divergence(teacher: TopK, own: TopK, kind: str) -> jax.Array:
    """KL(teacher ‖ own), with kind reverse_kl KL(own ‖ teacher), over the K tokens and the tail; float32 [B, T]."""
    one, other = (teacher, own) if kind == "forward_kl" else (own, teacher)
    kept_BT = jnp.sum(jnp.exp(one.log_probs_BTK) * (one.log_probs_BTK - other.log_probs_BTK), axis=-1)
    has_tail = jnp.isfinite(one.log_tail_BT) & jnp.isfinite(other.log_tail_BT)
    one_BT, other_BT = (jnp.where(has_tail, x.log_tail_BT, 0.0) for x in (one, other))
    return kept_BT + jnp.where(has_tail, jnp.exp(one_BT) * (one_BT - other_BT), 0.0)


def _at(logits_BTV: jax.Array, ids_BTK: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_BTV, ids_BTK, axis=-1)


def _execution(program: "Program") -> qmj.ExecutionConfig:
    """The teacher's: as the model's, with weights in the dtype of its matmuls."""
    execution = program.model.execution
    return dataclasses.replace(execution, param_dtype=execution.dtype)
