"""The base class of all models: a decoder with a head, on a mesh, from input arrays to output."""

import dataclasses
import math
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import ExecutionConfig, GenerationConfig, LoraConfig, ModelConfig
from qwen_moe_jax.config.resolve import SPLASH_MULTIPLE, resolve
from qwen_moe_jax.errors import ConfigError, RequestError, ShardingError
from qwen_moe_jax.model.cache import Cache, keeps_steps
from qwen_moe_jax.model.decoder import Decoder, DecoderOutput
from qwen_moe_jax.model.inputs import ModelInputs, checked_inputs, in_order, input_specs, pad_rows
from qwen_moe_jax.model.output import ModelOutput, RouterOutput
from qwen_moe_jax.moe.losses import router_losses
from qwen_moe_jax.moe.replay import Replay, Without, forced_routing
from qwen_moe_jax.nn.matmul import matmul_precision
from qwen_moe_jax.nn.parameters import ParameterFactory, as_rngs
from qwen_moe_jax.sharding.explicit import apart_from_callers_mesh, with_explicit_axes
from qwen_moe_jax.sharding.mesh import checked_mesh
from qwen_moe_jax.sharding.positions import RowOrder
from qwen_moe_jax.sharding.rules import (
    BATCH,
    CONTEXT,
    position_shards,
    positions_axis,
    positions_over_context,
    spec_of,
    stored,
    tokens_spec,
)
from qwen_moe_jax.suggest import missing_attribute, refuse_hub_arguments


