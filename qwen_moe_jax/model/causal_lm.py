"""The models: a decoder under a head. Start reading here.

Tokens [B, T] → embedding → L × (norm → attention → add → norm → MLP or mixture of experts → add) → norm → head.
"""

import dataclasses
import math
from os import PathLike
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import ExecutionConfig, GenerationConfig, LoraConfig, ModelConfig
from qwen_moe_jax.config.resolve import resolve
from qwen_moe_jax.errors import ConfigError, RequestError
from qwen_moe_jax.model.attention import TokenContext
from qwen_moe_jax.model.cache import STORED as CACHE
from qwen_moe_jax.model.cache import Cache
from qwen_moe_jax.model.cross_entropy import target_log_probs
from qwen_moe_jax.model.output import ModelOutput, RouterOutput, TokenLosses
from qwen_moe_jax.model.rotary import rotary_tables
from qwen_moe_jax.model.stack import LayerStack, StackOutput
from qwen_moe_jax.moe.losses import router_losses
from qwen_moe_jax.nn.embedding import TABLE, Embedding
from qwen_moe_jax.nn.linear import Linear
from qwen_moe_jax.nn.matmul import as_precise_as, weight_einsum
from qwen_moe_jax.nn.norm import RMSNorm
from qwen_moe_jax.nn.parameters import ParameterFactory
from qwen_moe_jax.sharding.explicit import with_explicit_axes
from qwen_moe_jax.sharding.mesh import checked_mesh
from qwen_moe_jax.sharding.rules import BATCH, partition_spec


class Decoder(nnx.Module):
    """Embedding, layers and final norm: what transformers calls the base model."""

    def __init__(self, config: ModelConfig, make: ParameterFactory):
        self.embed_tokens = Embedding(
            "model.embed_tokens", config.vocab_size, config.hidden_size, config.pad_token_id, make
        )
        self.layers = LayerStack(config, make)
        self.norm = RMSNorm("model.norm", config.hidden_size, config.rms_norm_eps, make)
        self.config = config

    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        execution: ExecutionConfig,
        *,
        noise_key: jax.Array | None,
        keep_trace: bool,
        keep_inputs: bool,
    ) -> StackOutput:
        """Hidden states after the final norm, with what the layers returned on the way."""
        config, dtype = self.config, jnp.dtype(execution.dtype)
        rotary = rotary_tables(
            config.rope, config.attention.head_dim, config.max_position_embeddings, positions_BT, dtype
        )
        known_BT = jnp.where(segment_ids_BT != 0, tokens_BT, 0)  # what stands in the padding means nothing
        out = self.layers(
            self.embed_tokens(known_BT, dtype),
            TokenContext(segment_ids_BT=segment_ids_BT, rotary=rotary),
            execution,
            noise_key=noise_key,
            keep_trace=keep_trace,
            keep_inputs=keep_inputs,
        )
        return dataclasses.replace(out, hidden_BTD=self.norm(out.hidden_BTD))

    def extend(
        self, tokens_BT: jax.Array, token_mask_BT: jax.Array, cache: Cache, execution: ExecutionConfig
    ) -> tuple[jax.Array, Cache]:
        """Hidden states of tokens that follow those in the cache, and the cache with them in it."""
        config, dtype = self.config, jnp.dtype(execution.dtype)
        positions_BT = jnp.where(token_mask_BT, cache.lengths_B[:, None] + jnp.arange(tokens_BT.shape[1]), 0)
        rotary = rotary_tables(
            config.rope, config.attention.head_dim, config.max_position_embeddings, positions_BT, dtype
        )
        context = TokenContext(segment_ids_BT=token_mask_BT.astype(jnp.int32), rotary=rotary)
        hidden_BTD = self.embed_tokens(jnp.where(token_mask_BT, tokens_BT, 0), dtype)
        hidden_BTD, cache = self.layers.extend(hidden_BTD, context, execution, cache)
        return self.norm(hidden_BTD), cache


