"""`qwen-moe-jax push`: a checkpoint folder to the Hub."""

import argparse
from pathlib import Path

from qwen_moe_jax.cli.card import add_card_arguments, card_details, require_folder

SUMMARY = "upload a checkpoint or adapter folder to the Hub, in one commit, with a model card if it has none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a complete Hub folder, or one of PEFT's adapters")
    parser.add_argument("repo", metavar="REPO", help="owner/model, or owner/model@branch; created if it is not there")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether a new repository is private; the account's default if not given",
    )
    parser.add_argument("--revision", metavar="BRANCH", help="created if it is not there; main if not given")
    parser.add_argument("--create-pr", action="store_true", help="make it a pull request")
    add_card_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Uploads, and prints the address of the commit.

    Raises:
        CheckpointError: as `push_folder`; the repository is unchanged then.
    """
    require_folder(arguments.folder)

    import jax

    jax.config.update("jax_platforms", "cpu")  # shapes only: no accelerator is needed

    from qwen_moe_jax.huggingface.push import push_folder

    url = push_folder(
        arguments.folder,
        arguments.repo,
        commit_message=arguments.message,
        private=arguments.private,
        revision=arguments.revision,
        create_pr=arguments.create_pr,
        model_card=card_details(arguments),
    )
    print(f"Uploaded {arguments.folder} to {arguments.repo}: {url}")
