"""What the engine asks of a request's mask, and how the most probable tokens are given to it: plain functions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.request import TokenMask, TopTokens


def checked_mask(mask_W: np.ndarray, words: int) -> np.ndarray:
    """A packed mask, uint32 [W].

    Raises:
        RequestError: it has another shape or dtype, or allows no token.
    """
    mask_W = np.asarray(mask_W)
    if mask_W.shape != (words,) or mask_W.dtype not in (np.uint32, np.int32):
        raise RequestError(f"found a mask {mask_W.dtype} {list(mask_W.shape)}, expected uint32 [{words}].")
    if not mask_W.any():
        raise RequestError("found a mask that allows no token, expected at least one.")
    return mask_W.view(np.uint32)


def accept(mask: TokenMask, tokens: Sequence[int]) -> RequestError | None:
    """Tells a mask which tokens were chosen; the error, where it raises one."""
    try:
        for token in tokens:
            mask.accept(token)
    except Exception as error:
        return as_request_error("its mask", error)
    return None


def as_request_error(what: str, error: Exception) -> RequestError:
    """The error of one request, beginning with whose fault it was."""
    return error if isinstance(error, RequestError) else RequestError(f"{what}: {type(error).__name__}: {error}")


def top_tokens(tokens_TK: Any, log_probs_TK: Any, count: int) -> list[TopTokens]:
    """The `count` most probable tokens at each position, best first; fewer in a small vocabulary."""
    rows = zip(tokens_TK[:, :count].tolist(), log_probs_TK[:, :count].tolist(), strict=True)
    return [
        tuple(pair for pair in zip(tokens, log_probs, strict=True) if pair[1] > -np.inf) for tokens, log_probs in rows
    ]