class Model(nnx.Module):
    """A decoder with a head, on a mesh it carries with it: call it, jit it, differentiate it, anywhere.

    Args:
        config: what the model means.
        rngs: source of fresh weights; None describes the model (`jax.ShapeDtypeStruct` leaves that carry their
            sharding) without allocating anything.
        mesh: see `make_mesh`; None is one device.
        execution: how it is run.
        generation_config: how its text ends; None takes the stop tokens of the config.

    Attributes:
        deterministic: True in eval mode, which is how every model starts; `train()` and `eval()` switch it.
        lora: of the low-rank adapters, where it has them (`add_lora`).

    Raises:
        ShardingError: a weight does not divide over the mesh.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs | None,
        mesh: Mesh | None = None,
        execution: ExecutionConfig = ExecutionConfig(),
        generation_config: GenerationConfig | None = None,
    ):
        dtype = execution.dtype or config.dtype or "float32"
        self.config = config
        self.execution = dataclasses.replace(execution, dtype=dtype, param_dtype=execution.param_dtype or dtype)
        self.generation_config = generation_config or GenerationConfig(eos_token_id=config.eos_token_id)
        self.mesh = checked_mesh(mesh)
        self.deterministic = True
        self.lora: LoraConfig | None = None
        make = self.factory(rngs)
        self.model = Decoder(config, make)
        self._add_head(make)

    def factory(self, rngs: nnx.Rngs | None) -> ParameterFactory:
        """What more of the model's parameters can be made with, here or by `model.lora`."""
        return ParameterFactory(
            mesh=self.mesh,
            rules=self.execution.sharding,
            dtype=self.execution.param_dtype,
            initializer_range=self.config.initializer_range,
            rngs=rngs,
        )

    def _add_head(self, make: ParameterFactory) -> None:
        """Creates the head's parameters; each subclass has its own."""

    def draw_head(self, rngs: nnx.Rngs) -> None:
        """Gives the model a fresh head, to be trained on weights that came without one."""
        self._add_head(self.factory(rngs))

    def _head(self, hidden_BTD: jax.Array, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """Normalised hidden states to float32 logits."""
        raise TypeError(f"{type(self).__name__} has no head: use CausalLM, SequenceClassifier or TokenClassifier.")

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], **kwargs: Any) -> Self:
        """Loads a checkpoint folder under this head; see `qwen_moe_jax.from_pretrained` for the arguments."""
        # One of the two arrows that run upwards, with ModelConfig's: reading Hub folders is huggingface/'s business.
        from qwen_moe_jax.huggingface.load import load_model

        return load_model(cls, folder, **kwargs)

    def __call__(
        self,
        tokens_BT: jax.typing.ArrayLike,
        segment_ids: jax.typing.ArrayLike | None = None,
        positions: jax.typing.ArrayLike | None = None,
        *,
        output_router_logits: bool = False,
        output_hidden_states: bool = False,
        logits_at: jax.typing.ArrayLike | None = None,
        noise_key: jax.Array | None = None,
    ) -> ModelOutput:
        """Runs the model.

        Args:
            tokens_BT: token ids, integers [B, T].
            segment_ids: integers [B, T]; tokens attend within their own segment, 0 is padding (so an attention mask of
                zeros and ones is one). None means no padding, one segment a row.
            positions: integers [B, T]; None counts from 0 at the first token of each segment.
            output_router_logits: also return `router.trace`: logits, experts, weights and drops of every token.
            output_hidden_states: also return `hidden_states`.
            logits_at: integers [B]; the head runs on this one token of each row, and `logits` is [B, 1, …].
            noise_key: a `jax.random.key`, another one for every step; needed in training mode by a config with
                `moe.router_jitter_noise`, and read there alone.

        Returns:
            See `ModelOutput`. Padding has finite logits that mean nothing; a token id outside the vocabulary makes its
            sequence NaN.

        Raises:
            RequestError: the arrays are not integers, or not all [B, T]; there is no `noise_key` where it is needed.
            ConfigError: in training mode, the config asks for dropout.
        """
        self.require_weights()
        tokens_BT, segment_ids, positions = map(_as_array, (tokens_BT, segment_ids, positions))
        segment_ids = np.ones(tokens_BT.shape, np.int32) if segment_ids is None else segment_ids
        _check_inputs(tokens_BT, segment_ids=segment_ids, positions=positions)
        if not self.deterministic:
            _check_trainable(self.config)
        return _forward(
            self,
            tokens_BT,
            segment_ids,
            positions,
            _as_array(logits_at),
            self._checked_noise_key(noise_key),
            output_router_logits=output_router_logits,
            output_hidden_states=output_hidden_states,
        )

    @property
    def execution_in_use(self) -> ExecutionConfig:
        """`execution` with everything that was left open chosen for the present mode (`train()` or `eval()`)."""
        return resolve(
            self.execution,
            self.config.moe,
            expert_shards=self.mesh.shape["expert"],
            platform=self.mesh.devices.flat[0].platform,
            training=not self.deterministic,
        )

    def _checked_noise_key(self, noise_key: jax.Array | None) -> jax.Array | None:
        """The key, where the present mode has a use for it."""
        amount = self.config.moe.router_jitter_noise if self.config.moe else 0.0
        if self.deterministic or not amount:
            return None
        if noise_key is None:
            raise RequestError(
                f"router_jitter_noise={amount} is drawn in training mode: pass noise_key=jax.random.key(…), another "
                "one for every step, or call eval()."
            )
        if jnp.shape(noise_key) != () or not jnp.issubdtype(jnp.result_type(noise_key), jax.dtypes.prng_key):
            found = f"{jnp.result_type(noise_key)} {list(jnp.shape(noise_key))}"
            raise RequestError(f"noise_key is {found}, expected one key as jax.random.key(…) makes it.")
        return noise_key

    def require_weights(self) -> None:
        """Refuses a model that was only described (`rngs=None`).

        Raises:
            RequestError: its leaves are shapes, not arrays.
        """
        if isinstance(self.model.norm.weight.get_value(), jax.ShapeDtypeStruct):
            raise RequestError(
                "this model is a description without weights (rngs=None): it can be compiled for, not run or saved."
            )

    def _explicit_forward(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        logits_at_B: jax.Array | None,
        noise_key: jax.Array | None,
        *,
        output_router_logits: bool,
        output_hidden_states: bool,
    ) -> ModelOutput:
        """The forward pass on explicitly sharded arrays, B over `BATCH`."""
        out = self.model(
            tokens_BT,
            segment_ids_BT,
            positions_BT,
            self.execution_in_use,
            noise_key=noise_key,
            keep_trace=output_router_logits,
            keep_inputs=output_hidden_states,
        )
        router, hidden_states = _router_output(out), None
        if output_hidden_states:
            hidden_states = jnp.concatenate([out.inputs_LBTD, out.hidden_BTD[None]])
        hidden_BTD = out.hidden_BTD if logits_at_B is None else token_at(out.hidden_BTD, logits_at_B)[:, None]
        logits = self._head(hidden_BTD, tokens_BT, segment_ids_BT)
        return ModelOutput(logits=logits, router=router, hidden_states=hidden_states)


