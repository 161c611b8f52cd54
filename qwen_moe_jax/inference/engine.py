"""The engine: requests of many callers join and leave one running batch, and none changes another's answer.

A request has a slot, one row of the cache, from its admission to its end. A step reads a chunk of the prompts of those
who joined, and decodes a few tokens of all others. Everything that runs on the device is one of a fixed set of compiled
programs (`inference.programs`, `inference.slot_programs`), which `Engine.compile` compiles before the first request.
"""

import dataclasses
import functools
import itertools
import math
import secrets
import time
from collections.abc import Callable, Mapping
from os import PathLike

import jax
import numpy as np
from flax import nnx

from qwen_moe_jax.config import DTypeLike, GenerationConfig
from qwen_moe_jax.errors import RequestError
from qwen_moe_jax.inference import programs
from qwen_moe_jax.inference.adapters import with_adapters
from qwen_moe_jax.inference.chunks import WEIGHTS_ELSEWHERE, WEIGHTS_ON_CPUS, chunk_shapes
from qwen_moe_jax.inference.decode_rows import Pace
from qwen_moe_jax.inference.expert_loads import ExpertLoads
from qwen_moe_jax.inference.masks import top_tokens
from qwen_moe_jax.inference.memory import LOG_PROB_CHUNK, PREFILL_CHUNK, blocks_for, engine_memory, has_row_states
from qwen_moe_jax.inference.outside import Events, Outside
from qwen_moe_jax.inference.paging import Paging
from qwen_moe_jax.inference.programs import DecodeOutput
from qwen_moe_jax.inference.request import MOST_TOP_LOGPROBS, Chunk, Finish, Request, TopTokens
from qwen_moe_jax.inference.running import Running
from qwen_moe_jax.inference.scheduler import ChunkPlan, Scheduler
from qwen_moe_jax.inference.session import check_request, new_tokens, token_list
from qwen_moe_jax.inference.settings import needs_full, require_fitting, require_known_tokens
from qwen_moe_jax.inference.slot_arrays import SlotArrays
from qwen_moe_jax.inference.slot_memory import choose_slots
from qwen_moe_jax.inference.slot_programs import PromptOutput
from qwen_moe_jax.inference.tables import TableSizes
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.rounding import round_up
from qwen_moe_jax.sharding.explicit import apart_from_callers_mesh
from qwen_moe_jax.sharding.rules import batch_shards
from qwen_moe_jax.suggest import did_you_mean

#: Tokens that are decoded between two looks at the queue.
DECODE_STEPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """What an engine is doing, and has done since it was made.

    Attributes:
        waiting, active_slots, free_slots: requests without a slot and with one, and slots without a request.
        cached_tokens: tokens of the requests with a slot that are in the cache.
        blocks, used_blocks, kept_blocks: of the cache; those that texts have; those that are kept for texts to come.
        prefix_hit_tokens: tokens of prompts that were not read, for a text before began with them.
        preempted: requests that were put back into the queue for want of blocks.
        read_tokens, decoded_tokens: tokens of prompts that were read, and tokens that were decoded.
        steps: calls of `step` that did something.
    """

    waiting: int
    active_slots: int
    free_slots: int
    cached_tokens: int
    blocks: int
    used_blocks: int
    kept_blocks: int
    prefix_hit_tokens: int
    preempted: int
    read_tokens: int
    decoded_tokens: int
    steps: int


