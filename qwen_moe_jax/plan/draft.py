"""Estimates of a step by arithmetic, before anything is compiled: memory, bytes sent, and seconds.

A draft has the exact bytes of parameters, optimizer state and cache. Its activations and traffic are formulas, good
enough to choose what is worth compiling (`plan.search`) and for nothing else.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from qwen_moe_jax.attention_kernels.cached_context import chunk_bytes, combined_bytes, read_at_a_time
from qwen_moe_jax.attention_kernels.context_delta import part_bytes
from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.config.execution import BUFFER_FACTOR
from qwen_moe_jax.config.resolve import attention_block
from qwen_moe_jax.plan.chips import Network
from qwen_moe_jax.plan.result import Group, PlacedArray, Target, Work
from qwen_moe_jax.plan.roofline import network_of, recomputes, token_axes
from qwen_moe_jax.plan.settings import MEMORY_KIND, Settings, with_settings
from qwen_moe_jax.sharding.rules import BATCH, CONTEXT


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
    """An estimate for a mesh and settings by arithmetic. Bytes are of one device.

    Attributes:
        mesh: sizes of all axes.
        settings: what is varied next to the mesh (`plan.settings`); empty where nothing is.
        tokens: of a step, as `Work.tokens`.
        arguments: bytes of parameters, optimizer state, cache and batch: exact.
        workspace: gradients, activations and gathered weights: a rough guess.
        available: as `Target.memory_bytes`.
        traffic: bytes sent in a step, by the axes they travel over, those of size 1 left out: by formula.
        seconds: of a step if nothing overlaps, as `Roofline.seconds_without_overlap`; None where the chip's numbers are
            not known.
    """

    mesh: dict[str, int]
    settings: Settings
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


def draft_of(
    outline: Outline,
    mesh: Mapping[str, int],
    target: Target,
    networks: Sequence[Network],
    settings: Settings | None = None,
) -> Draft:
    """The estimate for a step on a mesh, with settings in place of its own."""
    outline = dataclasses.replace(outline, work=with_settings(outline.work, settings or {}))
    work, groups = outline.work, outline.groups
    traffic = _traffic(outline, mesh)
    seconds = None
    found = {axes: network_of(axes, networks, mesh) for axes in traffic}
    over = {axes: network.bandwidth for axes, network in found.items() if network is not None}
    if target.peak_flops is not None and target.memory_bandwidth is not None and len(over) == len(traffic):
        compute = _program_flops(outline, mesh) / (target.devices * target.peak_flops)
        memory = _read(outline, mesh) / target.memory_bandwidth
        seconds = compute + memory + sum(sent / over[axes] for axes, sent in traffic.items())
    return Draft(
        mesh=dict(mesh),
        settings=dict(settings or {}),
        tokens=work.tokens,
        arguments=sum(group.device_bytes for group in groups)
        - (_moments(groups) if MEMORY_KIND in (settings or {}) else 0),
        workspace=_workspace(outline, mesh, target.platform),
        available=target.memory_bytes,
        traffic=traffic,
        seconds=seconds,
    )


def _moments(groups: Sequence[Group]) -> int:
    """Bytes of the optimizer state that can be in another memory: its arrays, not its counters."""
    state = (array for group in groups if group.name == "optimizer state" for array in group.arrays if array.shape)
    return sum(array.bytes for array in state if array.memory_kind == "device")


def _passes(work: Work) -> int:
    """Passes over the layers: forward, backward, and forward again where it is recomputed."""
    return 1 if work.purpose != "train" else 3 if recomputes(work) else 2


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

    tokens = work.tokens / _num_shards(token_axes(work), mesh)
    hidden = tokens * config.hidden_size * _width(work.dtype)
    layers, sparse = len(config.layers), sum(kind.mlp == "sparse" for kind in config.layers)
    if mesh["expert"] > 1 and sparse:
        # To the experts and back, forward and backward; again under "full" and "experts", dropless' results excepted.
        repeated = _passes(work) == 3 and work.execution.get("remat") in ("full", "experts")
        again = (1 if _dispatch(outline) == "dropless" else 2) if repeated else 0
        exchanges = 2 * min(_passes(work), 2) + again
        send(("expert",), exchanges * sparse * hidden * _exchanged(outline, mesh["expert"]))
    if mesh.get(CONTEXT, 1) > 1:
        attending = sum(kind.mixer != "linear" for kind in config.layers)
        each = _scores_sent(outline, mesh) if work.context else _keys_sent(outline, mesh)
        send((CONTEXT,), attending * tokens * each)
        if CONTEXT in token_axes(work):
            send((CONTEXT,), (layers - attending) * _states_sent(outline, mesh))
    if mesh["tensor"] > 1:
        # Sums over the parts of a hidden row: after o_proj and down_proj, and backward before q, k, v, gate and up.
        attention, mlp = (4, 3) if training else (1, 1)
        again = 1 if recomputes(work) else 0
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


def _keys_held(outline: Outline, mesh: Mapping[str, int]) -> float:
    """Bytes of other devices' keys and values that a layer holds: of all of `context`, or of one part and the next."""
    work, attention, others = outline.work, outline.config.attention, mesh.get(CONTEXT, 1) - 1
    parts = min(others, 2) if work.execution.get("context_parallel") == "ring" else others
    numbers = 2 * attention.num_key_value_heads * attention.head_dim / mesh["tensor"]
    return parts * numbers * _tokens(outline, mesh) * _width(work.dtype)


