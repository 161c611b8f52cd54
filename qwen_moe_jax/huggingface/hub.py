"""Model names on the Hugging Face Hub → local folders."""

import re
from os import PathLike
from pathlib import Path

from qwen_moe_jax.errors import CheckpointError, ConfigError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
#: Files that are always downloaded: configs, tokenizers, templates.
_TEXTS = ["*.json", "*.txt", "*.jinja", "*.model"]


def is_hub_name(source: str) -> bool:
    """Whether this is of the form of a model's name on the Hub: owner/model."""
    return _NAME.fullmatch(source) is not None


def local_folder(source: str | PathLike[str]) -> Path:
    """The folder itself, or the folder of a Hub name in huggingface_hub's cache, downloaded if it is not there.

    Raises:
        CheckpointError: no such folder, and the Hub has no such model or cannot be reached.
    """
    return _local(source, weights=("model*.safetensors", "pytorch_model*.bin"))


def tokenizer_folder(source: str | PathLike[str]) -> Path:
    """`local_folder` without weights: configs, tokenizer and chat template."""
    return _local(source, weights=())


def adapter_folder(source: str | PathLike[str]) -> Path:
    """`local_folder` of low-rank adapters in PEFT's layout."""
    return _local(source, weights=("adapter_model*.safetensors", "adapter_model.bin"))


def config_file(source: str | PathLike[str]) -> Path:
    """A folder or a config.json itself, or the config.json of a Hub name, downloaded alone if it is not cached.

    Raises:
        ConfigError: no such file or folder, and the Hub has no such model or cannot be reached.
    """
    path = Path(source)
    if path.exists():
        return path
    if not is_hub_name(str(source)):
        raise ConfigError(
            f"{source}: no such folder or config.json, and not a name on the Hub (owner/model). Give one of these."
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), "config.json"))
    except (OSError, ValueError, RuntimeError) as error:  # huggingface_hub's errors are subclasses of these
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"{source}: no such folder, and its config.json could not be downloaded from the Hub "
            f"({type(error).__name__}: {reason[0] if reason else ''}). Without a network, download it elsewhere and "
            "give the file or its folder."
        ) from None


def _local(source: str | PathLike[str], weights: tuple[str, ...]) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        fresh = f"CausalLM(ModelConfig.from_pretrained({str(path)!r}), rngs=nnx.Rngs(0))"
        raise CheckpointError(
            f"{path} is a file, expected a checkpoint folder."
            + (f" From a config file, for fresh weights: {fresh}." if path.suffix == ".json" else "")
        )
    if not is_hub_name(str(source)):
        raise CheckpointError(
            f"{source}: no such folder, and not a name on the Hub (owner/model). Download the checkpoint first and "
            "give its folder."
        )
    return _cached(str(source), weights)


def _cached(name: str, weights: tuple[str, ...]) -> Path:
    """Downloads the small files, and the weights in the first format that the model has."""
    from huggingface_hub import snapshot_download  # slow to import, and most sources are folders

    try:
        if not weights:
            return Path(snapshot_download(name, allow_patterns=_TEXTS))
        for pattern in weights:
            folder = Path(snapshot_download(name, allow_patterns=[*_TEXTS, pattern]))
            if any(folder.glob(pattern)):
                break
    except (OSError, ValueError, RuntimeError) as error:  # huggingface_hub's errors are subclasses of these
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{name}: no such folder, and no model of this name could be downloaded from the Hub "
            f"({type(error).__name__}: {reason[0] if reason else ''}). Without a network, download it elsewhere "
            f"(hf download {name} --local-dir FOLDER) and give the folder."
        ) from None
    return folder
