"""Chat templates: a conversation rendered by the checkpoint's own Jinja template, in a sandbox.

A template is a program from the checkpoint. It is given plain data only, under the sandbox rules of transformers 5, and
renders the same text as transformers' `apply_chat_template`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from qwen_moe_jax.errors import CheckpointError, RequestError
from qwen_moe_jax.huggingface.fields import read_json
from qwen_moe_jax.storage.git_lfs import lfs_problem
from qwen_moe_jax.text_files import read_text

#: Fields of a message for the model's reasoning before its answer; templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class ChatTemplate:
    """The chat templates of a checkpoint; see `load_chat_template`.

    Attributes:
        folder: the checkpoint folder, for messages.
        templates: by name. "tool_use", where there is one, renders conversations with tools, "default" all others.
        special_tokens: the template variables `bos_token`, `eos_token` and so on.
    """

    folder: str
    templates: Mapping[str, jinja2.Template]
    special_tokens: Mapping[str, str]

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Writes a conversation as one text.

        The text holds all special tokens that it needs: make tokens of it by `encode(…, add_special_tokens=False)`.

        Args:
            messages: at least one, {"role": …, "content": …} and other fields that the template reads, as JSON data.
            add_generation_prompt: end with the beginning of the assistant's answer.
            variables: for the template, as plain JSON data: `tools` and `documents`, `enable_thinking` and the like.

        Raises:
            RequestError: messages or variables that are no such data, no template for them, or a template that refuses
                them or fails.
        """
        variables = {
            "tools": None,
            "documents": None,
            **self.special_tokens,
            **{name: _plain(value, name) for name, value in variables.items()},
        }
        name = "tool_use" if variables["tools"] is not None and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise RequestError(
                f"{self.folder}: no chat template is the default, found only {', '.join(sorted(self.templates))}."
            )
        messages = _checked(messages)
        try:
            return self.templates[name].render(
                messages=messages, add_generation_prompt=add_generation_prompt, **variables
            )
        except _Refused as error:
            raise RequestError(f"the chat template refuses the messages: {error}") from None
        except SecurityError as error:
            raise RequestError(f"{self.folder}: the chat template tried what its sandbox forbids ({error}).") from None
        except Exception as error:  # a template may raise anything
            strings = [text for message in messages for text in argument_strings(message)]
            hint = f" Are the arguments {strings[0]!r:.60} wanted as an object, not as a string?" if strings else ""
            raise RequestError(
                f"{self.folder}: the chat template fails on these messages ({type(error).__name__}: {error}).{hint}"
            ) from None


def argument_strings(message: Mapping[str, Any]) -> list[str]:
    """The arguments of a message's tool calls that are strings, as in OpenAI's format, and not objects."""
    calls = message.get("tool_calls")
    functions = [
        call.get("function", call) for call in (calls if isinstance(calls, list) else []) if isinstance(call, Mapping)
    ]
    found = [function.get("arguments") for function in functions if isinstance(function, Mapping)]
    return [arguments for arguments in found if isinstance(arguments, str)]


def load_chat_template(folder: str | PathLike[str]) -> ChatTemplate:
    """Reads a checkpoint folder's chat templates.

    As for transformers' tokenizers, they are read from chat_template.jinja and additional_chat_templates/*.jinja, else
    from tokenizer_config.json; else from chat_template.json, which in transformers only processors read.

    Raises:
        CheckpointError: there is none, or it is malformed.
        ConfigError: a file that is not JSON.
    """
    folder = Path(folder)
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    where, sources = _sources(folder, config)
    templates = {}
    for name, source in sources.items():
        try:
            templates[name] = _ENVIRONMENT.from_string(source)
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise CheckpointError(f"{where}: the chat template {name!r} is malformed{line} ({error}).") from None
    return ChatTemplate(str(folder), templates, _special_tokens(folder, config))


def _sources(folder: Path, config: Mapping[str, Any]) -> tuple[Path, dict[str, str]]:
    """Templates by name, and the file or folder they were read from."""
    single, others = folder / "chat_template.jinja", sorted(folder.glob("additional_chat_templates/*.jinja"))
    if single.is_file() or others:
        named = ([("default", single)] if single.is_file() else []) + [(path.stem, path) for path in others]
        return folder, {name: _read(path) for name, path in named}
    legacy = folder / "chat_template.json"
    found, where = config.get("chat_template"), folder / "tokenizer_config.json"
    if found is None and legacy.is_file():
        found, where = read_json(legacy).get("chat_template"), legacy
    if found is None:
        raise CheckpointError(
            f"{folder}: found no chat template, neither in chat_template.jinja nor in tokenizer_config.json. Base "
            "models have none: give them texts to continue, or put a template there."
        )
    if isinstance(found, str):
        return where, {"default": found}
    try:
        return where, {_string(entry["name"]): _string(entry["template"]) for entry in found}
    except (TypeError, KeyError):
        raise CheckpointError(
            f"{where}: chat_template is neither a string nor a list of objects with name and template."
        ) from None


def _read(path: Path) -> str:
    if (problem := lfs_problem(path)) is not None:
        raise CheckpointError(f"{path}: {problem}.")
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a chat template ({error}).") from None


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and all others ending so, of tokenizer_config.json; in old folders special_tokens_map.json wins."""
    named = dict(config)
    legacy = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and legacy.is_file():
        named |= read_json(legacy)
    extra = named.get("extra_special_tokens")
    named |= extra if isinstance(extra, dict) else {}
    tokens = {}
    for name, value in named.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as transformers gives them to a template: copies, without nulls, reasoning under both names."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"messages is of type {type(messages).__name__}, expected a list of messages.")
    if not messages:
        raise RequestError("the conversation is empty, expected at least one message.")
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f'message {number} is {message!r:.80}, expected {{"role": …, "content": …}}.')
        message = {name: value for name, value in _plain(message, f"message {number}").items() if value is not None}
        reasoning = next((message[name] for name in _REASONING if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        checked.append(message)
    return checked


def _plain(value: Any, where: str) -> Any:
    """A copy in plain JSON types: objects of other types have methods that a sandbox cannot check."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {str.__str__(name): _plain(item, f"{where}, {name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}, item {number}") for number, item in enumerate(value)]
    raise RequestError(f"{where}: found a value of type {type(value).__name__}, expected plain JSON data.")


class _Refused(jinja2.TemplateError):
    """What `raise_exception` raises."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it renders its content."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


class _Dict:
    """`dict` for templates, without the attributes through which the real one leads out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` for templates, which takes no names that could mean Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may name one of its values `self`
        self, *others = args
        values = dict(*others, **kwargs)
        for name in values:
            _refuse_internal(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_internal(name)
        super().__setitem__(name, value)


def _refuse_internal(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"names of a namespace cannot start with an underscore, found {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As JSON and no more: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


_ENVIRONMENT = _environment()
