"""Model, or checkpoint folder → repository on the Hub: in one commit, so that a partial upload is never seen."""

import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import jax

from qwen_moe_jax.errors import CheckpointError, ConfigError
from qwen_moe_jax.huggingface.files import is_weights
from qwen_moe_jax.huggingface.hub import HubModel, explained, hub_model, is_hub_name
from qwen_moe_jax.huggingface.model_card import CARD, ModelCard, complete_summary
from qwen_moe_jax.huggingface.model_card import model_card as card_text
from qwen_moe_jax.huggingface.save import save_pretrained
from qwen_moe_jax.model.base import Model
from qwen_moe_jax.sharding.distributed import barrier, is_process_zero

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def push_to_hub(
    model: Model,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "5GB",
    model_card: ModelCard = ModelCard(),
    folder: str | PathLike[str] | None = None,
) -> str | None:
    """Saves a model as `save_pretrained` does, and uploads it with a model card in one commit.

    Under several processes all call it; process 0 uploads.

    Args:
        model: any head.
        repo_id: "owner/model", which is created if it does not exist.
        commit_message: None names the model's class.
        private: whether a new repository is private; None is the account's default.
        token: None is HF_TOKEN, or that of `hf auth login`.
        revision: a branch, created if it does not exist; None is main.
        create_pr: make the commit a pull request.
        max_shard_size: bytes of a file, or for example "5GB".
        model_card: what the card says that the checkpoint does not. A card that the repository has is kept.
        folder: to write the files into, which are kept; None is a temporary one. Several hosts need one that all see.

    Returns:
        The address of the commit, or of the pull request; None on other processes than 0.

    Raises:
        ConfigError: as `save_pretrained`; several hosts without `folder`.
        CheckpointError: the Hub cannot be reached or refuses it: nothing of the repository has changed then.
    """
    options: dict[str, Any] = dict(
        commit_message=commit_message or f"Upload {type(model).__name__}",
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        model_card=model_card,
    )
    _repository(repo_id)
    if folder is None and jax.process_count() > 1:
        raise ConfigError("push_to_hub under several processes needs folder=…, a folder that all hosts see.")
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "model" if folder is None else Path(folder)
        save_pretrained(model, target, max_shard_size=max_shard_size)
        url = push_folder(target, repo_id, **options) if is_process_zero() else None
        barrier(f"uploaded {repo_id}")
    return url


def push_folder(
    folder: str | PathLike[str],
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    model_card: ModelCard = ModelCard(),
) -> str:
    """Uploads a Hub folder, or one of adapters in PEFT's layout, in one commit.

    Weights that the repository has under other names are removed in the same commit, so that no loader mixes them with
    the new ones. A folder without README.md gets a model card in the repository, unless that has one.

    Args:
        folder: that loads: this is checked first, by its headers.
        repo_id, commit_message, private, token, revision, create_pr, model_card: as in `push_to_hub`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        CheckpointError: the folder does not load; the Hub cannot be reached or refuses it: nothing of the repository
            has changed then.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = Path(folder)
    model = _repository(repo_id, token=token, revision=revision)
    files = _uploaded(folder)
    card = None if CARD in files or _is_adapter(folder) else card_text(folder, model_card, name=model.name)
    api = HfApi(token=token)
    with explained(model, upload=True):
        api.create_repo(model.name, private=private, exist_ok=True)
        if model.revision is not None and not create_pr:
            api.create_branch(model.name, branch=model.revision, exist_ok=True)
        present = api.list_repo_files(model.name, revision=model.revision)
        stale = [name for name in present if is_weights(name) and name not in files]
        operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        if card is not None and CARD not in present:
            operations.append(CommitOperationAdd(CARD, card.encode()))
        done = api.create_commit(
            model.name,
            operations,
            commit_message=commit_message or f"Upload {folder.resolve().name}",
            revision=model.revision,
            create_pr=create_pr,
        )
    return done.pr_url or done.commit_url


def _repository(repo_id: str, *, token: str | None = None, revision: str | None = None) -> HubModel:
    if not is_hub_name(repo_id):
        raise CheckpointError(
            f"{repo_id}: is not the name of a repository on the Hub; expected owner/model or owner/model@branch."
        )
    return hub_model(repo_id, token=token, revision=revision)


def _is_adapter(folder: Path) -> bool:
    return (folder / _ADAPTER[0]).is_file()


def _uploaded(folder: Path) -> dict[str, Path]:
    """The files of a complete folder by their names in the repository; hidden ones are left out."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Give the folder of a checkpoint.")
    if _is_adapter(folder):
        if not (folder / _ADAPTER[1]).is_file():
            raise CheckpointError(f"{folder}: has {_ADAPTER[0]} and no {_ADAPTER[1]}. Save the adapters again.")
    else:
        complete_summary(folder)
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return {name.as_posix(): folder / name for name in names if not any(part.startswith(".") for part in name.parts)}
