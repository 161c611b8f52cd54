"""Low-rank adapters of a model's matrices: added, selected, merged, removed."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_moe_jax.config import LoraConfig
from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.moe.experts import MATRICES, Experts
from qwen_moe_jax.nn.embedding import Embedding
from qwen_moe_jax.nn.linear import Linear
from qwen_moe_jax.nn.lora import LoraAdapter
from qwen_moe_jax.nn.quantised import QuantisedMatrix
from qwen_moe_jax.suggest import did_you_mean

#: What "all-linear" leaves out: the router, the gate of the shared expert, the token table and the head.
_NOT_LINEAR = ("gate", "shared_expert_gate", "embed_tokens", "lm_head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix that can have an adapter: one of all layers of a kind, [layers, …, out, in]; the token table; the head.

    Attributes:
        segment, position: of `LayerStack.segments`; None outside the layers.
        path: within the layer, as "self_attn.q_proj" or "mlp.experts.gate_proj"; "embed_tokens" or "lm_head".
        owner: the module that it is in.
    """

    segment: int | None
    position: int | None
    path: str
    owner: Linear | Experts | Embedding

    @property
    def name(self) -> str:
        """The last word of the path."""
        return self.path.rpartition(".")[2]

    @property
    def parameter_path(self) -> str:
        """The path of the matrix in the model; of one in few bits, of its integers."""
        path = self._layer + (self.path if isinstance(self.owner, Experts) else f"{self.path}.weight")
        return f"{path}.integers" if isinstance(self.weight, QuantisedMatrix) else path

    @property
    def lora_path(self) -> str:
        """The path of its adapter in the model."""
        owner = self.path.rpartition(".")[0]
        return self._layer + (f"{owner}.lora.{self.name}" if isinstance(self.owner, Experts) else f"{self.path}.lora")

    @property
    def _layer(self) -> str:
        if self.segment is None:
            return "model." if isinstance(self.owner, Embedding) else ""
        return f"model.layers.segments.{self.segment}.{self.position}."

    @property
    def weight(self) -> nnx.Param | QuantisedMatrix:
        """The matrix."""
        return getattr(self.owner, self.name) if isinstance(self.owner, Experts) else self.owner.weight

    @property
    def axes(self) -> tuple[str, ...]:
        """Its logical axes, without that of the layers."""
        return MATRICES[self.name] if isinstance(self.owner, Experts) else self.owner.axes

    @property
    def lora(self) -> LoraAdapter | None:
        """Its adapter."""
        return self.owner.lora.get(self.name) if isinstance(self.owner, Experts) else self.owner.lora

    def attach(self, lora: LoraAdapter | None) -> None:
        """Gives it this adapter, or none."""
        if not isinstance(self.owner, Experts):
            self.owner.lora = lora
        elif lora is None:
            del self.owner.lora[self.name]
        else:
            self.owner.lora[self.name] = lora


def add_lora(model: Model, config: LoraConfig, *, rngs: nnx.Rngs | jax.Array | int | None) -> None:
    """Gives a model adapters, float32, without effect until they are trained (B is zero). Its weights are unchanged.

    A matrix has one where its path contains a name of `config.target_modules` (between dots): "q_proj", "experts",
    "mlp.shared_expert.down_proj"; "all-linear" is all of them but the gates.

    Args:
        model: without adapters.
        config: rank, scaling and which matrices.
        rngs: source of A; None for an abstract model.

    Raises:
        ConfigError: the model has adapters already; no matrix has such a name.
        ShardingError: an adapter does not divide over the mesh.
    """
    if model.lora is not None:
        raise ConfigError("the model has low-rank adapters already: merge them with merge_lora first.")
    make = dataclasses.replace(model.factory(rngs), dtype="float32")
    found = list(matrices(model))
    _check_targets(config.target_modules, [matrix.path for matrix in found])
    for matrix in found:
        if any(_is_meant(target, matrix.path) for target in config.target_modules):
            own, sizes = config.of_matrix(matrix.path), matrix.weight.unpadded_shape
            if matrix.segment is None:
                matrix.attach(LoraAdapter(matrix.path, matrix.axes, sizes, own, make))
                continue
            segment = model.model.layers.plan[matrix.segment]
            name = f"model.layers.{segment.start + matrix.position}.{matrix.path}"
            matrix.attach(LoraAdapter(name, matrix.axes, sizes[1:], own, make.stacked(segment.repeats)))
    model.lora = config


def merge_lora(model: Model) -> None:
    """Adds every adapter to its matrix, in float32 and rounded once, and leaves the model without adapters.

    Raises:
        ConfigError: it has none, or weights in few bits.
    """
    if model.lora is None:
        raise ConfigError("the model has no low-rank adapters to merge.")
    if model.execution.weights is not None:
        raise ConfigError(
            f"the weights are {model.execution.weights}, in which adapters would be rounded away: save_adapter writes "
            "them; merge them into the checkpoint loaded as floats (without weights=…), or by `qwen-moe-jax convert "
            "--adapter`."
        )
    for matrix in matrices(model):
        if matrix.lora is not None:
            assert isinstance(matrix.weight, nnx.Param)  # of floats
            weight = matrix.weight.get_value()
            merge = jax.jit(_merged, donate_argnums=0, out_shardings=weight.sharding)
            matrix.weight.set_value(merge(weight, matrix.lora))
    remove_lora(model)


def remove_lora(model: Model) -> None:
    """Removes the adapters of a model without merging them."""
    for matrix in matrices(model):
        if matrix.lora is not None:
            matrix.attach(None)
    model.lora = None


def matrices(model: Model) -> Iterator[Matrix]:
    """Every matrix that can have an adapter: the layers' in order, then the token table and a language model's head."""
    for number, period in enumerate(model.model.layers.segments):
        for position, layer in enumerate(period):
            for keys, module in nnx.iter_modules(layer):
                path = ".".join(map(str, keys))
                if isinstance(module, Linear):
                    yield Matrix(segment=number, position=position, path=path, owner=module)
                elif isinstance(module, Experts):
                    for name in MATRICES:
                        yield Matrix(segment=number, position=position, path=f"{path}.{name}", owner=module)
    yield Matrix(segment=None, position=None, path="embed_tokens", owner=model.model.embed_tokens)
    head = getattr(model, "lm_head", None)
    if head is not None:
        yield Matrix(segment=None, position=None, path="lm_head", owner=head)


def is_adapter(path: str) -> bool:
    """Whether a parameter, by its path, is part of an adapter."""
    return path.rpartition(".")[2] in ("lora_A", "lora_B")


def _merged(weight: jax.Array, lora: LoraAdapter) -> jax.Array:
    return (weight.astype(jnp.float32) + lora.product()).astype(weight.dtype)


def _is_meant(target: str, path: str) -> bool:
    if target == "all-linear":
        return path.rpartition(".")[2] not in _NOT_LINEAR
    return f".{target}." in f".{path}."


def _check_targets(targets: tuple[str, ...], paths: list[str]) -> None:
    for target in targets:
        if not any(_is_meant(target, path) for path in paths):
            names = sorted({word for path in paths for word in path.split(".")[1:] or [path]})
            raise ConfigError(
                f"target_modules: found {target!r}, which is in no matrix of this model; "
                f"{did_you_mean(target, names)}expected some of {', '.join(names)}, a path as {paths[0]!r}, "
                "or 'all-linear'."
            )
