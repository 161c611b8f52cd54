"""Log-likelihoods of token sequences, and the perplexity of a text longer than the model's window.

Sequences run in batches, the longest first, padded to one of few lengths and few numbers of rows, so that few
programs are compiled. Logits stay on the devices; one number and one flag per token are returned.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen_moe_jax.errors import RequestError, ShardingError
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.rounding import ceil_div, next_power_of_two, previous_power_of_two
from qwen_moe_jax.sharding.rules import BATCH

#: How many float32 numbers (1 GiB) the largest array of a batch may have on one device: its logits, B * T * V, or the
#: attention scores of a layer, B * N * T * T, either of them sharded over `tensor`. One sequence that is longer than
#: that runs alone: its logits are not divided.
BUDGET = 2**28
#: The most rows of a batch on one device. More would not be faster: reading the weights is amortised by then.
MAX_ROWS = 64
#: The shortest padded length: below it, a compilation costs more than the padding.
SHORTEST = 64

#: Called after every batch with the number of sequences (or windows) that are done, and of all.
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """The score of one sequence under a model.

    Attributes:
        log_likelihood: the sum over the scored tokens, in nats.
        num_tokens: how many tokens were scored.
        greedy: whether every scored token is the most probable one at its position (the first of several that are
            equally probable): greedy generation would have chosen them.
        token_log_probs: float32 [num_tokens]; the log-probability of each given all tokens before it, in nats.
    """

    log_likelihood: float
    num_tokens: int
    greedy: bool
    token_log_probs: np.ndarray = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        log_likelihood: the sum over the scored tokens, in nats.
        num_tokens: how many tokens were scored: all but the first.
        num_bytes: of the text, where they were given.
    """

    log_likelihood: float
    num_tokens: int
    num_bytes: int | None = None

    @property
    def nats_per_token(self) -> float:
        """The mean cross-entropy, transformers' loss."""
        return -self.log_likelihood / self.num_tokens

    @property
    def perplexity(self) -> float:
        """e to the power of `nats_per_token`; infinite where a float cannot hold it."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Size of the text if it were compressed with the model; comparable between tokenizers. None without bytes."""
        return None if self.num_bytes is None else -self.log_likelihood / math.log(2) / self.num_bytes


class Window(NamedTuple):
    """A part of a text that the model sees at once: tokens `start` to `end`, of which those from `first` on count."""

    start: int
    first: int
    end: int


class _Task(NamedTuple):
    """Tokens, int32 [T + 1], of which those from `first` on are scored."""

    tokens: np.ndarray
    first: int

    @property
    def length(self) -> int:
        """Of what goes into the model: the last token is only predicted."""
        return len(self.tokens) - 1


def score(
    model: CausalLM,
    sequences: Sequence[Sequence[int]],
    *,
    contexts: Sequence[Sequence[int]] | None = None,
    progress: Progress | None = None,
) -> list[Score]:
    """Log-likelihoods of token sequences of any lengths.

    Args:
        model: run in eval mode, whose dispatch drops no token unless the model's `ExecutionConfig` says so.
        sequences: lists or arrays of token ids. Without contexts, all tokens but the first of each are scored, as in
            transformers' loss.
        contexts: one for each sequence, of at least one token. Then all tokens of the sequence are scored, and none of
            its context.
        progress: called after every batch.

    Returns:
        One `Score` for each sequence, in their order.

    Raises:
        RequestError: nothing to score, nothing to score it after, or a token id outside the vocabulary; the message
            names the sequence, and nothing has run.
        ShardingError: the program runs on several hosts.
    """
    vocab_size = model.config.vocab_size
    if contexts is None:
        arrays = [token_array(f"sequence {number}", tokens, vocab_size) for number, tokens in enumerate(sequences)]
        for number, array in enumerate(arrays):
            if len(array) < 2:
                raise RequestError(
                    f"sequence {number} has one token, expected at least 2: nothing predicts the first. "
                    "Pass contexts=… to score it after something."
                )
        return _score(model, [_Task(array, 1) for array in arrays], progress)
    if len(contexts) != len(sequences):
        raise RequestError(f"there are {len(contexts)} contexts for {len(sequences)} sequences, expected one for each.")
    tasks = []
    for number, (context, tokens) in enumerate(zip(contexts, sequences, strict=True)):
        before = token_array(f"context {number}", context, vocab_size)
        tasks.append(_Task(np.append(before, token_array(f"sequence {number}", tokens, vocab_size)), len(before)))
    return _score(model, tasks, progress)


