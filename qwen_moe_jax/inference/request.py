"""Requests and what comes of them: the vocabulary of the engine, of sessions and of those who call them."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from qwen_moe_jax.config import GenerationConfig
from qwen_moe_jax.errors import RequestError

#: How a request ended: with a stop token (or because its caller had enough), at its largest length, or, in an `Engine`,
#: at its deadline or with an error of its own.
Finish = Literal["stop", "length", "deadline", "error"]

#: The most probable tokens that can be asked for at every new token, as in OpenAI's API.
MOST_TOP_LOGPROBS = 20


class TokenMask(Protocol):
    """Which tokens may come next, as a grammar says; asked between two decoding steps."""

    def allowed(self) -> np.ndarray:
        """uint32 [ceil(V / 32)]; bit i of word w says whether token 32 w + i may be chosen."""
        ...

    def accept(self, token: int) -> None:
        """Takes in a token that was chosen. Not called for the stop token, which ends the request."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt for an `Engine`, and how it is continued.

    Attributes:
        token_ids: the prompt, at least one token.
        config: how tokens are chosen and when the text ends. Stop strings are the caller's business, and speculative
            decoding is a session's: an engine decodes plainly, which gives the same text.
        top_logprobs: so many of the most probable tokens at each new token, by the model's own distribution, 0 to 20.
        prompt_logprobs: log-probabilities of the prompt's tokens, and so many alternatives to each; None: none.
        mask: which tokens may come next.
        adapter: name of the low-rank adapter to answer with; None is the model itself.
        deadline: in seconds of `time.monotonic()`; the request ends then, as "deadline".
    """

    token_ids: Sequence[int]
    config: GenerationConfig
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    mask: TokenMask | None = None
    adapter: str | None = None
    deadline: float | None = None


#: The most probable tokens at one position: pairs of token id and log-probability, the most probable first.
TopTokens = tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLogProbs:
    """Log-probabilities of a prompt's tokens by the model's own distribution, in nats.

    Attributes:
        log_probs: of each token after the first.
        top: the most probable tokens at each of them.
    """

    log_probs: tuple[float, ...]
    top: tuple[TopTokens, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """New tokens of one request.

    Attributes:
        index: of the request in its batch (`stream`, `Session`).
        request: of an `Engine`: the number that `submit` returned.
        token_ids: what is new, the stop token included.
        log_probs: of each, in nats, by the model's own distribution (before temperature and the like).
        top_logprobs: where asked for, the most probable tokens at each.
        prompt_logprobs: where asked for, with the first chunk of a request.
        cached_tokens: with the first chunk of a request, tokens of its prompt that were in the cache already.
        routing: where it is recorded, integers [L_sparse, T, A]; the experts of the tokens that were read to choose
            these. With the first chunk, that is the prompt; later, all tokens from the last of the chunk before to the
            last but one of this.
        finished: with the last chunk of a request: "stop" (a stop token, or `enough` was True), "length", "deadline" or
            "error"; else None.
        error: why, where it ended with an error.
    """

    index: int = 0
    request: int | None = None
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    top_logprobs: tuple[TopTokens, ...] = ()
    prompt_logprobs: PromptLogProbs | None = None
    cached_tokens: int = 0
    finished: Finish | None = None
    error: RequestError | None = None
    routing: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
