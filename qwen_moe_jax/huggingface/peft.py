"""Low-rank adapters in PEFT's layout: a folder with adapter_config.json and adapter_model.safetensors.

Every matrix has tensors of its own, `base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight` and so on, and so
has every expert: `….mlp.experts.7.gate_proj.lora_A.weight`, as PEFT names them for models whose experts are modules, in
transformers 4 and vLLM. Transformers 5 fuses experts, and PEFT converts their adapters for Mixtral and Qwen3-MoE; for
Qwen2-MoE it does not (0.21), and drops them: merge those into the weights instead.
"""

import dataclasses
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from qwen_moe_jax.config import LoraConfig
from qwen_moe_jax.errors import CheckpointError, ConfigError
from qwen_moe_jax.huggingface.checkpoint import HEADS, stacked_tensor
from qwen_moe_jax.huggingface.fields import read_json
from qwen_moe_jax.huggingface.hub import adapter_folder
from qwen_moe_jax.huggingface.save import readable_tensors, write_configs
from qwen_moe_jax.huggingface.tensors import HubParameter, hub_parameters, hub_tensors
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.model.lora import add_lora, is_adapter, matrices, remove_lora
from qwen_moe_jax.sharding.distributed import is_process_zero
from qwen_moe_jax.storage.arrays import ArrayTensor, read_arrays, write_arrays
from qwen_moe_jax.storage.folder import replaced_folder
from qwen_moe_jax.storage.placement import local_bytes, place
from qwen_moe_jax.storage.progress import bytes_bar
from qwen_moe_jax.storage.tensor import Index, StoredTensor

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_TASKS = {"CausalLM": "CAUSAL_LM", "SequenceClassifier": "SEQ_CLS", "TokenClassifier": "TOKEN_CLS"}
#: Fields of features that are not supported, and their neutral values.
_UNSUPPORTED = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "target_parameters": ([], None),
    "modules_to_save": ([], None),
    "layer_replication": ([], None),
    "trainable_token_indices": ([], {}, None),
}
_LISTED = 20


def save_adapter(model: Model, folder: str | PathLike[str], *, base: str = "") -> None:
    """Writes a model's adapters without its weights. Under several processes all call it.

    Args:
        model: with adapters (`add_lora`).
        folder: to write, under a temporary name first; other files in it are kept.
        base: name or folder of the checkpoint that they were trained on, for `base_model_name_or_path`.

    Raises:
        ConfigError: the model has no adapters.
        CheckpointError: `folder` is a file or a mount point.
    """
    if model.lora is None:
        raise ConfigError(
            "the model has no low-rank adapters: add_lora gives it some, save_pretrained saves the model."
        )
    model.require_weights()
    parameters = [parameter for parameter in hub_parameters(model) if is_adapter(parameter.path)]
    config, folder = _config_to_peft(model, base), Path(folder)
    with replaced_folder(folder, _is_stale) as new, readable_tensors(parameters, scratch=new) as tensors:
        if is_process_zero():
            write_configs(new, {CONFIG: config})
            write_arrays(new / TENSORS, {_PREFIX + name: tensor.read() for name, tensor in tensors.items()})