def perplexity(
    model: CausalLM,
    tokens: Sequence[int],
    *,
    window: int,
    stride: int,
    num_bytes: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a long text, read through a window that slides over it.

    It is that of "Perplexity of fixed-length models" in transformers' documentation: every token but the first is
    scored once, with `window - stride` tokens before it or more (or all there are). A small stride gives each token
    more context and costs more: about `window / stride` times the text. Every token counts alike; the documentation's
    loop gives those of all windows but the first a little less, by (stride - 1) / stride.

    Args:
        model: run in eval mode, as by `score`.
        tokens: ids, at least 2.
        window: how many tokens the model sees at once.
        stride: how far the window moves, from 1 to `window - 1`.
        num_bytes: of the text that the tokens encode, for `bits_per_byte`.
        progress: called after every batch.

    Raises:
        RequestError: fewer than 2 tokens, one outside the vocabulary, or a window or stride that cannot be.
        ShardingError: the program runs on several hosts.
    """
    text = token_array("the text", tokens, model.config.vocab_size)
    windows = sliding_windows(len(text), window, stride)
    scores = _score(model, [_Task(text[start:end], first - start) for start, first, end in windows], progress)
    return Perplexity(
        log_likelihood=math.fsum(one.log_likelihood for one in scores),
        num_tokens=sum(one.num_tokens for one in scores),
        num_bytes=num_bytes,
    )


def sliding_windows(num_tokens: int, window: int, stride: int) -> list[Window]:
    """The windows that score each of `num_tokens` tokens but the first once.

    Raises:
        RequestError: there is nothing to score, or the windows would not cover the text.
    """
    if window < 2:
        raise RequestError(f"window={window}, expected at least 2 tokens: one to predict, and one before it.")
    if not 1 <= stride < window:
        raise RequestError(
            f"stride={stride}, expected 1 to {window - 1} with window={window}: the first token of every window is "
            "context, scored in the window before."
        )
    if num_tokens < 2:
        raise RequestError(f"the text has {num_tokens} token, expected at least 2: nothing predicts the first.")
    windows = [Window(0, 1, min(window, num_tokens))]
    while windows[-1].end < num_tokens:
        start, _, end = windows[-1]
        windows.append(Window(start + stride, end, min(start + stride + window, num_tokens)))
    return windows


def token_array(name: str, tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    """Token ids as int32 [T].

    Raises:
        RequestError: there are none, or they are no token ids; the message begins with `name`.
    """
    try:
        array = np.asarray(tokens)
    except ValueError:  # nested lists of different lengths
        raise RequestError(f"{name} is nested, expected a flat list of token ids.") from None
    if array.size == 0:
        raise RequestError(f"{name} is empty, expected at least one token.")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RequestError(f"{name} is {array.dtype} {list(array.shape)}, expected a flat list of integer token ids.")
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        found = array[outside][0]
        raise RequestError(f"{name} holds {found}, expected token ids from 0 to {vocab_size - 1}.")
    return array.astype(np.int32)


def _score(model: CausalLM, tasks: list[_Task], progress: Progress | None) -> list[Score]:
    model.require_weights()
    if jax.process_count() > 1:
        raise ShardingError("scores are computed on one host; this program runs on several.")
    if not model.deterministic:
        model = nnx.merge(*nnx.split(model))  # a view of the same weights: the caller's model stays in training mode
        model.eval()
    longest_first = sorted(range(len(tasks)), key=lambda number: -tasks[number].length)
    scores: dict[int, Score] = {}
    while len(scores) < len(tasks):
        length = padded_length(tasks[longest_first[len(scores)]].length)
        chosen = longest_first[len(scores) :][: full_batch(model, length)]
        scores |= zip(chosen, _score_batch(model, [tasks[number] for number in chosen], length), strict=True)
        if progress is not None:
            progress(len(scores), len(tasks))
    return [scores[number] for number in range(len(tasks))]


def _score_batch(model: CausalLM, tasks: list[_Task], length: int) -> list[Score]:
    num_shards = _num_shards(model)
    rows = num_shards * next_power_of_two(ceil_div(len(tasks), num_shards))
    inputs_BT, targets_BT = (np.zeros((rows, length), np.int32) for _ in range(2))
    lengths_B = np.zeros(rows, np.int32)
    for row, task in enumerate(tasks):
        inputs_BT[row, : task.length] = task.tokens[:-1]
        targets_BT[row, : task.length] = task.tokens[1:]
        lengths_B[row] = task.length
    log_probs_BT, best_BT = jax.device_get(_predicted(model, inputs_BT, targets_BT, lengths_B))
    return [
        _as_score(log_probs_BT[row, task.first - 1 : task.length], best_BT[row, task.first - 1 : task.length])
        for row, task in enumerate(tasks)
    ]


def _as_score(log_probs_T: np.ndarray, best_T: np.ndarray) -> Score:
    return Score(
        log_likelihood=float(np.sum(log_probs_T, dtype=np.float64)),
        num_tokens=len(log_probs_T),
        greedy=bool(best_T.all()),
        token_log_probs=log_probs_T.copy(),  # a slice would keep the whole batch
    )


@jax.jit
def _predicted(
    model: CausalLM, inputs_BT: jax.Array, targets_BT: jax.Array, lengths_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of each target, its log-probability after its input, and whether no token is more probable."""
    token_mask_BT = (
        jnp.arange(inputs_BT.shape[1], dtype=jnp.int32) < lengths_B[:, None]
    )  # padding takes no expert's capacity
    logits_BTV = model(inputs_BT, segment_ids=token_mask_BT).logits
    # A masked sum, where a gather would all-gather a vocabulary that is sharded over `tensor`.
    target_BTV = jnp.arange(logits_BTV.shape[-1], dtype=jnp.int32) == targets_BT[..., None]
    target_BT = jnp.sum(jnp.where(target_BTV, logits_BTV, 0), axis=-1)
    log_probs_BT = target_BT - jax.nn.logsumexp(logits_BTV, axis=-1)
    return log_probs_BT, jnp.argmax(logits_BTV, axis=-1) == targets_BT


def padded_length(length: int) -> int:
    """The next of 64, 96, 128, 192, 256, 384, …: at most a third of a longer batch's rows is padding."""
    power = next_power_of_two(length)
    return max(SHORTEST, power * 3 // 4 if length <= power * 3 // 4 else power)


def full_batch(model: CausalLM, length: int) -> int:
    """How many sequences of this (padded) length run at once, by `BUDGET`."""
    config = model.config
    widest = max(config.vocab_size, config.attention.num_attention_heads * length)
    fitting = BUDGET * model.mesh.shape["tensor"] // (widest * length)
    rows = previous_power_of_two(fitting)  # as those of smaller batches
    return _num_shards(model) * min(rows, MAX_ROWS)


def _num_shards(model: CausalLM) -> int:
    """How many devices share the rows of a batch."""
    return math.prod(model.mesh.shape[axis] for axis in BATCH)
