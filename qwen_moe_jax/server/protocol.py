"""The bodies of requests, as pydantic models: what OpenAI's API takes, and a few fields of vLLM's.

A field that is unknown, or known and not supported, is refused by its name; one that clients send with a default value
is accepted at that default. Null is as if the field were not there.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qwen_moe_jax.inference.message_content import joined_parts
from qwen_moe_jax.server.errors import invalid
from qwen_moe_jax.suggest import similar

#: The most alternatives to a token that are returned, as in OpenAI's API.
MOST_LOGPROBS = 20
#: The most stop strings of a request, as in OpenAI's API.
MOST_STOPS = 4
#: The most sequences of one request: prompts times `n`.
MOST_SEQUENCES = 128

Prompts = str | list[str] | list[int] | list[list[int]]


def _as_strings(value: Any) -> Any:
    """`stop`: a string or a few."""
    if value is None:
        return []
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
        raise ValueError("expected a string or a list of strings, none of them empty")
    if len(found) > MOST_STOPS:
        raise ValueError(f"found {len(found)} strings, expected at most {MOST_STOPS}")
    return found


def _as_prompts(value: Any) -> Any:
    """`prompt` and `input`: a text, token ids, or a list of either."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value) or _is_tokens(value) or all(map(_is_tokens, value)):
            return value
    raise ValueError("expected a text, a list of token ids, or a list of either, not empty")


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _as_biases(value: Any) -> Any:
    """`logit_bias`: numbers by token id, which JSON has as a string."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(name.isascii() and name.isdigit() for name in value):
        raise ValueError('expected an object of numbers by token id, as in {"50256": -100}')
    if not all(type(bias) in (int, float) and -100 <= bias <= 100 for bias in value.values()):
        raise ValueError("expected biases between -100 and 100")
    return {int(name): float(bias) for name, bias in value.items()}


def _as_text(value: Any) -> Any:
    """The content of a message: a text, null, or parts of type text, as `joined_parts` joins them."""
    return joined_parts(value) if isinstance(value, list) else value


def _require_same(body: BaseModel, one: str, other: str) -> None:
    """Refuses two names of one field with different values."""
    values = getattr(body, one), getattr(body, other)
    if None not in values and values[0] != values[1]:
        text = f"{one} is {values[0]!r:.40} and {other} is {values[1]!r:.40}: both say the same, so send one of them"
        raise PydanticCustomError("unsupported", "{text}", {"field": one, "text": text})


Stops = Annotated[list[str], BeforeValidator(_as_strings)]
Content = Annotated[str | None, BeforeValidator(_as_text)]


class _Body(BaseModel):
    """A JSON object.

    Attributes:
        defaults_only: fields that are not supported, with the values that change nothing, null among them.
        labels: fields of the client's own bookkeeping, which change no answer.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    defaults_only: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    labels: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _without_defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in value.keys() & cls.defaults_only.keys():
            allowed = cls.defaults_only[name]
            if value[name] is not None and value[name] not in allowed:
                expected = " or ".join(map(json.dumps, allowed))
                text = f"is not supported{f', expected {expected} or nothing' if allowed else ': leave it out'}"
                raise PydanticCustomError("unsupported", "{text}", {"field": name, "text": text})
        left_out = cls.defaults_only.keys() | cls.labels
        return {name: one for name, one in value.items() if name not in left_out}


class StreamOptions(_Body):
    """What a stream also has."""

    defaults_only = {
        "include_obfuscation": (False, True),
    }

    include_usage: bool = False


class SamplingRequest(_Body):
    """How text is generated: common to completions and chat."""

    defaults_only = {
        "best_of": (1,),
        "use_beam_search": (False,),
        "length_penalty": (1.0,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "include_stop_str_in_output": (False,),
    }
    labels = frozenset({"user"})

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[int, float], BeforeValidator(_as_biases)] = {}
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Stops = []
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = Field(None, ge=0)
    min_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1, le=MOST_SEQUENCES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and "stream" in info.data and not info.data["stream"]:
            raise ValueError("it has a meaning with stream: true only, expected it to be left out")
        return value


