"""What a model means (`ModelConfig`), how it is run (`ExecutionConfig`), how text is made (`GenerationConfig`).

Nothing here knows a Hub name or imports JAX: `huggingface/` translates config.json into these fields, and no
layer ever asks which family it belongs to.
"""

import dataclasses
import math
import operator
import sys
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, Literal, get_args

from qwen_moe_jax.errors import ConfigError

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3"]
AttentionKind = Literal["full", "sliding"]
MlpKind = Literal["dense", "sparse"]
Activation = Literal["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]
Dispatch = Literal["dropless", "capacity", "dense"]
CapacityBy = Literal["einsum", "index"]
Drop = Literal["position", "weight"]
Exchange = Literal["gather", "all_to_all", "ragged_all_to_all"]
GroupedMatmul = Literal["blocks", "megablox", "triton"]
Attention = Literal["blocks", "splash"]
Routing = Literal["learned", "balanced"]
Remat = Literal["none", "full", "dots", "exchange"]
Dtype = Literal["float32", "bfloat16", "float16"]
MeshAxis = Literal["data", "fsdp", "expert", "tensor"]


def _require(holds: bool, field: str, found: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{field}={found!r} is not supported: expected {expected}.")


def _require_size(field: str, found: int) -> None:
    _require(0 < found < 2**31, field, found, "a positive integer below 2**31")


def _require_choice(field: str, found: Any, choices: Any) -> None:
    names = get_args(choices)
    _require(found in names, field, found, "one of " + ", ".join(map(repr, names)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, in the Hub's terms. Angles are `position * inv_freq`, in float32.

    `original_max_position_embeddings` is the context the scaled types (yarn, llama3) were pretrained with.
    `attention_factor`, `mscale*`, `beta_*` and `truncate` belong to yarn (arXiv 2309.00071), `*_freq_factor` to llama3.
    """

    rope_type: RopeType = "default"
    rope_theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        _require_choice("rope_type", self.rope_type, RopeType)
        for field in dataclasses.fields(self):
            found = getattr(self, field.name)
            if isinstance(found, float):
                _require(abs(found) < 2**127, field.name, found, "a number of float32, in which angles are computed")
        _require(self.rope_theta > 1, "rope_theta", self.rope_theta, "a number above 1")
        _require(self.factor >= 1, "rope factor", self.factor, "a number of at least 1")
        if self.rope_type in ("yarn", "llama3"):
            found = self.original_max_position_embeddings
            _require(found is not None and found > 0, "original_max_position_embeddings", found, "a positive integer")
        if self.rope_type == "yarn":
            for name in ("beta_fast", "beta_slow"):
                _require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
            for name in ("mscale", "mscale_all_dim"):
                found = getattr(self, name)
                _require(found is None or found >= 0, name, found, "zero, a positive number or nothing")
        if self.rope_type == "llama3":
            _require(
                self.high_freq_factor > self.low_freq_factor,
                "high_freq_factor",
                self.high_freq_factor,
                f"more than low_freq_factor={self.low_freq_factor}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention.

    `sliding_window` is the number of keys that a query of a sliding layer sees, its own included. `attention_dropout`
    belongs to training alone.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            _require_size(name, getattr(self, name))
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"a divisor of num_attention_heads={self.num_attention_heads}",
        )
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number (rotary embedding turns pairs)")
        if self.sliding_window is not None:
            _require(self.sliding_window > 0, "sliding_window", self.sliding_window, "a positive integer")
        _require(0 <= self.attention_dropout < 1, "attention_dropout", self.attention_dropout, "in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The sparse block: `num_experts_per_tok` of `num_experts` SwiGLU experts a token, and the shared expert, if any.

    `norm_topk_prob` renormalises the chosen weights to sum to one. `float32_weights` keeps them in float32 (Mixtral)
    instead of casting them to the model's dtype (Qwen). `shared_expert_intermediate_size` 0 means no shared expert.
    `router_jitter_noise` belongs to training alone. `balancing_bias` gives every router a bias on which experts it
    chooses, but not on what they count, which training moves towards an even load (DeepSeek-V3, arXiv 2412.19437).
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    float32_weights: bool = False
    shared_expert_intermediate_size: int = 0
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    balancing_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("num_experts", "moe_intermediate_size"):
            _require_size(name, getattr(self, name))
        _require(
            1 <= self.num_experts_per_tok <= self.num_experts,
            "num_experts_per_tok",
            self.num_experts_per_tok,
            f"between 1 and num_experts={self.num_experts}",
        )
        found = self.shared_expert_intermediate_size
        _require(0 <= found < 2**31, "shared_expert_intermediate_size", found, "zero or a positive integer below 2**31")
        _require(0 <= self.router_jitter_noise < 1, "router_jitter_noise", self.router_jitter_noise, "in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What one decoder layer is made of. Layers differ by kind, never by model name."""

    attention: AttentionKind = "full"
    mlp: MlpKind = "dense"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the numbers of a checkpoint mean.

    `layers` has one `LayerKind` per decoder layer. `intermediate_size` is the width of the dense MLP layers, `moe` the
    sparse ones (None when no layer is sparse). `dtype` is the checkpoint's own. `model_type` is the family to export
    as, and is read by `huggingface/` alone; `hub_fields` carries the config.json fields that mean nothing to the
    layers, as (name, JSON) pairs, so that an exported folder keeps them.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerKind, ...]
    attention: AttentionConfig
    rope: RopeConfig = RopeConfig()
    moe: MoEConfig | None = None
    rms_norm_eps: float = 1e-6
    hidden_act: Activation = "silu"
    max_position_embeddings: int = 32_768
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    dtype: Dtype | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    num_labels: int = 2
    hub_fields: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "num_labels"):
            _require_size(name, getattr(self, name))
        _require(len(self.layers) > 0, "num_hidden_layers", len(self.layers), "at least one layer")
        _require_choice("hidden_act", self.hidden_act, Activation)
        if self.dtype is not None:
            _require_choice("dtype", self.dtype, Dtype)
        sparse = any(kind.mlp == "sparse" for kind in self.layers)
        _require(not sparse or self.moe is not None, "moe", self.moe, "a MoEConfig, since some layers are sparse")
        sliding = any(kind.attention == "sliding" for kind in self.layers)
        window = self.attention.sliding_window
        _require(not sliding or window is not None, "sliding_window", window, "an integer, since some layers slide")
        for name in ("rms_norm_eps", "initializer_range"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "zero or a positive number")
        _token_ids("eos_token_id", self.eos_token_id)
        for name in ("bos_token_id", "pad_token_id"):
            found = getattr(self, name)
            inside = found is None or 0 <= found < self.vocab_size
            _require(inside, name, found, f"between 0 and vocab_size={self.vocab_size}, exclusive")

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str] | Mapping[str, Any]) -> "ModelConfig":
        """Reads a Hub config: a checkpoint folder, a config.json, or its content as a dict.

        Raises:
            ConfigError: naming the field, what was found and what is supported.
        """
        # One of the two arrows that run upwards: only huggingface/ may know Hub names, and users look for it here.
        from qwen_moe_jax.huggingface.config import read_config

        return read_config(source)

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers L."""
        return len(self.layers)

    @property
    def num_sparse_layers(self) -> int:
        """Number of layers with a router."""
        return sum(kind.mlp == "sparse" for kind in self.layers)

    def num_parameters(self, *, exclude_embeddings: bool = False) -> int:
        """Parameters of the causal language model, tied weights once; arithmetic only, nothing is allocated.

        Args:
            exclude_embeddings: leave out the input lookup table (a tied table stays: it is the output head as well).
        """
        routed = self.moe.num_experts if self.moe else 0
        return self._parameters(routed, exclude_embeddings)

    def num_active_parameters(self, *, exclude_embeddings: bool = False) -> int:
        """Parameters one token passes through: `num_parameters` less the routed experts it did not choose.

        This is the figure model cards give ("30B-A3B": 3.35e9). With `exclude_embeddings` it is the number of
        multiply-adds of a forward pass outside attention (3.04e9), since a lookup multiplies nothing.
        """
        routed = self.moe.num_experts_per_tok if self.moe else 0
        return self._parameters(routed, exclude_embeddings)

    def _parameters(self, experts_counted: int, exclude_embeddings: bool) -> int:
        width, attention, moe = self.hidden_size, self.attention, self.moe
        q_rows = attention.num_attention_heads * attention.head_dim
        kv_rows = attention.num_key_value_heads * attention.head_dim
        per_layer = 2 * width  # the two norms
        per_layer += width * (q_rows + 2 * kv_rows) + q_rows * width
        per_layer += (q_rows + 2 * kv_rows) * attention.qkv_bias + width * attention.o_bias
        per_layer += 2 * attention.head_dim * attention.qk_norm
        dense = 3 * width * self.intermediate_size
        sparse = 0
        if moe is not None:
            sparse = width * moe.num_experts + experts_counted * 3 * width * moe.moe_intermediate_size
            if moe.shared_expert_intermediate_size:
                sparse += 3 * width * moe.shared_expert_intermediate_size + width
        table = self.vocab_size * width
        ends = table if self.tie_word_embeddings or exclude_embeddings else 2 * table
        mlps = self.num_sparse_layers * sparse + (self.num_hidden_layers - self.num_sparse_layers) * dense
        return ends + width + self.num_hidden_layers * per_layer + mlps


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Where weights lie at rest: for each logical axis of a weight the mesh axes that cut it, outermost first.

    A layer uses heads, widths and vocabulary cut over `tensor`, routed experts over `expert` (that is no choice: tokens
    travel to them), and everything else whole. What a rule cuts beyond that saves memory and is gathered for the layer,
    forward and again backward; what it does not cut lies on several devices.

    Attributes:
        vocab: rows of the token table and of the head; "tensor" first.
        heads: rows of q, k and v, columns of o; "tensor" first.
        ffn: the width of MLPs and of experts; "tensor" first.
        embed: the hidden axis of all weights but the routed experts'.
        expert_embed: the hidden axis of the routed experts' weights.
    """

    vocab: tuple[MeshAxis, ...] = ("tensor",)
    heads: tuple[MeshAxis, ...] = ("tensor",)
    ffn: tuple[MeshAxis, ...] = ("tensor",)
    embed: tuple[MeshAxis, ...] = ("fsdp", "expert")
    expert_embed: tuple[MeshAxis, ...] = ("fsdp",)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            found = getattr(self, field.name)
            known = isinstance(found, list | tuple) and all(axis in get_args(MeshAxis) for axis in found)
            expected = "mesh axes, some of " + ", ".join(get_args(MeshAxis)) + ", each once"
            _require(known and len(set(found)) == len(found), f"sharding rule {field.name}", found, expected)
            object.__setattr__(self, field.name, tuple(found))
        for name in ("vocab", "heads", "ffn"):
            found = getattr(self, name)
            _require(found[:1] == ("tensor",), f"sharding rule {name}", found, '"tensor" first: a layer uses it cut so')


