"""The models: a decoder with a language-model head or a classification head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import ExecutionConfig
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.model.base import Model, ReadOut, copies_of, first_copy, router_output, token_at
from qwen_moe_jax.model.cache import Cache
from qwen_moe_jax.model.cross_entropy import target_log_probs
from qwen_moe_jax.model.decoder import DecoderOutput
from qwen_moe_jax.model.inputs import (
    ModelInputs,
    TokenContext,
    checked_inputs,
    in_order,
    input_specs,
    positions_behind,
)
from qwen_moe_jax.model.mtp import NextTokenHead, following
from qwen_moe_jax.model.output import TokenLosses
from qwen_moe_jax.model.rotary import rotary_tables
from qwen_moe_jax.moe.replay import Replay, Without
from qwen_moe_jax.moe.stats import RouterStats
from qwen_moe_jax.nn.embedding import TABLE, without_padding
from qwen_moe_jax.nn.linear import Linear
from qwen_moe_jax.nn.lora import LoraAdapter
from qwen_moe_jax.nn.matmul import matmul_precision, weight_einsum
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.nn.quantised import Quantised
from qwen_moe_jax.nn.stacked import reads_in_place, stacked_matmul
from qwen_moe_jax.sharding.explicit import with_explicit_axes
from qwen_moe_jax.sharding.positions import RowOrder
from qwen_moe_jax.sharding.rules import CONTEXT, partition_spec, positions_over_context, tokens_spec
from qwen_moe_jax.suggest import refuse_hub_arguments


def _logits_spec() -> P:
    """The partition spec of logits [B, T, V]."""
    return tokens_spec(*partition_spec(TABLE[:1]))


class CausalLM(Model):
    """Next-token logits over the vocabulary, [B, T, V].

    `lm_head` is None where it is tied to the embedding. `mtp` is the next-token head, None where the config has none.
    """

    def token_losses(
        self,
        tokens_BT: jax.typing.ArrayLike | None = None,
        targets_BT: jax.typing.ArrayLike | None = None,
        segment_ids: jax.typing.ArrayLike | None = None,
        positions: jax.typing.ArrayLike | None = None,
        *,
        noise_key: jax.Array | None = None,
        chunk: int | None = None,
        mtp: bool = False,
        replay: Replay | None = None,
        without: Without = (),
        temperature: float = 1.0,
        entropy: bool = False,
        output_router_logits: bool = False,
        **hub_arguments: Any,
    ) -> TokenLosses:
        """-log p(target) of every token, the same as of the logits, without ever holding the logits.

        A few tokens of each row go through the head at a time, in the backward pass too: of the [B, T, V] logits and of
        their gradient one chunk is in memory.

        Args:
            tokens_BT, segment_ids, positions, noise_key, replay, without: see `__call__`. The next-token head has a
                router of its own, to which nothing is prescribed.
            targets_BT: integers [B, T], needed; the token that should follow each one. The loss of a target outside the
                vocabulary is NaN: mask it where it has no meaning.
            chunk: tokens of each row in a chunk; None lets a device hold 256 MiB of logits.
            mtp: also return `mtp_losses` and `mtp_router`, those of the next-token head.
            temperature: what the logits are divided by, as in sampling.
            entropy: also return `entropy`, that of the distribution of each token.
            output_router_logits: also return `router.trace`, as `__call__` does.
            hub_arguments: as of `__call__`.

        Raises:
            RequestError: as `__call__`, of the targets too; `chunk` is less than 1; the temperature is not above 0; the
                model has no next-token head.
            ConfigError: in training mode, the config asks for dropout.
        """
        refuse_hub_arguments("token_losses", hub_arguments, ("targets_BT", "segment_ids", "positions"))
        if targets_BT is None:
            raise RequestError("there are no targets, expected the token that should follow each one, integers [B, T].")
        inputs = checked_inputs(tokens_BT, segment_ids, positions, targets=targets_BT)
        inputs = self.with_forced_routing(inputs, replay, without)
        if chunk is not None and chunk < 1:
            raise RequestError(f"chunk={chunk} is no number of tokens: expected at least 1, or None.")
        if not temperature > 0:
            raise RequestError(f"temperature={temperature} is no temperature: expected a number above 0.")
        if mtp:
            self.require_mtp("mtp=True")
        read_out = LossesOf(
            chunk=chunk,
            mtp=mtp,
            temperature=float(temperature),
            entropy=entropy,
            output_router_logits=output_router_logits,
        )
        return self.run(inputs, read_out, noise_key=noise_key)

    def mtp_step(
        self, tokens_BT: jax.Array, hidden_BTD: jax.Array, token_mask_BT: jax.Array, cache: Cache
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """Reads tokens into the next-token head's cache and predicts what follows the last one of each row.

        Call it inside a `jax.jit`, with a batch that divides over the mesh.

        Args:
            tokens_BT: int32; new tokens of each row, from the left.
            hidden_BTD: of the token before each of them: after the decoder's final norm, or, of a draft, this method's.
            token_mask_BT: False for padding.
            cache: of the head (`abstract_mtp_cache`).

        Returns:
            float32 logits [B, V], the head's state [B, D] and the cache; the first two of each row's last token.
        """

        def run(model: CausalLM, inputs: ModelInputs, hidden_BTD: jax.Array, cache: Cache):
            execution = model.execution_in_use
            positions_BT = positions_behind(cache.lengths_B, inputs.segment_ids_BT != 0)
            inputs = dataclasses.replace(inputs, positions_BT=positions_BT)
            states_BTD, cache, _ = model.mtp_states(inputs, inputs.tokens_BT, hidden_BTD, execution, cache)
            last_BD = token_at(states_BTD, inputs.logits_at_B)
            return first_copy(model.head_of_few(copies_of(last_BD), inputs))[:, 0], last_BD, cache

        order = RowOrder.of_chunk(tokens_BT.shape[1], self.mesh.shape[CONTEXT])
        inputs = ModelInputs(
            tokens_BT=tokens_BT,
            segment_ids_BT=token_mask_BT.astype(jnp.int32),
            logits_at_B=jnp.sum(token_mask_BT, axis=1, dtype=jnp.int32) - 1,
        )
        inputs, hidden_BTD = in_order(inputs, order), hidden_BTD if order is None else order.store(hidden_BTD)
        with matmul_precision(self.execution.dtype), positions_over_context(order is not None):
            specs = (input_specs(inputs, self.mesh), tokens_spec(None, mesh=self.mesh), cache.specs())
            return with_explicit_axes(run, self.mesh, specs)(self, inputs, hidden_BTD, cache)

    def mtp_states(
        self,
        inputs: ModelInputs,
        next_BT: jax.Array,
        hidden_BTD: jax.Array,
        execution: ExecutionConfig,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None, RouterStats | None]:
        """The next-token head on explicitly sharded arrays: see `NextTokenHead.__call__`.

        Args:
            inputs: segments and positions.
            next_BT: the token after each one.
            hidden_BTD: of each token.
            execution: with no setting None.
            cache: of the head.
        """
        config, dtype = self.config, jnp.dtype(execution.dtype)
        rotary = rotary_tables(
            config.rope, config.rotary_dim, config.max_position_embeddings, inputs.positions_BT, dtype
        )
        embedded_BTD = self.model.embed_tokens(jnp.where(inputs.segment_ids_BT != 0, next_BT, 0), dtype)
        context = TokenContext(
            segment_ids_BT=inputs.segment_ids_BT,
            rotary=rotary,
            row_segment_ids_BT=inputs.row_segment_ids_BT,
            order=inputs.order,
        )
        return self.mtp(embedded_BTD, hidden_BTD, context, execution, cache)

    def require_mtp(self, what: str) -> None:
        """Refuses what needs a next-token head on a model without one.

        Raises:
            RequestError: beginning with `what`.
        """
        if self.mtp is None:
            raise RequestError(
                f"{what} needs a next-token head, and this model has none: its config has no mtp_num_hidden_layers, or "
                "it was loaded without its weights (mtp.*)."
            )

    def add_head(self, make: ParameterFactory) -> None:
        """See `Model`."""
        sizes = (self.config.vocab_size, self.config.hidden_size)
        self.lm_head = None if self.config.tie_word_embeddings else Linear("lm_head", TABLE, sizes, make.of_floats())
        if not hasattr(self, "mtp"):  # a head that is drawn anew leaves it as it is
            self.mtp = NextTokenHead(self.config, make) if self.config.num_mtp_layers else None

    def head(self, hidden_BTD: jax.Array, inputs: ModelInputs) -> jax.Array:
        """See `Model`."""
        # float32 results from the dtype of the model: the logits are not rounded once more.
        product_BTV = weight_einsum("BTD,VD->BTV", hidden_BTD, self.table_VD, TABLE, _logits_spec(), jnp.float32)
        return self._logits(hidden_BTD, product_BTV)

    def head_of_few(self, hidden_BTD: jax.Array, inputs: ModelInputs) -> jax.Array:
        """See `Model`."""
        stack = self.table_VD[None]
        if not reads_in_place(hidden_BTD, [stack]):
            return self.head(hidden_BTD, inputs)
        return self._logits(hidden_BTD, stacked_matmul(hidden_BTD, [stack], jnp.int32(0), [_logits_spec()])[0])

    def _logits(self, hidden_BTD: jax.Array, logits_BTV: jax.Array) -> jax.Array:
        """The products with the table, with what the adapter adds, without padding."""
        if self.lora_head is not None:
            added_BTV = self.lora_head(hidden_BTD, "BTD,VD->BTV", "BTr", tokens_spec(None), _logits_spec())
            logits_BTV = logits_BTV + added_BTV.astype(jnp.float32)
        return without_padding(logits_BTV, self.config.vocab_size)

    @property
    def lora_head(self) -> LoraAdapter | None:
        """The head's low-rank adapter, if it has one."""
        return None if self.lm_head is None else self.lm_head.lora

    @property
    def table_VD(self) -> jax.Array:
        """The head's weight: the token table where they are tied."""
        table = (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight[...]
        assert not isinstance(table, Quantised)  # heads are floats
        return table


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossesOf(ReadOut):
    """Reads out the losses of targets, chunk by chunk; see `CausalLM.token_losses`."""

    chunk: int | None = None
    mtp: bool = False
    temperature: float = 1.0
    entropy: bool = False

    def prepared(self, model: Model, inputs: ModelInputs) -> ModelInputs:
        """See `ReadOut`."""
        if not self.mtp:
            return inputs
        next_tokens_BT, is_followed_BT = following(inputs.tokens_BT, inputs.segment_ids_BT)
        next_targets_BT, _ = following(inputs.targets_BT, inputs.segment_ids_BT)
        return dataclasses.replace(
            inputs,
            next_tokens_BT=next_tokens_BT,
            next_targets_BT=next_targets_BT,
            is_followed_BT=is_followed_BT.astype(jnp.int32),
        )

    def __call__(self, model: Model, out: DecoderOutput, inputs: ModelInputs) -> TokenLosses:
        """See `ReadOut`."""
        assert isinstance(model, CausalLM)
        log_probs_BT, logsumexp_BT, entropy_BT = self._log_probs(model, out.hidden_BTD, inputs.targets_BT)
        mtp_losses_BT, mtp_stats = None, None
        if self.mtp:
            own = dataclasses.replace(
                inputs,
                segment_ids_BT=inputs.segment_ids_BT * inputs.is_followed_BT,
                row_segment_ids_BT=inputs.row_followed_ids_BT,
            )
            states_BTD, _, mtp_stats = model.mtp_states(
                own, inputs.next_tokens_BT, out.hidden_BTD, model.execution_in_use
            )
            mtp_losses_BT = -self._log_probs(model, states_BTD, inputs.next_targets_BT)[0]
        return TokenLosses(
            losses=-log_probs_BT,
            logsumexp=logsumexp_BT,
            router=router_output(out),
            mtp_losses=mtp_losses_BT,
            mtp_router=None if mtp_stats is None else jax.tree.map(lambda x: x[None], mtp_stats),
            entropy=entropy_BT,
        )

    def _log_probs(
        self, model: CausalLM, hidden_BTD: jax.Array, targets_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        with jax.named_scope("head"):
            return target_log_probs(
                hidden_BTD,
                model.table_VD,
                targets_BT,
                lora=model.lora_head,
                vocab_size=model.config.vocab_size,
                chunk=self.chunk,
                temperature=self.temperature,
                entropy=self.entropy,
            )


class TokenClassifier(Model):
    """One set of label logits per token, [B, T, labels]. There is no dropout before the head."""

    def add_head(self, make: ParameterFactory) -> None:
        """See `Model`."""
        sizes = (self.config.num_labels, self.config.hidden_size)
        self.score = Linear("score", ("labels", "embed"), sizes, make.of_floats(), bias=True)

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
        self.score = Linear("score", ("labels", "embed"), sizes, make.of_floats())

    def head(self, hidden_BTD: jax.Array, inputs: ModelInputs) -> jax.Array:
        """See `Model`; the hidden states are those of one token of each row."""
        return first_copy(self.score(hidden_BTD))[:, 0].astype(jnp.float32)

    def prepared(self, inputs: ModelInputs) -> ModelInputs:
        """See `Model`."""
        pad = self.config.pad_token_id
        token_mask_BT = inputs.segment_ids_BT != 0 if pad is None else inputs.tokens_BT != pad
        last_B = jnp.max(jnp.where(token_mask_BT, jnp.arange(token_mask_BT.shape[1], dtype=jnp.int32), 0), axis=1)
        return dataclasses.replace(inputs, logits_at_B=last_B)
