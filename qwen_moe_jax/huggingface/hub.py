"""Models on the Hugging Face Hub: their names, and local folders with the files that are needed of them."""

import contextlib
import dataclasses
import glob
import re
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

from qwen_moe_jax.errors import CheckpointError, ConfigError

_NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
#: Files that are always downloaded: configs, tokenizers, templates, the index of the weights.
_TEXTS = ("*.json", "*.txt", "*.jinja", "*.model")
_TORCH = ("pytorch_model.bin", "pytorch_model-*.bin")
#: What huggingface_hub raises: most of its errors are subclasses of these, the others are of these libraries.
_ERRORS, _LIBRARIES = (OSError, ValueError, RuntimeError), ("huggingface_hub", "httpx", "requests", "hf_xet")


@dataclasses.dataclass(frozen=True)
class HubModel:
    """A model on the Hub. What is None is huggingface_hub's own choice: `main`, HF_TOKEN or the login, HF_HUB_CACHE.

    Attributes:
        name: "owner/model".
        revision: a branch, a tag or a commit.
        token: for private and gated models.
        cache_dir: folder of downloads.
    """

    name: str
    revision: str | None = None
    token: str | None = dataclasses.field(default=None, repr=False)
    cache_dir: str | PathLike[str] | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    def at(self, folder: Path) -> "HubModel":
        """The same at the commit of a folder of the cache, so that all files are of one commit."""
        return dataclasses.replace(self, revision=folder.name)


def is_hub_name(source: str) -> bool:
    """Whether this is of the form of a model's name on the Hub: owner/model, or owner/model@revision."""
    return _NAME.fullmatch(source) is not None


def hub_model(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
) -> HubModel:
    """The model of a name; `revision` counts before one in the name.

    Raises:
        CheckpointError: it is no name on the Hub.
    """
    found = _NAME.fullmatch(str(source))
    if found is None:
        raise CheckpointError(
            f"{source}: no such folder, and not a name on the Hub (owner/model). Download the checkpoint first and "
            "give its folder."
        )
    return HubModel(found[1], revision or found[2], token, cache_dir)


def local_folder(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
    drop_mtp: bool = False,
) -> Path:
    """The folder itself, or the folder of a Hub name in huggingface_hub's cache, with the files that are needed.

    These are configs and tokenizer, and of the weights the first of safetensors and PyTorch files that there are; of
    several files, those that an index gives a tensor of the text model.

    Args:
        source: a folder, "owner/model" or "owner/model@revision".
        revision, token, cache_dir: of `HubModel`; of a folder, without effect.
        drop_mtp: the next-token head is not needed.

    Raises:
        CheckpointError: no such folder, and the Hub has no such model or cannot be reached.
    """
    from qwen_moe_jax.huggingface.files import INDEX, SINGLE, needed_files  # imports NumPy, for which no --help waits

    path = _existing(source)
    if path is not None:
        return path
    model = hub_model(source, revision=revision, token=token, cache_dir=cache_dir)
    folder = download(model, _TEXTS)
    if (folder / INDEX).is_file():
        needed = needed_files(folder / INDEX, drop_mtp=drop_mtp)
        return download(model.at(folder), [glob.escape(name) for name in needed]) if needed else folder
    for patterns in ((SINGLE,), _TORCH):
        folder = download(model.at(folder), patterns)
        if any(file for pattern in patterns for file in folder.glob(pattern)):
            break
    return folder


def tokenizer_folder(source: str | PathLike[str]) -> Path:
    """`local_folder` without weights: configs, tokenizer and chat template."""
    return _existing(source) or download(hub_model(source), _TEXTS)


def adapter_folder(source: str | PathLike[str]) -> Path:
    """`local_folder` of low-rank adapters in PEFT's layout."""
    path = _existing(source)
    return path or download(hub_model(source), [*_TEXTS, "adapter_model.safetensors", "adapter_model.bin"])


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

    model = hub_model(source)
    with explained(model, ConfigError):
        return Path(hf_hub_download(model.name, "config.json", revision=model.revision))


def download(model: HubModel, patterns: Sequence[str]) -> Path:
    """Downloads the files of these patterns, subfolders aside, that are not in the cache; returns the model's folder.

    Raises:
        CheckpointError: the Hub has no such model or does not let it be read; it cannot be reached, and the files are
            not cached.
    """
    from huggingface_hub import snapshot_download  # slow to import, and most sources are folders

    with explained(model):
        folder = snapshot_download(
            model.name,
            revision=model.revision,
            token=model.token,
            cache_dir=None if model.cache_dir is None else Path(model.cache_dir),
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
        )
    return Path(folder)


@contextlib.contextmanager
def explained(
    model: HubModel, kind: type[CheckpointError | ConfigError] = CheckpointError, *, upload: bool = False
) -> Iterator[None]:
    """Errors of huggingface_hub within the block become one of this kind, with what they mean and the way out.

    That a file is not there (EntryNotFoundError) remains, unless it is a config. `upload`: the block writes.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        yield
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:
        is_absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        is_known = isinstance(error, _ERRORS) or type(error).__module__.startswith(_LIBRARIES)
        if is_known and (kind is ConfigError or not is_absent):
            raise kind(_problem(model, error, upload=upload)) from None
        raise


def _problem(model: HubModel, error: Exception, *, upload: bool) -> str:
    """What an error of huggingface_hub means, with the way out, in one line."""
    from huggingface_hub import constants, errors

    log_in = "log in (hf auth login), or set HF_TOKEN"
    elsewhere = f"download it elsewhere (hf download {model.name} --local-dir FOLDER) and give the folder"
    said = _first_line(error)
    reason = f"{type(error).__name__}: {said}"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # as huggingface_hub wraps errors of uploads
        reason = f"{reason} {type(error.__cause__).__name__}: {_first_line(error.__cause__)}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{model.name}"
        return f"{model}: the Hub gives access on conditions: accept them at {page}, then {log_in}."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model}: the Hub has no such revision of {model.name}. Give a branch, a tag or a commit that it has."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{model}: no such folder, and the Hub has no model of this name, or it is private. Check the name; for a "
            f"private one, {log_in}."
        )
    if status in (401, 403):
        return f"{model}: the Hub refuses access ({status}: {said}). For a token of an account that has it, {log_in}."
    if upload:
        return (
            f"{model}: could not be uploaded ({reason}). Nothing in the repository has changed. Run it again: what was "
            "sent is not sent twice."
        )
    if constants.HF_HUB_OFFLINE:
        cache = model.cache_dir or constants.HF_HUB_CACHE
        return (
            f"{model}: no such folder; HF_HUB_OFFLINE is set, and the model's files are not in the cache {cache} "
            f"({reason}). Unset it, or {elsewhere}."
        )
    return (
        f"{model}: no such folder, and no model of this name could be downloaded from the Hub ({reason}). Without a "
        f"network, {elsewhere}."
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def _existing(source: str | PathLike[str]) -> Path | None:
    """The source, if it is a folder; None for what may be a name on the Hub."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        fresh = f"CausalLM(ModelConfig.from_pretrained({str(path)!r}), rngs=nnx.Rngs(0))"
        raise CheckpointError(
            f"{path} is a file, expected a checkpoint folder."
            + (f" From a config file, for fresh weights: {fresh}." if path.suffix == ".json" else "")
        )
    return None