@jax.jit(static_argnames=("output_router_logits", "output_hidden_states"))
def _forward(
    model: Model,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array | None,
    logits_at_B: jax.Array | None,
    noise_key: jax.Array | None,
    *,
    output_router_logits: bool,
    output_hidden_states: bool,
) -> ModelOutput:
    """Pads the batch to the mesh, crosses into explicit sharding and back, and cuts the padding off again."""
    batch = tokens_BT.shape[0]
    inputs, missing = _padded_inputs(model, tokens_BT, segment_ids_BT, positions_BT)
    inputs += [None if logits_at_B is None else jnp.pad(jnp.asarray(logits_at_B), (0, missing)), noise_key]
    specs = [*[P(BATCH, None)] * 3, P(BATCH), P()]

    def run(model: Model, *inputs: jax.Array | None) -> ModelOutput:
        flags = dict(output_router_logits=output_router_logits, output_hidden_states=output_hidden_states)
        return model._explicit_forward(*inputs, **flags)

    with as_precise_as(model.execution.dtype):
        out = with_explicit_axes(run, model.mesh, specs)(model, *inputs)
    if not missing:
        return out
    router, hidden = out.router, out.hidden_states
    if router is not None:
        router = dataclasses.replace(router, trace=jax.tree.map(lambda x: x[:, :batch], router.trace))
    hidden = hidden if hidden is None else hidden[:, :batch]
    return dataclasses.replace(out, logits=out.logits[:batch], router=router, hidden_states=hidden)


