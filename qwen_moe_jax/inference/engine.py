"""Prefill once, decode on the device: the loop that turns prompts into tokens.

Three compiled programs do the work. `_prefill` runs a stretch of every prompt through the model and into the cache,
`_first` chooses the first new tokens, `_decode` writes token after token without asking the host, until its stretch is
full or every row has stopped. Shapes are rounded up (rows, room in the cache, stretches), so that requests of all
lengths share a few compilations.
"""

import contextlib
import dataclasses
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import GenerationConfig
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference.sampling import (
    SamplingSettings,
    SamplingState,
    advance,
    choose,
    initial_state,
    log_probabilities,
    process_logits,
    sampling_settings,
)
from qwen_moe_jax.model.cache import Cache, abstract_cache, empty_cache
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.rounding import next_power_of_two, round_up
from qwen_moe_jax.sharding.distributed import broadcast
from qwen_moe_jax.sharding.rules import BATCH

#: Stretches of a prompt that are run at once: the shortest that holds what is left, or the longest.
PREFILL_BUCKETS = (8, 32, 128, 512)
#: Tokens that are written before the host looks at them.
DECODE = 32
#: Room in a cache: powers of two from the first number to the second, from there on multiples of the second.
CACHE_BUCKETS = (64, 4096)

Finish = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """New tokens of one request.

    Attributes:
        index: of the request in its batch.
        token_ids: what is new, the stop token included.
        log_probs: of each, in nats, by the model's own distribution (before temperature and the like).
        finished: with the last chunk of a request: "stop" (a stop token, or it was enough) or "length"; else None.
    """

    index: int
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finished: Finish | None = None


def stream(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    configs: Sequence[GenerationConfig],
    *,
    cache_dtype: str | None = None,
    enough: Callable[[Chunk], bool] = lambda chunk: False,
) -> Iterator[Chunk]:
    """Continues every prompt, handing out tokens as they come.

    Args:
        model: run in eval mode.
        prompts: token ids, at least one each.
        configs: one for each prompt; `max_new_tokens` None means as many as the model has positions for.
        cache_dtype: of keys and values; None is the model's.
        enough: asked of every chunk before it is handed out; True ends that request (its text has a stop string, say).

    Raises:
        RequestError: a prompt that cannot be served (see `check_request`).
    """
    requests = list(zip(prompts, configs, strict=True))
    for index, request in enumerate(requests):
        check_request(model, f"prompt {index}", *request)
    if requests:
        longest = max(len(prompt) + new_tokens(model, prompt, config) for prompt, config in requests)
        session = Session(model, max_length=longest, rows=len(requests), cache_dtype=cache_dtype)
        yield from session.run(prompts, configs, enough)


def check_request(model: CausalLM, name: str, prompt: Sequence[int], config: GenerationConfig) -> None:
    """Refuses what cannot be served.

    Raises:
        RequestError: naming the request: an empty prompt, a token id outside the vocabulary, no room for a new token.
    """
    vocab_size, positions = model.config.vocab_size, model.config.max_position_embeddings
    if len(prompt) == 0:
        raise RequestError(f"{name} is empty, expected at least one token.")
    for token in prompt:
        if not isinstance(token, int | np.integer) or not 0 <= token < vocab_size:
            raise RequestError(f"{name} holds {token!r}, expected token ids from 0 to {vocab_size - 1}.")
    if config.max_new_tokens is None and len(prompt) >= positions:
        raise RequestError(
            f"{name} has {len(prompt)} tokens, and the model has {positions} positions: there is no room for a new "
            "token. Shorten it, or give max_new_tokens to go beyond what the model was trained for."
        )


def new_tokens(model: CausalLM, prompt: Sequence[int], config: GenerationConfig) -> int:
    """How many tokens a request may add."""
    return config.max_new_tokens or model.config.max_position_embeddings - len(prompt)


def compilations() -> int:
    """How many programs the engine has compiled in this process."""
    return sum(program._cache_size() for program in (_prefill, _first, _decode))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """One of the engine's programs, with nothing in it allocated: what a planner compiles is what a session runs.

    Attributes:
        program: jitted.
        arguments: its own, as `jax.ShapeDtypeStruct`s.
        cache: the one among them that holds keys and values.
        rows, length, room: as they were rounded up: requests, new tokens of each, tokens a row may come to.
    """

    program: Callable
    arguments: tuple
    cache: Cache
    rows: int
    length: int
    room: int


