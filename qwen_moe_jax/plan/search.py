"""Search for the best mesh: estimates by arithmetic for all meshes that divide, then the most promising compiled.

    search = search_meshes(target, networks, outline_of, compile_plan, keep=6, progress=show)
    search.best, search.candidates; `plan.search_table` prints them

Two functions are the caller's; `plan.mesh_search` makes them of a step:

    outline_of(mesh: dict[str, int]) -> Outline     ShardingError where the model or the batch does not divide
    compile_plan(mesh: dict[str, int]) -> Plan      by the target's compiler

A draft has the exact bytes of parameters, optimizer state and cache. Its activations and traffic are formulas, good
enough to choose what is worth compiling and for nothing else.

Plans that fit come first, then those that may. Among them the order is `Roofline.seconds_without_overlap`: with perfect
overlap all meshes that are bound by arithmetic take the same time, since they compute the same, and the better one is
the one that leaves less to hide.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax.numpy as jnp

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.config.execution import BUFFER_FACTOR
from qwen_moe_jax.config.resolve import attention_block
from qwen_moe_jax.errors import ConfigError, ShardingError
from qwen_moe_jax.plan.chips import Network
from qwen_moe_jax.plan.result import Group, PlacedArray, Plan, Target, Work
from qwen_moe_jax.plan.roofline import network_of
from qwen_moe_jax.plan.work import check_rows
from qwen_moe_jax.sharding.mesh import AXES
from qwen_moe_jax.sharding.rules import BATCH, CONTEXT
from qwen_moe_jax.text import format_mesh

OutlineOf = Callable[[dict[str, int]], "Outline"]
CompilePlan = Callable[[dict[str, int]], Plan]


#: Tokens of the shortest part of a row that a search gives to a device.
SHORTEST_PART = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outline:
    """A step on a mesh, before it is compiled.

    Attributes:
        config: of the model.
        work: the step.
        flops: of all devices, as `Flops.model`.
        groups: the program's arguments, as `Memory.groups`; one is called "parameters".
    """

    config: ModelConfig
    work: Work
    flops: float
    groups: tuple[Group, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """An estimate for a mesh by arithmetic. Bytes are of one device.

    Attributes:
        mesh: sizes of all axes.
        tokens: of a step, as `Work.tokens`.
        arguments: bytes of parameters, optimizer state, cache and batch: exact.
        workspace: gradients, activations and gathered weights: a rough guess.
        available: as `Target.memory_bytes`.
        traffic: bytes sent in a step, by the axes they travel over, those of size 1 left out: by formula.
        seconds: of a step if nothing overlaps, as `Roofline.seconds_without_overlap`; None where the chip's numbers are
            not known.
    """

    mesh: dict[str, int]
    tokens: int
    arguments: int
    workspace: int
    available: int | None
    traffic: dict[tuple[str, ...], int]
    seconds: float | None

    @property
    def total(self) -> int:
        """Bytes of arguments and workspace."""
        return self.arguments + self.workspace

    @property
    def fits(self) -> bool | None:
        """Whether the step may fit; None where a device's memory is not known."""
        return None if self.available is None else self.total <= self.available

    @property
    def sent(self) -> int:
        """Bytes sent over all axes."""
        return sum(self.traffic.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A mesh with its estimate and, where it was compiled, its plan; None otherwise."""

    draft: Draft
    plan: Plan | None

    @property
    def mesh(self) -> dict[str, int]:
        """Sizes of all axes."""
        return self.draft.mesh

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
        refused: meshes that do not divide, with the reason: the message of `outline_of` or of `compile_plan`.
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
    """The state before a compilation: `number`, from 1, of `of`; seconds left, None before the first has ended."""

    number: int
    of: int
    mesh: dict[str, int]
    seconds_left: float | None


def search_meshes(
    target: Target,
    networks: Sequence[Network],
    outline_of: OutlineOf,
    compile_plan: CompilePlan,
    *,
    keep: int = 6,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Search:
    """Estimates every mesh that divides, and compiles the `keep` most promising.

    Args:
        target: the hardware; as many devices as its own.
        networks: between them, nearest first; none for simulated ones.
        outline_of: a step on a mesh.
        compile_plan: its plan.
        keep: how many.
        progress: called before each compilation.

    Raises:
        ShardingError: no mesh of that many devices divides the model and the batch; the message has the reasons.
    """
    drafts, refused = draft_meshes(target, networks, outline_of)
    waiting = in_turns(drafts)
    compiled: list[Candidate] = []
    started = time.monotonic()
    while waiting and len(compiled) < keep:
        of, done = min(keep, len(compiled) + len(waiting)), len(compiled)
        draft, *waiting = waiting
        left = (time.monotonic() - started) / done * (of - done) if done else None
        progress(Progress(number=done + 1, of=of, mesh=draft.mesh, seconds_left=left))
        try:
            compiled.append(Candidate(draft=draft, plan=compile_plan(dict(draft.mesh))))
        except ShardingError as error:  # what the outline did not find; the next draft is compiled instead
            refused.append((draft.mesh, str(error)))
    if not compiled:
        raise _nothing_divides(target, refused)
    rest = sorted(waiting, key=_promise)
    candidates = [*ranked(compiled), *(Candidate(draft=draft, plan=None) for draft in rest)]
    return Search(target=target, candidates=tuple(candidates), refused=tuple(refused))


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
            return (0.0, plan.roofline.seconds_without_overlap, total)
        return (0.0, sum(item.bytes_per_step or 0 for item in plan.collectives), total)

    return sorted(candidates, key=key)


def draft_meshes(
    target: Target, networks: Sequence[Network], outline_of: OutlineOf
) -> tuple[list[Draft], list[tuple[dict[str, int], str]]]:
    """Every mesh that divides, the most promising first, and the others with the reason.

    Those that may fit come first, in the order of their seconds, or of the bytes they send where the chip's numbers are
    not known; then those that may not, in the order of their bytes.

    Raises:
        ShardingError: none divides.
    """
    drafts, refused = [], []
    work: Work | None = None
    for mesh in meshes_of(target.devices):
        if mesh[CONTEXT] > 1 and work is not None and not _splits_rows(work, mesh[CONTEXT]):
            continue
        try:
            outline = outline_of(dict(mesh))
            work = outline.work
            check_rows(outline.work.rows, mesh, outline.work.accumulation_steps)
        except ShardingError as error:
            refused.append((mesh, str(error)))
            continue
        if outline.config.moe is None and mesh["expert"] > 1:
            continue  # in a dense model `expert` shards what `fsdp` does
        drafts.append(draft_of(outline, mesh, target, networks))
    if not drafts:
        raise _nothing_divides(target, refused)

    return sorted(drafts, key=_promise), refused


def _splits_rows(work: Work, ways: int) -> bool:
    """Whether rows are long enough to be sharded so many ways: a cache is not, and short parts save no memory."""
    return not work.context and work.tokens_per_row >= ways * SHORTEST_PART


def in_turns(drafts: Sequence[Draft], at_once: int = 2) -> list[Draft]:
    """Drafts in the order to compile them: the best two of each form, then the next two.

    Meshes that split the same axes are of one form. The formulas err about them in the same way, so that one error
    could otherwise choose all that are compiled.

    Args:
        drafts: the most promising first.
        at_once: how many of a form before the next form.
    """
    seen: dict[tuple[str, ...], int] = {}
    turns = []
    for draft in drafts:
        form = tuple(axis for axis, size in draft.mesh.items() if size > 1)
        # Drafts that may not fit come last.
        turns.append((draft.fits is False, seen.get(form, 0) // at_once))
        seen[form] = seen.get(form, 0) + 1
    return [draft for _, draft in sorted(zip(turns, drafts, strict=True), key=lambda item: item[0])]


def _promise(draft: Draft) -> tuple[float, ...]:
    if draft.fits is False:
        return (1, draft.total)
    return (0, draft.sent if draft.seconds is None else draft.seconds, draft.total)


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


def draft_of(outline: Outline, mesh: Mapping[str, int], target: Target, networks: Sequence[Network]) -> Draft:
    """The estimate for a step on a mesh."""
    work, groups = outline.work, outline.groups
    traffic = _traffic(outline, mesh)
    seconds = None
    found = {axes: network_of(axes, networks, mesh) for axes in traffic}
    over = {axes: network.bandwidth for axes, network in found.items() if network is not None}
    if target.peak_flops is not None and target.memory_bandwidth is not None and len(over) == len(traffic):
        recomputed = 4 / 3 if _recomputes(work) else 1
        compute = outline.flops * recomputed / (target.devices * target.peak_flops)
        memory = _read(outline, mesh) / target.memory_bandwidth
        seconds = compute + memory + sum(sent / over[axes] for axes, sent in traffic.items())
    return Draft(
        mesh=dict(mesh),
        tokens=work.tokens,
        arguments=sum(group.bytes for group in groups),
        workspace=_workspace(outline, mesh, target.platform),
        available=target.memory_bytes,
        traffic=traffic,
        seconds=seconds,
    )


def _nothing_divides(target: Target, refused: Sequence[tuple[dict[str, int], str]]) -> ShardingError:
    # The mesh that splits the batch least says most about the model.
    mesh, reason = min(refused, key=lambda item: math.prod(item[0][axis] for axis in BATCH))
    shape = format_mesh(mesh)
    return ShardingError(
        f"no mesh of {target.devices} devices divides the model and the batch. {shape}, for example: {reason} Choose "
        "another number of devices, or more rows."
    )


def _recomputes(work: Work) -> bool:
    return work.purpose == "train" and work.execution.get("remat") == "full"


def _passes(work: Work) -> int:
    """Passes over the layers: forward, backward, and forward again where it is recomputed."""
    return 1 if work.purpose != "train" else 3 if _recomputes(work) else 2


def _gathered_over(array: PlacedArray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes over which a stored weight is gathered for its layer; routed experts stay on theirs."""
    sharded = {axis for axes in array.spec for axis in axes if mesh[axis] > 1}
    gathered = ("fsdp", CONTEXT) if ".experts." in f".{array.name}." else ("fsdp", "expert", CONTEXT)
    return tuple(axis for axis in gathered if axis in sharded)


def _num_shards(axes: Sequence[str], mesh: Mapping[str, int]) -> int:
    return math.prod(mesh.get(axis, 1) for axis in axes)


def _parameters(outline: Outline) -> Group:
    return next(group for group in outline.groups if group.name == "parameters")


def _traffic(outline: Outline, mesh: Mapping[str, int]) -> dict[tuple[str, ...], int]:
    """Bytes that a device sends in a step, by rings and direct exchanges."""
    work, config = outline.work, outline.config
    training = work.purpose == "train"
    sent: dict[tuple[str, ...], float] = {}

    def send(axes: tuple[str, ...], size: float) -> None:
        if axes and size:
            sent[axes] = sent.get(axes, 0) + size

    for array in _parameters(outline).arrays:
        axes = _gathered_over(array, mesh)
        # Gathered forward and again backward, and the gradient scattered, in each micro-batch.
        times = 3 * work.accumulation_steps if training else 1
        send(axes, times * _used_bytes(array, work) * (_num_shards(axes, mesh) - 1))
        if training:
            sharded = {axis for axes in array.spec for axis in axes}
            copies = tuple(axis for axis in (*BATCH, CONTEXT) if axis not in sharded and mesh.get(axis, 1) > 1)
            ways = _num_shards(copies, mesh)
            send(copies, work.accumulation_steps * 2 * _used_bytes(array, work) * (ways - 1) / ways)

    tokens = work.tokens / _num_shards((*BATCH, CONTEXT), mesh)
    hidden = tokens * config.hidden_size * _width(work.dtype)
    layers, sparse = len(config.layers), sum(kind.mlp == "sparse" for kind in config.layers)
    if mesh["expert"] > 1 and sparse:
        # To the experts and back, in each pass.
        send(("expert",), 2 * _passes(work) * sparse * hidden * _exchanged(outline, mesh["expert"]))
    if mesh.get(CONTEXT, 1) > 1:
        attending = sum(kind.mixer != "linear" for kind in config.layers)
        send((CONTEXT,), attending * tokens * _keys_sent(outline, mesh))
    if mesh["tensor"] > 1:
        # Sums over the parts of a hidden row: after o_proj and down_proj, and backward before q, k, v, gate and up.
        attention, mlp = (4, 3) if training else (1, 1)
        again = 1 if _recomputes(work) else 0
        rows = (mlp + again) * (layers - sparse + sparse * _rows_per_token(outline)) + (attention + again) * layers
        send(("tensor",), hidden * rows * 2 * (mesh["tensor"] - 1) / mesh["tensor"])
    return {axes: round(size) for axes, size in sent.items()}


def _keys_sent(outline: Outline, mesh: Mapping[str, int]) -> float:
    """Bytes that a device sends over `context` for each of its tokens in a layer; see `attention_kernels.context`."""
    work, attention, others = outline.work, outline.config.attention, mesh[CONTEXT] - 1
    numbers = 2 * attention.num_key_value_heads * attention.head_dim / mesh["tensor"]
    sent = numbers * _width(work.dtype) * others
    if work.purpose != "train":
        return sent
    ring = work.execution.get("context_parallel") == "ring"
    gradients = numbers * _width("float32") * mesh[CONTEXT] if ring else sent
    return _passes(work) * sent + gradients


def _exchanged(outline: Outline, ways: int) -> float:
    """How many times its tokens a device sends over `expert`, one way: as rows to their experts, or to every device."""
    execution, training = outline.work.execution, outline.work.purpose == "train"
    gathered = ways - 1
    dispatch = execution.get("dispatch") or ("capacity" if training else "dropless")
    if dispatch == "dense" or (dispatch == "dropless" and execution.get("exchange") == "all_gather"):
        return gathered
    return _rows_per_token(outline) * (ways - 1) / ways


def _rows_per_token(outline: Outline) -> float:
    """Rows that the experts multiply, unused slots included."""
    if outline.config.moe is None:
        return 1
    execution, training = outline.work.execution, outline.work.purpose == "train"
    dispatch = execution.get("dispatch") or ("capacity" if training else "dropless")
    if dispatch == "dense":
        return outline.config.moe.num_experts
    if dispatch == "capacity":
        factor = execution.get("capacity_factor" if training else "eval_capacity_factor") or 1
    else:
        factor = execution.get("buffer_factor") or BUFFER_FACTOR
    return outline.config.moe.num_experts_per_tok * factor


def _workspace(outline: Outline, mesh: Mapping[str, int], platform: str) -> int:
    """Bytes of gradients, saved activations, one layer's activations and its gathered weights."""
    work, config, parameters = outline.work, outline.config, _parameters(outline)
    attention, tensor = config.attention, mesh["tensor"]
    width = _width(work.dtype)
    rows = work.rows / work.accumulation_steps / _num_shards(BATCH, mesh)
    tokens = rows * work.tokens_per_row / mesh.get(CONTEXT, 1)
    heads = attention.num_attention_heads * attention.head_dim / tensor
    # Scores in float32, and their exponentials: of all that is in a cache, or of a block of queries and one of keys,
    # unless splash keeps these on the chip.
    block = min(work.execution.get("attention_block") or attention_block(platform), work.tokens_per_row)
    in_blocks = 0 if work.execution.get("attention") == "splash" else block * block
    pairs = work.tokens_per_row * work.context if work.context else in_blocks
    scores = 2 * 4 * rows * attention.num_attention_heads / tensor * pairs
    ffn = config.intermediate_size
    moved = 0.0
    if config.moe is not None:
        ffn = config.moe.moe_intermediate_size * config.moe.num_experts_per_tok
        moved = 2 * config.moe.num_experts_per_tok * config.hidden_size
    layer = scores + tokens * width * (4 * config.hidden_size + 3 * heads + 3 * ffn / tensor + moved)
    gathered = 2 * _used(outline, mesh) / len(config.layers)
    if work.purpose != "train":
        return round(layer + gathered)
    kept = {
        "none": layer - scores,
        "full": tokens * width * config.hidden_size,
        "exchange": tokens * width * (config.hidden_size + moved),
        "dots": tokens * width * (2 * config.hidden_size + 3 * heads + 2 * ffn / tensor + moved),
    }[work.execution.get("remat") or "none"]
    return round(parameters.bytes + len(config.layers) * kept + 2 * layer + gathered)


def _read(outline: Outline, mesh: Mapping[str, int]) -> float:
    """Bytes that come from a device's memory: the weights as used, in each pass, and the rest, read and written."""
    work, parameters, used = outline.work, _parameters(outline), _used(outline, mesh)
    others = sum(group.bytes for group in outline.groups if group is not parameters)
    return used * _passes(work) * work.accumulation_steps + (2 if work.purpose == "train" else 1) * others


def _used(outline: Outline, mesh: Mapping[str, int]) -> float:
    """Bytes of all weights as a device multiplies with them: gathered."""
    arrays = _parameters(outline).arrays
    return sum(_used_bytes(array, outline.work) * _num_shards(_gathered_over(array, mesh), mesh) for array in arrays)


def _used_bytes(array: PlacedArray, work: Work) -> float:
    """Bytes of a stored weight in the activations' dtype: weights and gradients are cast before they are sent."""
    return array.bytes * _width(work.dtype) / _width(array.dtype)


def _width(dtype: str) -> int:
    """Bytes of a number."""
    return jnp.dtype(dtype).itemsize
