"""Prompts of `generate`: from the command line, files, standard input, or one request a line of a .jsonl file."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.message_content import joined_parts
from qwen_moe_jax.storage.git_lfs import lfs_problem
from qwen_moe_jax.text_files import decode_text

_EXPECTED = 'expected {"prompt": "…"} or {"messages": [{"role": …, "content": …}, …]}, the latter also with "tools"'

Render = Callable[..., str]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text to be continued.

    Attributes:
        text: of the prompt; for a conversation, once `rendered`.
        request: the line of a .jsonl file that has messages; None for a text.
    """

    text: str = ""
    request: Mapping[str, Any] | None = None

    @property
    def is_conversation(self) -> bool:
        """Whether a chat template writes the text, with all its special tokens."""
        return self.request is not None

    def rendered(self, render: Render | None) -> str:
        """The text, for a conversation by the chat template's `render`.

        Raises:
            RequestError: the template refuses the messages.
        """
        if self.request is None or render is None:
            return self.text
        variables = {name: value for name, value in self.request.items() if name != "messages"}
        return render(self.request["messages"], **variables)


def read_prompts(sources: Iterable[str | Path | None]) -> list[Prompt]:
    """The prompts of texts, files and standard input (None), in order.

    Raises:
        RequestError: a file that cannot be read, or a line of a .jsonl file that is no request.
    """
    prompts: list[Prompt] = []
    for source in sources:
        if isinstance(source, Path) and source.suffix == ".jsonl":
            prompts += _requests(source)
        else:
            prompts.append(Prompt(text=source if isinstance(source, str) else _content(source)))
    return prompts


def _content(source: Path | None) -> str:
    try:
        content = sys.stdin.buffer.read() if source is None else source.read_bytes()
    except OSError as error:
        raise RequestError(f"{source}: cannot be read ({error.strerror}).") from None
    if source is not None and (problem := lfs_problem(source)) is not None:
        raise RequestError(f"{source}: {problem}.")
    try:
        return decode_text(content)
    except UnicodeDecodeError:
        # Kept, so that the prompt is refused for them, and not for something else.
        return content.decode("utf-8", "surrogateescape")


def _requests(path: Path) -> list[Prompt]:
    lines = enumerate(_content(path).split("\n"), 1)  # JSON strings may have other line ends
    found = [_request(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    if not found:
        raise RequestError(f"{path}: found no request, expected one a line: {_EXPECTED}.")
    return found


def _request(where: str, line: str) -> Prompt:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: is not JSON ({error}), {_EXPECTED}.") from None
    if not isinstance(request, dict) or ("prompt" in request) == ("messages" in request):
        raise RequestError(f"{where}: found {line.strip():.60}, {_EXPECTED}.")
    known = {"prompt"} if "prompt" in request else {"messages", "tools"}
    unknown = [name for name in request if name not in known]
    if unknown:
        raise RequestError(
            f"{where}: found the field {unknown[0]!r}, {_EXPECTED}. Settings are given on the command line, for all."
        )
    if "messages" in request:
        return Prompt(request={**request, "messages": _with_texts(request["messages"], where)})
    if not isinstance(request["prompt"], str):
        raise RequestError(f"{where}: prompt is of type {type(request['prompt']).__name__}, expected a string.")
    return Prompt(text=request["prompt"])


def _with_texts(messages: Any, where: str) -> Any:
    """Messages whose content is a text where it is a list of parts; what is no message is left to the template."""
    if not isinstance(messages, list):
        return messages
    found = []
    for number, message in enumerate(messages):
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            try:
                message = {**message, "content": joined_parts(message["content"])}
            except ValueError as error:
                raise RequestError(f"{where}: messages[{number}].content: {error}.") from None
        found.append(message)
    return found