@jax.jit(static_argnames=("chunk",))
def _token_losses(
    model: "CausalLM",
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array | None,
    noise_key: jax.Array | None,
    *,
    chunk: int | None,
) -> TokenLosses:
    """`_forward` with the chunked head in place of the whole one."""
    batch = tokens_BT.shape[0]
    inputs, missing = _padded_inputs(model, tokens_BT, segment_ids_BT, positions_BT)
    inputs += [jnp.pad(jnp.asarray(targets_BT).astype(jnp.int32), ((0, missing), (0, 0))), noise_key]
    specs = [*[P(BATCH, None)] * 4, P()]

    def run(model: CausalLM, *inputs: jax.Array | None) -> TokenLosses:
        return model._explicit_token_losses(*inputs, chunk=chunk)

    with as_precise_as(model.execution.dtype):
        out = with_explicit_axes(run, model.mesh, specs)(model, *inputs)
    return dataclasses.replace(out, losses=out.losses[:batch], logsumexp=out.logsumexp[:batch]) if missing else out


def _padded_inputs(
    model: Model, tokens_BT: jax.Array, segment_ids_BT: jax.Array, positions_BT: jax.Array | None
) -> tuple[list[jax.Array | None], int]:
    """Tokens, segment ids and positions as int32 with rows of padding that fill the mesh, and how many those are."""
    tokens_BT, segment_ids_BT = (jnp.asarray(x).astype(jnp.int32) for x in (tokens_BT, segment_ids_BT))
    positions_BT = positions_in_segments(segment_ids_BT) if positions_BT is None else positions_BT
    positions_BT = jnp.where(segment_ids_BT != 0, positions_BT, 0)  # padding must not lengthen a dynamic rope
    missing = -tokens_BT.shape[0] % math.prod(model.mesh.shape[axis] for axis in BATCH)
    return [jnp.pad(x, ((0, missing), (0, 0))) for x in (tokens_BT, segment_ids_BT, positions_BT)], missing


def _router_output(out: StackOutput) -> RouterOutput | None:
    if out.stats is None:
        return None
    return RouterOutput(stats=out.stats, losses=router_losses(out.stats), trace=out.trace)


def _as_array(x: Any) -> Any:
    """Lists and numbers become arrays; JAX arrays stay where they are."""
    if x is None or isinstance(x, jax.Array):
        return x
    try:
        return np.asarray(x)
    except ValueError:
        raise RequestError(
            "the rows have different lengths: pad them to one length, and pass segment_ids that are 0 on the padding."
        ) from None


def token_at(x_BTD: jax.Array, index_B: jax.Array) -> jax.Array:
    """One token of each row, [B, D]; a masked sum, since a gather along T would have to name its sharding."""
    chosen_BT1 = (jnp.arange(x_BTD.shape[1]) == index_B[:, None])[..., None]
    return jnp.sum(jnp.where(chosen_BT1, x_BTD, 0), axis=1)


