"""Log-probabilities of tokens in the two forms that OpenAI's API has for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from qwen_moe_jax.inference.request import PromptLogProbs, TopTokens
from qwen_moe_jax.inference.token_text import token_text

#: In place of minus infinity, which JSON does not have; OpenAI's number.
_LEAST = -9999.0


@dataclass(frozen=True)
class Token:
    """A new token: its id, its log-probability in nats, and the most probable tokens in its place."""

    token: int
    log_prob: float
    top: TopTokens = ()


class TokenTexts:
    """The texts of single tokens; bytes that are no text are written as OpenAI does, `bytes:\\xe4\\xbd`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._seen: dict[int, tuple[str, bytes]] = {}

    def text(self, token: int) -> str:
        """A token's text."""
        return self._of(token)[0]

    def bytes_of(self, token: int) -> list[int]:
        """A token's bytes in UTF-8."""
        return list(self._of(token)[1])

    def _of(self, token: int) -> tuple[str, bytes]:
        if token not in self._seen:
            text = token_text(self._tokenizer, token)
            encoded = text.encode("utf-8", "surrogateescape")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in encoded)
            self._seen[token] = (text, encoded)
        return self._seen[token]


def chat_logprobs(tokens: Sequence[Token], texts: TokenTexts) -> dict[str, Any]:
    """The form of /v1/chat/completions."""

    def entry(token: int, log_prob: float) -> dict[str, Any]:
        return {"token": texts.text(token), "logprob": _number(log_prob), "bytes": texts.bytes_of(token)}

    content = [
        {**entry(one.token, one.log_prob), "top_logprobs": [entry(*other) for other in one.top]} for one in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[Token | int], texts: TokenTexts, start: int) -> dict[str, Any]:
    """The form of /v1/completions.

    Args:
        tokens: a number is a token without a log-probability: the first one of a prompt.
        texts: of the tokenizer.
        start: characters of the text before the first token.
    """
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one in tokens:
        text = texts.text(one if isinstance(one, int) else one.token)
        found["tokens"].append(text)
        found["text_offset"].append(start)
        start += len(text)
        if isinstance(one, int):
            found["token_logprobs"].append(None)
            found["top_logprobs"].append(None)
        else:
            found["token_logprobs"].append(_number(one.log_prob))
            top = {text: _number(one.log_prob)}
            for token, log_prob in one.top:  # the most probable one first, of several with the same text
                top.setdefault(texts.text(token), _number(log_prob))
            found["top_logprobs"].append(top)
    return found


def prompt_tokens(token_ids: Sequence[int], log_probs: PromptLogProbs | None) -> list[Token | int]:
    """A prompt's tokens with their log-probabilities, the first without."""
    if log_probs is None:
        return list(token_ids)
    no_top: Sequence[TopTokens] = ((),) * len(log_probs.log_probs)
    return [token_ids[0], *map(Token, token_ids[1:], log_probs.log_probs, log_probs.top or no_top)]


def _number(log_prob: float) -> float:
    return max(float(log_prob), _LEAST)
