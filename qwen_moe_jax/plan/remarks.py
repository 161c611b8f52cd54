"""Remarks on a plan, as a reviewer would make them: only what follows from its numbers."""

import math
from collections.abc import Iterator, Sequence

from qwen_moe_jax.config import INFERENCE_SHARDING
from qwen_moe_jax.plan.result import PUBLISHED, Collective, PlacedArray, Plan, Remark
from qwen_moe_jax.units import format_bytes

#: An array is worth a word from this share of what a device holds, or of what it sends.
SHARE = 0.02
#: Program FLOPs over the model's, from which on a remark is due: a third of it is full recomputation.
WASTE = 1.5


def remarks_on(plan: Plan) -> tuple[Remark, ...]:
    """All remarks on a plan, the most important first."""
    checks = (_memory, _replicated, _gathered_experts, _gathered_for_a_token, _whole_sums, _flops, _padding)
    return tuple(remark for check in checks for remark in check(plan))


def _could_offload(plan: Plan) -> bool:
    """Whether activations are on the devices that could be in the memory of the host; CPUs have one memory."""
    offloaded = plan.work.execution.get("activation_offloading")
    return plan.work.purpose == "train" and plan.target.platform != "cpu" and not offloaded


def _memory(plan: Plan) -> Iterator[Remark]:
    memory = plan.memory
    if memory.fits is False and memory.free is not None:
        text = f"It does not fit: {format_bytes(-memory.free)} a device are missing."
        if plan.work.purpose == "train" and plan.work.execution.get("remat") != "full":
            text += ' execution.remat = "full" keeps one layer\'s activations instead of all.'
        elif plan.work.purpose == "train" and plan.work.rows // plan.work.accumulation_steps > _batch_ways(plan):
            text += " run.gradient_accumulation_steps splits the rows into micro-batches."
        elif _could_offload(plan):
            text += (
                " execution.activation_offloading = true keeps what waits for the backward pass in the host's memory."
            )
        elif plan.work.purpose != "train" and plan.target.devices > 1:
            text += _other_sharding(plan)
        yield Remark(about="memory", text=text)
    elif memory.free is not None and memory.available is not None and memory.free < 0.05 * memory.available:
        yield Remark(
            about="memory",
            text=f"It fits with {format_bytes(memory.free)} a device free, less than a twentieth: another "
            "version of the compiler may need more.",
        )
    used = memory.total / memory.available if memory.total and memory.available else 0.0
    if plan.target.platform == "gpu" and memory.fits and used > 0.75:
        yield Remark(
            about="memory",
            text="JAX takes three quarters of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise; "
            f"this needs {used:.2f}.",
        )


def _other_sharding(plan: Plan) -> str:
    """The shardings that take less memory than replicated weights, in words; empty where none would."""
    if plan.work.sharding != INFERENCE_SHARDING:
        return ""
    replicated = sum(array.bytes for array in _parameters(plan) if _copies(array, plan) > plan.mesh["data"])
    if replicated < SHARE * max(plan.memory.arguments, 1):
        return ""
    return (
        f" --sharding {INFERENCE_SHARDING}, the default here, keeps {format_bytes(replicated)} of weights on several "
        "devices, so that none are gathered. --sharding expert+fsdp shards them over fsdp and expert, and gathers "
        "them for every token; a larger tensor axis shards them and gathers none."
    )


def _batch_ways(plan: Plan) -> int:
    return math.prod(size for axis, size in plan.mesh.items() if axis not in ("context", "tensor"))


def _replicated(plan: Plan) -> Iterator[Remark]:
    if plan.target.devices == 1:
        return
    by_default = plan.work.sharding == INFERENCE_SHARDING and plan.work.purpose != "train"
    weights = sum(array.bytes for array in _parameters(plan) if _copies(array, plan) == plan.target.devices)
    if by_default and weights >= SHARE * max(plan.memory.arguments, 1):
        yield Remark(
            about="replicated",
            text=f"{format_bytes(weights)} of weights are replicated on every device, so that none are gathered: "
            f"--sharding {INFERENCE_SHARDING}. A tensor axis would shard them.",
        )
    for group in plan.memory.groups:
        if by_default and group.name == "parameters":
            continue
        for array in group.arrays:
            if array.bytes >= SHARE * max(plan.memory.arguments, 1) and _copies(array, plan) == plan.target.devices:
                yield Remark(
                    about="replicated",
                    text=f"{group.name}: {array.name} {list(array.shape)} is replicated on every device, "
                    f"{format_bytes(array.bytes)} each.",
                )
    copies = plan.mesh["data"]
    state = [group for group in plan.memory.groups if group.name in ("parameters", "optimizer state")]
    size = sum(group.device_bytes for group in state)
    if copies > 1 and plan.memory.available and size > 0.25 * plan.memory.available:
        yield Remark(
            about="replicated",
            text=f"data={copies} keeps {copies} copies of parameters and optimizer state, {format_bytes(size)} a "
            "device; fsdp instead of data shards them.",
        )


def _copies(array: PlacedArray, plan: Plan) -> int:
    return plan.target.devices // math.prod(plan.mesh[axis] for axes in array.spec for axis in axes)


