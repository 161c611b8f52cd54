"""What the numbers of a checkpoint mean (`ModelConfig`), and the parts of that."""

import dataclasses
import math
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

from qwen_moe_jax.config import count
from qwen_moe_jax.config.checks import dtype_name, require, require_choice, require_size, stop_ids
from qwen_moe_jax.config.dtypes import DTypeLike

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3"]
MixerKind = Literal["full", "sliding", "linear"]
MlpKind = Literal["dense", "sparse"]
Activation = Literal["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, in the Hub's terms. Angles are `position * inv_freq`, in float32.

    `partial_rotary_factor` is the share of a head's dimensions that are rotated, the first ones; the rest pass as they
    are, and the scaled types treat the rotated ones as the whole head.
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
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        require_choice("rope_type", self.rope_type, RopeType)
        for field in dataclasses.fields(self):
            found = getattr(self, field.name)
            if isinstance(found, float):
                require(abs(found) < 2**127, field.name, found, "a number of float32, in which angles are computed")
        require(self.rope_theta > 1, "rope_theta", self.rope_theta, "a number above 1")
        require(self.factor >= 1, "rope factor", self.factor, "a number of at least 1")
        found = self.partial_rotary_factor
        require(0 < found <= 1, "partial_rotary_factor", found, "a number above 0 and at most 1")
        if self.rope_type in ("yarn", "llama3"):
            context = self.original_max_position_embeddings
            holds = context is not None and context > 0
            require(holds, "original_max_position_embeddings", context, "a positive integer")
        if self.rope_type == "yarn":
            for name in ("beta_fast", "beta_slow"):
                require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
            for name in ("mscale", "mscale_all_dim"):
                found = getattr(self, name)
                require(found is None or found >= 0, name, found, "zero, a positive number or nothing")
        if self.rope_type == "llama3":
            require(
                self.high_freq_factor > self.low_freq_factor,
                "high_freq_factor",
                self.high_freq_factor,
                f"more than low_freq_factor={self.low_freq_factor}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention.

    `output_gate`: `q_proj` gives every head a query and a gate (first the rows of the query, then those of the
    gate), whose sigmoid multiplies what the head attended to before `o_proj` (Qwen3-Next). `sliding_window` is the
    number of keys that a query of a sliding layer sees, its own included. `attention_dropout` belongs to training
    alone.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    output_gate: bool = False
    sliding_window: int | None = None
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            require_size(name, getattr(self, name))
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"a divisor of num_attention_heads={self.num_attention_heads}",
        )
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number (rotary embedding turns pairs)")
        if self.sliding_window is not None:
            require(self.sliding_window > 0, "sliding_window", self.sliding_window, "a positive integer")
        require(0 <= self.attention_dropout < 1, "attention_dropout", self.attention_dropout, "in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig:
    """The gated delta rule (Gated DeltaNet, arXiv 2412.06464) behind a short causal convolution.

    Every value head has a state of `key_head_dim` times `value_head_dim` numbers in place of a cache of keys; value
    head h reads and writes it with key head `h // (num_value_heads // num_key_heads)`. `conv_kernel_dim` is the number
    of tokens that the convolution over q, k and v sees. `float32_parameters` says that `A_log` and the weight of the
    gated norm are stored in float32 whatever the dtype of the other parameters, as the first Qwen3.5 checkpoints store
    them.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel_dim: int
    float32_parameters: bool = False

    def __post_init__(self) -> None:
        for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim"):
            require_size(f"linear_{name}", getattr(self, name))
        require(
            self.num_value_heads % self.num_key_heads == 0,
            "linear_num_value_heads",
            self.num_value_heads,
            f"a multiple of linear_num_key_heads={self.num_key_heads}",
        )

    @property
    def key_dim(self) -> int:
        """Rows of all queries, and of all keys."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        """Rows of all values."""
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: the rows of queries, keys and values."""
        return 2 * self.key_dim + self.value_dim


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
            require_size(name, getattr(self, name))
        require(
            1 <= self.num_experts_per_tok <= self.num_experts,
            "num_experts_per_tok",
            self.num_experts_per_tok,
            f"between 1 and num_experts={self.num_experts}",
        )
        found = self.shared_expert_intermediate_size
        require(0 <= found < 2**31, "shared_expert_intermediate_size", found, "zero or a positive integer below 2**31")
        require(0 <= self.router_jitter_noise < 1, "router_jitter_noise", self.router_jitter_noise, "in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What one decoder layer is made of. Layers differ by kind, never by model name.

    `mixer` is what mixes tokens: attention over all of them ("full") or a window ("sliding"), or a gated delta rule
    ("linear").
    """

    mixer: MixerKind = "full"
    mlp: MlpKind = "dense"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the numbers of a checkpoint mean.

    `layers` has one `LayerKind` per decoder layer. `intermediate_size` is the width of the dense MLP layers, `moe` the
    sparse ones (None when no layer is sparse), `linear_attention` the linear ones (None when no layer is linear).
    `zero_centered_norm`: norms multiply by one plus their weight, all but the gated norm of linear layers.
    `num_mtp_layers` is 1 for a model with a head for the token after the next (multi-token prediction), else 0.

    `dtype` is the checkpoint's own. `model_type` is the family to export as, and is read by `huggingface/` alone;
    `hub_fields` carries the config.json fields that mean nothing to the layers, as (name, JSON) pairs, so that an
    exported folder keeps them.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerKind, ...]
    attention: AttentionConfig
    rope: RopeConfig = RopeConfig()
    moe: MoEConfig | None = None
    linear_attention: LinearAttentionConfig | None = None
    zero_centered_norm: bool = False
    num_mtp_layers: int = 0
    rms_norm_eps: float = 1e-6
    hidden_act: Activation = "silu"
    max_position_embeddings: int = 32_768
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    dtype: DTypeLike | None = None
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    num_labels: int = 2
    hub_fields: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "num_labels"):
            require_size(name, getattr(self, name))
        require(len(self.layers) > 0, "num_hidden_layers", len(self.layers), "at least one layer")
        require_choice("hidden_act", self.hidden_act, Activation)
        if self.dtype is not None:
            object.__setattr__(self, "dtype", dtype_name("dtype", self.dtype))
        sparse = any(kind.mlp == "sparse" for kind in self.layers)
        require(not sparse or self.moe is not None, "moe", self.moe, "a MoEConfig, since some layers are sparse")
        self._check_mixers()
        require(self.num_mtp_layers in (0, 1), "num_mtp_layers", self.num_mtp_layers, "0 or 1")
        for name in ("rms_norm_eps", "initializer_range"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "zero or a positive number")
        object.__setattr__(self, "eos_token_id", stop_ids("eos_token_id", self.eos_token_id))
        for name in ("bos_token_id", "pad_token_id"):
            found = getattr(self, name)
            inside = found is None or 0 <= found < self.vocab_size
            require(inside, name, found, f"between 0 and vocab_size={self.vocab_size}, exclusive")

    def _check_mixers(self) -> None:
        mixers = {kind.mixer for kind in self.layers}
        window, linear = self.attention.sliding_window, self.linear_attention
        holds = "sliding" not in mixers or window is not None
        require(holds, "sliding_window", window, "an integer, since some layers slide")
        holds = "linear" not in mixers or linear is not None
        require(holds, "linear_attention", linear, "a LinearAttentionConfig, since some layers are linear")
        holds = "linear" in mixers or linear is None
        require(holds, "linear_attention", linear, "None, since no layer is linear")
        head_dim, factor = self.attention.head_dim, self.rope.partial_rotary_factor
        holds = self.rotary_dim >= 2 and self.rotary_dim % 2 == 0
        expected = f"such that int({head_dim=} * factor) is even and positive (rotary embedding turns pairs)"
        require(holds, "partial_rotary_factor", factor, expected)

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

    @property
    def rotary_dim(self) -> int:
        """The number of dimensions of a head that rotary embedding turns, the first ones."""
        return int(self.attention.head_dim * self.rope.partial_rotary_factor)

    @property
    def mtp_layer(self) -> LayerKind:
        """The kind of the next-token head's one layer: full attention, and experts where the decoder has some."""
        return LayerKind(mixer="full", mlp="sparse" if self.num_sparse_layers else "dense")

    def num_parameters(self, *, exclude_embeddings: bool = False) -> int:
        """Parameters of the causal language model, tied weights once; arithmetic only, nothing is allocated.

        The next-token head is not counted; `num_mtp_parameters` counts it.

        Args:
            exclude_embeddings: leave out the input lookup table (a tied table stays: it is the output head as well).
        """
        return count.parameters(self, self.moe.num_experts if self.moe else 0, exclude_embeddings)

    def num_active_parameters(self, *, exclude_embeddings: bool = False) -> int:
        """Parameters one token passes through: `num_parameters` less the routed experts it did not choose.

        This is the figure model cards give ("30B-A3B": 3.35e9). With `exclude_embeddings` it is the number of
        multiply-adds of a forward pass outside attention (3.04e9), since a lookup multiplies nothing.
        """
        return count.parameters(self, self.moe.num_experts_per_tok if self.moe else 0, exclude_embeddings)

    def num_mtp_parameters(self) -> int:
        """Parameters of the next-token head in addition to `num_parameters`; embedding and output head are shared."""
        return self.num_mtp_layers * count.mtp_parameters(self)
