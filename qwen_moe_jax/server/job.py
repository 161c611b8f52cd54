"""The sequences of one HTTP request: submitted together, read together, and let go of together."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import tokenizers

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.detokenize import TextStream
from qwen_moe_jax.inference.request import Chunk, PromptLogProbs, Request
from qwen_moe_jax.server.errors import ApiError, invalid
from qwen_moe_jax.server.runner import Ended, EngineFailed, Inbox
from qwen_moe_jax.server.service import Service
from qwen_moe_jax.server.token_logprobs import Token


@dataclass(kw_only=True)
class Piece:
    """What is new of a sequence.

    Attributes:
        text: that no later token changes, without special tokens and up to a stop string.
        tokens: in order; text of the last ones may come later.
        finish: "stop" or "length", with the last piece.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None


class Continuation:
    """One sequence: the engine's chunks as pieces of text."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, request: Request):
        self._stream = TextStream(tokenizer, request.config.stop_strings)
        self.request = request
        self.num_tokens = 0
        self.cached_tokens = 0
        self.prompt_logprobs: PromptLogProbs | None = None
        self.finished = False

    def take(self, chunks: Sequence[Chunk]) -> Piece:
        """The next chunks as one piece.

        Raises:
            ApiError: the sequence ended with an error, or at its deadline.
        """
        piece = Piece()
        for chunk in chunks:
            if self.finished:
                break
            if chunk.prompt_logprobs is not None:
                self.prompt_logprobs = chunk.prompt_logprobs
            self.cached_tokens += getattr(chunk, "cached_tokens", 0)
            piece.text += self._stream.push(chunk.token_ids)
            taken = self._stream.num_tokens - self.num_tokens
            self.num_tokens += taken
            top = chunk.top_logprobs or ((),) * taken
            piece.tokens += map(Token, chunk.token_ids[:taken], chunk.log_probs, top)
            if self._stream.stopped is not None:
                self.finished, piece.finish = True, "stop"
            elif chunk.finished == "error":
                raise ApiError(500, f"the answer has ended with an error: {chunk.error}", code="generation_failed")
            elif chunk.finished == "deadline":
                raise ApiError(504, "the answer has taken longer than this server allows.", code="deadline_exceeded")
            elif chunk.finished is not None:
                self.finished, piece.finish = True, chunk.finished
                piece.text += self._stream.finish()
        return piece


class Job:
    """The sequences of one HTTP request.

    Args:
        service: whose runner runs them.
        requests: one for each sequence.
        where: the field of the request that is wrong where the engine refuses one.

    Attributes:
        sequences: in the order of `requests`.

    Raises:
        ApiError: there is no place for them in the queue.
    """

    def __init__(self, service: Service, requests: Sequence[Request], where: str):
        service.require_room(len(requests))
        self.sequences = [Continuation(service.tokenizer, request) for request in requests]
        self._where = where
        self._runner = service.runner
        self._inbox = Inbox()
        self._tickets = [self._runner.submit(request, self._inbox, number) for number, request in enumerate(requests)]

    async def accepted(self) -> None:
        """Waits until the engine has taken all of them.

        Raises:
            ApiError: it has refused one; the others are cancelled.
        """
        try:
            await asyncio.gather(*(ticket.accepted for ticket in self._tickets))
        except RequestError as error:
            raise invalid(str(error), self._where) from None
        except (EngineFailed, Ended) as error:
            raise _failed(error) from None

    async def pieces(self) -> AsyncIterator[dict[int, Piece]]:
        """What is new, by the number of the sequence, until all have ended.

        Raises:
            ApiError: one of them ended with an error.
        """
        while not all(sequence.finished for sequence in self.sequences):
            chunks: dict[int, list[Chunk]] = {}
            try:
                for number, chunk in await self._inbox.take():
                    chunks.setdefault(number, []).append(chunk)
            except (EngineFailed, Ended) as error:
                raise _failed(error) from None
            pieces = {
                number: self.sequences[number].take(found)
                for number, found in chunks.items()
                if not self.sequences[number].finished
            }
            # Of stop strings the engine knows nothing.
            self._runner.cancel(self._tickets[number] for number in pieces if self.sequences[number].finished)
            if pieces:
                yield pieces

    def end(self, number: int) -> None:
        """Ends one sequence: its reader has enough."""
        self.sequences[number].finished = True
        self._runner.cancel([self._tickets[number]])

    def close(self) -> None:
        """Lets go of what has not ended."""
        self._runner.cancel(self._tickets)

    @property
    def usage(self) -> dict[str, object]:
        """OpenAI's `usage`. A prompt that several sequences share counts once."""
        prompts = {id(sequence.request.token_ids): sequence for sequence in self.sequences}.values()
        read = sum(len(sequence.request.token_ids) for sequence in prompts)
        new = sum(sequence.num_tokens for sequence in self.sequences)
        return {
            "prompt_tokens": read,
            "completion_tokens": new,
            "total_tokens": read + new,
            "prompt_tokens_details": {"cached_tokens": sum(sequence.cached_tokens for sequence in prompts)},
        }


def deadline(service: Service) -> float | None:
    """When a request that begins now has to end, in seconds of `time.monotonic()`."""
    seconds = service.limits.max_seconds
    return None if seconds is None else time.monotonic() + seconds


def _failed(error: EngineFailed | Ended) -> ApiError:
    if isinstance(error, Ended):
        return ApiError(503, str(error), code="draining", retry_after=1)
    return ApiError(500, f"the engine has failed ({error}).", code="engine_failed")
