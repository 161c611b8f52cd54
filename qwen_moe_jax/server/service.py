"""What the handlers share: the model's name, tokenizer, template and settings, the runner, and the limits."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from starlette.requests import Request as HttpRequest

from qwen_moe_jax.config import GenerationConfig
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.tokenizer import encode, require_unicode
from qwen_moe_jax.server.chat_form import ChatForm
from qwen_moe_jax.server.errors import ApiError, invalid
from qwen_moe_jax.server.grammar import Grammars
from qwen_moe_jax.server.http import read_json
from qwen_moe_jax.server.keys import ApiKeys
from qwen_moe_jax.server.lifecycle import Lifecycle
from qwen_moe_jax.server.metrics import Metrics
from qwen_moe_jax.server.runner import Runner
from qwen_moe_jax.server.token_logprobs import TokenTexts
from qwen_moe_jax.suggest import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for.

    Attributes:
        max_length: tokens of a sequence, prompt and answer.
        slots: sequences that are decoded at once.
        max_waiting: sequences that may wait for a slot.
        max_body_bytes: of a request.
        max_seconds: of a request; None is without a limit.
        write_seconds: how long a client may take to send its request, or to accept a piece of a stream.
    """

    max_length: int
    slots: int
    max_waiting: int = 256
    max_body_bytes: int = 8 << 20
    max_seconds: float | None = None
    write_seconds: float = 60.0

    async def body_of(self, http: HttpRequest) -> bytes:
        """The body of a request; raises as `read_json`."""
        return await read_json(http, self.max_body_bytes, self.write_seconds)


@dataclass(kw_only=True)
class Service:
    """One model and what it is served with.

    Attributes:
        name: of the model, in requests.
        adapters: names of the low-rank adapters, which are models to clients.
        vocab_size: of the model.
        generation: settings where a request has none.
        chat: how conversations become prompts; None for a model without a chat template.
        grammars: masks for answers of a given form; None where the model has no stop token to end them.
        embedder: embeds texts, in the runner's thread; None where the server was started without.
    """

    name: str
    vocab_size: int
    tokenizer: tokenizers.Tokenizer
    generation: GenerationConfig
    limits: Limits
    chat: ChatForm | None = None
    grammars: Grammars | None = None
    embedder: Any = None
    adapters: tuple[str, ...] = ()
    keys: ApiKeys = field(default_factory=ApiKeys)
    life: Lifecycle = field(default_factory=Lifecycle)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.texts = TokenTexts(self.tokenizer)
        self.metrics = Metrics(
            lambda: None if self.runner.engine is None else self.runner.engine.load,
            lambda: None if self.runner.engine is None else self.runner.engine.expert_loads(),
        )
        self.runner = Runner(on_chunks=self.metrics.observe, on_failure=self.life.fail)

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter that a request names as its model; None for the model itself.

        Raises:
            ApiError: 404, there is no such model.
        """
        if model is None or model == self.name:
            return None
        if model in self.adapters:
            return model
        names = (self.name, *self.adapters)
        message = f"model: there is no {model!r:.80}; {did_you_mean(model, names)}expected one of {', '.join(names)}."
        raise ApiError(404, message, param="model", code="model_not_found")

    async def encoded(self, prompts: Any, field_name: str) -> list[list[int]]:
        """Token ids of `prompt` or `input`: a text, token ids, or a list of either.

        Raises:
            ApiError: 400, naming the field: an empty text, one that is not valid Unicode, or a token id outside the
                vocabulary.
        """
        several = isinstance(prompts, list) and not isinstance(prompts[0], int)
        ids = [
            await self.tokens_of(prompt, f"{field_name}[{number}]" if several else field_name)
            for number, prompt in enumerate(prompts if several else [prompts])
        ]
        return ids

    async def tokens_of(self, prompt: str | Sequence[int], where: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of one prompt; raises as `encoded`. Tokenizers release Python's lock, so another thread does it."""
        if isinstance(prompt, str):
            try:
                require_unicode(where, prompt)
            except RequestError as error:
                raise invalid(str(error), where) from None
            ids = await asyncio.to_thread(encode, self.tokenizer, prompt, add_special_tokens=add_special_tokens)
        else:
            ids = list(prompt)
        if not ids:
            raise invalid(f"{where} is empty, expected at least one token.", where)
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(token for token in ids if not 0 <= token < self.vocab_size)
            raise invalid(f"{where} holds token id {wrong}, expected ids from 0 to {self.vocab_size - 1}.", where)
        return ids

    def require_room(self, sequences: int) -> None:
        """Refuses sequences that the queue has no place for.

        Raises:
            ApiError: 429 with Retry-After; 400 for more than the queue ever takes.
        """
        most = self.limits.slots + self.limits.max_waiting
        if sequences > most:
            raise invalid(f"the request has {sequences} sequences, and this server takes {most} at once.", "n")
        if len(self.runner.unfinished) + sequences > most:
            message = f"{len(self.runner.unfinished)} sequences are being served, of at most {most}: try again later."
            raise ApiError(429, message, code="queue_full", retry_after=self._retry_after())

    def _retry_after(self) -> int:
        """Seconds until about a quarter of the queue will have been served, by the mean of those that have ended."""
        rounds = 1 + self.limits.max_waiting / self.limits.slots / 4
        return min(60, max(1, round(self.metrics.mean_seconds() * rounds)))
