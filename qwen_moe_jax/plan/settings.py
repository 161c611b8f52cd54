"""Settings that a search varies for each mesh: what a step recomputes, splits and moves. Its result is the same.

They are fields of `ExecutionConfig`, `accumulation_steps`, the named table of sharding rules and the optimizer's
`memory_kind`. Nothing that drops a token is proposed: `capacity` is tried only where it was asked for. Over `context`,
keys are gathered or go round in a ring, and the attention kernel is the one that does so. Dtypes stay as they are, and
so does the attention block: neither arithmetic nor a compiled program says which of several is faster.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, get_args

from qwen_moe_jax.config import SHARDING_RULES
from qwen_moe_jax.config.execution import ContextParallel, Remat
from qwen_moe_jax.config.resolve import SPLASH_MULTIPLE
from qwen_moe_jax.plan.result import Work
from qwen_moe_jax.sharding.rules import BATCH, CONTEXT

#: Values by name: `accumulation_steps`, `rules`, `memory_kind`, or a field of `ExecutionConfig`.
Settings = dict[str, Any]

ACCUMULATION = "accumulation_steps"

#: Which of `SHARDING_RULES` the weights are stored by, where it is not the one that was asked for.
RULES = "rules"

#: All that a search varies.
VARIED = (
    ACCUMULATION,
    RULES,
    "remat",
    "dispatch",
    "exchange",
    "buffer_factor",
    "context_parallel",
    "attention",
    "memory_kind",
    "activation_offloading",
)

#: Where the optimizer state is between steps (`optimizer.memory_kind`).
MEMORY_KIND = "memory_kind"
#: Where what is kept for the backward pass waits: a field of `ExecutionConfig`.
ACTIVATIONS = "activation_offloading"
#: The memory of the host, for one or both, where nothing else fits.
OFFLOADED: tuple[Settings, ...] = (
    {MEMORY_KIND: "pinned_host"},
    {ACTIVATIONS: True},
    {MEMORY_KIND: "pinned_host", ACTIVATIONS: True},
)

#: A `dropless` buffer for balanced routers, in multiples of a balanced load: what exceeds it takes a further round.
SMALL_BUFFER = 1.25


def settings_of(
    work: Work, mesh: Mapping[str, int], platform: str, fixed: Collection[str] = (), *, sparse: bool
) -> Iterator[Settings]:
    """All settings to try on a mesh; one that is empty for a step that does not train.

    Args:
        work: as it was asked for.
        mesh: sizes of the axes.
        platform: of the devices.
        fixed: names that keep the values they have in `work`.
        sparse: whether the model has experts.
    """
    if work.purpose != "train":
        yield {}
        return
    asked = {ACCUMULATION: work.accumulation_steps, **work.execution}

    def values(name: str, others: Collection[Any]) -> list[Any]:
        found = asked[name]
        return [found] if name in fixed else list(dict.fromkeys([found, *others]))

    dispatches = values("dispatch", ("dropless", "dense")) if sparse else [None]
    splits = values(ACCUMULATION, _splits(work, mesh))
    attentions, remats = _attentions(work, mesh, platform, fixed), values("remat", get_args(Remat))
    for dispatch, split, remat, attention in itertools.product(dispatches, splits, remats, attentions):
        settings = {ACCUMULATION: split, "remat": remat, **attention, **({"dispatch": dispatch} if sparse else {})}
        if dispatch != "dropless" or mesh["expert"] == 1:
            yield settings
            continue
        exchanges = values("exchange", ("all_gather", "all_to_all" if platform == "cpu" else "ragged_all_to_all"))
        for exchange, factor in itertools.product(exchanges, values("buffer_factor", (SMALL_BUFFER,))):
            buffer = {} if factor is None else {"buffer_factor": factor}
            yield {**settings, "exchange": exchange, **buffer}


def other_rules(work: Work, mesh: Mapping[str, int], fixed: Collection[str] = ()) -> list[str]:
    """The tables of sharding rules to try on a mesh next to that of `work`, where they can pay.

    Over `context`, weights are stored sharded (less memory) or not (less to gather); dense weights that are not sharded
    over `expert` are not gathered over it. Tables of one's own are not varied.
    """
    if work.purpose != "train" or RULES in fixed or work.sharding not in SHARDING_RULES:
        return []
    found = ["expert+fsdp", "expert+fsdp+context"] if mesh[CONTEXT] > 1 else []
    found += ["fsdp"] if mesh["expert"] > 1 else []
    return [name for name in found if name != work.sharding]


def _attentions(work: Work, mesh: Mapping[str, int], platform: str, fixed: Collection[str]) -> list[Settings]:
    """How queries meet the keys of other devices, with the kernel that does so; without `context`, as was asked for."""
    if mesh[CONTEXT] == 1:
        return [{}]
    block = work.execution.get("attention_block") or SPLASH_MULTIPLE
    splash = platform == "tpu" and work.dtype in ("bfloat16", "float32") and block >= SPLASH_MULTIPLE
    asked = {name: work.execution.get(name) for name in ("context_parallel", "attention") if name in fixed}
    found = []
    for way in get_args(ContextParallel):
        for kernel in ("splash", "blocks") if splash and way == "all_gather" else ("blocks",):
            one = {"context_parallel": way, "attention": kernel}
            if all(one[name] == value for name, value in asked.items()):
                found.append({name: value for name, value in one.items() if name not in fixed})
    return found or [{}]


def _splits(work: Work, mesh: Mapping[str, int]) -> list[int]:
    """Numbers of micro-batches, powers of two, that leave whole rows to every device."""
    rows = work.rows // math.prod(mesh[axis] for axis in BATCH)
    return [2**power for power in range(max(rows, 1).bit_length()) if rows % 2**power == 0]


def can_offload(settings: Mapping[str, Any], choice: Mapping[str, Any]) -> bool:
    """Whether one of `OFFLOADED` has a meaning under settings: remat has to name the activations that are kept."""
    return not (choice.get(ACTIVATIONS) and settings.get("remat") == "none")


def of_execution(settings: Mapping[str, Any]) -> Settings:
    """Those that are fields of `ExecutionConfig`."""
    return {name: value for name, value in settings.items() if name not in (ACCUMULATION, RULES, MEMORY_KIND)}


def with_settings(work: Work, settings: Mapping[str, Any]) -> Work:
    """The step under these settings."""
    execution = {**work.execution, **of_execution(settings)}
    steps, rules = settings.get(ACCUMULATION, work.accumulation_steps), settings.get(RULES, work.sharding)
    return dataclasses.replace(work, execution=execution, accumulation_steps=steps, sharding=rules)


def format_settings(settings: Mapping[str, Any]) -> str:
    """Settings in words: "remat dots, 2 micro-batches, dropless, all_gather, buffer 1.25"; "" where there are none."""
    words = []
    if "remat" in settings:
        words.append(f"remat {settings['remat']}")
    if settings.get(ACCUMULATION, 1) > 1:
        words.append(f"{settings[ACCUMULATION]} micro-batches")
    words += [str(settings[name]) for name in ("dispatch", "exchange") if settings.get(name)]
    if "buffer_factor" in settings:
        words.append(f"buffer {settings['buffer_factor']:g}")
    if "context_parallel" in settings:
        words.append(f"context by {settings['context_parallel']}")
    if "attention" in settings:
        words.append(f"attention by {settings['attention']}")
    if RULES in settings:
        words.append(f"rules {settings[RULES]}")
    if MEMORY_KIND in settings:
        words.append(f"optimizer state in {settings[MEMORY_KIND]}")
    if settings.get(ACTIVATIONS):
        words.append("activations in pinned_host")
    return ", ".join(words)