#: By what is gathered for a layer. The default keeps no weight twice but over `data`; "fsdp" and "expert" gather dense
#: weights over one axis, and keep copies along the other; "expert+tensor" gathers nothing, as suits inference.
SHARDING_RULES: dict[str, ShardingRules] = {
    "expert+fsdp": ShardingRules(),
    "fsdp": ShardingRules(embed=("fsdp",)),
    "expert": ShardingRules(embed=("expert",), expert_embed=()),
    "expert+tensor": ShardingRules(embed=(), expert_embed=()),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a model is run. Any checkpoint runs under any of these; results differ by rounding and by counted drops.

    Settings that are None are chosen for the model, its mesh and its mode; `model.execution_in_use` shows the choices.

    Attributes:
        dtype: of activations and matmuls; None takes the checkpoint's. Logits are always float32.
        param_dtype: of the stored weights; None takes `dtype`.
        router_dtype: of the router's matmul; None is `dtype`, as transformers has it. "float32" is steadier in bfloat16
            training, and routes a few tokens otherwise than transformers does.
        dispatch: how tokens reach their experts. "dropless" sorts them by expert and multiplies ragged groups;
            "capacity" gives each expert a fixed number of places per group of tokens; "dense" runs every expert on
            every token, the reference. None means "dropless" in eval mode (`model.eval()`, how every model starts) and
            "capacity" in training mode (`model.train()`).
        capacity_factor: under "capacity" in training mode, places per expert and group as a multiple of a perfectly
            balanced load (`ceil(group_size * num_experts_per_tok / num_experts * capacity_factor)`).
        eval_capacity_factor: the same in eval mode.
        min_capacity: places an expert has at least in every group (as many as the group has tokens are always enough).
        group_size: tokens routed together under "capacity". The einsums that move them cost 2/3 * group_size /
            moe_intermediate_size of the experts' own matmuls; small groups drop more tokens. None takes the largest
            power of two that keeps the cost at a third, or all tokens of a device where they are moved by index.
        drop: who goes without when an expert is full: "position" the last tokens of the group, "weight" those that
            weigh it least (batch-prioritised routing, arXiv 2106.05974).
        capacity_by: "einsum" moves tokens by one-hot matmuls (GShard), "index" by gathers: the same tokens to the same
            places. None takes "einsum" where it costs at most a third of the experts' matmuls.
        buffer_factor: under "dropless" on several expert devices in training mode, rows a device has room for, as a
            multiple of a perfectly balanced load. What does not fit is dropped and counted. None makes room for the
            worst case: nothing is ever dropped.
        eval_buffer_factor: the same in eval mode.
        exchange: under "dropless", how rows cross the `expert` axis. "gather" brings every token to every device of the
            axis and sums what they return; "all_to_all" sends each row to its expert, in buffers of fixed size;
            "ragged_all_to_all" sends only the rows there are (not on CPUs). None takes "gather" where it sends less or
            where nothing may be dropped.
        grouped_matmul: what multiplies ragged groups: "blocks" (any device), "megablox" (TPU), "triton" (NVIDIA).
        routing: "balanced" sends tokens to experts in turn, whatever the router says: for benchmarks.
        attention: what attends, block by block: "blocks" (any device) by XLA's operations, "splash" (TPU, bfloat16 or
            float32) by JAX's kernels, which keep the scores on the chip. None takes "splash" where it runs.
        attention_block: tokens of the longest block of queries and of keys whose scores are there at a time, for
            "splash" 128 at least (and 1024 at most on a v5p: scores of 2048 do not fit into its vector memory). None
            takes 128 on CPUs and 512 elsewhere.
        remat: what the backward pass recomputes, per layer: "none" nothing, "full" the whole layer from its input,
            "exchange" all but what came over the `expert` axis, "dots" all but that, attention and the matmuls with
            weights. Weights gathered over fsdp are gathered again in any case.
        sharding: where weights lie at rest, a `ShardingRules` or the name of one (`SHARDING_RULES`).
    """

    dtype: Dtype | None = None
    param_dtype: Dtype | None = None
    router_dtype: Dtype | None = None
    dispatch: Dispatch | None = None
    capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    min_capacity: int = 4
    group_size: int | None = None
    drop: Drop = "position"
    capacity_by: CapacityBy | None = None
    buffer_factor: float | None = 2.0
    eval_buffer_factor: float | None = None
    exchange: Exchange | None = None
    grouped_matmul: GroupedMatmul | None = None
    routing: Routing = "learned"
    attention: Attention | None = None
    attention_block: int | None = None
    remat: Remat = "none"
    sharding: ShardingRules | str = ShardingRules()

    def __post_init__(self) -> None:
        if isinstance(self.sharding, str):
            names = ", ".join(map(repr, SHARDING_RULES))
            _require(self.sharding in SHARDING_RULES, "sharding", self.sharding, f"one of {names}, or ShardingRules")
            object.__setattr__(self, "sharding", SHARDING_RULES[self.sharding])
        choices = {
            "dtype": Dtype,
            "param_dtype": Dtype,
            "router_dtype": Dtype,
            "dispatch": Dispatch,
            "drop": Drop,
            "capacity_by": CapacityBy,
            "exchange": Exchange,
            "grouped_matmul": GroupedMatmul,
            "routing": Routing,
            "attention": Attention,
            "remat": Remat,
        }
        for name, allowed in choices.items():
            if getattr(self, name) is not None:
                _require_choice(name, getattr(self, name), allowed)
        for name in ("capacity_factor", "eval_capacity_factor"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        for name in ("buffer_factor", "eval_buffer_factor"):
            found = getattr(self, name)
            _require(
                found is None or 1 <= found < float("inf"),
                name,
                found,
                "a number of at least 1, or None for the worst case",
            )
        _require(self.min_capacity > 0, "min_capacity", self.min_capacity, "a positive integer")
        for name in ("group_size", "attention_block"):
            found = getattr(self, name)
            _require(found is None or found > 0, name, found, "a positive integer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters beside matrices that stay as they are: `W x + scaling · B A x` (LoRA, arXiv 2106.09685).

    The fields are PEFT's, but for its `target_modules` being read more widely.

    Attributes:
        r: rank: rows of A [r, in] and columns of B [out, r].
        lora_alpha: the adapters' weight, `scaling = lora_alpha / r`.
        target_modules: which matrices have one: "q_proj" wherever there is one, "experts" all of the routed experts,
            "shared_expert.down_proj" that one; "all-linear" all but routers, gates and the head.
        use_rslora: `scaling = lora_alpha / sqrt(r)`, with which higher ranks learn as fast (rsLoRA, arXiv 2312.03732).
    """

    r: int = 16
    lora_alpha: float = 32.0
    target_modules: tuple[str, ...] = ("all-linear",)
    use_rslora: bool = False

    def __post_init__(self) -> None:
        _require_size("LoRA rank r", self.r)
        _require(0 < self.lora_alpha < math.inf, "lora_alpha", self.lora_alpha, "a positive number")
        object.__setattr__(self, "target_modules", _strings("target_modules", self.target_modules))
        _require(len(self.target_modules) > 0, "target_modules", self.target_modules, "at least one name")

    @property
    def scaling(self) -> float:
        """What the product of the two matrices is multiplied with."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How a model's text is made and where it ends: transformers' generation_config.json, and four fields of vLLM's.

    The defaults are those that transformers 5.23 generates with where nothing is said. Sequences may be given as lists,
    `logit_bias` as a mapping; they are kept as tuples, so that a config can be hashed.

    Attributes:
        eos_token_id: tokens that end a text.
        stop_strings: strings that end a text.
        max_new_tokens: at most so many, the ending token included; None leaves it to the caller.
        min_new_tokens: `eos_token_id` cannot be chosen before so many.
        do_sample: draw tokens; otherwise the most probable one is taken, and neither temperature, top_k, top_p, min_p
            nor seed count.
        temperature: divides the logits. It may be 0 where nothing is drawn.
        top_k: draw among the k most probable tokens; 0 among all.
        top_p: draw among the fewest most probable tokens whose probabilities sum to at least this.
        min_p: draw among the tokens at least this times as probable as the most probable one.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that stand in the prompt
            or in what was generated (arXiv 1909.05858).
        presence_penalty: subtracted from the logits of tokens that were generated, as OpenAI and vLLM have it.
        frequency_penalty: the same, times how often they were generated.
        logit_bias: (token, bias) pairs, added to the logits. In place of a token may stand a sequence of tokens: its
            last one is biased where the others were the last to be read or generated (transformers' `sequence_bias`).
        bad_words_ids: sequences of tokens that are not completed. A single token that ends a text stays allowed.
        seed: of the random numbers, below 2**64; None is another one every time.
        hub_fields: the other fields of generation_config.json as (name, JSON) pairs: kept for export, and not acted on.

    Raises:
        ConfigError: a value outside its range.
    """

    eos_token_id: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int | tuple[int, ...], float], ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    hub_fields: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        frozen = {
            "eos_token_id": _token_ids("eos_token_id", self.eos_token_id),
            "stop_strings": _strings("stop_strings", self.stop_strings),
            "logit_bias": _biases("logit_bias", self.logit_bias),
            "bad_words_ids": tuple(_token_ids("bad_words_ids", word) for word in self.bad_words_ids),
        }
        for name, value in frozen.items():
            object.__setattr__(self, name, value)
        _require(all(self.bad_words_ids), "bad_words_ids", self.bad_words_ids, "at least one token in each")
        found = self.max_new_tokens
        _require(found is None or found >= 1, "max_new_tokens", found, "a positive integer, or None")
        for name in ("min_new_tokens", "top_k"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "zero or a positive integer")
        for name in ("top_p", "min_p"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "in [-2, 2]")
        found = self.repetition_penalty
        _require(0 < found < math.inf, "repetition_penalty", found, "a positive number (1 changes nothing)")
        found = self.temperature
        _require(0 <= found < math.inf, "temperature", found, "a positive number")
        _require(
            found > 0 or not self.do_sample, "temperature", found, "a positive number, or do_sample=False beside it"
        )
        found = self.seed
        _require(found is None or 0 <= found < 2**64, "seed", found, "between 0 and 2**64, exclusive, or None")


