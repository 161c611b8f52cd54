"""Sessions: prompts of one batch are prefilled into a cache and continued on the device (`inference.programs`)."""

import contextlib
import dataclasses
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import DTypeLike, GenerationConfig
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.huggingface.unused_fields import say_once
from qwen_moe_jax.inference import programs, speculative
from qwen_moe_jax.inference.programs import DecodeOutput
from qwen_moe_jax.inference.request import Chunk, Finish
from qwen_moe_jax.inference.settings import initial_state, sampling_settings
from qwen_moe_jax.inference.speculative import Drafts
from qwen_moe_jax.model.cache import Cache, RecurrentState, empty_cache
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.sharding.distributed import broadcast
from qwen_moe_jax.sharding.explicit import apart_from_callers_mesh
from qwen_moe_jax.sharding.rules import BATCH


def stream(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    configs: Sequence[GenerationConfig],
    *,
    cache_dtype: DTypeLike | None = None,
    enough: Callable[[Chunk], bool] = lambda chunk: False,
    return_routing: bool = False,
) -> Iterator[Chunk]:
    """Continues every prompt and yields tokens as they are decoded.

    Args:
        model: run in eval mode.
        prompts: token ids, at least one each: lists, or arrays of NumPy, JAX or PyTorch.
        configs: one for each prompt; without `max_new_tokens` and `max_length`, as many as the model has positions for.
        cache_dtype: of keys and values, anything that `jnp.dtype` takes; None is the model's.
        enough: called with every chunk before it is yielded; True ends that request (its text has a stop string, say).
        return_routing: record the experts of every token (`Chunk.routing`).

    Raises:
        RequestError: a prompt that cannot be served (see `check_request`); the routing of a model without experts.
    """
    prompts = [token_list(f"prompt {index}", prompt) for index, prompt in enumerate(prompts)]
    requests = list(zip(prompts, configs, strict=True))
    for index, request in enumerate(requests):
        check_request(model, f"prompt {index}", *request)
    if requests:
        longest = max(len(prompt) + new_tokens(model, prompt, config) for prompt, config in requests)
        session = Session(
            model, max_length=longest, rows=len(requests), cache_dtype=cache_dtype, return_routing=return_routing
        )
        yield from session.run(prompts, configs, enough)


def check_request(model: CausalLM, name: str, prompt: Sequence[int], config: GenerationConfig) -> None:
    """Checks that a request can be served.

    Raises:
        RequestError: naming the request: an empty prompt, a token id outside the vocabulary, no position for a
            new token, speculative decoding by a model without a next-token head.
    """
    vocab_size, positions = model.config.vocab_size, model.config.max_position_embeddings
    if config.num_speculative_tokens:
        model.require_mtp(f"{name}: num_speculative_tokens={config.num_speculative_tokens}")
        if model.config.rope.rope_type == "dynamic":
            raise RequestError(
                f"{name}: num_speculative_tokens={config.num_speculative_tokens} is not supported under a dynamic "
                "rope, whose rotations of a token differ when several are read at once: expected 0."
            )
    if len(prompt) == 0:
        raise RequestError(f"{name} is empty, expected at least one token.")
    for token in prompt:
        if not isinstance(token, int | np.integer) or not 0 <= token < vocab_size:
            raise RequestError(f"{name} holds {token!r}, expected token ids from 0 to {vocab_size - 1}.")
    if config.max_new_tokens is None and config.max_length is not None:
        if len(prompt) >= config.max_length:
            raise RequestError(
                f"{name} has {len(prompt)} tokens, and max_length={config.max_length} counts them, too: none is left "
                "for a new token. Shorten it, or give max_new_tokens, which replaces max_length."
            )
    elif config.max_new_tokens is None and len(prompt) >= positions:
        raise RequestError(
            f"{name} has {len(prompt)} tokens, and the model has {positions} positions: none is left for a new "
            "token. Shorten it, or give max_new_tokens to go beyond what the model was trained for."
        )
    if len(prompt) > positions:
        say_once(
            f"{name} has {len(prompt)} tokens, more than the {positions} positions that the model was trained for "
            "(max_position_embeddings): the text may become worse."
        )


