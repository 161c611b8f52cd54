"""The arrays of an engine's slots on the devices: cache, decode state, settings; and the calls of their programs."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_moe_jax.config import DTypeLike, GenerationConfig
from qwen_moe_jax.inference import programs
from qwen_moe_jax.inference.adapters import choose_adapters
from qwen_moe_jax.inference.decode_rows import RowChoice, choose_rows, row_counts
from qwen_moe_jax.inference.expert_loads import ExpertLoads, no_counts, on_host
from qwen_moe_jax.inference.programs import DecodeOutput, DecodeState, StepLimits
from qwen_moe_jax.inference.running import Running
from qwen_moe_jax.inference.scheduler import ChunkPlan
from qwen_moe_jax.inference.settings import SamplingSettings, fixed_settings, initial_state
from qwen_moe_jax.inference.slot_programs import PromptOutput, SlotUpdate, Texts, slot_programs
from qwen_moe_jax.inference.tables import TableSizes
from qwen_moe_jax.model.cache import Blocks, Cache, empty_cache
from qwen_moe_jax.model.causal_lm import CausalLM
from qwen_moe_jax.rounding import ceil_div
from qwen_moe_jax.sharding.rules import BATCH, batch_shards

#: From one number of rows that has a decoding program to the next: with plain settings, and with the full ones.
PLAIN_FACTOR, FULL_FACTOR = 2, 4


class SlotArrays:
    """The arrays of an engine's slots, allocated by `start`.

    Args:
        model: in eval mode.
        slots: a multiple of the devices that share the batch.
        max_length: the largest number of tokens of a request.
        chunk: tokens that are read at once at most.
        decode_steps: tokens that `decode` decodes at most.
        cache_dtype: of keys and values; None is the model's.
        blocks: of keys and values, on all shards.
        copies: rows for copies of states, on all shards; 0 for none.
        sizes: of the tables of settings.
        adapter_names: of the model's low-rank adapters, in the order of their numbers.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        slots: int,
        max_length: int,
        chunk: int,
        decode_steps: int,
        cache_dtype: DTypeLike | None,
        blocks: Blocks,
        copies: int,
        sizes: TableSizes,
        adapter_names: Sequence[str] = (),
    ):
        self._model, self._slots, self._max_length = model, slots, max_length
        self._decode_steps, self._sizes = decode_steps, sizes
        self._shards = batch_shards(model.mesh)
        self.abstract = programs.abstract_slots(model, slots, max_length, chunk, cache_dtype, blocks)
        self.abstract_copies: Cache | None = None
        if copies:
            least = Blocks(count=self._shards, size=blocks.size)
            self.abstract_copies = programs.abstract_slots(model, copies, max_length, chunk, cache_dtype, least)
        self._blocks = blocks
        self._programs = slot_programs(self.abstract, self.abstract_copies)
        self._per_row = NamedSharding(model.mesh, P(BATCH))
        self._settings: dict[bool, SamplingSettings] = {}  # by whether they are the full ones
        self._configs: list[GenerationConfig] = [GenerationConfig(seed=0)] * slots
        self._adapters: dict[str | None, int] = {None: 0, **{name: at for at, name in enumerate(adapter_names, 1)}}
        self._adapter_B = np.zeros(slots, np.int32)
        self._cache: Cache | None = None
        # Not donated: any thread may read them at any time, and an exception does not lose them.
        self._counters = jax.device_put(no_counts(model.config), NamedSharding(model.mesh, P()))
        self.mask_words = ceil_div(model.config.vocab_size, 32)
        self._all_allowed: dict[int, Any] = {}  # masks that allow every token, by rows

    def expert_loads(self) -> ExpertLoads | None:
        """Tokens that each expert was given; None for a model without experts."""
        return None if self._counters is None else on_host(self._counters, self._model.config)

    @property
    def started(self) -> bool:
        """Whether they are allocated."""
        return self._cache is not None

    def start(self) -> None:
        """Allocates them, where they are not: no slot has a request."""
        if self.started:
            return
        cache, empty = empty_cache(self.abstract), [()] * self._slots
        plain, full = (initial_state(self._settings_of(is_full), empty, self._max_length) for is_full in (False, True))
        self._texts = self._put(Texts.of(full))
        zeros_B: Any = np.zeros(self._slots, np.int32)
        self._state = self._put(DecodeState(token_B=zeros_B, left_B=zeros_B, sampling=plain))
        self._copies = None if self.abstract_copies is None else empty_cache(self.abstract_copies)
        self._cache = cache

    def drop(self) -> None:
        """Frees them: after an exception, they may have been donated to a program that did not return."""
        self._cache = None

    def configure(self, running: Mapping[int, Running]) -> None:
        """Takes the settings of the requests, by slot."""
        none = GenerationConfig(seed=0)
        self._configs = [running[slot].config if slot in running else none for slot in range(self._slots)]
        self._settings.clear()
        for slot in range(self._slots):
            self._adapter_B[slot] = self._adapters[running[slot].request.adapter] if slot in running else 0

    def read(self, plan: ChunkPlan) -> PromptOutput | None:
        """Reads a chunk of prompts; their log-probabilities, where they are asked for."""
        arrays = [plan.tokens_RT, plan.count_R, plan.rows_R, plan.lengths_R, plan.table_RM]
        if plan.with_targets:
            arrays.append(plan.targets_RT)
        rows, rows_of_chunk = self._slots // self._shards, len(plan.rows_R)
        first_R = np.arange(rows_of_chunk) // (rows_of_chunk // self._shards) * rows
        slot_R = np.minimum(first_R + plan.rows_R, self._slots - 1)
        self._choose_adapters(np.where(plan.rows_R < rows, self._adapter_B[slot_R], 0).astype(np.int32))
        self._cache, self._counters, output = self._programs.read_chunk(
            self._model, self._cache, self._counters, *map(self._put, arrays)
        )
        return output

    def update(self, slots: Mapping[int, Running | None]) -> None:
        """Sets slots to requests that are ready to decode; None for a slot that has none any more."""
        numbers: dict[str, Any] = {
            field.name: np.zeros(self._slots, np.int32) for field in dataclasses.fields(SlotUpdate)
        }
        changed_B = np.zeros(self._slots, bool)
        for slot, running in slots.items():
            changed_B[slot] = True
            if running is not None:
                numbers["lengths_B"][slot], numbers["token_B"][slot] = running.read, running.tokens[-1]
                numbers["left_B"][slot], numbers["prompt_length_B"][slot] = running.left, running.prompt
                numbers["generated_B"][slot] = running.generated
        update = self._put(SlotUpdate(**{**numbers, "changed_B": changed_B}))
        self._state, lengths_B = self._programs.update_slots(self._state, self._cache.lengths_B, update)
        self._cache = dataclasses.replace(self._cache, lengths_B=lengths_B)

    def set_text(self, slot: int, tokens: list[int], prompt: int) -> None:
        """Sets what penalties and constraints look at: prompt and output, the first `prompt` of them the prompt."""
        text_L = np.zeros(self._max_length, np.int32)
        text_L[: len(tokens)] = tokens
        self._texts = self._programs.set_text(
            self._texts, np.int32(slot), text_L, np.int32(len(tokens)), np.int32(prompt)
        )

    def set_table(self, table_BM: np.ndarray) -> None:
        """Sets the blocks of all slots."""
        self._cache = dataclasses.replace(self._cache, table_BM=self._put(table_BM.copy()))

    def clear(self, slot: int | None, blocks: Sequence[int]) -> None:
        """Fills the cache of a slot, and these blocks of its shard, with zeros."""
        rows, count = self._slots // self._shards, self.abstract.table_BM.shape[1]
        rows_R = np.full(self._shards, rows, np.int32)
        blocks_RM = np.full((self._shards, count), self._blocks.count, np.int32)
        if slot is not None:
            rows_R[slot // rows] = slot % rows
            blocks_RM[slot // rows, : len(blocks)] = blocks
        self._cache = self._programs.clear(self._cache, *self._put((rows_R, blocks_RM.ravel())))

    def save_state(self, slot: int | None, row: int = 0) -> None:
        """Copies the state of a slot to a row for copies, numbered on its shard; of no slot, nothing."""
        rows = self._slots // self._shards
        slots_R = np.zeros(self._shards, np.int32)
        rows_R = np.full(self._shards, self.abstract_copies.lengths_B.shape[0], np.int32)
        if slot is not None:
            slots_R[slot // rows], rows_R[slot // rows] = slot % rows, row
        self._copies = self._programs.save_states(self._copies, self._cache, *self._put((rows_R, slots_R)))

    def restore_state(self, slot: int | None, row: int = 0) -> None:
        """Copies a row for copies to a slot, of which it becomes the state."""
        rows = self._slots // self._shards
        slots_R, rows_R = np.full(self._shards, rows, np.int32), np.zeros(self._shards, np.int32)
        if slot is not None:
            slots_R[slot // rows], rows_R[slot // rows] = slot % rows, row
        self._cache = self._programs.restore_states(self._cache, self._copies, *self._put((slots_R, rows_R)))

    def rows_for(self, slots: Collection[int], *, is_full: bool) -> RowChoice:
        """The rows of the smallest program that decodes these slots."""
        rows = self._slots // self._shards
        counts = row_counts(rows, FULL_FACTOR if is_full else PLAIN_FACTOR)
        return choose_rows(slots, rows=rows, shards=self._shards, counts=counts)

    def decode(
        self, rows: RowChoice, limit_R: np.ndarray, masks: Mapping[int, np.ndarray], *, top: bool, is_full: bool
    ) -> DecodeOutput:
        """Decodes a few tokens of every row that has any left.

        Args:
            rows: which (`rows_for`).
            limit_R: int32; tokens of each at most; 0 for rows that are none.
            masks: packed masks, by position in the call.
            top: whether the most probable tokens are asked for.
            is_full: with the full settings (`settings.needs_full`).

        Returns:
            Arrays of the host.
        """
        self._choose_adapters(self._adapter_B[rows.slot_R])
        state, plain = self._state, self._state.sampling
        if is_full:
            state = dataclasses.replace(state, sampling=self._texts.added_to(plain))
        limits, settings = self._limits(limit_R, masks, top), self._settings_of(is_full)
        arguments = (self._model, self._cache, state, self._counters, settings, limits, rows.rows_R)
        self._cache, state, self._counters, output = self._programs.decode(*arguments, steps=self._decode_steps)
        if is_full:
            self._texts = Texts.of(state.sampling)
            nothing = {field.name: getattr(plain, field.name) for field in dataclasses.fields(Texts)}
            state = dataclasses.replace(state, sampling=dataclasses.replace(state.sampling, **nothing))
        self._state = state
        return jax.device_get(output if top else dataclasses.replace(output, top_BCK=None, top_log_prob_BCK=None))

    def compilers(self, plans: Mapping[str, ChunkPlan]) -> dict[str, Callable[[], Any]]:
        """A call of every program with nothing to do, by name; `plans` are empty, one for each shape."""
        rows = self._slots // self._shards
        copying: dict[str, Callable[[], Any]] = {}
        if self.abstract_copies is not None:
            copying = {
                "copies of states": lambda: self.save_state(None),
                "states from copies": lambda: self.restore_state(None),
            }
        return {
            **{name: functools.partial(self.read, plan) for name, plan in plans.items()},
            "the state of slots": lambda: self.update({}),
            "the text of a slot": lambda: self.set_text(self._slots, [], 0),
            "cleared slots": lambda: self.clear(None, []),
            **copying,
            **{
                f"decoding {count} rows": functools.partial(self._decode_nothing, count, is_full=False)
                for count in row_counts(rows, PLAIN_FACTOR)
            },
            **{
                f"decoding {count} rows with penalties and constraints": functools.partial(
                    self._decode_nothing, count, is_full=True
                )
                for count in row_counts(rows, FULL_FACTOR)
            },
        }

    def _decode_nothing(self, count: int, *, is_full: bool) -> None:
        """Calls the program for so many rows of each shard; none of them has a token left."""
        rows, zeros_R = self._slots // self._shards, np.zeros(self._shards * count, np.int32)
        rows_R = None if count == rows else np.full_like(zeros_R, rows)
        nobody = RowChoice(rows_R=rows_R, slot_R=zeros_R, position={})
        self.decode(nobody, zeros_R, {}, top=False, is_full=is_full)

    def _choose_adapters(self, rows_B: np.ndarray) -> None:
        """Gives the model the adapters of the rows that it reads next, where it has any."""
        if len(self._adapters) > 1:
            choose_adapters(self._model, rows_B)

    def _limits(self, limit_R: np.ndarray, masks: Mapping[int, np.ndarray], top: bool) -> StepLimits:
        allowed_RW: Any = self._all_allowed.get(len(limit_R))
        if masks or allowed_RW is None:
            packed_RW = np.full((len(limit_R), self.mask_words), 0xFFFF_FFFF, np.uint32)
            for position, mask_W in masks.items():
                packed_RW[position] = mask_W
            allowed_RW = self._put(packed_RW)
        if not masks:
            self._all_allowed[len(limit_R)] = allowed_RW
        flags: dict[str, Any] = {"limit_B": limit_R, "masked": np.bool_(masks), "top": np.bool_(top)}
        return StepLimits(allowed_BW=allowed_RW, **flags)

    def _settings_of(self, is_full: bool) -> SamplingSettings:
        """The settings of the requests in their slots, the full ones or the plain."""
        if is_full not in self._settings:
            made = fixed_settings(self._configs, self._model.config.vocab_size, self._sizes, is_full=is_full)
            drawing = made.drawing
            made = self._put(dataclasses.replace(made, drawing=dataclasses.replace(drawing, key_B=None)))
            # Keys are given to devices as numbers: typed keys are not arrays of the host.
            halves_B2 = np.array([(one.seed >> 32, one.seed & 0xFFFF_FFFF) for one in self._configs], np.uint32)
            key_B = jax.random.wrap_key_data(self._put(halves_B2), impl="threefry2x32")
            self._settings[is_full] = dataclasses.replace(made, drawing=dataclasses.replace(made.drawing, key_B=key_B))
        return self._settings[is_full]

    def _put(self, tree: Any) -> Any:
        """Arrays of the host, one part a row, on the devices: always with the same sharding."""
        return jax.tree.map(lambda x: jax.device_put(np.asarray(x), self._per_row), tree)
