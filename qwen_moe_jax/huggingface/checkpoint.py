"""A checkpoint folder of any layout, opened: its config, its tensors under the Hub's names, and its problems."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.huggingface.config import config_from_hub, text_part
from qwen_moe_jax.huggingface.families import family_of
from qwen_moe_jax.huggingface.fields import read_json
from qwen_moe_jax.huggingface.files import HARMLESS, VISION, Files, open_files
from qwen_moe_jax.huggingface.layouts import EMBEDDING, HEAD, in_hub_form, tied
from qwen_moe_jax.huggingface.linear_rows import published_name
from qwen_moe_jax.huggingface.quantised.method import opener_of
from qwen_moe_jax.huggingface.tensors import HubParameter, hub_parameters, hub_tensors
from qwen_moe_jax.huggingface.unused_fields import say_once
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.model.causal_lm import CausalLM, SequenceClassifier, TokenClassifier
from qwen_moe_jax.storage.prefetch import prefetch
from qwen_moe_jax.storage.tensor import Index, StackedTensor, StoredTensor, TensorSlice, ZeroPaddedTensor, blocks

#: The subfolder of a native folder that is its Orbax checkpoint.
ORBAX = "orbax"
#: A field of a native folder's config.json that the Hub does not have: routers have DeepSeek-V3's balancing bias.
BALANCING_BIAS = "qwen_moe_jax_balancing_bias"

#: Model classes by the suffix of their class names in transformers.
HEADS: dict[str, type[Model]] = {
    "ForCausalLM": CausalLM,
    "ForSequenceClassification": SequenceClassifier,
    "ForTokenClassification": TokenClassifier,
}

#: First word of the names of the next-token head's tensors.
MTP = "mtp."
#: Parameters of linear layers that some checkpoints store in float32 whatever the dtype of the others.
_OFTEN_FLOAT32 = re.compile(r"\.linear_attn\.(A_log|norm\.weight)$")

#: Dtypes of stored weights.
FLOATS = ("float32", "bfloat16", "float16")
#: Behind the name of a tensor of a model that PEFT has wrapped.
ADAPTED = ": of a model with PEFT's adapters inside; call merge_and_unload() and save_pretrained there"
_LISTED = 40
#: Rows of a head over a network that are compared with those of the embedding.
_REMOTE_ROWS = 16
#: Bytes per block of a check.
_BLOCK = 64 << 20


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened folder; only headers are read.

    Attributes:
        folder: the folder.
        config: of config.json; its dtypes, tied head and next-token head are corrected by the tensors.
        head: the class that config.json names; CausalLM if it names no known one.
        tensors: by the names of `hub_parameters`.
        ignored: names of tensors that no forward pass reads.
        problems: found in the files, a line each.
        whole: False if some files could not be opened, which may have the missing tensors.
        native: whether it is an Orbax folder of this package, and not a Hub folder.
    """

    folder: Path
    config: ModelConfig
    head: type[Model]
    tensors: dict[str, StoredTensor]
    ignored: tuple[str, ...]
    problems: tuple[str, ...]
    whole: bool
    native: bool


def open_checkpoint(
    folder: Path,
    *,
    drop_mtp: bool = False,
    content: Mapping[str, Any] | None = None,
    adapt: Callable[[dict[str, StoredTensor]], dict[str, StoredTensor]] | None = None,
    files: Files | None = None,
) -> Checkpoint:
    """Opens a Hub folder or a native one.

    Args:
        folder: the folder.
        drop_mtp: leave out the next-token head, where the files have one.
        content: of config.json, in place of what the file says.
        adapt: applied to the tensors of a Hub folder, under the names of its files.
        files: that hold the tensors; None opens those of the folder.

    Raises:
        ConfigError: config.json is missing or not supported.
        CheckpointError: the folder has no weights.
    """
    path = folder / "config.json"
    hub = text_part(read_json(path) if content is None else content, str(path))
    config = config_from_hub(hub, str(path))
    head = head_of(hub)
    if (folder / ORBAX).is_dir():
        if hub.get(BALANCING_BIAS) is True and config.moe is not None:
            config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, balancing_bias=True))
        return _open_native(folder, config, head, drop_mtp=drop_mtp)
    files, wrappers = (files or open_files(folder)).without_wrappers()
    if wrappers:
        say_once(
            f"{folder}: all tensor names begin with {wrappers!r}, which a wrapper of the model left; it is removed."
        )
    config = dataclasses.replace(config, dtype=config.dtype or _stored_dtype(files.tensors))
    dequantise = opener_of(hub, str(path))
    tensors, wrong = (files.tensors, []) if dequantise is None else dequantise(files.tensors)
    tensors = tensors if adapt is None else adapt(tensors)
    tensors, twice = in_hub_form(tensors, config)
    if vision := sum(1 for name in tensors if VISION.search(name)):
        say_once(f"{folder}: the text model alone is loaded: {vision} tensors of its vision tower are skipped.")
    has_mtp = _has_mtp(folder, hub, config, tensors, drop_mtp=drop_mtp)
    config = _with_stored_parts(config, tensors, has_mtp)
    ignored = tuple(name for name in tensors if HARMLESS.search(name) and not (has_mtp and name.startswith(MTP)))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in set(ignored)}
    problems = (*files.problems, *wrong, *twice)
    if config.tie_word_embeddings and {EMBEDDING, HEAD} & tensors.keys():
        tensors, really = tied(tensors, readable=not problems, rows=_REMOTE_ROWS if files.is_remote else None)
        config = dataclasses.replace(config, tie_word_embeddings=really)
    return Checkpoint(folder, config, head, tensors, ignored, problems, _is_whole(files), native=False)