def token_list(name: str, prompt: Any) -> list[Any]:
    """A prompt's token ids as a list, from a list or an array of NumPy, JAX or PyTorch; `check_request` checks them.

    Raises:
        RequestError: it is no sequence; the message begins with `name`.
    """
    tokens = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        raise RequestError(f"{name} is {tokens!r}, expected a list of token ids: pass [prompt] for a single prompt.")
    return [token.item() if hasattr(token, "item") and np.ndim(token) == 0 else token for token in tokens]


def new_tokens(model: CausalLM, prompt: Sequence[int], config: GenerationConfig) -> int:
    """The largest number of new tokens of a request."""
    longest = model.config.max_position_embeddings if config.max_length is None else config.max_length
    return config.max_new_tokens or longest - len(prompt)


class Session:
    """A cache and the rows that use it. The prefix that a row shares with its next prompt is not computed again.

    The state of linear layers cannot go back to an earlier token. A session of one row keeps two copies of it, from
    the end of the last prompt and from before the last chunk of that; a prompt that departs from what was read goes on
    from the last copy before that point, or is read from its start.

    An exception (Ctrl-C, say) while the device runs clears the cache, and nothing else.

    Where the model is sharded over several processes, all of them run the same session with the same prompts, and all
    get the same tokens.

    Args:
        model: run in eval mode.
        max_length: the largest number of tokens of a row, prompts and answers included.
        rows: requests at once.
        cache_dtype: of keys and values, anything that `jnp.dtype` takes; None is the model's.
        return_routing: record the experts of every token (`Chunk.routing`), for as long as it is in the cache.

    Attributes:
        decoded, passes: tokens that were decoded after the first of each prompt, and the forward passes of the rows
            that they took: as many in plain decoding, fewer in speculative decoding.
    """

    def __init__(
        self,
        model: CausalLM,
        max_length: int,
        *,
        rows: int = 1,
        cache_dtype: DTypeLike | None = None,
        return_routing: bool = False,
    ):
        model.require_weights()
        if return_routing and not any(kind.mlp == "sparse" for kind in model.config.layers):
            raise RequestError("return_routing was asked for, but the model has no sparse layer: there is no routing.")
        if not model.deterministic:
            model = nnx.merge(*nnx.split(model))  # a view of the same weights: the caller's stays in training mode
            model.eval()
        self._model = model
        self._rows, self.max_length, self._abstract = programs.padded_cache(model, rows, max_length, cache_dtype)
        self._cache_dtype = cache_dtype
        self._cache: Cache | None = None
        self._drafts: Drafts | None = None  # of the next-token head, in speculative decoding
        self._cached: list[list[int]] = [[] for _ in range(self._rows)]
        self._return_routing = return_routing
        self._routing: list[list[np.ndarray]] = [[] for _ in range(self._rows)]  # of the tokens that were read
        self.decoded = self.passes = 0
        self._is_linear = any(kind.mixer == "linear" for kind in model.config.layers)
        self._copies: dict[int, list[RecurrentState]] = {}  # of linear layers, by the tokens that row 0 had then
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
            RequestError: it cannot be served, or does not fit into the cache.
        """
        token_ids = token_list("the prompt", token_ids)
        check_request(self._model, "the prompt", token_ids, config)
        left = self.max_length - len(token_ids)
        if left < 1:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens, and the cache holds {self.max_length} in total: none is "
                "left for a new token. Start a new conversation, or give the session a larger max_length."
            )
        budget = min(new_tokens(self._model, token_ids, config), left)
        yield from self.run(
            [token_ids], [dataclasses.replace(config, max_new_tokens=budget)], enough, keep_copies=self._is_linear
        )

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        configs: Sequence[GenerationConfig],
        enough: Callable[[Chunk], bool],
        *,
        keep_copies: bool = False,
    ) -> Iterator[Chunk]:
        """Continues prompts that were checked and fit, one a row.

        Args:
            prompts: token ids.
            configs: one for each prompt.
            enough: that of `stream`.
            keep_copies: copy the state of linear layers, for the next prompt of this one row.
        """
        model, absent = self._model, self._rows - len(prompts)
        rows = [*map(list, prompts), *[[]] * absent]
        budgets = [new_tokens(model, *request) for request in zip(prompts, configs, strict=True)]
        configs = [
            dataclasses.replace(config, max_new_tokens=budget) for config, budget in zip(configs, budgets, strict=True)
        ]
        if self._spans_processes:
            configs = [_with_common_seed(config) for config in configs]
        token_B: Any = np.zeros(self._rows, np.int32)
        left_B: Any = np.array([*budgets, *[0] * absent], np.int32)
        with self._or_clear():
            settings = sampling_settings([*configs, *[GenerationConfig()] * absent], model.config.vocab_size)
            sampling = initial_state(settings, rows, self.max_length)
            state = programs.DecodeState(token_B=token_B, left_B=left_B, sampling=sampling)
            proposals = max((config.num_speculative_tokens for config in configs), default=0)
            state, output = programs.first(self._read(rows, keep_copies, proposals > 0), state, settings)
            if proposals:
                drafts = speculative.begin(self._drafts, state.token_B, proposals=proposals)
                state = dataclasses.replace(state, drafts=drafts)
            output = self._on_host(output)
        alive = set(range(len(prompts)))
        yield from self._chunks(output, alive, enough)
        while alive:
            continues_B = np.isin(np.arange(self._rows), sorted(alive))
            with self._or_clear():
                state = dataclasses.replace(state, left_B=jnp.where(continues_B, state.left_B, 0))
                self._cache, state, output = programs.decode(model, self._cache, state, settings, **self._recording)
                self._drafts, output = state.drafts, self._on_host(output)
            self.decoded += int(output.count_B.sum())
            self.passes += int(output.passes_B.sum())
            yield from self._chunks(output, alive, enough)

    def _on_host(self, output: Any) -> Any:
        """The new tokens, or experts, of all rows: those of other processes as well."""
        return (
            multihost_utils.process_allgather(output, tiled=True) if self._spans_processes else jax.device_get(output)
        )

    @contextlib.contextmanager
    def _or_clear(self) -> Iterator[None]:
        """Clears the session where a program is interrupted: its cache was donated, or has tokens the host has not."""
        try:
            with apart_from_callers_mesh(self._model.mesh):
                yield
        except BaseException:
            self._cache, self._drafts, self._copies = None, None, {}
            self._cached, self._routing = [[] for _ in range(self._rows)], [[] for _ in range(self._rows)]
            raise

    def _read(self, rows: list[list[int]], keep_copies: bool = False, with_drafts: bool = False) -> jax.Array:
        """Reads the prompts into the cache, and into the next-token head's; logits [B, V] of what follows each."""
        known_B = np.array([self._known(index, row) for index, row in enumerate(rows)], np.int32)
        cache = self._cache or empty_cache(self._abstract)
        if self._is_linear and 0 < known_B[0] < len(self._cached[0]) - 1:
            cache = programs.restore_states(cache, self._copies[int(known_B[0])])
        self._cached, self._copies = [list(row) for row in rows], {}
        self._cache = dataclasses.replace(cache, lengths_B=jax.device_put(known_B, self._per_row))
        if with_drafts:
            self._drafts = self._drafts_after(known_B)
        logits_BV, read = None, []
        self._routing = [_first_tokens(parts, known) for parts, known in zip(self._routing, known_B, strict=True)]
        while logits_BV is None or any(known < len(row) for known, row in zip(known_B, rows, strict=True)):
            left = max(len(row) - known for known, row in zip(known_B, rows, strict=True))
            length = programs.prefill_length(left, self._model.config)
            if keep_copies and left <= length:
                self._copy_states(known_B[0])
            tokens_BT = np.zeros((self._rows, length), np.int32)
            count_B = np.zeros(self._rows, np.int32)
            for index, (known, row) in enumerate(zip(known_B, rows, strict=True)):
                part = row[known : known + length]
                tokens_BT[index, : len(part)] = part
                count_B[index] = len(part)
            arguments = (self._model, self._cache, tokens_BT, count_B, logits_BV)
            if with_drafts:
                head = self._drafts.cache, speculative.last_state(self._drafts)
                self._cache, logits_BV, experts, self._drafts = speculative.prefill(
                    *arguments, *head, **self._recording
                )
            else:
                self._cache, logits_BV, experts = programs.prefill(*arguments, **self._recording)
            read.append((experts, count_B))
            known_B = known_B + count_B  # not in place: JAX may still read the old one
        if keep_copies:
            self._copy_states(known_B[0])
        if self._return_routing:  # the host waits for the device only here
            for experts, count_B in read:
                self._record(self._on_host(experts), count_B)
        return logits_BV

    @property
    def _recording(self) -> dict[str, bool]:
        """Arguments of the programs."""
        return {"return_routing": True} if self._return_routing else {}

    def _record(self, experts_BTLA: Any, count_B: Any) -> None:
        for parts, experts_TLA, count in zip(self._routing, experts_BTLA, count_B, strict=True):
            parts.append(np.swapaxes(experts_TLA[:count], 0, 1))

    def _drafts_after(self, known_B: np.ndarray) -> Drafts:
        """The next-token head's state for rows of which so many tokens are in the cache.

        The head reads a token with the state of the one before it, which is known of the last token of the last turn
        alone, and it may have read proposals in place of tokens. That makes its proposals worse, and nothing else.
        """
        drafts = self._drafts or programs.empty_drafts(self._model, self._rows, self.max_length, self._cache_dtype)
        lengths_B = jax.device_put(np.maximum(known_B - 1, 0), self._per_row)
        return dataclasses.replace(drafts, cache=dataclasses.replace(drafts.cache, lengths_B=lengths_B))

    def _copy_states(self, tokens: np.integer) -> None:
        if tokens:  # no copy is needed of the state before the first token
            self._copies[int(tokens)] = programs.copy_states(self._cache)

    def _known(self, index: int, row: list[int]) -> int:
        """How many tokens of a prompt the row's cache has. The last is run in any case: its logits are needed."""
        cached = self._cached[index][:-1]  # the last token was chosen, and is not in the cache
        same = next(
            (at for at, (a, b) in enumerate(zip(cached, row, strict=False)) if a != b), min(len(cached), len(row))
        )
        same = min(same, max(len(row) - 1, 0))
        if programs.has_growing_base(self._model.config, max(len(row), len(self._cached[index]))):
            return 0  # the cached keys were rotated for a text of another length
        if self._is_linear and same < len(cached):
            return max((tokens for tokens in self._copies if tokens <= same), default=0) if index == 0 else 0
        # A ring buffer has overwritten older tokens: it can go back by less than a chunk.
        sliding = any(kind.mixer == "sliding" for kind in self._model.config.layers)
        return 0 if sliding and len(cached) - same >= programs.PREFILL_BUCKETS[-1] else same

    def _chunks(self, output: DecodeOutput, alive: set[int], enough: Callable[[Chunk], bool]) -> Iterator[Chunk]:
        """The new tokens, request by request; requests that ended are taken out of `alive`."""
        decoded = {index: output.token_BC[index, : output.count_B[index]].tolist() for index in sorted(alive)}
        for index, token_ids in decoded.items():  # all of them, before the first is yielded: nobody may take the others
            self._cached[index] += token_ids
        is_first = output.experts_BCLA is None  # the first tokens are chosen after the prompt, and read later
        if not is_first:
            self._record(output.experts_BCLA, output.count_B)
        for index, token_ids in decoded.items():
            routing = None
            if self._return_routing:
                parts = self._routing[index] if is_first else self._routing[index][-1:]
                routing = np.concatenate(parts, axis=1)
            finished: Finish | None = None
            if not output.alive_B[index]:
                finished = "stop" if output.stopped_B[index] else "length"
                alive.discard(index)
            log_probs = tuple(output.log_prob_BC[index, : len(token_ids)].tolist())
            chunk = Chunk(
                index=index, token_ids=tuple(token_ids), log_probs=log_probs, finished=finished, routing=routing
            )
            if enough(chunk) and finished is None:
                alive.discard(index)
                chunk = dataclasses.replace(chunk, finished="stop")
            yield chunk


def _first_tokens(parts: list[np.ndarray], tokens: int) -> list[np.ndarray]:
    """Recorded experts [L_sparse, T, A] of the first tokens."""
    return [np.concatenate(parts, axis=1)[:, :tokens]] if parts else []


def _with_common_seed(config: GenerationConfig) -> GenerationConfig:
    """A row that samples without a seed is given a random one, the same in all processes."""
    if config.seed is not None or not config.do_sample:
        return config
    return dataclasses.replace(config, seed=int(broadcast(str(secrets.randbits(64)))))