class Model(nnx.Module):
    """A decoder with a head, on a mesh that it carries with it: call it, jit it, differentiate it, anywhere.

    Args:
        config: what the weights mean.
        rngs: source of fresh weights: nnx.Rngs, a key or a seed; None makes an abstract model (its leaves are
            `jax.ShapeDtypeStruct`s with their sharding) without allocating anything.
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
        rngs: nnx.Rngs | jax.Array | int | None,
        mesh: Mesh | None = None,
        execution: ExecutionConfig = ExecutionConfig(),
        generation_config: GenerationConfig | None = None,
    ):
        dtype = execution.dtype or config.dtype or "float32"
        self.config = config
        self.execution = dataclasses.replace(execution, dtype=dtype, param_dtype=execution.param_dtype or dtype)
        self.generation_config = generation_config or GenerationConfig(eos_token_id=config.eos_token_id)
        self.mesh = checked_mesh(mesh)
        _check_experts(config, self.mesh, execution)
        self.deterministic = True
        self.lora: LoraConfig | None = None
        make = self.factory(rngs)
        self.model = Decoder(config, make)
        self.add_head(make)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Names of transformers are refused with what does the same here."""
            raise missing_attribute(type(self).__name__, name)

    def factory(self, rngs: nnx.Rngs | jax.Array | int | None) -> ParameterFactory:
        """Creates more of the model's parameters, here or in `model.lora`."""
        return ParameterFactory(
            mesh=self.mesh,
            rules=self.execution.rules,
            dtype=self.execution.param_dtype,
            initializer_range=self.config.initializer_range,
            rngs=as_rngs(rngs),
            weights=self.execution.weight_format,
        )

    def add_head(self, make: ParameterFactory) -> None:
        """Creates the head's parameters; each subclass has its own."""

    def draw_head(self, rngs: nnx.Rngs | jax.Array | int) -> None:
        """Initialises a new head, for weights that were loaded without one."""
        self.add_head(self.factory(rngs))

    def head(self, hidden_BTD: jax.Array, inputs: ModelInputs) -> jax.Array:
        """Normalised hidden states to float32 logits, on explicitly sharded arrays."""
        raise TypeError(f"{type(self).__name__} has no head: use CausalLM, SequenceClassifier or TokenClassifier.")

    def head_of_few(self, hidden_BTD: jax.Array, inputs: ModelInputs) -> jax.Array:
        """`head` where nothing is differentiated, for a few tokens at a time: of decoding."""
        return self.head(hidden_BTD, inputs)

    def prepared(self, inputs: ModelInputs) -> ModelInputs:
        """The inputs with what the head reads of whole rows, before their positions are sharded."""
        return inputs

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], **kwargs: Any) -> Self:
        """Loads a checkpoint folder under this head; see `qwen_moe_jax.from_pretrained` for the arguments."""
        # One of the two imports that point upwards, with ModelConfig's: only huggingface/ reads the Hub's folders.
        from qwen_moe_jax.huggingface.load import load_model

        return load_model(cls, folder, **kwargs)

    def __call__(
        self,
        tokens_BT: jax.typing.ArrayLike | None = None,
        segment_ids: jax.typing.ArrayLike | None = None,
        positions: jax.typing.ArrayLike | None = None,
        *,
        cache: Cache | None = None,
        output_router_logits: bool = False,
        output_hidden_states: bool = False,
        logits_at: jax.typing.ArrayLike | None = None,
        noise_key: jax.Array | None = None,
        replay: Replay | None = None,
        without: Without = (),
        **hub_arguments: Any,
    ) -> ModelOutput:
        """Runs the model.

        Args:
            tokens_BT: token ids, integers [B, T]; needed.
            segment_ids: integers [B, T]; tokens attend within their own segment, 0 is padding (so an attention mask of
                zeros and ones is one). None means no padding, one segment a row.
            positions: integers [B, T]; None counts from 0 at the first token of each segment.
            cache: of the tokens before (`model.cache`), one text a row, B a multiple of the devices that share the
                batch. The tokens follow those in it, from the left; what is not 0 in `segment_ids` is a token. Call the
                model inside a `jax.jit` that donates the cache, or it is copied.
            output_router_logits: also return `router.trace`: logits, experts, weights and drops of every token.
            output_hidden_states: also return `hidden_states`.
            logits_at: integers [B]; the head runs on this one token of each row, and `logits` is [B, 1, …].
            noise_key: a `jax.random.key`, another one for every step; needed in training mode by a config with
                `moe.router_jitter_noise`, and unused otherwise.
            replay: routing to use in place of the routers' own: `out.router.trace` of another call, one
                `RecordedRouting` for each row, or integers [L_sparse, B, T, A]; negative where the router chooses, as
                after the end of a recording that is shorter than the row. Weights are computed from the present
                logits, so gradients reach the routers; statistics and losses count the experts used.
            without: pairs (layer, expert), or bool [L_sparse, E]; experts that are never chosen, replayed or not: the
                next best are. Layers are counted among the sparse ones, as in the trace.
            hub_arguments: not accepted; those of transformers are refused with the name to use instead.

        Returns:
            See `ModelOutput`. Padding has finite logits without a meaning; a token id outside the vocabulary makes its
            sequence NaN.

        Raises:
            RequestError: there are no tokens; the arrays are not integers, or not all [B, T]; `positions` are given
                with a cache, or the cache has another number of rows; there is no `noise_key` where it is needed;
                `replay` has another shape, or names experts that do not exist or one twice for a token (a traced
                array is not looked into); `without` leaves too few.
            ConfigError: in training mode, the config asks for dropout.
            TypeError: an argument of another name.
        """
        refuse_hub_arguments(type(self).__name__, hub_arguments, ("segment_ids", "positions", "cache", "logits_at"))
        inputs = checked_inputs(tokens_BT, segment_ids, positions, logits_at=logits_at)
        inputs = self.with_forced_routing(inputs, replay, without)
        read_out = LogitsOf(output_router_logits=output_router_logits, output_hidden_states=output_hidden_states)
        return self.run(inputs, read_out, cache=cache, noise_key=noise_key)

    def run(
        self,
        inputs: ModelInputs,
        read_out: "ReadOut",
        *,
        cache: Cache | None = None,
        noise_key: jax.Array | None = None,
    ) -> Any:
        """Runs the decoder and then `read_out`, compiled for each `read_out`: `__call__` for any result."""
        self.require_weights()
        if not self.deterministic:
            _check_trainable(self.config)
            self._require_adapters_over_low_bits()
        if cache is not None:
            _check_cached(cache, inputs, math.prod(self.mesh.shape[axis] for axis in BATCH))
        with apart_from_callers_mesh(self.mesh):
            return _forward(self, inputs, cache, self._checked_noise_key(noise_key), read_out=read_out)

    def with_forced_routing(self, inputs: ModelInputs, replay: Replay | None, without: Without) -> ModelInputs:
        """The inputs with what is prescribed to the routers; see `__call__`."""
        layers = sum(kind.mlp == "sparse" for kind in self.config.layers)
        forced = forced_routing(replay, without, self.config.moe, layers, inputs.tokens_BT.shape)
        return dataclasses.replace(inputs, forced=forced)

    @property
    def execution_in_use(self) -> ExecutionConfig:
        """`execution` with every setting that was None chosen for the present mode (`train()` or `eval()`)."""
        return resolve(
            self.execution,
            self.config.moe,
            expert_shards=self.mesh.shape["expert"],
            context_shards=self.mesh.shape[CONTEXT],
            queries_per_key=self.config.attention.num_attention_heads // self.config.attention.num_key_value_heads,
            platform=self.mesh.devices.flat[0].platform,
            training=not self.deterministic,
            linear=self.config.linear_attention,
        )

    def row_order(self, length: int, *, noise: bool = False) -> RowOrder | None:
        """The positions that each device of `context` has of rows of this length; None where it has one device.

        Linear layers read a row in its order, and noise is drawn in it: with one of them it stays.
        """
        shards, execution = self.mesh.shape[CONTEXT], self.execution_in_use
        if shards == 1:
            return None
        contiguous = noise or any(kind.mixer == "linear" for kind in self.config.layers)
        multiple = SPLASH_MULTIPLE if execution.attention == "splash" else 1
        longest = execution.attention_block
        return RowOrder.of(length, shards, zigzag=not contiguous, longest=longest, multiple=multiple)

    def require_weights(self) -> None:
        """Refuses an abstract model (`rngs=None`).

        Raises:
            RequestError: its leaves are shapes, not arrays.
        """
        if isinstance(self.model.norm.weight.get_value(), jax.ShapeDtypeStruct):
            raise RequestError(
                "this model is abstract, without weights (rngs=None): it can be compiled for, not run or saved."
            )

    def _require_adapters_over_low_bits(self) -> None:
        """Refuses to train integers.

        Raises:
            ConfigError: the weights are in few bits, and there are no adapters.
        """
        if self.execution.weights is not None and self.lora is None:
            raise ConfigError(
                f"the weights are {self.execution.weights}, rounded to integers, which are not trained: train adapters "
                "over them (add_lora), or load the model without weights=…, as floats."
            )

    def _checked_noise_key(self, noise_key: jax.Array | None) -> jax.Array | None:
        """The key, where the present mode needs one."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOut:
    """How a forward pass becomes a result. Hashable: a program is compiled for each.

    Attributes:
        output_router_logits, output_hidden_states: what the decoder also keeps; see `Model.__call__`.
    """

    output_router_logits: bool = False
    output_hidden_states: bool = False

    def prepared(self, model: Model, inputs: ModelInputs) -> ModelInputs:
        """The inputs with what else is read of whole rows, before their positions are sharded."""
        return inputs

    def __call__(self, model: Model, out: DecoderOutput, inputs: ModelInputs) -> Any:
        """The result, of explicitly sharded arrays; it has the methods `first_rows` and `restored`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitsOf(ReadOut):
    """Reads out the head's logits, with what else of the forward pass was asked for; see `Model.__call__`."""

    def prepared(self, model: Model, inputs: ModelInputs) -> ModelInputs:
        """See `ReadOut`."""
        return model.prepared(inputs)

    def __call__(self, model: Model, out: DecoderOutput, inputs: ModelInputs) -> ModelOutput:
        """See `ReadOut`."""
        hidden_BTD, hidden_states = out.hidden_BTD, None
        if self.output_hidden_states:
            # A single row has two spellings of its sharding on a single device.
            spec = P(None, *tokens_spec(None))
            parts = (jax.sharding.reshard(x, spec) for x in (out.inputs_LBTD, hidden_BTD[None]))
            hidden_states = jnp.concatenate([*parts])
        if inputs.logits_at_B is not None:
            hidden_BTD = copies_of(token_at(hidden_BTD, inputs.logits_at_B))
        with jax.named_scope("head"):
            logits = (model.head if out.cache is None else model.head_of_few)(hidden_BTD, inputs)
        if inputs.logits_at_B is not None and logits.ndim == 3:
            logits = first_copy(logits)
        return ModelOutput(logits=logits, router=router_output(out), hidden_states=hidden_states, cache=out.cache)


