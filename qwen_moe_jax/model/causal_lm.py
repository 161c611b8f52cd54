"""The models: a decoder with a language-model head or a classification head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.model.base import Model, ReadOut, router_output, token_at
from qwen_moe_jax.model.cross_entropy import target_log_probs
from qwen_moe_jax.model.decoder import DecoderOutput
from qwen_moe_jax.model.inputs import ModelInputs, checked_inputs
from qwen_moe_jax.model.output import TokenLosses
from qwen_moe_jax.nn.embedding import TABLE, without_padding
from qwen_moe_jax.nn.linear import Linear
from qwen_moe_jax.nn.lora import LoraAdapter
from qwen_moe_jax.nn.matmul import weight_einsum
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.sharding.rules import BATCH, partition_spec
from qwen_moe_jax.suggest import refuse_hub_arguments


class CausalLM(Model):
    """Next-token logits over the vocabulary, [B, T, V]. `lm_head` is None where it is tied to the embedding."""

    def token_losses(
        self,
        tokens_BT: jax.typing.ArrayLike | None = None,
        targets_BT: jax.typing.ArrayLike | None = None,
        segment_ids: jax.typing.ArrayLike | None = None,
        positions: jax.typing.ArrayLike | None = None,
        *,
        noise_key: jax.Array | None = None,
        chunk: int | None = None,
        **hub_arguments: Any,
    ) -> TokenLosses:
        """-log p(target) of every token, the same as of the logits, without ever holding the logits.

        A few tokens of each row go through the head at a time, in the backward pass too: of the [B, T, V] logits and of
        their gradient one chunk is in memory.

        Args:
            tokens_BT, segment_ids, positions, noise_key: see `__call__`.
            targets_BT: integers [B, T], needed; the token that should follow each one. The loss of a target outside the
                vocabulary is NaN: mask it where it has no meaning.
            chunk: tokens of each row in a chunk; None lets a device hold 256 MiB of logits.
            hub_arguments: as of `__call__`.

        Raises:
            RequestError: as `__call__`, of the targets too; `chunk` is less than 1.
            ConfigError: in training mode, the config asks for dropout.
        """
        refuse_hub_arguments("token_losses", hub_arguments, ("targets_BT", "segment_ids", "positions"))
        if targets_BT is None:
            raise RequestError("there are no targets, expected the token that should follow each one, integers [B, T].")
        inputs = checked_inputs(tokens_BT, segment_ids, positions, targets=targets_BT)
        if chunk is not None and chunk < 1:
            raise RequestError(f"chunk={chunk} is no number of tokens: expected at least 1, or None.")
        return self.run(inputs, LossesOf(chunk=chunk), noise_key=noise_key)

    def add_head(self, make: ParameterFactory) -> None:
        """See `Model`."""
        sizes = (self.config.vocab_size, self.config.hidden_size)
        self.lm_head = None if self.config.tie_word_embeddings else Linear("lm_head", TABLE, sizes, make)

    def head(self, hidden_BTD: jax.Array, inputs: ModelInputs) -> jax.Array:
        """See `Model`."""
        out = P(BATCH, None, *partition_spec(TABLE[:1]))
        # float32 results from the dtype of the model: the logits are not rounded once more.
        logits_BTV = weight_einsum("BTD,VD->BTV", hidden_BTD, self.table_VD, TABLE, out, jnp.float32)
        if self.lora_head is not None:
            added_BTV = self.lora_head(hidden_BTD, "BTD,VD->BTV", "BTr", P(BATCH, None, None), out)
            logits_BTV = logits_BTV + added_BTV.astype(jnp.float32)
        return without_padding(logits_BTV, self.config.vocab_size)

    @property
    def lora_head(self) -> LoraAdapter | None:
        """The head's low-rank adapter, if it has one."""
        return None if self.lm_head is None else self.lm_head.lora

    @property
    def table_VD(self) -> jax.Array:
        """The head's weight: the token table where they are tied."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight[...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossesOf(ReadOut):
    """Reads out the losses of targets, chunk by chunk; see `CausalLM.token_losses`."""

    chunk: int | None = None

    def __call__(self, model: Model, out: DecoderOutput, inputs: ModelInputs) -> TokenLosses:
        """See `ReadOut`."""
        assert isinstance(model, CausalLM)
        with jax.named_scope("head"):
            log_probs_BT, logsumexp_BT = target_log_probs(
                out.hidden_BTD,
                model.table_VD,
                inputs.targets_BT,
                lora=model.lora_head,
                vocab_size=model.config.vocab_size,
                chunk=self.chunk,
            )
        return TokenLosses(losses=-log_probs_BT, logsumexp=logsumexp_BT, router=router_output(out))


class TokenClassifier(Model):
    """One set of label logits per token, [B, T, labels]. There is no dropout before the head."""

    def add_head(self, make: ParameterFactory) -> None:
        """See `Model`."""
        sizes = (self.config.num_labels, self.config.hidden_size)
        self.score = Linear("score", ("labels", "embed"), sizes, make, bias=True)

    def head(self, hidden_BTD: jax.Array, inputs: ModelInputs) -> jax.Array:
        """See `Model`."""
        return self.score(hidden_BTD).astype(jnp.float32)


class SequenceClassifier(Model):
    """One set of label logits per sequence, [B, labels], of its last token that is not padding.

    That is, as in transformers, the rightmost token that is not `config.pad_token_id`. A config without one takes the
    rightmost token whose segment id is not 0, so it needs segment ids where rows are padded.
    """

    def add_head(self, make: ParameterFactory) -> None:
        """See `Model`."""
        sizes = (self.config.num_labels, self.config.hidden_size)
        self.score = Linear("score", ("labels", "embed"), sizes, make)

    def head(self, hidden_BTD: jax.Array, inputs: ModelInputs) -> jax.Array:
        """See `Model`."""
        pad = self.config.pad_token_id
        token_mask_BT = inputs.segment_ids_BT != 0 if pad is None else inputs.tokens_BT != pad
        last_B = jnp.max(jnp.where(token_mask_BT, jnp.arange(token_mask_BT.shape[1]), 0), axis=1)
        return self.score(token_at(hidden_BTD, last_B)[:, None])[:, 0].astype(jnp.float32)
