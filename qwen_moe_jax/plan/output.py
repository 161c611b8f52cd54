"""Output of the planning commands: a plan's table, JSON and page; for a search, the ranking before them."""

import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.plan.page import MARK, write_plan_page
from qwen_moe_jax.plan.result import Plan
from qwen_moe_jax.plan.search import Search
from qwen_moe_jax.plan.search_table import Paste, print_search
from qwen_moe_jax.plan.table import print_plan
from qwen_moe_jax.whole_file import write_whole


def show_plan(make: Callable[[], Plan], target: str, *, json_to: str | None, html_to: str | None) -> None:
    """Makes a plan and prints its table, or its JSON for `-`; writes JSON and page to the files that are given.

    Args:
        make: compiles.
        target: as it was requested.
        json_to: a file, or `-`.
        html_to: a file for the page.

    Raises:
        ConfigError: a file cannot be written. What `make` raises.
    """
    _check_files(json_to, html_to)
    with Console(stderr=True).status(f"compiling for {target}"):
        plan = make()
    _write(plan, json_to, html_to)


def show_search(
    make: Callable[[], Search],
    target: str,
    paste: Paste,
    *,
    json_to: str | None,
    html_to: str | None,
) -> None:
    """Searches, prints the ranking, and shows the plan of the best mesh as `show_plan` does.

    The ranking goes to standard error where standard output has the JSON. Where no mesh fits, the plan is the one that
    lacks least.

    Args:
        make: searches.
        target: as it was requested.
        paste: a mesh and settings as the command at hand takes them.
        json_to: a file, or `-`.
        html_to: a file for the page.

    Raises:
        ConfigError: a file cannot be written. What `make` raises.
    """
    _check_files(json_to, html_to)
    with Console(stderr=True).status(f"trying meshes of {target}"):
        search = make()
    console = Console(stderr=json_to == "-", highlight=False)
    print_search(search, console, paste)
    console.print()
    _write(search.candidates[0].compiled_plan, json_to, html_to)


def _check_files(*files: str | None) -> None:
    """Refuses files without a folder and those of others, before minutes of compilation."""
    for file in files:
        if not file or file == "-":
            continue
        path = Path(file)
        if not path.parent.is_dir():
            raise ConfigError(f"{file}: there is no folder {path.parent} to write into.")
        if path.exists() and not (path.is_file() and _is_plan(path)):
            raise ConfigError(f"{file} exists and was not written by this command: give another name, or delete it.")


def _is_plan(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(200)
    return MARK.encode() in start or start.startswith(b'{\n "target": {')


def _write(plan: Plan, json_to: str | None, html_to: str | None) -> None:
    try:
        if html_to:
            write_plan_page(plan, Path(html_to))
        if json_to and json_to != "-":
            write_whole(Path(json_to), plan.to_json())
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be written ({error.strerror}).") from None
    if json_to == "-":
        sys.stdout.write(plan.to_json())
    else:
        print_plan(plan)