def abstract_prefill(
    model: CausalLM, *, rows: int, prompt: int, max_length: int, cache_dtype: str | None = None
) -> Described:
    """The program that reads a stretch of every prompt, the longest that prompts of this length need.

    Args:
        model: in eval mode; it may be without weights.
        rows, prompt, max_length: requests, tokens of each, tokens a row may come to.
        cache_dtype: as `Session`.
    """
    rows, room, cache = _described_cache(model, rows, max_length, cache_dtype)
    length = next((stretch for stretch in PREFILL_BUCKETS if stretch >= prompt), PREFILL_BUCKETS[-1])
    tokens_BT, count_B = jax.ShapeDtypeStruct((rows, length), np.int32), jax.ShapeDtypeStruct((rows,), np.int32)
    arguments = (model, cache, tokens_BT, count_B, None)
    return Described(program=_prefill, arguments=arguments, cache=cache, rows=rows, length=length, room=room)


def abstract_decode(model: CausalLM, *, rows: int, max_length: int, cache_dtype: str | None = None) -> Described:
    """The program that writes up to `DECODE` tokens, the most probable ones; a round of its loop is one token a row.

    Arguments as `abstract_prefill`.
    """
    rows, room, cache = _described_cache(model, rows, max_length, cache_dtype)
    settings = sampling_settings([GenerationConfig()] * rows, model.config.vocab_size)
    numbers_B = np.zeros(rows, np.int32)
    writing = DecodeState(token_B=numbers_B, left_B=numbers_B, sampling=initial_state(settings, [[]] * rows))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (writing, settings))
    return Described(program=_decode, arguments=(model, cache, *shapes), cache=cache, rows=rows, length=1, room=room)


def _described_cache(model: CausalLM, rows: int, max_length: int, cache_dtype: str | None) -> tuple[int, int, Cache]:
    """Rows and room as they are rounded up, and the cache for them."""
    ways = math.prod(model.mesh.shape[axis] for axis in BATCH)
    rows, room = round_up(next_power_of_two(rows), ways), _room(max_length)
    dtype = cache_dtype or model.execution.dtype
    cache = abstract_cache(
        model.config, model.mesh, batch=rows, max_length=room, max_write=PREFILL_BUCKETS[-1], dtype=dtype
    )
    return rows, room, cache