def _scores_sent(outline: Outline, mesh: Mapping[str, int]) -> float:
    """Bytes that a device sends over `context` for each of its new tokens in a layer, where it shards a cache."""
    work, attention, ways = outline.work, outline.config.attention, mesh[CONTEXT]
    heads, kv_heads = (n // mesh["tensor"] for n in (attention.num_attention_heads, attention.num_key_value_heads))
    if CONTEXT not in token_axes(work):
        return combined_bytes(1, 1, heads, attention.head_dim) * 2 * (ways - 1) / ways
    sizes = chunk_bytes(1, 1, heads, kv_heads, attention.head_dim, itemsize=_width(work.dtype))
    gathered, reduced, scattered = sizes
    return (gathered + 2 * reduced + scattered) * (ways - 1)  # of as many tokens as all devices have


def _states_sent(outline: Outline, mesh: Mapping[str, int]) -> float:
    """Bytes that a device sends over `context` in a linear layer: what its parts of rows make of states before them."""
    work, linear, tensor = outline.work, outline.config.linear_attention, mesh["tensor"]
    if linear is None:
        return 0
    each = part_bytes(
        linear.num_value_heads // tensor,
        linear.key_head_dim,
        linear.value_head_dim,
        columns=linear.conv_kernel_dim - 1,
        channels=linear.conv_dim // tensor,
        itemsize=_width(work.dtype),
    )
    return _passes(work) * work.rows / _num_shards(BATCH, mesh) * each * (mesh[CONTEXT] - 1)


def _exchanged(outline: Outline, ways: int) -> float:
    """How many times its tokens a device sends over `expert`, one way: as rows to their experts, or to every device."""
    if _gathers_tokens(outline):
        return ways - 1
    moe, exchange = outline.config.moe, outline.work.execution.get("exchange")
    if moe is not None and _dispatch(outline) == "dropless" and exchange == "ragged_all_to_all":
        return moe.num_experts_per_tok * (ways - 1) / ways  # only the rows there are
    return _rows_per_token(outline) * (ways - 1) / ways


def _dispatch(outline: Outline) -> str:
    default = "capacity" if outline.work.purpose == "train" else "dropless"
    return str(outline.work.execution.get("dispatch") or default)


def _gathers_tokens(outline: Outline) -> bool:
    """Whether every token goes to all devices of the `expert` axis."""
    dispatch = _dispatch(outline)
    by_gather = outline.work.execution.get("exchange") == "all_gather"
    return dispatch == "dense" or (dispatch == "dropless" and by_gather)


def _rows_per_token(outline: Outline) -> float:
    """Rows of the experts' buffers, unused ones included."""
    if outline.config.moe is None:
        return 1
    execution, dispatch = outline.work.execution, _dispatch(outline)
    if dispatch == "dense":
        return outline.config.moe.num_experts
    if dispatch == "capacity":
        training = outline.work.purpose == "train"
        factor = execution.get("capacity_factor" if training else "eval_capacity_factor") or 1
    else:
        factor = execution.get("buffer_factor") or BUFFER_FACTOR
    return outline.config.moe.num_experts_per_tok * factor


def _program_flops(outline: Outline, mesh: Mapping[str, int]) -> float:
    """The model's FLOPs, with what is computed twice, and rows of experts that the model does not ask for."""
    work, config, factor = outline.work, outline.config, 1.0
    if config.moe is not None and _dispatch(outline) != "dropless":
        sparse = sum(kind.mlp == "sparse" for kind in config.layers)
        chosen = config.moe.num_experts_per_tok
        weights = sparse * chosen * 3 * config.hidden_size * config.moe.moe_intermediate_size
        share = min(1.0, weights / config.num_active_parameters())
        factor += share * (_rows_per_token(outline) / chosen - 1)
    # Of a few new tokens, all devices of `context` compute the layers, but for attention.
    copies = 0 if CONTEXT in token_axes(work) else mesh.get(CONTEXT, 1) - 1
    again = copies * work.tokens * 2 * config.num_active_parameters(exclude_embeddings=True)
    return (outline.flops + again) * factor * (4 / 3 if recomputes(work) else 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Activations:
    """Numbers of a token in one layer, on one device.

    Attributes:
        hidden: of a hidden row.
        heads: of queries, or of attention's results.
        ffn: of one of the feed-forward products, of all rows that the token's experts multiply.
        rows: of these rows, as they enter or leave the experts.
        exchanged: of what came over the `expert` axis.
        results: of the rows' results, where the backward pass needs them.
    """

    hidden: float
    heads: float
    ffn: float
    rows: float
    exchanged: float
    results: float

    @property
    def all(self) -> float:
        """Numbers that a pass over the layer makes."""
        return 4 * self.hidden + 3 * self.heads + 3 * self.ffn + 2 * self.rows + self.exchanged

    def kept(self, remat: str) -> float:
        """Numbers that wait for the backward pass, by `ExecutionConfig.remat`."""
        return {
            "none": self.all,
            "full": self.hidden,
            "exchange": self.hidden + self.exchanged,
            "experts": 2 * self.hidden + 3 * self.heads,
            "dots": 2 * self.hidden + 3 * self.heads + 2 * self.ffn + self.results + self.exchanged,
        }[remat]


def _activations(outline: Outline, mesh: Mapping[str, int]) -> _Activations:
    config = outline.config
    hidden, tensor, ways = config.hidden_size, mesh["tensor"], mesh["expert"]
    heads = config.attention.num_attention_heads * config.attention.head_dim / tensor
    if config.moe is None:
        return _Activations(
            hidden=hidden, heads=heads, ffn=config.intermediate_size / tensor, rows=0, exchanged=0, results=0
        )
    rows, dropless = _rows_per_token(outline), _dispatch(outline) == "dropless"
    if ways == 1 and dropless:
        rows = config.moe.num_experts_per_tok  # on one device of experts, the buffer is what all tokens need
    exchanged = ways if _gathers_tokens(outline) else rows if dropless else 2 * rows
    return _Activations(
        hidden=hidden,
        heads=heads,
        ffn=rows * config.moe.moe_intermediate_size / tensor,
        rows=rows * hidden,
        exchanged=exchanged * hidden if ways > 1 else 0,
        results=0 if dropless else rows * hidden,
    )


def _tokens(outline: Outline, mesh: Mapping[str, int]) -> float:
    """Tokens of a device in a micro-batch."""
    return outline.work.tokens / outline.work.accumulation_steps / _num_shards(token_axes(outline.work), mesh)


def _workspace(outline: Outline, mesh: Mapping[str, int], platform: str) -> int:
    """Bytes of gradients, saved activations, one layer's activations, its gathered weights and others' keys."""
    work, config, parameters = outline.work, outline.config, _parameters(outline)
    rows = work.rows / work.accumulation_steps / _num_shards(BATCH, mesh)
    # Scores in float32, and their exponentials: of all that is in a cache, of a part where `context` shards it, or of a
    # block of queries and one of keys, unless splash keeps these on the chip.
    block = min(work.execution.get("attention_block") or attention_block(platform), work.tokens_per_row)
    in_blocks = 0 if work.execution.get("attention") == "splash" else block * block
    slots = (
        work.context
        if mesh.get(CONTEXT, 1) == 1
        else read_at_a_time(work.context // mesh[CONTEXT], work.tokens_per_row)
    )
    pairs = work.tokens_per_row * slots if work.context else in_blocks
    scores = 2 * 4 * rows * config.attention.num_attention_heads / mesh["tensor"] * pairs
    activations, token = _activations(outline, mesh), _tokens(outline, mesh) * _width(work.dtype)
    layer = scores + token * activations.all
    keys = 0 if work.context else _keys_held(outline, mesh)
    gathered = 2 * _used(outline, mesh) / len(config.layers) + keys
    if work.purpose != "train":
        return round(layer + gathered)
    kept = token * activations.kept(work.execution.get("remat") or "none")
    waiting = 2 if work.execution.get("activation_offloading") else len(config.layers)  # one layer's are on their way
    sums = parameters.bytes if work.accumulation_steps > 1 else 0
    # A layer backward: its activations and their gradients, those of sums in float32.
    return round(parameters.bytes + sums + waiting * kept + 4 * layer + gathered)


def _read(outline: Outline, mesh: Mapping[str, int]) -> float:
    """Bytes between a device and its memory.

    Weights as used, in each pass; activations, written and read in each; the rest, read and written.
    """
    work, parameters = outline.work, _parameters(outline)
    others = sum(group.bytes for group in outline.groups if group is not parameters)
    token = _tokens(outline, mesh) * _width(work.dtype)
    in_layers = 2 * token * _activations(outline, mesh).all * len(outline.config.layers)
    sums = 2 * parameters.bytes if work.accumulation_steps > 1 else 0
    micro_batch = _passes(work) * (_used(outline, mesh) + in_layers) + sums
    return micro_batch * work.accumulation_steps + (2 if work.purpose == "train" else 1) * others


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
