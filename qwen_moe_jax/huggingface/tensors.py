"""StoredTensor names of the Hub ↔ parameters of the model.

Modules have the Hub's names, so most tensor names are a parameter's path with the layer number inserted. The rest is
stacking: a parameter of scanned layers [L, …] is one Hub tensor per layer, one of experts [L, E, …] one per layer and
expert. Matrices keep the Hub's [out, in] order, so both directions are slicing. The projections of linear layers are
named as Qwen3.5's in every family, and keep the model's order of rows: `linear_rows` says what the files have instead.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qwen_moe_jax.model.base import Model
from qwen_moe_jax.nn.parameters import parameters_with_paths
from qwen_moe_jax.storage.tensor import full_index

#: (our pattern, the Hub's replacement) for families whose tensor names differ from the module names.
RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": (
        (r"\.mlp\.gate\.", ".block_sparse_moe.gate."),
        (r"\.mlp\.experts\.(\d+)\.gate_proj\.", r".block_sparse_moe.experts.\1.w1."),
        (r"\.mlp\.experts\.(\d+)\.down_proj\.", r".block_sparse_moe.experts.\1.w2."),
        (r"\.mlp\.experts\.(\d+)\.up_proj\.", r".block_sparse_moe.experts.\1.w3."),
    )
}

_STACKED = re.compile(r"model\.layers\.segments\.(\d+)\.(\d+)\.(.+)")
#: Parameters of a layer that is not stacked with others, that of the next-token head.
_SINGLE = re.compile(r"(mtp\.layers\.\d+)\.(.+)")
#: The arrays of a low-bit matrix, which files have as one of floats.
_PART = re.compile(r"\.(integers|scales)$")


@dataclasses.dataclass(frozen=True)
class HubParameter:
    """One parameter of the model and the Hub tensors that it stacks.

    Attributes:
        path: of the array in the model, with dots.
        leaf: the array, its `jax.ShapeDtypeStruct`, or its gradient; padded, where the mesh needs it.
        shape: of the parameter, without padding.
        names: object array of Hub names (of adapters, PEFT's) over the leading axes that the Hub does not stack: [],
            [L] or [L, E].
    """

    path: str
    leaf: Any
    shape: tuple[int, ...]
    names: np.ndarray

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each Hub tensor."""
        return self.shape[self.names.ndim :]

    def window(self, index: tuple[int, ...]) -> tuple[int | slice, ...]:
        """The slice of the array that is the Hub tensor `names[index]`."""
        return (*index, *full_index(self.tensor_shape))


def hub_parameters(model: Model) -> list[HubParameter]:
    """Every parameter of a model, in the order of `jax.tree.leaves(model)`.

    Works on any tree of the model's structure: weights, gradients, abstract models (`rngs=None`).
    """
    rename = renamer(model.config.model_type)
    found = []
    for path, param in parameters_with_paths(model):
        leaf = param.get_value()
        found.append(HubParameter(path, leaf, param.unpadded_shape, _names(path, leaf, model, rename)))
    return found


def hub_tensors(parameters: list[HubParameter]) -> Iterator[tuple[str, HubParameter, tuple[int, ...]]]:
    """(name, parameter, index into it) of every Hub tensor, by layer, then by parameter, then by expert.

    Neighbours are then slices of one array, which devices transfer and disks read well.
    """
    entries = [(name, parameter, index) for parameter in parameters for index, name in np.ndenumerate(parameter.names)]

    def order(entry: tuple[str, HubParameter, tuple[int, ...]]) -> tuple[Any, ...]:
        name, _, index = entry
        return natural_order(re.sub(r"\.experts\.\d+\.", ".experts.", name)), index

    return iter(sorted(entries, key=order))


def renamer(model_type: str) -> Callable[[str], str]:
    """A function from a tensor's name in our modules to its name in the family's files."""
    rules = RENAMES.get(model_type, ())

    def rename(name: str) -> str:
        for ours, hub in rules:
            name = re.sub(ours, hub, name)
        return name

    return rename


def natural_order(name: str) -> list[tuple[int, int | str]]:
    """Sort key of names that orders numbers by value: layer 9 before layer 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]


def _names(path: str, leaf: Any, model: Model, rename: Callable[[str], str]) -> np.ndarray:
    path = _PART.sub("", path)
    stacked, single = _STACKED.fullmatch(path), _SINGLE.fullmatch(path)
    if stacked is not None:
        segment = model.model.layers.plan[int(stacked[1])]
        layers = [segment.layer_index(int(stacked[2]), repeat) for repeat in range(segment.repeats)]
        return _layer_names([f"model.layers.{layer}" for layer in layers], stacked[3], leaf.shape[1:], rename)
    if single is not None:
        return np.array(_layer_names([single[1]], single[2], leaf.shape, rename)[0], dtype=object)
    return np.array(rename(re.sub(r"\.lora\.(lora_[AB])$", r".\1.weight", path)), dtype=object)


def _layer_names(layers: list[str], rest: str, shape: tuple[int, ...], rename: Callable[[str], str]) -> np.ndarray:
    """[layers] or, of routed experts, [layers, experts] names of a parameter, from its path and shape in one layer."""
    # Adapters are siblings of their matrix in PEFT: "q_proj.lora.lora_A", "experts.lora.gate_proj.lora_A".
    rest = re.sub(r"\.lora((?:\.\w+)?)\.(lora_[AB])$", r"\1.\2.weight", rest)
    experts = re.fullmatch(r"mlp\.experts\.(\w+?)(\.lora_[AB])?(?:\.weight)?", rest)
    if experts is None:
        names: list[Any] = [rename(f"{layer}.{rest}") for layer in layers]
    else:
        matrix = experts[1] + (experts[2] or "")
        names = [[rename(f"{layer}.mlp.experts.{e}.{matrix}.weight") for e in range(shape[0])] for layer in layers]
    return np.array(names, dtype=object)