class Session:
    """A cache, and the rows that live in it. What a row has in common with its next prompt is not computed again.

    An exception (Ctrl-C, say) while the device reads or writes costs what is remembered, and nothing else.

    Where the model is spread over several processes, all of them run the same session with the same prompts, and all
    are handed the same tokens.

    Args:
        model: run in eval mode.
        max_length: tokens a row may come to, prompt and answers together.
        rows: requests at once.
        cache_dtype: of keys and values; None is the model's.
    """

    def __init__(self, model: CausalLM, max_length: int, *, rows: int = 1, cache_dtype: str | None = None):
        model.require_weights()
        if not model.deterministic:
            model = nnx.merge(*nnx.split(model))  # a view of the same weights: the caller's stays in training mode
            model.eval()
        self._model = model
        self._rows, self.max_length, self._described = _described_cache(model, rows, max_length, cache_dtype)
        self._cache: Cache | None = empty_cache(self._described)
        self._cached: list[list[int]] = [[] for _ in range(self._rows)]
        self._per_row = NamedSharding(model.mesh, P(BATCH))
        self._spans_processes = not self._per_row.is_fully_addressable

    def generate(
        self,
        token_ids: Sequence[int],
        config: GenerationConfig,
        enough: Callable[[Chunk], bool] = lambda chunk: False,
    ) -> Iterator[Chunk]:
        """Continues one conversation, given from its start; for a session of one row. `enough` is that of `stream`.

        Raises:
            RequestError: it cannot be served, or has no room in the cache.
        """
        check_request(self._model, "the prompt", token_ids, config)
        room = self.max_length - len(token_ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens, and the cache has room for {self.max_length} in all: there "
                "is none for a new token. Start a new conversation, or give the session a larger max_length."
            )
        budget = min(new_tokens(self._model, token_ids, config), room)
        yield from self.run([token_ids], [dataclasses.replace(config, max_new_tokens=budget)], enough)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        configs: Sequence[GenerationConfig],
        enough: Callable[[Chunk], bool],
    ) -> Iterator[Chunk]:
        """Continues prompts that were checked and fit, one a row."""
        model, absent = self._model, self._rows - len(prompts)
        rows = [*map(list, prompts), *[[]] * absent]
        budgets = [new_tokens(model, *request) for request in zip(prompts, configs, strict=True)]
        if self._spans_processes:
            configs = [_seeded_alike(config) for config in configs]
        settings = sampling_settings([*configs, *[GenerationConfig()] * absent], model.config.vocab_size)
        writing = DecodeState(
            token_B=np.zeros(self._rows, np.int32),
            left_B=np.array([*budgets, *[0] * absent], np.int32),
            sampling=initial_state(settings, rows),
        )
        with self._or_forget():
            writing, written = _first(self._read(rows), writing, settings)
            written = self._on_host(written)
        alive = set(range(len(prompts)))
        yield from self._chunks(written, alive, enough)
        while alive:
            goes_on_B = np.isin(np.arange(self._rows), sorted(alive))
            writing = dataclasses.replace(writing, left_B=jnp.where(goes_on_B, writing.left_B, 0))
            with self._or_forget():
                self._cache, writing, written = _decode(model, self._cache, writing, settings)
                written = self._on_host(written)
            yield from self._chunks(written, alive, enough)

    def _on_host(self, written: "DecodeOutput") -> "DecodeOutput":
        """What the device wrote, of all rows: those of other processes as well."""
        return (
            multihost_utils.process_allgather(written, tiled=True) if self._spans_processes else jax.device_get(written)
        )

    @contextlib.contextmanager
    def _or_forget(self) -> Iterator[None]:
        """Where this ends early, the cache may be given away and not come back, or hold more than was heard of."""
        try:
            yield
        except BaseException:
            self._cache, self._cached = None, [[] for _ in range(self._rows)]
            raise

    def _read(self, rows: list[list[int]]) -> jax.Array:
        """Brings the prompts into the cache; logits [B, V] of what follows each."""
        known_B = np.array([self._known(index, row) for index, row in enumerate(rows)], np.int32)
        self._cached = [list(row) for row in rows]
        cache = self._cache or empty_cache(self._described)
        self._cache = dataclasses.replace(cache, lengths_B=jax.device_put(known_B, self._per_row))
        logits_BV = None
        while logits_BV is None or any(known < len(row) for known, row in zip(known_B, rows, strict=True)):
            left = max(len(row) - known for known, row in zip(known_B, rows, strict=True))
            length = next((stretch for stretch in PREFILL_BUCKETS if stretch >= left), PREFILL_BUCKETS[-1])
            tokens_BT = np.zeros((self._rows, length), np.int32)
            count_B = np.zeros(self._rows, np.int32)
            for index, (known, row) in enumerate(zip(known_B, rows, strict=True)):
                part = row[known : known + length]
                tokens_BT[index, : len(part)] = part
                count_B[index] = len(part)
            self._cache, logits_BV = _prefill(self._model, self._cache, tokens_BT, count_B, logits_BV)
            known_B = known_B + count_B  # not in place: JAX may read the old one where it lies
        return logits_BV

    def _known(self, index: int, row: list[int]) -> int:
        """How many tokens of a prompt the row's cache has. The last is run in any case: its logits are needed."""
        cached = self._cached[index][:-1]  # the last token was chosen, and never read
        same = next(
            (at for at, (a, b) in enumerate(zip(cached, row, strict=False)) if a != b), min(len(cached), len(row))
        )
        same = min(same, max(len(row) - 1, 0))
        # A ring has overwritten what lies a whole round back: it can forget no more than a stretch.
        sliding = any(kind.attention == "sliding" for kind in self._model.config.layers)
        return 0 if sliding and len(cached) - same >= PREFILL_BUCKETS[-1] else same

    def _chunks(self, written: "DecodeOutput", alive: set[int], enough: Callable[[Chunk], bool]) -> Iterator[Chunk]:
        """What the device wrote, now on the host, request by request; those that ended leave `alive`."""
        for index in sorted(alive):
            count = int(written.count_B[index])
            token_ids = tuple(written.token_BC[index, :count].tolist())
            finished: Finish | None = None
            if not written.alive_B[index]:
                finished = "stop" if written.stopped_B[index] else "length"
                alive.discard(index)
            self._cached[index] += token_ids
            log_probs = tuple(written.log_prob_BC[index, :count].tolist())
            chunk = Chunk(index=index, token_ids=token_ids, log_probs=log_probs, finished=finished)
            if enough(chunk) and finished is None:
                alive.discard(index)
                chunk = dataclasses.replace(chunk, finished="stop")
            yield chunk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """Where every row stands.

    Attributes:
        token_B: int32; the token that was chosen last, which the model has not read yet.
        left_B: int32; tokens the row may still write; 0 for one that has ended.
        sampling: what choosing remembers.
    """

    token_B: jax.Array
    left_B: jax.Array
    sampling: SamplingState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOutput:
    """What a program hands to the host.

    Attributes:
        token_BC, log_prob_BC: int32 and float32; the new tokens of each row.
        count_B: int32; how many they are.
        alive_B: bool; whether the row goes on.
        stopped_B: bool; whether it ended with a stop token.
    """

    token_BC: jax.Array
    log_prob_BC: jax.Array
    count_B: jax.Array
    alive_B: jax.Array
    stopped_B: jax.Array


