"""Search for the best mesh and settings: estimates by arithmetic for all, then the most promising compiled.

    search = search_meshes(target, networks, outline_of, compile_plan, keep=6, progress=show)
    search.best, search.candidates; `plan.search_table` prints them

Three functions are the caller's; `plan.mesh_search` makes them of a step:

    outline_of(mesh) -> Outline                     ShardingError where the model or the batch does not divide
    settings_of(outline, mesh) -> settings to try   `plan.settings`; without it those of the outline alone
    compile_plan(mesh, settings) -> Plan            by the target's compiler

Plans that fit come first, then those that may. Among them the order is `Roofline.likely`, the time where nothing
overlaps, or what is expected by measured steps: with perfect overlap all meshes that are bound by arithmetic take the
same time, since they compute the same, and the better one is the one that leaves less to hide.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from qwen_moe_jax.errors import ConfigError, ShardingError
from qwen_moe_jax.plan.chips import Network
from qwen_moe_jax.plan.draft import Draft, Outline, draft_of
from qwen_moe_jax.plan.promise import Waiting, promise
from qwen_moe_jax.plan.result import Plan, Target, Work
from qwen_moe_jax.plan.settings import RULES, Settings, can_offload, with_settings
from qwen_moe_jax.plan.work import check_rows
from qwen_moe_jax.sharding.mesh import AXES
from qwen_moe_jax.sharding.rules import BATCH, CONTEXT
from qwen_moe_jax.text import format_mesh

OutlineOf = Callable[[dict[str, int]], Outline]
#: The same step under other tables of sharding rules.
OthersOf = Callable[[Outline, Mapping[str, int]], Iterable[Outline]]
SettingsOf = Callable[[Outline, Mapping[str, int]], Iterable[Settings]]
CompilePlan = Callable[[dict[str, int], Settings], Plan]

#: Tokens of the shortest part of a row that a search gives to a device.
SHORTEST_PART = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A mesh and its settings with their estimate and, where they were compiled, their plan.

    Attributes:
        draft: the estimate.
        plan: None where it was not compiled.
        reason: why it was not; "" where it was.
    """

    draft: Draft
    plan: Plan | None
    reason: str = ""

    @property
    def mesh(self) -> dict[str, int]:
        """Sizes of all axes."""
        return self.draft.mesh

    @property
    def settings(self) -> Settings:
        """What is varied next to the mesh."""
        return self.draft.settings

    @property
    def compiled_plan(self) -> Plan:
        """The plan of a candidate that was compiled.

        Raises:
            ValueError: it was not.
        """
        if self.plan is None:
            raise ValueError(f"the mesh {format_mesh(self.mesh)} was not compiled.")
        return self.plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A search's outcome.

    Attributes:
        target: the hardware.
        candidates: those that were compiled, one at least, best first; then the others, by their drafts.
        refused: meshes that were not drafted, or not compiled, with the reason: they do not divide the model or the
            batch, were not asked for, or are no better than others by their form.
    """

    target: Target
    candidates: tuple[Candidate, ...]
    refused: tuple[tuple[dict[str, int], str], ...]

    @property
    def best(self) -> Candidate | None:
        """The first compiled candidate, if it fits or a device's memory is not known."""
        first = self.candidates[0]
        return None if first.compiled_plan.memory.fits is False else first

    @property
    def compiled(self) -> tuple[Candidate, ...]:
        """Candidates with a plan."""
        return tuple(candidate for candidate in self.candidates if candidate.plan is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """The state before a compilation.

    Attributes:
        number: from 1.
        of: how many there will be.
        mesh, settings: what is compiled.
        seconds_left: None before the first has ended.
    """

    number: int
    of: int
    mesh: dict[str, int]
    settings: Settings
    seconds_left: float | None


def as_asked(outline: Outline, mesh: Mapping[str, int]) -> Iterable[Settings]:
    """The settings of a search over meshes alone."""
    return ({},)


def no_other_rules(outline: Outline, mesh: Mapping[str, int]) -> Iterable[Outline]:
    """No other rules than those that were asked for."""
    return ()


def search_meshes(
    target: Target,
    networks: Sequence[Network],
    outline_of: OutlineOf,
    compile_plan: CompilePlan,
    *,
    settings_of: SettingsOf = as_asked,
    others_of: OthersOf = no_other_rules,
    last_resorts: Collection[Settings] = (),
    keep: int = 6,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Search:
    """Estimates every mesh that divides under all settings, and compiles the `keep` most promising.

    Args:
        target: the hardware; as many devices as its own.
        networks: between them, nearest first; none for simulated ones.
        outline_of: a step on a mesh.
        compile_plan: its plan under settings.
        settings_of: what is tried on a mesh.
        others_of: under which other rules, each with all of these settings.
        last_resorts: settings, each of which is tried with all others where nothing fits by arithmetic.
        keep: how many.
        progress: called before each compilation.

    Raises:
        ShardingError: no mesh of that many devices divides the model and the batch; the message has the reasons.
    """
    drafts, refused = draft_meshes(target, networks, outline_of, settings_of, others_of)
    if last_resorts and all(draft.fits is False for draft in drafts):

        def with_last_resorts(outline: Outline, mesh: Mapping[str, int]) -> Iterable[Settings]:
            tried = itertools.product(settings_of(outline, mesh), last_resorts)
            return ({**one, **resort} for one, resort in tried if can_offload(one, resort))

        saving, _ = draft_meshes(target, networks, outline_of, with_last_resorts, others_of)
        drafts = sorted([*drafts, *saving], key=promise)
    waiting = Waiting(drafts, keep)
    compiled: list[Candidate] = []
    started = time.monotonic()
    while waiting.drafts and len(compiled) < keep:
        of, done = min(keep, len(compiled) + len(waiting.drafts)), len(compiled)
        draft = waiting.take([(candidate.draft, candidate.compiled_plan) for candidate in ranked(compiled)])
        left = (time.monotonic() - started) / done * (of - done) if done else None
        progress(Progress(number=done + 1, of=of, mesh=draft.mesh, settings=draft.settings, seconds_left=left))
        try:
            compiled.append(Candidate(draft=draft, plan=compile_plan(dict(draft.mesh), dict(draft.settings))))
        except ShardingError as error:  # what the outline did not find; the next draft is compiled instead
            refused.append((draft.mesh, str(error)))
    if not compiled:
        raise _nothing_divides(target, refused)
    ordered = ranked(compiled)
    rest = (Candidate(draft=draft, plan=None, reason=why) for draft, why in waiting.left(ordered[0].draft))
    return Search(target=target, candidates=(*ordered, *rest), refused=tuple(refused))


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Compiled candidates in order, those that fit first.

    Of equals the one with more free memory comes first, then the one that came first. What does not fit is in the
    order of what is missing.
    """

    def key(candidate: Candidate) -> tuple[float, ...]:
        plan = candidate.compiled_plan
        total = math.inf if plan.memory.total is None else plan.memory.total
        if plan.memory.fits is False:
            return (1.0, total)
        if plan.roofline is not None:
            return (0.0, plan.roofline.likely, total)
        return (0.0, sum(item.bytes_per_step or 0 for item in plan.collectives), total)

    return sorted(candidates, key=key)


def draft_meshes(
    target: Target,
    networks: Sequence[Network],
    outline_of: OutlineOf,
    settings_of: SettingsOf = as_asked,
    others_of: OthersOf = no_other_rules,
) -> tuple[list[Draft], list[tuple[dict[str, int], str]]]:
    """Every mesh that divides under all settings, the most promising first, and the other meshes with the reason.

    Those that may fit come first, in the order of their seconds, or of the bytes they send where the chip's numbers are
    not known; then those that may not, in the order of their bytes.

    Raises:
        ShardingError: none divides.
    """
    drafts: list[Draft] = []
    refused: list[tuple[dict[str, int], str]] = []
    work: Work | None = None
    for mesh in meshes_of(target.devices):
        if mesh[CONTEXT] > 1 and work is not None and not _splits_rows(work, mesh[CONTEXT]):
            refused.append((mesh, _short_parts(work)))
            continue
        try:
            outline = outline_of(dict(mesh))
            work = outline.work
            settings = _that_divide(outline, mesh, settings_of(outline, mesh))
        except ShardingError as error:
            refused.append((mesh, str(error)))
            continue
        if outline.config.moe is None and mesh["expert"] > 1:
            refused.append((mesh, "In a dense model `expert` shards what `fsdp` does."))
            continue
        drafts += [draft_of(outline, mesh, target, networks, one) for one in settings]
        for other in others_of(outline, mesh):
            rules = {RULES: other.work.sharding}
            drafts += [draft_of(other, mesh, target, networks, {**one, **rules}) for one in settings]
    if not drafts:
        raise _nothing_divides(target, refused)

    return sorted(drafts, key=promise), refused


def _that_divide(outline: Outline, mesh: Mapping[str, int], settings: Iterable[Settings]) -> list[Settings]:
    """The settings under which the devices share the batch evenly.

    Raises:
        ShardingError: there are none.
    """
    found, refusal = [], None
    for one in settings:
        work = with_settings(outline.work, one)
        try:
            check_rows(work.rows, mesh, work.accumulation_steps)
        except ShardingError as error:
            refusal = refusal or error
            continue
        found.append(one)
    if refusal is not None and not found:
        raise refusal
    return found


def _splits_rows(work: Work, ways: int) -> bool:
    """Whether rows, or the slots of a cache, are long enough to be sharded so many ways: short parts save no memory."""
    return (work.context or work.tokens_per_row) >= ways * SHORTEST_PART


def _short_parts(work: Work) -> str:
    length = f"A cache of {work.context:,}" if work.context else f"Rows of {work.tokens_per_row:,}"
    verb = "is" if work.context else "are"
    return f"{length} tokens {verb} too short for `context`: parts have {SHORTEST_PART:,} at least."


def meshes_of(devices: int) -> Iterator[dict[str, int]]:
    """All meshes of exactly so many devices, those with whole rows first.

    Raises:
        ConfigError: there are none.
    """
    if devices < 1:
        raise ConfigError(f"search: found {devices} devices, expected at least one.")
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for context, data, fsdp, expert in itertools.product(divisors, repeat=4):
        if devices % (data * fsdp * expert * context) == 0:
            tensor = devices // (data * fsdp * expert * context)
            yield dict(zip(AXES, (data, fsdp, expert, context, tensor), strict=True))


def _nothing_divides(target: Target, refused: Sequence[tuple[dict[str, int], str]]) -> ShardingError:
    # The mesh that splits the batch least says most about the model.
    mesh, reason = min(refused, key=lambda item: math.prod(item[0][axis] for axis in BATCH))
    shape = format_mesh(mesh)
    return ShardingError(
        f"no mesh of {target.devices} devices divides the model and the batch. {shape}, for example: {reason} Choose "
        "another number of devices, or more rows."
    )
