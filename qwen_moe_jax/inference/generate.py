"""Greedy generation for a batch of prompts of different lengths.

The loop runs on the device and stops when every sequence has stopped. It runs the whole model over prompt and text for
every new token, so its cost grows with the square of the length.
"""

import functools
from collections.abc import Sequence
from os import PathLike

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen_moe_jax.errors import RequestError, ShardingError
from qwen_moe_jax.inference.tokenizer import Tokenizer, decode, encode, load_tokenizer
from qwen_moe_jax.model.causal_lm import CausalLM

#: Buffers are rounded up to this many tokens, so that requests of similar lengths share one compilation.
BUCKET = 64


def generate(
    model: CausalLM,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    stop_token_ids: Sequence[int] | None = None,
    tokenizer: Tokenizer | str | PathLike[str] | None = None,
) -> list[str] | list[list[int]]:
    """Continues every prompt with the most probable tokens.

    Args:
        model: run in eval mode, whose dispatch drops no token unless the model's `ExecutionConfig` says so.
        prompts: texts, or lists of token ids. They need not be of one length.
        max_new_tokens: at most so many per prompt.
        stop_token_ids: tokens that end a text; None means the model's own (generation_config.json, else config.json),
            () none.
        tokenizer: needed for texts: a tokenizer, or the checkpoint folder that holds one.

    Returns:
        For texts, the new texts without special tokens. For token ids, the new token ids, the stop token included, as
        in transformers.

    Raises:
        RequestError: an empty prompt, a token id outside the vocabulary, or texts without a tokenizer; the message
            names the prompt.
        ShardingError: the program runs on several hosts.
    """
    if isinstance(prompts, str):
        raise RequestError("prompts is one string, expected a list: generate(model, [prompt], …).")
    if len(prompts) == 0:
        return []
    texts = all(isinstance(prompt, str) for prompt in prompts)
    if texts and tokenizer is None:
        raise RequestError("the prompts are texts, but no tokenizer was given: pass tokenizer=<checkpoint folder>.")
    if isinstance(tokenizer, str | PathLike):
        tokenizer = load_tokenizer(tokenizer)
    ids = [encode(tokenizer, prompt) for prompt in prompts] if texts else [list(prompt) for prompt in prompts]
    _check(ids, max_new_tokens, model.config.vocab_size)
    if jax.process_count() > 1:
        raise ShardingError("generate runs on one host; this program runs on several.")
    if not model.deterministic:
        model = nnx.merge(*nnx.split(model))  # a view of the same weights: the caller's model stays in training mode
        model.eval()
    stop = model.generation_config.eos_token_id if stop_token_ids is None else tuple(stop_token_ids)
    new = _generate_ids(model, ids, max_new_tokens, stop)
    return [decode(tokenizer, one) for one in new] if texts else new


def _check(prompts: list[list[int]], max_new_tokens: int, vocab_size: int) -> None:
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens={max_new_tokens}, expected at least 1.")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise RequestError(f"prompt {number} is empty, expected at least one token.")
        for token in prompt:
            if not isinstance(token, int | np.integer) or not 0 <= token < vocab_size:
                raise RequestError(f"prompt {number} holds {token!r}, expected token ids from 0 to {vocab_size - 1}.")


def _generate_ids(model: CausalLM, prompts: list[list[int]], budget: int, stop: tuple[int, ...]) -> list[list[int]]:
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    size = -(-(int(lengths.max()) + budget) // BUCKET) * BUCKET
    buffer_BT = np.zeros((len(prompts), size), np.int32)
    for row, prompt in zip(buffer_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    # -1 is no token: the list of stop tokens keeps its length, and with it the compilation, for most models.
    stop_S = np.array([*stop, *[-1] * (-len(stop) % 4)], np.int32)
    buffer_BT, ends = jax.device_get(_greedy(model, buffer_BT, lengths, stop_S, np.int32(budget)))
    return [row[start:end].tolist() for row, start, end in zip(buffer_BT, lengths, ends, strict=True)]


@functools.partial(jax.jit, donate_argnames="buffer_BT")
def _greedy(
    model: CausalLM, buffer_BT: jax.Array, lengths_B: jax.Array, stop_S: jax.Array, budget: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Fills the buffer behind the prompts; returns it with the length of every sequence."""
    columns = jnp.arange(buffer_BT.shape[1])

    def going(state: tuple[jax.Array, ...]) -> jax.Array:
        step, _, _, done_B = state
        return (step < budget) & ~jnp.all(done_B)

    def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        step, buffer_BT, ends_B, done_B = state
        # Places that hold no token yet are padding: they take no expert's capacity.
        written_BT = (columns < ends_B[:, None]).astype(jnp.int32)
        logits_B1V = model(buffer_BT, segment_ids=written_BT, logits_at=ends_B - 1).logits
        token_B = jnp.argmax(logits_B1V[:, 0], axis=-1).astype(jnp.int32)
        here_BT = (columns == ends_B[:, None]) & ~done_B[:, None]
        buffer_BT = jnp.where(here_BT, token_B[:, None], buffer_BT)
        ends_B = ends_B + ~done_B
        done_B = done_B | jnp.any(token_B[:, None] == stop_S, axis=1)
        return step + 1, buffer_BT, ends_B, done_B

    done_B = jnp.zeros(len(lengths_B), bool)
    _, buffer_BT, ends_B, _ = jax.lax.while_loop(going, step, (jnp.int32(0), buffer_BT, lengths_B, done_B))
    return buffer_BT, ends_B