def _has_mtp(
    folder: Path,
    hub: Mapping[str, object],
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    *,
    drop_mtp: bool,
) -> bool:
    """Whether to load a next-token head: if the files have one, whatever the config says, unless it says 0."""
    if not family_of(config.model_type, "config").mtp or drop_mtp or hub.get("mtp_num_hidden_layers") == 0:
        return False
    found = any(name.startswith(MTP) for name in tensors)
    if config.num_mtp_layers and not found:
        say_once(f"{folder}: it has no tensors {MTP}*: the model is loaded without its next-token head.")
    return found


def _with_stored_parts(config: ModelConfig, tensors: Mapping[str, StoredTensor], has_mtp: bool) -> ModelConfig:
    """The config with what only the files say: whether there is a next-token head, and what is stored in float32."""
    config = dataclasses.replace(config, num_mtp_layers=int(has_mtp))
    if config.linear_attention is None or config.dtype == "float32":
        return config
    float32 = any(tensor.dtype == "float32" for name, tensor in tensors.items() if _OFTEN_FLOAT32.search(name))
    linear = dataclasses.replace(config.linear_attention, float32_parameters=float32)
    return dataclasses.replace(config, linear_attention=linear)


def _open_native(folder: Path, config: ModelConfig, head: type[Model], *, drop_mtp: bool) -> Checkpoint:
    from qwen_moe_jax.storage.orbax import stored_tensors  # Orbax is slow to import, and most folders are Hub folders

    stored = stored_tensors(folder / ORBAX)
    ignored = tuple(name for name in stored if drop_mtp and name.startswith(MTP))
    stored = {name: tensor for name, tensor in stored.items() if name not in ignored}
    config = _with_stored_parts(config, stored, any(name.startswith(MTP) for name in stored))
    abstract = head(config, rngs=None)
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for parameter in hub_parameters(abstract):
        if parameter.path not in stored:
            continue
        found = stored.pop(parameter.path)
        if found.shape != parameter.leaf.shape:
            expected = list(parameter.leaf.shape)
            problems.append(f"shape: {parameter.path} is {list(found.shape)} in {ORBAX}, expected {expected}")
        tensors |= {name: TensorSlice(found, index) for index, name in np.ndenumerate(parameter.names)}
    # The remaining arrays belong to no parameter, and are reported as unexpected.
    return Checkpoint(folder, config, head, tensors | stored, ignored, tuple(problems), whole=True, native=True)


def _is_whole(files: Files) -> bool:
    return bool(files.tensors) and not files.unreadable


def head_of(hub: Mapping[str, object]) -> type[Model]:
    """The class that a config.json names in `architectures`; CausalLM if it names no known one."""
    named = hub.get("architectures")
    for name in named if isinstance(named, list) else ():
        for ending, head in HEADS.items():
            if isinstance(name, str) and name.endswith(ending):
                return head
    return CausalLM


def _stored_dtype(tensors: Mapping[str, StoredTensor]) -> str | None:
    """The dtype of a config without one: that of the first floating-point tensor, as in transformers.

    Tensors that may be in float32 for themselves are passed over.
    """
    own = (tensor.dtype for name, tensor in tensors.items() if not _OFTEN_FLOAT32.search(name))
    return next((dtype for dtype in own if dtype in FLOATS), None)