def load_adapter(model: Model, folder: str | PathLike[str]) -> None:
    """Adds the adapters of a folder to a model; float32, sharded as the matrices they belong to.

    Args:
        model: with weights, without adapters.
        folder: as `save_adapter` and PEFT write it for models whose experts are modules; or a name on the Hub.

    Raises:
        ConfigError: the adapter is of another kind, or the model has adapters already.
        CheckpointError: the tensors do not fit this model; all problems in one message.
    """
    adapter = open_adapter(folder)
    parameters = {parameter.path: parameter for parameter in hub_parameters(model)}
    targets = []
    for matrix in matrices(model):
        names = [_base_of(name) for name in parameters[matrix.parameter_path].names.flat]
        if any(name in adapter.bases for name in names):
            targets.append(matrix.path)
    if not targets:
        raise CheckpointError(
            f"{adapter.folder}: none of its tensors fits a matrix of this model. Its first tensor is "
            f"{next(iter(adapter.tensors), 'missing')}."
        )
    add_lora(model, dataclasses.replace(adapter.config, target_modules=tuple(dict.fromkeys(targets))), rngs=None)
    wanted = [parameter for parameter in hub_parameters(model) if is_adapter(parameter.path)]
    if problems := _problems(adapter, wanted):
        remove_lora(model)
        _refuse(adapter.folder, problems)
    abstract = [parameter.leaf for parameter in wanted]
    with bytes_bar(f"Loading {adapter.folder.name}", local_bytes(abstract)) as advance:
        arrays = place([stacked_tensor(parameter, adapter.tensors) for parameter in wanted], abstract, advance)
    placed = {parameter.path: array for parameter, array in zip(wanted, arrays, strict=True)}
    for matrix in matrices(model):
        if matrix.lora is not None:
            for name in ("lora_A", "lora_B"):
                getattr(matrix.lora, name).set_value(placed[f"{matrix.lora_path}.{name}"])


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An opened adapter folder.

    Attributes:
        folder: the folder.
        config: rank and scaling; `target_modules` of adapter_config.json, if that is a list.
        tensors: by Hub name, as "model.layers.0.self_attn.q_proj.lora_A.weight".
    """

    folder: Path
    config: LoraConfig
    tensors: dict[str, StoredTensor]

    @property
    def bases(self) -> set[str]:
        """Paths of the adapted matrices, as "model.layers.0.self_attn.q_proj"."""
        return {re.sub(r"\.lora_[AB]\.weight$", "", name) for name in self.tensors}


def open_adapter(folder: str | PathLike[str]) -> Adapter:
    """Opens an adapter's folder, or one on the Hub.

    Raises:
        ConfigError: adapter_config.json is missing or asks for more than low-rank adapters of matrices.
        CheckpointError: the tensors are missing or damaged.
    """
    folder = adapter_folder(folder)
    path = folder / CONFIG
    peft = read_json(path)
    if peft.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type={peft.get('peft_type')!r} is not supported: expected 'LORA'.")
    for key, nothing in _UNSUPPORTED.items():
        if key in peft and peft[key] not in nothing:
            raise ConfigError(f"{path}: {key}={peft[key]!r} is not supported: expected {nothing[0]!r}.")
    targets = peft.get("target_modules")
    fields = {key: peft[key] for key in ("r", "lora_alpha", "use_rslora") if key in peft}
    listed = isinstance(targets, list) and bool(targets)
    config = LoraConfig(**fields, target_modules=tuple(targets) if listed else ("all-linear",))
    arrays = read_arrays(folder / TENSORS)
    tensors: dict[str, StoredTensor] = {name: ArrayTensor(array, TENSORS) for name, array in arrays.items()}
    strange = [name for name in tensors if not (name.startswith(_PREFIX) and is_adapter(name.removesuffix(".weight")))]
    if strange:
        _refuse(folder, [f"unexpected: {name}" for name in strange])
    return Adapter(folder, config, {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()})


def merged(tensors: Mapping[str, StoredTensor], adapter: Adapter) -> dict[str, StoredTensor]:
    """A checkpoint's tensors with the adapters added to the matrices they belong to, computed on read.

    Raises:
        CheckpointError: an adapter belongs to no tensor of the checkpoint, or has other sizes.
    """
    problems, sums = [], dict(tensors)
    for base in sorted(adapter.bases):
        weight = tensors.get(f"{base}.weight")
        a, b = (adapter.tensors.get(f"{base}.lora_{side}.weight") for side in "AB")
        if weight is None or a is None or b is None:
            problems.append(f"missing: {base}." + ("weight" if weight is None else "lora_A or lora_B"))
        elif (b.shape, a.shape) != ((weight.shape[0], adapter.config.r), (adapter.config.r, weight.shape[1])):
            problems.append(f"shape: {base} is {list(weight.shape)}, lora_B {list(b.shape)}, lora_A {list(a.shape)}")
        else:
            sums[f"{base}.weight"] = _MergedTensor(weight, a, b, adapter.config.scaling)
    if problems:
        _refuse(adapter.folder, problems)
    return sums


@dataclasses.dataclass(frozen=True)
class _MergedTensor(StoredTensor):
    """`weight + scaling · b a` in float32; the reader rounds it once."""

    weight: StoredTensor
    a: StoredTensor
    b: StoredTensor
    scaling: float

    dtype = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def source(self) -> str:
        return self.weight.source

    def read_into(self, index: Index, out: np.ndarray) -> None:
        rows, columns = index
        rank = slice(0, self.a.shape[0])
        a, b = self.a.read((rank, columns)).astype(np.float32), self.b.read((rows, rank)).astype(np.float32)
        out[...] = self.weight.read(index).astype(np.float32) + np.float32(self.scaling) * (b @ a)


def _config_to_peft(model: Model, base: str) -> dict[str, Any]:
    lora = model.lora
    head = next(head.__name__ for head in HEADS.values() if isinstance(model, head))
    return {
        "peft_type": "LORA",
        "task_type": _TASKS[head],
        "base_model_name_or_path": base or None,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.use_rslora,
        "target_modules": _target_modules(model),
        "bias": "none",
        "inference_mode": True,
    }


def _target_modules(model: Model) -> list[str] | str:
    """The last words of the adapted matrices' Hub names; a regular expression if other matrices end in them, too."""
    parameters = {parameter.path: parameter for parameter in hub_parameters(model)}
    adapted, others = set(), set()
    for matrix in matrices(model):
        side = others if matrix.lora is None else adapted
        side.update(_base_of(name) for name in parameters[matrix.parameter_path].names.flat)
    words = {name.rpartition(".")[2] for name in adapted}
    if not any(name.rpartition(".")[2] in words for name in others):
        return sorted(words)
    # Without layer numbers, and with optional expert numbers, which PEFT omits for fused experts.
    kinds = {re.sub(r"^model\.layers\.\d+\.", "", re.sub(r"\.experts\.\d+\.", ".experts.", name)) for name in adapted}
    paths = "|".join(re.escape(kind).replace(r"\.experts\.", r"\.experts\.(\d+\.)?") for kind in sorted(kinds))
    return rf".*\.layers\.\d+\.({paths})"


def _problems(adapter: Adapter, parameters: list[HubParameter]) -> list[str]:
    wanted = {name: parameter.tensor_shape for name, parameter, _ in hub_tensors(parameters)}
    found = adapter.tensors
    problems = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in found]
    problems += [f"unexpected: {name} {list(tensor.shape)}" for name, tensor in found.items() if name not in wanted]
    return problems + [
        f"shape: {name} is {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]


def _refuse(folder: Path, problems: list[str]) -> None:
    more = [f"… and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    listed = "\n  ".join(problems[:_LISTED] + more)
    raise CheckpointError(
        f"{folder}: {TENSORS} does not fit this model and {CONFIG} ({len(problems)} problems):\n  {listed}\n"
        "Expected adapters for every layer and every expert of a matrix, or for none."
    )


def _base_of(name: str) -> str:
    return name.removesuffix(".weight")


def _is_stale(name: str) -> bool:
    return name in (CONFIG, TENSORS, "adapter_model.bin")
