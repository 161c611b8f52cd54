"""/v1/completions: texts and token ids, continued."""

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from qwen_moe_jax.inference.request import Request
from qwen_moe_jax.server.errors import invalid
from qwen_moe_jax.server.http import CLIENT_GONE, DONE, EventStream, event, unless_gone
from qwen_moe_jax.server.job import Job, deadline
from qwen_moe_jax.server.protocol import MOST_SEQUENCES, CompletionRequest, parse
from qwen_moe_jax.server.service import Service
from qwen_moe_jax.server.settings import COMPLETION_TOKENS, settings_of, with_seed_of
from qwen_moe_jax.server.token_logprobs import Token, completion_logprobs, prompt_tokens


async def completions(service: Service, http: HttpRequest) -> Response:
    """Answers one request.

    Raises:
        ApiError: it cannot be served.
    """
    body = parse(CompletionRequest, await service.limits.body_of(http))
    texts, job = await _begin(service, body)
    answer = _Answer(service, body, job, texts)
    if body.stream:
        return EventStream(answer.events(), job.close, service.limits.write_seconds)
    try:
        found = await unless_gone(http.receive, answer.whole())
    finally:
        job.close()
    return Response(status_code=CLIENT_GONE) if found is None else JSONResponse(found)


async def _begin(service: Service, body: CompletionRequest) -> tuple[list[str], Job]:
    """The prompts' texts, where they are echoed, and the sequences of all prompts, `n` for each."""
    adapter = service.adapter_of(body.model)
    prompts = await service.encoded(body.prompt, "prompt")
    count = body.n or 1
    if len(prompts) * count > MOST_SEQUENCES:
        raise invalid(f"{len(prompts)} prompts times n={count}: expected at most {MOST_SEQUENCES} sequences.", "n")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens: found 0, expected at least 1, or echo.", "max_tokens")
    until = deadline(service)
    requests = []
    for ids in map(tuple, prompts):
        config = settings_of(
            body,
            service,
            prompt=len(ids),
            asked=None if body.max_tokens is None else max(body.max_tokens, 1),  # where it is 0, one is left out
            default=COMPLETION_TOKENS,
            where="prompt",
        )
        requests += [
            Request(
                token_ids=ids,
                config=with_seed_of(config, choice),
                top_logprobs=body.logprobs or 0,
                prompt_logprobs=body.logprobs if body.echo else None,
                adapter=adapter,
                deadline=until,
            )
            for choice in range(count)
        ]
    texts = []
    if body.echo:
        given = body.prompt if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int) else [body.prompt]
        for one, tokens in zip(given, prompts, strict=True):
            text = one if isinstance(one, str) else service.tokenizer.decode(tokens, skip_special_tokens=False)
            texts += [text] * count
    job = Job(service, requests, "prompt")
    try:
        await job.accepted()
    except BaseException:
        job.close()
        raise
    return texts or [""] * len(requests), job


@dataclass
class _Choice:
    """One choice of a whole answer."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None


class _Answer:
    """The JSON of an answer, whole or as a stream."""

    def __init__(self, service: Service, body: CompletionRequest, job: Job, echoed: list[str]):
        self._service = service
        self._body = body
        self._job = job
        self._echoed = echoed
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or service.name,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer, when all is there."""
        choices = [_Choice() for _ in self._job.sequences]
        async for pieces in self._job.pieces():
            for number, piece in pieces.items():
                choice = choices[number]
                choice.text += piece.text
                choice.tokens += piece.tokens
                choice.finish = piece.finish
        found = [
            self._choice(number, one.text, one.tokens, one.finish, first=True, start=0)
            for number, one in enumerate(choices)
        ]
        return {**self._head, "choices": found, "usage": self._usage}

    async def events(self) -> AsyncIterator[bytes]:
        """The answer, piece by piece."""
        options = self._body.stream_options
        usage: dict[str, Any] = {"usage": None} if options and options.include_usage else {}
        lengths: dict[int, int] = {}
        async for pieces in self._job.pieces():
            events = []
            for number, piece in pieces.items():
                if not (piece.text or piece.finish or piece.tokens):
                    continue
                first, start = number not in lengths, lengths.get(number, 0)
                choice = self._choice(number, piece.text, piece.tokens, piece.finish, first=first, start=start)
                lengths[number] = start + len(choice["text"])
                events.append(event({**self._head, "choices": [choice], **usage}))
            yield b"".join(events)
        if usage:
            yield event({**self._head, "choices": [], "usage": self._usage})
        yield DONE

    @property
    def _usage(self) -> dict[str, Any]:
        usage = self._job.usage
        if self._body.max_tokens == 0:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def _choice(
        self, number: int, text: str, tokens: list[Token], finish: str | None, *, first: bool, start: int
    ) -> dict[str, Any]:
        """A choice; the first piece of an echoed one begins with its prompt."""
        sequence = self._job.sequences[number]
        listed: list[Token | int] = list(tokens)
        if self._body.max_tokens == 0:
            text, listed = "", []
        if self._body.echo and first:
            text = self._echoed[number] + text
            listed = prompt_tokens(sequence.request.token_ids, sequence.prompt_logprobs) + listed
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = completion_logprobs(listed, self._service.texts, start)
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish}