def problems_of(checkpoint: Checkpoint, parameters: list[HubParameter], optional: Iterable[str] = ()) -> list[str]:
    """Every reason why a checkpoint does not load as a model with these parameters, a line each.

    Args:
        checkpoint: the folder.
        parameters: of the model.
        optional: names of tensors that the model does not use and the checkpoint may have; those of a next-token head
            are, where the model has none.
    """
    problems = list(checkpoint.problems)
    tensors, optional = checkpoint.tensors, set(optional)
    wanted = {name: parameter.tensor_shape for name, parameter, _ in hub_tensors(parameters)}
    if not any(name.startswith(MTP) for name in wanted):
        optional |= {name for name in tensors if name.startswith(MTP)}
    renamed = _common_prefix(tensors, wanted)
    if renamed is not None:
        return [*problems, renamed]
    if checkpoint.whole:
        problems += [_missing(name, shape, checkpoint) for name, shape in wanted.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name in optional:
            continue
        if name not in wanted:
            hint = ADAPTED if ".base_layer." in name or ".lora_" in name else ""
            problems.append(f"unexpected: {name} {list(tensor.shape)} in {tensor.source}{hint}")
        elif tensor.shape != wanted[name]:
            problems.append(f"shape: {name} is {list(tensor.shape)} in {tensor.source}, expected {list(wanted[name])}")
        elif tensor.dtype not in FLOATS:
            hint = ": save the model in float32" if tensor.dtype == "float64" else ""
            expected = f"expected one of {', '.join(FLOATS)}{hint}"
            problems.append(f"dtype: {name} is {tensor.dtype} in {tensor.source}, {expected}")
    return problems


def _common_prefix(tensors: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[int, ...]]) -> str | None:
    """The line for names that are the model's behind a prefix which all of them have, in place of hundreds of lines."""
    if not tensors or wanted.keys() & tensors.keys():
        return None
    for name in list(wanted)[:_LISTED]:
        prefix = next((other.removesuffix(name) for other in tensors if other.endswith(f".{name}")), None)
        if prefix and all(other.startswith(prefix) for other in tensors):
            known = sum(other.removeprefix(prefix) in wanted for other in tensors)
            return (
                f"names: all {len(tensors)} tensor names begin with {prefix!r}, expected names without it, as {name}; "
                f"{known} of them are the model's then. Rename them and save the file again"
            )
    return None


def _missing(name: str, shape: tuple[int, ...], checkpoint: Checkpoint) -> str:
    """The line for a missing tensor; for one that is missing for a known reason, with the way out."""
    line = f"missing: {name} {list(shape)}"
    published = published_name(name, checkpoint.config)
    if published != name and not checkpoint.native:
        line += f", rows of {published}"
    if name == HEAD and EMBEDDING in checkpoint.tensors:
        where = " (in its text_config, if it has one)" if family_of(checkpoint.config.model_type, "config").mtp else ""
        return (
            f"{line}: add it, or set tie_word_embeddings to true in config.json{where} if the head is the token table"
        )
    if name.startswith(MTP):
        ways = "drop_mtp=True in Python, convert --drop-mtp, --run.drop_mtp true in training"
        return f"{line}: add it, or load without the next-token head ({ways})"
    if name == "score.weight":
        return f"{line}: pass rngs=nnx.Rngs(0) to initialise a head that is to be trained"
    return line


def non_finite(tensors: Mapping[str, StoredTensor], advance: Callable[[int], None]) -> list[str]:
    """Reads every tensor once, block by block; returns those with infinities or NaN, a line each."""
    parts = (
        (name, tensor, block)
        for name, tensor in tensors.items()
        for block in blocks(tensor.shape, np.dtype(tensor.dtype).itemsize, _BLOCK)
    )

    def count(part: tuple[str, StoredTensor, Index]) -> tuple[str, int, int]:
        name, tensor, block = part
        values = tensor.read(block)
        return name, int(values.size - np.isfinite(values).sum()), values.nbytes

    found: Counter[str] = Counter()
    for name, number, size in prefetch(count, parts):
        found[name] += number
        advance(size)
    return [
        f"not finite: {name} in {tensors[name].source} has {number} values that are infinite or NaN"
        for name, number in found.items()
        if number
    ]


def require_no_problems(folder: Path, problems: list[str]) -> None:
    """Raises a CheckpointError that lists the problems, if there are any."""
    if not problems:
        return
    more = [f"… and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    listed = "\n  ".join(problems[:_LISTED] + more)
    raise CheckpointError(
        f"{folder}: its tensors do not fit its config.json ({count}):\n  {listed}\n"
        "Check that config.json belongs to these files and that the download is complete."
    )


def stacked_tensor(parameter: HubParameter, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    """A parameter as the stack of its Hub tensors, with the padding that the mesh needs."""
    grid = np.empty(parameter.names.shape, object)
    for index, name in np.ndenumerate(parameter.names):
        grid[index] = tensors[name]
    stacked = StackedTensor(grid, str(parameter.leaf.dtype))
    return stacked if parameter.shape == parameter.leaf.shape else ZeroPaddedTensor(stacked, parameter.leaf.shape)