def _check_inputs(tokens_BT: jax.Array | np.ndarray, **others: jax.Array | np.ndarray | None) -> None:
    shape = tokens_BT.shape
    if len(shape) != 2 or 0 in shape:
        raise RequestError(f"tokens have shape {shape}, expected [batch, length], neither of them 0.")
    for name, array in {"tokens": tokens_BT, **others}.items():
        if array is None:
            continue
        if array.shape != shape:
            raise RequestError(f"{name} has shape {array.shape}, expected that of the tokens, {shape}.")
        if not (jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.bool_)):
            raise RequestError(f"{name} has dtype {array.dtype}, expected integers.")


def _check_trainable(config: ModelConfig) -> None:
    """Noise that transformers adds in training mode and this package does not must not be left out silently."""
    found = config.attention.attention_dropout
    if found:
        raise ConfigError(
            f"attention_dropout={found} is not applied in training here: set it to 0.0 in config.json to train."
        )


def positions_in_segments(segment_ids_BT: jax.Array) -> jax.Array:
    """Positions counted from the first token of each segment, [B, T]; padding inside a segment counts as well."""
    index_BT = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32), segment_ids_BT.shape)
    last_real_BT = jax.lax.cummax(jnp.where(segment_ids_BT != 0, index_BT, 0), axis=1)
    filled_BT = jnp.take_along_axis(segment_ids_BT, last_real_BT, axis=1)  # padding belongs to the segment before it
    before_BT = jnp.pad(filled_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts_BT = jnp.where(filled_BT != before_BT, index_BT, 0)
    return index_BT - jax.lax.cummax(starts_BT, axis=1)


class CausalLM(Model):
    """Next-token logits over the vocabulary, [B, T, V]. `lm_head` is None where it is tied to the embedding."""

    def token_losses(
        self,
        tokens_BT: jax.typing.ArrayLike,
        targets_BT: jax.typing.ArrayLike,
        segment_ids: jax.typing.ArrayLike | None = None,
        positions: jax.typing.ArrayLike | None = None,
        *,
        noise_key: jax.Array | None = None,
        chunk: int | None = None,
    ) -> TokenLosses:
        """-log p(target) of every token, which is what the logits say, without ever holding the logits.

        A few tokens of each row go through the head at a time, in the backward pass too: of the [B, T, V] logits and of
        their gradient one chunk is in memory.

        Args:
            tokens_BT, segment_ids, positions, noise_key: see `__call__`.
            targets_BT: integers [B, T]; the token that should follow each one. The loss of a target outside the
                vocabulary is NaN: mask it where it means nothing.
            chunk: tokens of each row in a chunk; None lets a device hold 256 MiB of logits.

        Raises:
            RequestError: as `__call__`, of the targets too; `chunk` is less than 1.
            ConfigError: in training mode, the config asks for dropout.
        """
        self.require_weights()
        tokens_BT, targets_BT, segment_ids, positions = map(_as_array, (tokens_BT, targets_BT, segment_ids, positions))
        segment_ids = np.ones(tokens_BT.shape, np.int32) if segment_ids is None else segment_ids
        _check_inputs(tokens_BT, targets=targets_BT, segment_ids=segment_ids, positions=positions)
        if chunk is not None and chunk < 1:
            raise RequestError(f"chunk={chunk} is no number of tokens: expected at least 1, or None.")
        if not self.deterministic:
            _check_trainable(self.config)
        noise_key = self._checked_noise_key(noise_key)
        return _token_losses(self, tokens_BT, targets_BT, segment_ids, positions, noise_key, chunk=chunk)

    def extend(self, tokens_BT: jax.Array, counts_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Runs the model on tokens that follow those in the cache. Call it inside a `jax.jit` that donates the cache.

        Args:
            tokens_BT: int32; the next tokens of each row, from the left; B a multiple of the devices that share it.
            counts_B: int32; how many of them there are, the rest is padding.
            cache: of the tokens before; see `model.cache`.

        Returns:
            float32 logits [B, V] of each row's last token (of rows with none, nothing that means anything), and the
            cache with these tokens in it.
        """
        specs = [P(BATCH, None), P(BATCH)]
        leaves, treedef = jax.tree.flatten(cache)
        specs += [CACHE if leaf.ndim == 5 else P(BATCH) for leaf in leaves]

        def run(model: Self, tokens_BT: jax.Array, counts_B: jax.Array, *leaves: jax.Array):
            token_mask_BT = jnp.arange(tokens_BT.shape[1]) < counts_B[:, None]
            cache = jax.tree.unflatten(treedef, leaves)
            hidden_BTD, cache = model.model.extend(tokens_BT, token_mask_BT, cache, model.execution_in_use)
            last_B1D = token_at(hidden_BTD, counts_B - 1)[:, None]
            return model._head(last_B1D, tokens_BT, token_mask_BT)[:, 0], cache

        with as_precise_as(self.execution.dtype):
            return with_explicit_axes(run, self.mesh, specs)(self, tokens_BT, counts_B, *leaves)

    def _add_head(self, make: ParameterFactory) -> None:
        sizes = (self.config.vocab_size, self.config.hidden_size)
        self.lm_head = None if self.config.tie_word_embeddings else Linear("lm_head", TABLE, sizes, make)

    def _explicit_token_losses(
        self,
        tokens_BT: jax.Array,
        segment_ids_BT: jax.Array,
        positions_BT: jax.Array,
        targets_BT: jax.Array,
        noise_key: jax.Array | None,
        *,
        chunk: int | None,
    ) -> TokenLosses:
        """`token_losses` on explicitly sharded arrays, B over `BATCH`."""
        out = self.model(
            tokens_BT,
            segment_ids_BT,
            positions_BT,
            self.execution_in_use,
            noise_key=noise_key,
            keep_trace=False,
            keep_inputs=False,
        )
        log_probs_BT, logsumexp_BT = target_log_probs(out.hidden_BTD, self._table(), targets_BT, chunk)
        return TokenLosses(losses=-log_probs_BT, logsumexp=logsumexp_BT, router=_router_output(out))

    def _table(self) -> jax.Array:
        """What hidden states are multiplied with, [V, D]."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight[...]

    def _head(self, hidden_BTD: jax.Array, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        out = P(BATCH, None, *partition_spec(TABLE[:1]))
        # float32 results from the dtype of the model: the logits are not rounded once more.
        return weight_einsum("BTD,VD->BTV", hidden_BTD, self._table(), TABLE, out, jnp.float32)


class TokenClassifier(Model):
    """One set of label logits per token, [B, T, labels]. There is no dropout before the head."""

    def _add_head(self, make: ParameterFactory) -> None:
        sizes = (self.config.num_labels, self.config.hidden_size)
        self.score = Linear("score", ("labels", "embed"), sizes, make, bias=True)

    def _head(self, hidden_BTD: jax.Array, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        return self.score(hidden_BTD).astype(jnp.float32)


class SequenceClassifier(Model):
    """One set of label logits per sequence, [B, labels], of its last real token.

    That is, as in transformers, the rightmost token that is not `config.pad_token_id`. A config without one takes the
    rightmost token whose segment id is not 0, so it needs segment ids where rows are padded.
    """

    def _add_head(self, make: ParameterFactory) -> None:
        sizes = (self.config.num_labels, self.config.hidden_size)
        self.score = Linear("score", ("labels", "embed"), sizes, make)

    def _head(self, hidden_BTD: jax.Array, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        pad = self.config.pad_token_id
        token_mask_BT = segment_ids_BT != 0 if pad is None else tokens_BT != pad
        last_B = jnp.max(jnp.where(token_mask_BT, jnp.arange(token_mask_BT.shape[1]), 0), axis=1)
        return self.score(token_at(hidden_BTD, last_B)[:, None])[:, 0].astype(jnp.float32)