def _gathered_experts(plan: Plan) -> Iterator[Remark]:
    """Over the `expert` axis tokens are exchanged; weights should never be gathered there."""
    experts = [array for array in _parameters(plan) if ".experts." in f".{array.name}."]
    for one in plan.collectives:
        if one.kind == "all-gather" and "expert" in one.axes and _is_part_of(one, experts, plan):
            yield Remark(
                about="gathered experts",
                text=f"Weights of all experts {list(one.shape)} are gathered over {'×'.join(one.axes)}, "
                f"{format_bytes(one.bytes)} each time: tokens should be exchanged instead.",
            )


def _whole_sums(plan: Plan) -> Iterator[Remark]:
    """All-reduces of whole weights over axes that shard them: each device keeps a shard, and gets the whole."""
    sums = [one for one in plan.collectives if one.kind == "all-reduce"]
    whole = [one for one in sums if _is_part_of(one, _parameters(plan), plan)]
    total, found = sum(map(_per_step, plan.collectives)), sum(map(_per_step, whole))
    if total and found >= SHARE * total:
        largest = max(whole, key=_per_step)
        yield Remark(
            about="collectives",
            text=f"All-reduces of weights or gradients that are sharded, as {list(largest.shape)} over "
            f"{'×'.join(largest.axes)}, send {format_bytes(found)} a step and device, {found / total:.0%} of all: "
            "up to twice what gathering or scattering their shards would.",
        )


def _gathered_for_a_token(plan: Plan) -> Iterator[Remark]:
    """In decoding there is one token a row, and gathering weights costs as much as for thousands."""
    if plan.work.purpose != "decode":
        return
    gathers = [one for one in plan.collectives if one.kind == "all-gather"]
    weights = [one for one in gathers if _is_part_of(one, _parameters(plan), plan)]
    found = sum(map(_per_step, weights))
    if found >= SHARE * plan.memory.groups[0].bytes:
        largest = max(weights, key=_per_step)
        yield Remark(
            about="collectives",
            text=f"{format_bytes(found)} of weights are gathered over {'×'.join(largest.axes)} for every token. With "
            "--sharding expert+tensor none are: dense weights are replicated then, or sharded over tensor.",
        )


def _is_part_of(one: Collective, arrays: Sequence[PlacedArray], plan: Plan) -> bool:
    """Whether its array is one of these, or a layer of one, whole along axes that shard it as stored."""
    for array in arrays:
        if not set(one.axes) & {axis for axes in array.spec for axis in axes if plan.mesh[axis] > 1}:
            continue
        shape = [
            size // math.prod(plan.mesh[axis] for axis in axes if axis not in one.axes)
            for size, axes in zip(array.shape, array.spec, strict=True)
        ]
        layer = shape[1:] if not array.spec[0] else shape  # a first axis that is sharded is the experts'
        if _sizes(one.shape) in (_sizes(shape), _sizes(layer)):
            return True
    return False


def _per_step(one: Collective) -> int:
    return one.bytes_per_step or 0


def _parameters(plan: Plan) -> tuple[PlacedArray, ...]:
    return next((group.arrays for group in plan.memory.groups if group.name == "parameters"), ())


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """Sizes of the dimensions, sorted and without ones, since layouts transpose."""
    return tuple(sorted(size for size in shape if size != 1))


def _flops(plan: Plan) -> Iterator[Remark]:
    ratio = plan.flops.ratio
    if plan.work.dtype == "float32" and plan.roofline is not None and plan.roofline.speeds == PUBLISHED:
        yield Remark(
            about="flops",
            text="Products of float32 take several passes in bfloat16 units: compute takes longer than the estimate, "
            "which counts one.",
        )
    if ratio is None and plan.memory.temporaries is not None:
        yield Remark(
            about="flops",
            text="The program has kernels or loops of unknown FLOPs: its FLOPs are taken to be the model's.",
        )
    if ratio is not None and ratio > WASTE:
        causes = []
        if plan.work.execution.get("remat") == "full":
            causes.append('remat = "full" makes a third of the model\'s')
        if plan.work.execution.get("dispatch") == "dense":
            causes.append('dispatch = "dense" runs every expert on every token')
        if plan.work.execution.get("dispatch") == "capacity":
            causes.append("capacity_factor and one-hot einsums (group_size) cost their share")
        if plan.work.purpose == "decode":
            causes.append("a single query meets the keys of all heads, so that the cache is read once")
        elif plan.work.purpose == "prefill":
            causes.append("masked-out scores are computed")
        yield Remark(
            about="flops",
            text=f"The program computes {ratio:.2f} times the model's FLOPs"
            + (f": {'; '.join(causes)}." if causes else "."),
        )


def _padding(plan: Plan) -> Iterator[Remark]:
    memory = plan.memory
    if memory.padding is not None and memory.padding > SHARE * memory.arguments:
        yield Remark(
            about="padding",
            text=f"The tiles of the target's layouts add {format_bytes(memory.padding)} to the arguments, "
            f"{memory.padding / memory.arguments:.0%}: shards smaller than a tile's 8 × 128.",
        )