@jax.jit(static_argnames="read_out")
def _forward(
    model: Model,
    inputs: ModelInputs,
    cache: Cache | None,
    noise_key: jax.Array | None,
    *,
    read_out: ReadOut,
) -> Any:
    """Pads the batch to the mesh, runs the model on explicitly sharded arrays, and takes the padding off again."""
    batch, num_shards = inputs.tokens_BT.shape[0], math.prod(model.mesh.shape[axis] for axis in BATCH)
    padded = pad_rows(inputs, num_shards, cached=cache is not None)
    length = inputs.tokens_BT.shape[1]
    if cache is None:
        order = model.row_order(length, noise=noise_key is not None)
    else:
        order = None if keeps_steps(cache) else RowOrder.of_chunk(length, model.mesh.shape[CONTEXT])
    prepared = in_order(read_out.prepared(model, padded), order)

    def run(model: Model, inputs: ModelInputs, cache: Cache | None, noise_key: jax.Array | None) -> Any:
        out = model.model(
            inputs,
            model.execution_in_use,
            cache=cache,
            noise_key=noise_key,
            keep_trace=read_out.output_router_logits,
            keep_inputs=read_out.output_hidden_states,
        )
        return read_out(model, out, inputs)

    with matmul_precision(model.execution.dtype), positions_over_context(order is not None):
        specs = (input_specs(prepared, model.mesh), None if cache is None else cache.specs(), P())
        out = with_explicit_axes(run, model.mesh, specs)(model, prepared, cache, noise_key)
    out = out if order is None else out.restored(order)
    return out if padded.tokens_BT.shape[0] == batch else out.first_rows(batch)