class Engine:
    """A fixed number of slots in one cache, and a queue before them. Not for several threads at once.

    Args:
        model: run in eval mode.
        slots: requests that are served at once; rounded up to a multiple of the devices that share the batch. None is
            what fits into the memory that the model and its adapters leave free (`slot_memory.choose_slots`).
        max_length: the largest number of tokens of a request, prompt and answer.
        cache_tokens: tokens of all requests together for which there are keys and values; None is `max_length` for each
            slot. Rounded up to whole blocks, and to `max_length` on each of the devices that share the batch.
        cache_dtype: of keys and values, anything that `jnp.dtype` takes; None is the model's.
        prefix_states: copies of what linear and sliding layers keep of texts that others may begin like; None is one
            for each slot. Without effect for a model of full attention alone, which needs none.
        decode_steps: tokens of each request that are decoded between two looks at the queue, at most.
        prefill_chunk: tokens of prompts that are read between two decoding steps, at most.
        sizes: of the tables of stop tokens, biases and the like; a request that needs more is refused.
        adapters: folders of low-rank adapters by the names that `Request.adapter` has; not of routed experts.

    Raises:
        RequestError: the model has no weights, or not even one slot fits.
        ConfigError, CheckpointError: an adapter does not fit, or is one of routed experts; see `with_adapters`.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        slots: int | None,
        max_length: int,
        cache_tokens: int | None = None,
        cache_dtype: DTypeLike | None = None,
        prefix_states: int | None = None,
        decode_steps: int = DECODE_STEPS,
        prefill_chunk: int = PREFILL_CHUNK,
        sizes: TableSizes = TableSizes(),
        adapters: Mapping[str, str | PathLike[str]] | None = None,
    ):
        model.require_weights()
        if not model.deterministic:
            model = nnx.merge(*nnx.split(model))  # a view of the same weights: the caller's stays in training mode
            model.eval()
        self.adapter_names = tuple(adapters or ())
        if adapters:
            model = with_adapters(model, adapters)
        self._model, self._sizes = model, sizes
        self._pace, self._steps_of_call = Pace(decode_steps), 1
        shards = batch_shards(model.mesh)
        slots = choose_slots(model, max_length, cache_tokens) if slots is None else slots
        self.slots, self.max_length = round_up(slots, shards), max_length
        self._chunk_tokens = chunk = min(prefill_chunk, programs.prefill_length(max_length, model.config))
        shapes = chunk_shapes(programs.PREFILL_BUCKETS[1], chunk, self.slots // shards)
        weights = WEIGHTS_ON_CPUS if model.mesh.devices.flat[0].platform == "cpu" else WEIGHTS_ELSEWHERE
        blocks = blocks_for(model, self.slots, max_length, cache_tokens)
        is_paged = not has_row_states(model)  # nothing else is kept of a text
        copies = 0 if is_paged else round_up(self.slots if prefix_states is None else prefix_states, shards)
        self._paging = Paging(
            slots=self.slots,
            shards=shards,
            blocks=blocks.count // shards,
            size=blocks.size,
            max_length=max_length,
            copies=None if is_paged else copies // shards,
            every=round_up(chunk, blocks.size),
        )
        log_prob_shape = 1, min(chunk, LOG_PROB_CHUNK)
        self._scheduler = Scheduler(self.slots, shards, shapes, weights, log_prob_shape, self._paging)
        self._arrays = SlotArrays(
            model,
            slots=self.slots,
            max_length=max_length,
            chunk=chunk,
            decode_steps=decode_steps,
            cache_dtype=cache_dtype,
            blocks=blocks,
            copies=copies,
            sizes=sizes,
            adapter_names=self.adapter_names,
        )
        self._memory = functools.partial(
            engine_memory,
            model,
            slots=slots,
            max_length=max_length,
            cache_tokens=cache_tokens,
            cache_dtype=cache_dtype,
            prefix_states=prefix_states,
            prefill_chunk=prefill_chunk,
        )
        self._numbers = itertools.count()
        self._requests: dict[int, Running] = {}
        self._outside = Outside(self._arrays.mask_words)
        self._masks: dict[int, np.ndarray] = {}  # packed, by request
        self._new: set[int] = set()  # slots whose first token is due
        self._read_tokens = self._hit_tokens = self._decoded_tokens = self._steps = 0

    def compile(self, report: Callable[[str, int, int], None] = lambda name, done, total: None) -> None:
        """Compiles every program, with nothing to do: no request waits for a compilation after that.

        Of several processes, all call it.

        Args:
            report: called with the name of the next program, how many are done and how many there are.
        """
        with apart_from_callers_mesh(self._model.mesh):
            self._arrays.start()
            calls = self._arrays.compilers(self._scheduler.empty_plans())
            for done, (name, call) in enumerate(calls.items()):
                report(name, done, len(calls))
                call()
            report("", len(calls), len(calls))

    def memory(self) -> list[tuple[str, int]]:
        """Bytes on each device by what they are for; all exact but the last, an estimate of the working memory."""
        return self._memory()

    # ---- requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Puts a request into the queue; the number by which its chunks are known.

        Without `max_new_tokens` and `max_length`, and at most, a text goes on to the engine's `max_length`.

        Raises:
            RequestError: it can never be served: see `session.check_request`; it fills the cache; lists of its settings
                are longer than the tables.
        """
        tokens = token_list("the prompt", request.token_ids)
        config = self._checked_config(tokens, request)
        number = next(self._numbers)
        self._outside.submit(number, dataclasses.replace(request, token_ids=tuple(tokens)), config)
        return number

    def _checked_config(self, tokens: list[int], request: Request) -> GenerationConfig:
        """The config of a request that can be served, with a seed and the number of new tokens."""
        model, config = self._model, request.config
        check_request(model, "the prompt", tokens, dataclasses.replace(config, num_speculative_tokens=0))
        left = self.max_length - len(tokens)
        if left < 1:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens, and a request has {self.max_length} in total: none is left for "
                "a new token. Shorten it, or start the engine with a larger max_length."
            )
        budget = min(new_tokens(model, tokens, config), left)
        if programs.has_growing_base(model.config, len(tokens) + budget):
            raise RequestError(
                f"prompt and answer may have {len(tokens) + budget} tokens, more than the model's "
                f"{model.config.max_position_embeddings} positions: its dynamic rope then rotates anew what was read. "
                "Expected fewer; a Session serves it."
            )
        for name, count in (("top_logprobs", request.top_logprobs), ("prompt_logprobs", request.prompt_logprobs or 0)):
            if not 0 <= count <= MOST_TOP_LOGPROBS:
                raise RequestError(f"{name}={count}: expected between 0 and {MOST_TOP_LOGPROBS}.")
        if request.adapter is not None and request.adapter not in self.adapter_names:
            raise RequestError(
                f"adapter={request.adapter!r}: this engine has no adapter of that name; "
                f"{did_you_mean(request.adapter, self.adapter_names)}"
                f"expected None or one of {', '.join(self.adapter_names) or 'none: it has no adapters'}."
            )
        require_known_tokens("the request", config, model.config.vocab_size)
        require_fitting("the request", config, self._sizes)
        seed = secrets.randbits(64) if config.seed is None else config.seed
        return dataclasses.replace(config, max_new_tokens=budget, seed=seed)

    def cancel(self, request: int) -> None:
        """Ends a request without another chunk; its slot is free at the next step. Nothing for one that has ended."""
        self._outside.cancel(request)

    @property
    def idle(self) -> bool:
        """Whether there is no request."""
        return not self._requests and not self._outside.submissions

    @property
    def load(self) -> EngineLoad:
        """What it is doing."""
        running = self._scheduler.running.values()
        return EngineLoad(
            waiting=len(self._scheduler.waiting) + self._outside.submissions,
            active_slots=len(running),
            free_slots=self.slots - len(running),
            cached_tokens=sum(one.read for one in running),
            blocks=self._paging.blocks,
            used_blocks=self._paging.used_blocks,
            kept_blocks=self._paging.kept_blocks,
            prefix_hit_tokens=self._hit_tokens,
            preempted=self._scheduler.preempted,
            read_tokens=self._read_tokens,
            decoded_tokens=self._decoded_tokens,
            steps=self._steps,
        )

    def expert_loads(self) -> ExpertLoads | None:
        """Tokens that each expert was given since the engine was made; None for a model without experts.

        Waits for the devices and copies [L, E] numbers from them, so it is not part of `load`. Any thread may call it.
        """
        return self._arrays.expert_loads()

    # ---- one step ---------------------------------------------------------------------------------------------------

    def step(self) -> list[Chunk]:
        """Admits requests, reads a chunk of their prompts, and decodes a few tokens of those who are ready.

        An exception (Ctrl-C, say) puts the requests with a slot back into the queue: what they have is kept, and read
        again.

        Returns:
            What is new, by request; [] where there is none.
        """
        chunks = self._take(self._outside.exchange(self._requests.values(), self._pace.steps))
        if not self._requests:
            return chunks
        self._steps += 1
        try:
            with apart_from_callers_mesh(self._model.mesh):
                self._arrays.start()
                if self._scheduler.admit():
                    self._arrays.configure(self._scheduler.running)
                has_read = self._read()
                return chunks + self._decode(timed=not has_read)
        except BaseException:
            self._give_up()
            raise

    def follow(self) -> None:
        """Runs the steps of process 0, in every other process that shares the model, until that calls `close`.

        Process 0 has to call `step` now and then also when it is idle: the others wait for it in a collective.
        """
        while not self._outside.closed:
            self.step()

    def close(self) -> None:
        """Ends all requests, and `follow` in the other processes."""
        for number in self._requests:
            self._outside.cancel(number)
        self._outside.close()
        self.step()

    def _take(self, events: Events) -> list[Chunk]:
        """Takes in what came from outside: requests, ends of requests and masks; the last chunks of those that end."""
        for number, request, config in events.submitted:
            running = Running(number=number, request=request, config=config, tokens=list(request.token_ids))
            self._requests[number] = running
            self._scheduler.waiting.append(running)
        self._masks, self._steps_of_call = events.masks, events.steps
        chunks = []
        for number, finished, error in events.ended:
            if number in self._requests:
                self._end(self._requests[number])
                if finished is not None:
                    chunks.append(Chunk(request=number, token_ids=(), log_probs=(), finished=finished, error=error))
        return chunks

    def _end(self, running: Running) -> None:
        """Takes a request off its slot, whose row does not go on, or out of the queue."""
        if running.slot is not None:
            self._new.discard(running.slot)
            if running.decodes and running.left and self._arrays.started:
                self._arrays.update({running.slot: None})
        self._scheduler.release(running)
        self._outside.forget(running.number)
        del self._requests[running.number]

    def _give_up(self) -> None:
        """After an exception: the arrays are gone, and every request with a slot waits for one again."""
        self._arrays.drop()
        self._new.clear()
        for running in sorted(self._scheduler.running.values(), key=lambda one: -one.number):
            self._scheduler.requeue(running)
        self._paging.forget()

    def _read(self) -> bool:
        """Reads the next chunks of prompts, and lets those decode whose prompt is read; whether there were any."""
        left, has_read = self._chunk_tokens, False
        while (plan := self._scheduler.next_chunk(left)) is not None:
            self._stop_preempted()
            for slot, row in plan.restored.items():
                self._arrays.restore_state(slot, row)
            if plan.parts:
                self._read_plan(plan)
            left -= plan.tokens_RT.size // self._scheduler.shards
            has_read = True
        self._stop_preempted()
        ready = [one for one in self._scheduler.running.values() if one.begun and not one.decodes and one.unread == 0]
        for running in ready:
            running.decodes = True
            if running.generated == 0:
                self._hit_tokens += running.cached
            self._new.add(running.slot)
            if needs_full(running.config):
                self._arrays.set_text(running.slot, running.tokens, running.prompt)
        if ready:
            self._arrays.update({running.slot: running for running in ready})
        return has_read

    def _read_plan(self, plan: ChunkPlan) -> None:
        output = self._arrays.read(plan)
        for running, size in plan.parts:
            running.read += size
            self._read_tokens += size
            self._paging.remember(running)
            row = self._paging.place_copy(running)
            if row is not None:
                self._arrays.save_state(running.slot, row)
        if output is not None:
            _add_log_probs(plan, output)

    def _stop_preempted(self) -> None:
        """The rows of slots that were taken from their requests do not go on."""
        if self._scheduler.stopped:
            self._arrays.update(dict.fromkeys(self._scheduler.stopped))
            self._new.difference_update(self._scheduler.stopped)
            self._scheduler.stopped.clear()

    def _steps_now(self) -> int:
        """Tokens of each request in the next call: one while a first token is due, a prompt is read or a mask asked."""
        running = self._scheduler.running.values()
        soon = bool(self._new) or any(not one.decodes or one.number in self._masks for one in running)
        return 1 if soon else self._steps_of_call

    def _reserve(self, steps: int) -> dict[int, Running]:
        """The requests that decode next, by slot: each has the blocks for it, the oldest first."""
        for running in sorted(self._scheduler.running.values(), key=lambda one: one.number):
            if running.decodes and running.slot is not None:
                self._scheduler.reserve(running, running.read + min(steps, running.left))
        self._stop_preempted()
        if self._paging.changed:
            self._arrays.set_table(self._paging.table_BM)
            self._paging.changed = False
        return {slot: one for slot, one in self._scheduler.running.items() if one.decodes}

    def _decode(self, *, timed: bool) -> list[Chunk]:
        """Decodes the next tokens. A call that waits for prompts to be read says nothing of how long tokens take."""
        steps = self._steps_now()
        running = self._reserve(steps)
        if not running:
            return []
        is_full = any(needs_full(one.config) for one in running.values())
        rows = self._arrays.rows_for(running, is_full=is_full)
        limit_R = np.zeros(len(rows.slot_R), np.int32)
        limit_R[list(rows.position.values())] = steps
        masks = {
            rows.position[slot]: self._masks[one.number] for slot, one in running.items() if one.number in self._masks
        }
        top = any(one.request.top_logprobs for one in running.values())
        begin = time.perf_counter()
        output = self._arrays.decode(rows, limit_R, masks, top=top, is_full=is_full)
        if timed:
            self._pace.add(int(output.count_B.max()), time.perf_counter() - begin)
        self._new.clear()
        return [self._chunk(one, output, rows.position[slot]) for slot, one in running.items()]

    def _chunk(self, running: Running, output: DecodeOutput, position: int) -> Chunk:
        """What is new of one request, at its position in the call; one that has ended leaves its slot."""
        count, request, is_first = int(output.count_B[position]), running.request, running.generated == 0
        log_probs = output.log_prob_BC[position, :count].tolist()
        error = None
        if any(map(math.isnan, log_probs)):
            count = next(at for at, log_prob in enumerate(log_probs) if math.isnan(log_prob))
            error = RequestError("found logits that are not finite, expected numbers: NaN or infinity in the model.")
        tokens = output.token_BC[position, :count].tolist()
        running.tokens += tokens
        running.read += count
        self._decoded_tokens += count
        if error is None:
            self._paging.remember(running)
        finished: Finish | None = None
        if not output.alive_B[position]:
            finished = "stop" if output.stopped_B[position] else "length"
            running.decodes = False  # the device knows
        elif error is None:
            self._outside.accept(running.number, tokens)
        if error is not None:
            self._arrays.clear(running.slot, self._paging.spoiled(running))
            finished = "error"
        top: list[TopTokens] = []
        if request.top_logprobs:
            top = top_tokens(
                output.top_BCK[position, :count], output.top_log_prob_BCK[position, :count], request.top_logprobs
            )
        if finished is not None:
            self._end(running)
        return Chunk(
            request=running.number,
            token_ids=tuple(tokens),
            log_probs=tuple(log_probs[:count]),
            top_logprobs=tuple(top),
            prompt_logprobs=running.prompt_log_probs() if is_first else None,
            cached_tokens=running.cached if is_first else 0,
            finished=finished,
            error=error,
        )


def _add_log_probs(plan: ChunkPlan, output: PromptOutput) -> None:
    """Gives the one request of a chunk the log-probabilities of its tokens."""
    [(running, size)] = plan.parts
    place = int(np.flatnonzero(plan.count_R)[0])
    found = jax.tree.map(lambda x: x[place, :size], jax.device_get(output))
    running.log_probs += found.log_prob_RT.tolist()
    running.top += top_tokens(found.top_RTK, found.top_log_prob_RTK, running.request.prompt_logprobs)
