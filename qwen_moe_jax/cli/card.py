"""`qwen-moe-jax card`: the model card of a checkpoint folder."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_moe_jax.errors import CheckpointError

if TYPE_CHECKING:
    from qwen_moe_jax.huggingface.model_card import ModelCard

SUMMARY = "write a folder's model card: README.md with the Hub's metadata, from its config, its run and its results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a complete Hub folder")
    add_card_arguments(parser)
    parser.add_argument("--replace", action="store_true", help="replace the README.md that the folder has")


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """What the checkpoint itself does not say."""
    group = parser.add_argument_group("what the card says in addition to the checkpoint")
    group.add_argument("--base-model", action="append", metavar="NAME", help="a model on the Hub that it was made of")
    group.add_argument("--license", metavar="NAME", help="the Hub's name of a licence, for example apache-2.0")
    group.add_argument("--tag", action="append", default=[], metavar="TAG", help="a tag; several by several --tag")
    group.add_argument(
        "--run",
        metavar="FOLDER",
        help="of the training run: its settings and held-out losses are shown; found by itself for RUN/hub",
    )
    group.add_argument(
        "--results",
        action="append",
        default=[],
        metavar="FILE",
        help="the JSON of qwen-moe-jax score or verify, or of lm-eval; several by several --results",
    )


def card_details(arguments: argparse.Namespace) -> "ModelCard":
    """Those of `add_card_arguments`."""
    from qwen_moe_jax.huggingface.model_card import ModelCard

    return ModelCard(
        base_model=None if arguments.base_model is None else tuple(arguments.base_model),
        license=arguments.license,
        tags=tuple(arguments.tag),
        run=arguments.run,
        results=tuple(arguments.results),
    )


def require_folder(folder: Path) -> None:
    """Checks that a folder is there, before anything is imported that takes seconds.

    Raises:
        CheckpointError: it is not.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Give the folder of a checkpoint.")


def run(arguments: argparse.Namespace) -> None:
    """Writes the card.

    Raises:
        CheckpointError: as `write_card`.
    """
    require_folder(arguments.folder)

    import jax

    jax.config.update("jax_platforms", "cpu")  # shapes only: no accelerator is needed

    from qwen_moe_jax.huggingface.model_card import write_card

    print(f"Wrote {write_card(arguments.folder, card_details(arguments), replace=arguments.replace)}.")
