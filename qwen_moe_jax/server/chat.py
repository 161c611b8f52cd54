"""/v1/chat/completions: conversations, through the model's own template."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.request import Request
from qwen_moe_jax.server.answer_parts import AnswerParts, Part
from qwen_moe_jax.server.chat_form import ChatForm, ChatPrompt, Thought
from qwen_moe_jax.server.errors import invalid
from qwen_moe_jax.server.grammar import Grammars
from qwen_moe_jax.server.http import CLIENT_GONE, DONE, EventStream, event, unless_gone
from qwen_moe_jax.server.job import Job, Piece, deadline
from qwen_moe_jax.server.protocol import ChatRequest, NamedTool, parse
from qwen_moe_jax.server.service import Service
from qwen_moe_jax.server.settings import settings_of, with_seed_of
from qwen_moe_jax.server.token_logprobs import Token, chat_logprobs


async def chat_completions(service: Service, http: HttpRequest) -> Response:
    """Answers one request.

    Raises:
        ApiError: it cannot be served.
    """
    body = parse(ChatRequest, await service.limits.body_of(http))
    adapter = service.adapter_of(body.model)
    form = _form(service)
    tools = _tools(body, form)
    prompt = await _prompt(body, form, tools)
    grammar = _grammar(service, body, form, tools, prompt.thought)
    job = await _begin(service, body, prompt, grammar, adapter)
    answer = _Answer(service, body, job, prompt, tools)
    if body.stream:
        return EventStream(answer.events(), job.close, service.limits.write_seconds)
    try:
        found = await unless_gone(http.receive, answer.whole())
    finally:
        job.close()
    return Response(status_code=CLIENT_GONE) if found is None else JSONResponse(found)


Tools = Mapping[str, dict[str, Any]]


def _form(service: Service) -> ChatForm:
    if service.chat is None:
        raise invalid(
            f"{service.name} has no chat template: /v1/completions continues texts.", "messages", "no_chat_template"
        )
    return service.chat


def _tools(body: ChatRequest, form: ChatForm) -> Tools:
    """The functions that may be called, by name, as the template is given them; none with tool_choice "none"."""
    tools: dict[str, dict[str, Any]] = {}
    for number, tool in enumerate(body.tools or []):
        if tool.function.name in tools:
            where = f"tools[{number}].function.name"
            raise invalid(f"{where}: {tool.function.name!r} is also that of an earlier tool, expected another.", where)
        tools[tool.function.name] = tool.model_dump(exclude_none=True)
    if isinstance(body.tool_choice, NamedTool) and body.tool_choice.function.name not in tools:
        name = body.tool_choice.function.name
        raise invalid(
            f"tool_choice names {name!r}, expected one of the tools: {', '.join(tools) or 'none'}.", "tool_choice"
        )
    if body.tool_choice == "required" and not tools:
        raise invalid("tool_choice is required, but there are no tools.", "tool_choice")
    if tools and form.tool_form is None:
        raise invalid("the model's chat template writes no tool calls in a form that this server reads.", "tools")
    return {} if body.tool_choice == "none" else tools


async def _prompt(body: ChatRequest, form: ChatForm, tools: Tools) -> ChatPrompt:
    for name in ("messages", "tools", "add_generation_prompt"):
        if name in (body.chat_template_kwargs or {}):
            raise invalid(f"chat_template_kwargs has {name}, which is a field of its own.", "chat_template_kwargs")
    try:
        return await asyncio.to_thread(
            form.prompt,
            body.messages,
            list(tools.values()),
            body.chat_template_kwargs or {},
            add_generation_prompt=body.add_generation_prompt is not False,
        )
    except RequestError as error:
        raise invalid(str(error), "messages") from None


def _grammar(service: Service, body: ChatRequest, form: ChatForm, tools: Tools, thought: Thought) -> str | None:
    """The grammar that the answer has to follow; None for a free one."""
    asked = body.response_format
    needs_call = body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)
    free = asked is None or asked.type == "text"
    if free and not needs_call:
        return None
    where = "tool_choice" if needs_call else "response_format"
    if service.grammars is None:
        raise invalid(f"{where}: the model has no stop token, so nothing could end an answer of a given form.", where)
    if body.ignore_eos:
        raise invalid(f"ignore_eos leaves {where} without an end: leave one of them out.", "ignore_eos")
    if needs_call and not free:
        raise invalid("response_format and a tool_choice that asks for a call exclude each other.", "response_format")
    if needs_call:
        chosen = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
        schemas = {
            name: tool["function"].get("parameters") or {} for name, tool in tools.items() if chosen in (None, name)
        }
        several = chosen is None and body.parallel_tool_calls is not False
        return service.grammars.calls(schemas, form.tool_form or "json", thought, several=several)
    if asked.type == "json_object":
        return service.grammars.json({"type": "object"}, thought)
    if asked.json_schema is None:
        raise invalid("response_format is json_schema, without one.", "response_format.json_schema")
    return service.grammars.json(asked.json_schema.schema_, thought)


async def _begin(
    service: Service, body: ChatRequest, prompt: ChatPrompt, grammar: str | None, adapter: str | None
) -> Job:
    """The sequences, `n` of them, once the engine has taken them."""
    # The template has written all special tokens itself.
    ids = tuple(await service.tokens_of(prompt.text, "messages", add_special_tokens=False))
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if asked == 0:
        raise invalid("max_completion_tokens: found 0, expected at least 1.", "max_completion_tokens")
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs is given without logprobs: true.", "top_logprobs")
    config = settings_of(body, service, prompt=len(ids), asked=asked, default=None, where="messages")
    requests = []
    for choice in range(body.n or 1):
        mask = None if grammar is None else await _mask(service.grammars, grammar, body)
        requests.append(
            Request(
                token_ids=ids,
                config=with_seed_of(config, choice),
                top_logprobs=body.top_logprobs or 0,
                mask=mask,
                adapter=adapter,
                deadline=deadline(service),
            )
        )
    job = Job(service, requests, "messages")
    try:
        await job.accepted()
    except BaseException:
        job.close()
        raise
    return job


async def _mask(grammars: Grammars, grammar: str, body: ChatRequest) -> Any:
    try:
        return await asyncio.to_thread(grammars.mask, grammar)
    except RequestError as error:
        where = "response_format" if body.response_format and body.response_format.type != "text" else "tools"
        raise invalid(f"{where}: {error}", where) from None


@dataclass
class _Choice:
    """One choice of an answer, so far.

    Attributes:
        pending: log-probabilities that no event of a stream has had.
    """

    parts: AnswerParts
    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None

    @property
    def finish_reason(self) -> str | None:
        return "tool_calls" if self.calls and self.finish == "stop" else self.finish

    def take(self, piece: Piece, *, several_calls: bool) -> list[dict[str, Any]]:
        """Adds a piece; returns what is new as the deltas of a stream."""
        self.tokens += piece.tokens
        parts = self.parts.push(piece.text)
        if piece.finish is not None:
            parts += self.parts.finish()
        deltas = []
        self.finish = piece.finish
        for part in parts:
            deltas.append(self._add(part))
            if part.call is not None and not several_calls:
                self.finish = "stop"
                break
        return deltas

    def _add(self, part: Part) -> dict[str, Any]:
        if part.call is not None:
            function = {"name": part.call.name, "arguments": part.call.arguments}
            self.calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
            return {"tool_calls": [{"index": len(self.calls) - 1, **self.calls[-1]}]}
        self.reasoning += part.reasoning
        self.content += part.content
        return {"reasoning_content": part.reasoning} if part.reasoning else {"content": part.content}

    @property
    def message(self) -> dict[str, Any]:
        """The whole message."""
        found: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.reasoning:
            found["reasoning_content"] = self.reasoning
        if self.calls:
            found["tool_calls"] = self.calls
        if not self.content and (self.calls or self.reasoning):
            found["content"] = None
        return found


class _Answer:
    """The JSON of an answer, whole or as a stream."""

    def __init__(self, service: Service, body: ChatRequest, job: Job, prompt: ChatPrompt, tools: Tools):
        self._service = service
        self._body = body
        self._job = job
        self._several_calls = body.parallel_tool_calls is not False
        schemas = {name: tool["function"].get("parameters") or {} for name, tool in tools.items()}
        tool_form = service.chat.tool_form if tools else None
        self._choices = [
            _Choice(AnswerParts(thinking=prompt.thought == "open", tool_form=tool_form, schemas=schemas))
            for _ in job.sequences
        ]
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model or service.name,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer, when all is there."""
        async for pieces in self._job.pieces():
            for number, piece in pieces.items():
                self._take(number, piece)
        choices = [
            {
                "index": number,
                "message": choice.message,
                "logprobs": self._logprobs(choice.tokens),
                "finish_reason": choice.finish_reason,
            }
            for number, choice in enumerate(self._choices)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._job.usage}

    async def events(self) -> AsyncIterator[bytes]:
        """The answer, piece by piece."""
        head = {**self._head, "object": "chat.completion.chunk"}
        options = self._body.stream_options
        usage: dict[str, Any] = {"usage": None} if options and options.include_usage else {}

        def one(number: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> bytes:
            choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            return event({**head, "choices": [choice], **usage})

        yield b"".join(one(number, {"role": "assistant", "content": ""}) for number in range(len(self._choices)))
        async for pieces in self._job.pieces():
            events = []
            for number, piece in pieces.items():
                choice = self._choices[number]
                deltas, logprobs = self._take(number, piece), self._logprobs(piece.tokens)
                if logprobs is not None and not deltas:
                    deltas = [{}]  # the text is held back, its tokens are known
                for delta in deltas:
                    events.append(one(number, delta, logprobs=logprobs))
                    logprobs = None
                if choice.finish is not None:
                    events.append(one(number, {}, finish=choice.finish_reason))
            if events:
                yield b"".join(events)
        if usage:
            yield event({**head, "choices": [], "usage": self._job.usage})
        yield DONE

    def _take(self, number: int, piece: Piece) -> list[dict[str, Any]]:
        choice = self._choices[number]
        deltas = choice.take(piece, several_calls=self._several_calls)
        if choice.finish is not None:
            self._job.end(number)  # also where a call has ended it, and not the engine
        return deltas

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        return chat_logprobs(tokens, self._service.texts) if self._body.logprobs else None