def router_output(out: DecoderOutput) -> RouterOutput | None:
    """The routers' counts and trace, with the losses they make."""
    if out.stats is None:
        return None
    return RouterOutput(stats=out.stats, losses=router_losses(out.stats), trace=out.trace)


def token_at(x_BTD: jax.Array, index_B: jax.Array) -> jax.Array:
    """One token of each row, [B, D]; a masked sum, since a gather along T would have to name its sharding."""
    index_T = jax.sharding.reshard(jnp.arange(x_BTD.shape[1], dtype=jnp.int32), P(positions_axis()))
    chosen_BT1 = (index_T == index_B[:, None])[..., None]
    return jnp.sum(jnp.where(chosen_BT1, x_BTD, 0), axis=1)


def copies_of(x_BD: jax.Array) -> jax.Array:
    """A token of each row as activations [B, X, D]: one copy for each of the X devices of `context`."""
    shape = len(x_BD), position_shards(), x_BD.shape[1]
    if shape[1] == 1:
        return x_BD[:, None]
    return jax.sharding.reshard(jnp.broadcast_to(x_BD[:, None], shape), tokens_spec(None))


def first_copy(x_BXV: jax.Array) -> jax.Array:
    """What became of `copies_of`, [B, 1, V]."""
    if positions_axis() is None:
        return x_BXV
    return jax.sharding.reshard(x_BXV, P(BATCH, None, *spec_of(x_BXV)[2:]))[:, :1]


def _check_cached(cache: Cache, inputs: ModelInputs, num_shards: int) -> None:
    rows, found = cache.lengths_B.shape[0], inputs.tokens_BT.shape[0]
    if found != rows or rows % num_shards:
        raise RequestError(
            f"the tokens have {found} rows and the cache {rows}, expected the same number, a multiple of the "
            f"{num_shards} devices that share the batch."
        )
    if inputs.positions_BT is not None:
        raise RequestError("positions were given with a cache, expected None: the cache counts its tokens.")


def _check_experts(config: ModelConfig, mesh: Mesh, execution: ExecutionConfig) -> None:
    """Refuses experts that do not divide over the mesh before other axes are, which are split over the same devices."""
    axes = stored(execution.rules)["expert"]
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if config.moe is not None and config.moe.num_experts % shards:
        sizes = ", ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
        raise ShardingError(
            f"num_experts={config.moe.num_experts} does not divide over the mesh axes {sizes}: "
            "every device has the same number of whole experts. Choose a size that divides "
            f"{config.moe.num_experts}; fsdp or data use the other devices."
        )


def _check_trainable(config: ModelConfig) -> None:
    """Noise that transformers adds in training mode and this package does not must not be left out silently."""
    found = config.attention.attention_dropout
    if found:
        raise ConfigError(
            f"attention_dropout={found} is not applied in training here: set it to 0.0 in config.json to train."
        )
