"""Names on the Hugging Face Hub → folders on this machine."""

import re
from os import PathLike
from pathlib import Path

from qwen_moe_jax.errors import CheckpointError, ConfigError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
#: What is downloaded: configs, tokenizers, templates, and the weights in one of their two formats.
_TEXTS = ["*.json", "*.txt", "*.jinja", "*.model"]


def is_hub_name(source: str) -> bool:
    """Whether this can be the name of a model on the Hub: owner/model."""
    return _NAME.fullmatch(source) is not None


def local_folder(source: str | PathLike[str]) -> Path:
    """The folder itself, or that of a Hub name in huggingface_hub's cache, downloaded unless it is there.

    Raises:
        CheckpointError: there is no such folder, and the Hub has no such model or cannot be reached.
    """
    return _local(source, weights=("model*.safetensors", "pytorch_model*.bin"))


def tokenizer_folder(source: str | PathLike[str]) -> Path:
    """`local_folder` for who needs the tokenizer alone: no weights are downloaded."""
    return _local(source, weights=())


def adapter_folder(source: str | PathLike[str]) -> Path:
    """`local_folder` for low-rank adapters in PEFT's layout."""
    return _local(source, weights=("adapter_model*.safetensors",))


def config_file(source: str | PathLike[str]) -> Path:
    """A folder or a config.json as it is, or the config.json of a Hub name, downloaded alone unless it is there.

    Raises:
        ConfigError: there is no such file or folder, and the Hub has no such model or cannot be reached.
    """
    path = Path(source)
    if path.exists():
        return path
    if not is_hub_name(str(source)):
        raise ConfigError(
            f"{source}: no such folder or config.json, and no name on the Hub (owner/model) either. Give one of these."
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), "config.json"))
    except (OSError, ValueError, RuntimeError) as error:  # its own errors are all of these kinds
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"{source}: there is no such folder, and its config.json could not be had from the Hub "
            f"({type(error).__name__}: {reason[0] if reason else ''}). Without a network, save it elsewhere and give "
            "the file or its folder."
        ) from None


def _local(source: str | PathLike[str], weights: tuple[str, ...]) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file, expected a checkpoint folder.")
    if not is_hub_name(str(source)):
        raise CheckpointError(
            f"{source}: no such folder, and no name on the Hub (owner/model) either. Download the checkpoint first and "
            "give its folder."
        )
    return _cached(str(source), weights)


def _cached(name: str, weights: tuple[str, ...]) -> Path:
    """Downloads the texts and the first of the forms of weights that there is."""
    from huggingface_hub import snapshot_download  # slow to import, and most folders are folders

    try:
        if not weights:
            return Path(snapshot_download(name, allow_patterns=_TEXTS))
        for form in weights:
            folder = Path(snapshot_download(name, allow_patterns=[*_TEXTS, form]))
            if any(folder.glob(form)):
                break
    except (OSError, ValueError, RuntimeError) as error:  # its own errors are all of these kinds
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{name}: there is no such folder, and the Hub could not be asked for a model of this name "
            f"({type(error).__name__}: {reason[0] if reason else ''}). Without a network, download it elsewhere "
            f"(hf download {name} --local-dir FOLDER) and give the folder."
        ) from None
    return folder