@jax.jit(donate_argnames=("cache", "logits_BV"))
def _prefill(
    model: CausalLM, cache: Cache, tokens_BT: jax.Array, count_B: jax.Array, logits_BV: jax.Array | None
) -> tuple[Cache, jax.Array]:
    """Reads a stretch of every prompt. Rows without tokens in it keep the logits they had."""
    new_BV, cache = model.extend(tokens_BT, count_B, cache)
    return cache, new_BV if logits_BV is None else jnp.where(count_B[:, None] > 0, new_BV, logits_BV)


@jax.jit
def _first(logits_BV: jax.Array, writing: DecodeState, settings: SamplingSettings) -> tuple[DecodeState, DecodeOutput]:
    """Chooses the first tokens."""
    alive_B = writing.left_B > 0
    writing, log_prob_B = _choose(logits_BV, writing, settings)
    count_B = alive_B.astype(jnp.int32)
    return writing, _written(writing, settings, writing.token_B[:, None], log_prob_B[:, None], count_B)


@jax.jit(donate_argnames=("cache", "writing"))
def _decode(
    model: CausalLM, cache: Cache, writing: DecodeState, settings: SamplingSettings
) -> tuple[Cache, DecodeState, DecodeOutput]:
    """Reads the last token and chooses the next, up to `DECODE` times, as long as any row goes on."""
    rows = writing.token_B.shape[0]

    def going(carry) -> jax.Array:
        step, _, writing, *_ = carry
        return (step < DECODE) & jnp.any(writing.left_B > 0)

    def step(carry):
        step, cache, writing, token_BC, log_prob_BC, count_B = carry
        alive_B = writing.left_B > 0
        logits_BV, cache = model.extend(writing.token_B[:, None], alive_B.astype(jnp.int32), cache)
        writing, log_prob_B = _choose(logits_BV, writing, settings)
        token_BC = token_BC.at[:, step].set(writing.token_B)
        log_prob_BC = log_prob_BC.at[:, step].set(log_prob_B)
        return step + 1, cache, writing, token_BC, log_prob_BC, count_B + alive_B

    start = (
        jnp.int32(0),
        cache,
        writing,
        jnp.zeros((rows, DECODE), jnp.int32),
        jnp.zeros((rows, DECODE), jnp.float32),
        jnp.zeros(rows, jnp.int32),
    )
    _, cache, writing, token_BC, log_prob_BC, count_B = jax.lax.while_loop(going, step, start)
    return cache, writing, _written(writing, settings, token_BC, log_prob_BC, count_B)


def _choose(logits_BV: jax.Array, writing: DecodeState, settings: SamplingSettings) -> tuple[DecodeState, jax.Array]:
    """The next token of every row that goes on, and its log-probability [B]; rows that ended stay as they are."""
    alive_B = writing.left_B > 0
    token_B = choose(process_logits(logits_BV, settings, writing.sampling), settings, writing.sampling)
    token_B = jnp.where(alive_B, token_B, writing.token_B)
    stopped_B = jnp.any(token_B[:, None] == settings.stop_BS, axis=1)
    writing = dataclasses.replace(
        writing,
        token_B=token_B,
        left_B=jnp.where(alive_B & ~stopped_B, writing.left_B - 1, 0),
        sampling=advance(writing.sampling, token_B, alive_B),
    )
    return writing, log_probabilities(logits_BV, token_B)


def _written(
    writing: DecodeState, settings: SamplingSettings, token_BC: jax.Array, log_prob_BC: jax.Array, count_B: jax.Array
) -> DecodeOutput:
    return DecodeOutput(
        token_BC=token_BC,
        log_prob_BC=log_prob_BC,
        count_B=count_B,
        alive_B=writing.left_B > 0,
        stopped_B=jnp.any(writing.token_B[:, None] == settings.stop_BS, axis=1),
    )


def _seeded_alike(config: GenerationConfig) -> GenerationConfig:
    """A row that draws without a seed is given one by chance: the same in all processes."""
    if config.seed is not None or not config.do_sample:
        return config
    return dataclasses.replace(config, seed=int(broadcast(str(secrets.randbits(64)))))


def _room(length: int) -> int:
    smallest, step = CACHE_BUCKETS
    return max(smallest, next_power_of_two(length)) if length <= step else round_up(length, step)