def _token_ids(field: str, found: Any) -> tuple[int, ...]:
    try:
        ids = tuple(operator.index(token) for token in found)
    except TypeError:
        ids = (-1,)
    _require(all(0 <= token < 2**31 for token in ids), field, found, "a sequence of token ids")
    return ids


def _strings(field: str, found: Any) -> tuple[str, ...]:
    # Not any iterable: a string is one too, of strings, but hardly meant so.
    good = isinstance(found, list | tuple) and all(isinstance(text, str) and text for text in found)
    _require(good, field, found, "a tuple of strings, none of them empty")
    return tuple(found)


def _biases(field: str, found: Any) -> tuple[tuple[int | tuple[int, ...], float], ...]:
    """The last of several biases of one sequence counts, as in a mapping; a sequence of one token is that token."""
    biases: dict[int | tuple[int, ...], float] = {}
    for key, bias in found.items() if isinstance(found, Mapping) else found:
        ids = _token_ids(field, key if isinstance(key, Iterable) else (key,))
        finite = bias == -math.inf or abs(bias) <= sys.float_info.max
        _require(len(ids) > 0 and finite, field, found, "(token id or ids, number) pairs, infinity excluded")
        biases[ids if len(ids) > 1 else ids[0]] = float(bias)
    return tuple(biases.items())
