"""`qwen-moe-jax route`: which experts a prompt's tokens chose, layer by layer."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_moe_jax.cli.arguments import add_model_arguments, load_model, number_ranges
from qwen_moe_jax.cli.prompts import Prompt, read_prompts
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.whole_file import write_whole

if TYPE_CHECKING:
    from qwen_moe_jax.cli.routing import PromptRouting

SUMMARY = "show which experts every token of a prompt chose, with which weight, and which were dropped"

#: Near the start of every file that this command writes, so that it overwrites no others.
MARK = "qwen-moe-jax route"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to route")
    prompt.add_argument(
        "--file",
        type=Path,
        metavar="FILE",
        help="a file whose whole content is the text to route, or a .jsonl file of one line, a request as "
        "generate takes it: a conversation is written by the chat template",
    )
    parser.add_argument(
        "--layers",
        type=number_ranges,
        metavar="N,N-N",
        help="look at these layers, for example 0,3-5; all if not given",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a self-contained HTML page, instead of tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, instead of tables")


def run(arguments: argparse.Namespace) -> None:
    """Prints the tables, or writes the requested files.

    Raises:
        RequestError: a prompt, requests, layers or files that cannot be; nothing has been loaded or written then.
        ConfigError, CheckpointError, ShardingError: as `from_pretrained` and `make_mesh`.
    """
    files = [path for path in (arguments.html, arguments.json) if path is not None]
    for path in files:
        _check_replaceable(path)

    from rich.console import Console

    from qwen_moe_jax.cli.routing import routed_layers, trace_routing
    from qwen_moe_jax.config import ModelConfig
    from qwen_moe_jax.huggingface.hub import local_folder
    from qwen_moe_jax.inference.chat_template import load_chat_template
    from qwen_moe_jax.inference.tokenizer import encode_prompt, load_tokenizer

    # Weights take minutes to read: all that can be refused without them is refused first.
    folder = local_folder(arguments.folder)
    config = ModelConfig.from_pretrained(folder)
    layers = routed_layers(config, arguments.layers)
    tokenizer = load_tokenizer(folder)
    prompt = _prompt(arguments)
    text = prompt.rendered(load_chat_template(folder).render if prompt.is_conversation else None)
    special_tokens = not prompt.is_conversation
    encode_prompt(tokenizer, text, config.vocab_size, add_special_tokens=special_tokens)

    model = load_model(arguments)
    with Console(stderr=True).status("routing the prompt"):
        name = arguments.folder.resolve().name
        routing = trace_routing(model, tokenizer, text, name=name, layers=layers, add_special_tokens=special_tokens)

    if arguments.html is not None:
        from qwen_moe_jax.cli.routing_page import routing_page

        _write(arguments.html, routing_page(routing, mark=MARK))
    if arguments.json is not None:
        _write(arguments.json, routing_json(routing))
    if not files:
        from qwen_moe_jax.cli.routing_table import print_routing

        print_routing(routing, Console(highlight=False))


def routing_json(routing: "PromptRouting") -> str:
    """The routing as JSON: the fields of `PromptRouting`, arrays as nested lists."""
    content = {"written_by": MARK, **dataclasses.asdict(routing)}
    return json.dumps(content, ensure_ascii=False, default=lambda array: array.tolist()) + "\n"


def _prompt(arguments: argparse.Namespace) -> Prompt:
    """The one prompt of the command line or of its file."""
    prompts = read_prompts([arguments.prompt if arguments.file is None else arguments.file])
    if len(prompts) != 1:
        raise RequestError(f"{arguments.file}: found {len(prompts)} requests, expected one: route shows one prompt.")
    return prompts[0]


def _check_replaceable(path: Path) -> None:
    if not path.parent.is_dir():
        raise RequestError(f"{path}: there is no folder {path.parent} to write into.")
    if not path.exists():
        return
    if not path.is_file():
        raise RequestError(f"{path} is not a file, expected one to write or none yet.")
    with path.open("rb") as file:
        if MARK.encode() not in file.read(200):
            raise RequestError(f"{path} exists and was not written by this command: give another name, or delete it.")


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise RequestError(f"{path}: cannot be written ({error.strerror}).") from None
    print(f"Wrote {path}, {path.stat().st_size / 1e3:,.0f} kB.")