class CompletionRequest(SamplingRequest):
    """The body of /v1/completions."""

    defaults_only = {**SamplingRequest.defaults_only, "suffix": ("",)}

    prompt: Annotated[Any, BeforeValidator(_as_prompts)]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)


class FunctionCall(_Body):
    """A call of a function, as a message of the past has it."""

    name: str
    arguments: str


class ToolCall(_Body):
    """A tool call of a message of the past."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(_Body):
    """A message of a conversation."""

    defaults_only = {
        "refusal": (),
        "audio": (),
        "annotations": ([],),
        "function_call": (),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _one_reasoning(self) -> Self:
        _require_same(self, "reasoning_content", "reasoning")
        return self


class Function(_Body):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    """A tool; all of them are functions."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Body):
    """The name of a function."""

    name: str


class NamedTool(_Body):
    """A tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Body):
    """A JSON schema with its name."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """The form that an answer has to have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


def _as_tool_choice(value: Any) -> Any:
    """A word, or the tool itself."""
    if value is None or value in ("none", "auto", "required"):
        return value
    if isinstance(value, dict) and value.get("type") == "function":
        return NamedTool.model_validate(value)
    raise ValueError('expected none, auto, required or {"type": "function", "function": {"name": …}}')


class ChatRequest(SamplingRequest):
    """The body of /v1/chat/completions."""

    defaults_only = {
        **SamplingRequest.defaults_only,
        "continue_final_message": (False,),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "modalities": (["text"],),
        "reasoning_effort": (),
        "verbosity": (),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "functions": (),
        "function_call": (),
    }
    labels = SamplingRequest.labels | frozenset(
        {"metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    )

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    tool_choice: Annotated[Any, BeforeValidator(_as_tool_choice)] = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    max_completion_tokens: int | None = Field(None, ge=0)
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        _require_same(self, "max_completion_tokens", "max_tokens")
        return self


class EmbeddingRequest(_Body):
    """The body of /v1/embeddings."""

    defaults_only = {"dimensions": ()}
    labels = frozenset({"user"})

    input: Annotated[Any, BeforeValidator(_as_prompts)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"


BodyType = TypeVar("BodyType", bound=_Body)


def parse(kind: type[BodyType], body: bytes) -> BodyType:
    """The body of a request as a model.

    Raises:
        ApiError: 400, naming the first wrong field as `param`; the message names all of them.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not JSON ({error}), expected an object.", code="invalid_json") from None
    if not isinstance(found, dict):
        raise invalid(f"the body is of type {type(found).__name__}, expected a JSON object.", code="invalid_json")
    return checked(kind, {name: value for name, value in found.items() if value is not None})


def checked(kind: type[BodyType], fields: Mapping[str, Any]) -> BodyType:
    """Fields as a model; raises as `parse`."""
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        problems = [_problem(kind, one) for one in error.errors(include_url=False)[:5]]
        raise invalid(" ".join(text for _, text in problems), problems[0][0]) from None
    except RecursionError:
        raise invalid("the body is nested too deeply.") from None


def _problem(kind: type[BaseModel], error: Mapping[str, Any]) -> tuple[str, str]:
    """The field of an error, and a sentence on it."""
    if error["type"] == "unsupported":
        path = _dotted((*error["loc"], error["ctx"]["field"]))
        return path, f"{path}: {error['ctx']['text']}."
    path = _dotted(error["loc"])
    if error["type"] == "extra_forbidden":
        near = similar(str(error["loc"][-1]), kind.model_fields, count=1) if len(error["loc"]) == 1 else ()
        suggestion = f"Did you mean {near[0]!r}?" if near else "Leave it out."
        return path, f"{path}: there is no such field. {suggestion}"
    if error["type"] == "missing":
        return path, f"{path}: is missing."
    found = f"found {error['input']!r:.60}: " if error["type"] != "value_error" else ""
    return path, f"{path}: {found}{error['msg'].removeprefix('Value error, ')}."


def _dotted(parts: Sequence[str | int]) -> str:
    """`("messages", 0, "content")` as `messages[0].content`."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
