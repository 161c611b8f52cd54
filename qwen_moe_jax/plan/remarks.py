"""What a reviewer would say on reading a plan: only what follows from its numbers."""

import math
from collections.abc import Iterator, Sequence

from qwen_moe_jax.config import INFERENCE_SHARDING
from qwen_moe_jax.plan.result import Collective, PlacedArray, Plan, Remark
from qwen_moe_jax.units import format_bytes

#: An array is worth a word from this share of what a device holds, or of what it sends.
SHARE = 0.02
#: Program FLOPs over the model's, from which on a remark is due: a third of it is full recomputation.
WASTE = 1.5


def remarks_on(plan: Plan) -> tuple[Remark, ...]:
    """All of them, what matters most first."""
    checks = (_memory, _replicated, _gathered_experts, _gathered_for_a_token, _whole_sums, _flops, _padding)
    return tuple(remark for check in checks for remark in check(plan))


def _memory(plan: Plan) -> Iterator[Remark]:
    memory = plan.memory
    if memory.fits is False and memory.free is not None:
        text = f"It does not fit: {format_bytes(-memory.free)} a device are missing."
        if plan.work.purpose == "train" and plan.work.execution.get("remat") != "full":
            text += ' execution.remat = "full" keeps one layer\'s activations instead of all.'
        elif plan.work.purpose == "train" and plan.work.rows // plan.work.accumulation_steps > _batch_ways(plan):
            text += " run.accumulation_steps cuts the rows that are there at once."
        elif plan.work.purpose != "train" and plan.target.devices > 1:
            text += _other_sharding(plan)
        yield Remark(about="memory", text=text)
    elif memory.free is not None and memory.free < 0.05 * memory.available:
        yield Remark(
            about="memory",
            text=f"It fits with {format_bytes(memory.free)} a device free, less than a twentieth: another "
            "version of the compiler may need more.",
        )
    if plan.target.platform == "gpu" and memory.fits and memory.total > 0.75 * memory.available:
        yield Remark(
            about="memory",
            text="JAX takes three quarters of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise; "
            f"this needs {memory.total / memory.available:.2f}.",
        )


def _other_sharding(plan: Plan) -> str:
    """What would take less memory than weights that are replicated so that none are gathered."""
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
    return math.prod(size for axis, size in plan.mesh.items() if axis != "tensor")


def _replicated(plan: Plan) -> Iterator[Remark]:
    if plan.target.devices == 1:
        return
    for group in plan.memory.groups:
        for array in group.arrays:
            if array.bytes >= SHARE * max(plan.memory.arguments, 1) and _copies(array, plan) == plan.target.devices:
                yield Remark(
                    about="replicated",
                    text=f"{group.name}: {array.name} {list(array.shape)} lies whole on every device, "
                    f"{format_bytes(array.bytes)} each.",
                )
    copies = plan.mesh["data"]
    state = [group for group in plan.memory.groups if group.name in ("parameters", "optimizer state")]
    size = sum(group.bytes for group in state)
    if copies > 1 and plan.memory.available and size > 0.25 * plan.memory.available:
        yield Remark(
            about="replicated",
            text=f"data={copies} keeps {copies} copies of parameters and optimizer state, {format_bytes(size)} a "
            "device; fsdp in its place splits them.",
        )


def _copies(array: PlacedArray, plan: Plan) -> int:
    return plan.target.devices // math.prod(plan.mesh[axis] for place in array.spec for axis in place)


def _gathered_experts(plan: Plan) -> Iterator[Remark]:
    """Routed experts cross the `expert` axis: tokens should travel there, and weights never."""
    experts = [array for array in _parameters(plan) if ".experts." in f".{array.name}."]
    for one in plan.collectives:
        if one.kind == "all-gather" and "expert" in one.axes and _is_part_of(one, experts, plan):
            yield Remark(
                about="gathered experts",
                text=f"Weights of all experts {list(one.shape)} are gathered over {'×'.join(one.axes)}, "
                f"{format_bytes(one.bytes)} each time: tokens should travel instead.",
            )


def _whole_sums(plan: Plan) -> Iterator[Remark]:
    """All-reduces over axes that cut a weight, of all of it: each device keeps a part, and gets the whole."""
    sums = [one for one in plan.collectives if one.kind == "all-reduce"]
    whole = [one for one in sums if _is_part_of(one, _parameters(plan), plan)]
    total, found = sum(map(_per_step, plan.collectives)), sum(map(_per_step, whole))
    if total and found >= SHARE * total:
        largest = max(whole, key=_per_step)
        yield Remark(
            about="collectives",
            text=f"All-reduces of weights or gradients that lie cut, as {list(largest.shape)} over "
            f"{'×'.join(largest.axes)}, send {format_bytes(found)} a step and device, {found / total:.0%} of all: "
            "up to twice what gathering or scattering their parts would.",
        )


def _gathered_for_a_token(plan: Plan) -> Iterator[Remark]:
    """In decoding there is one token a row, and gathering weights for it costs what it costs for thousands."""
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
            "--sharding expert+tensor none are: dense weights lie whole then, or cut over tensor.",
        )


def _is_part_of(one: Collective, arrays: Sequence[PlacedArray], plan: Plan) -> bool:
    """Whether it carries one of these arrays, or a layer of it, whole along its axes, which cut it at rest."""
    for array in arrays:
        if not set(one.axes) & {axis for place in array.spec for axis in place if plan.mesh[axis] > 1}:
            continue
        shape = [
            size // math.prod(plan.mesh[axis] for axis in place if axis not in one.axes)
            for size, place in zip(array.shape, array.spec, strict=True)
        ]
        if _sizes(one.shape) in (_sizes(shape), _sizes(shape[1:])):
            return True
    return False


def _per_step(one: Collective) -> int:
    return one.bytes_per_step or 0


def _parameters(plan: Plan) -> tuple[PlacedArray, ...]:
    return next((group.arrays for group in plan.memory.groups if group.name == "parameters"), ())


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """In any order, without ones: layouts turn what they carry."""
    return tuple(sorted(size for size in shape if size != 1))


def _flops(plan: Plan) -> Iterator[Remark]:
    ratio = plan.flops.ratio
    if plan.work.dtype == "float32" and plan.roofline is not None:
        yield Remark(
            about="flops",
            text="Products of float32 take several passes in bfloat16 units: compute takes longer than the estimate, "
            "which counts one.",
        )
    if ratio is None and plan.memory.temporaries is not None:
        yield Remark(
            about="flops",
            text="The program has kernels or loops that do not say what they compute: its FLOPs are taken to be the "
            "model's.",
        )
    if ratio is not None and ratio > WASTE:
        causes = []
        if plan.work.execution.get("remat") == "full":
            causes.append('remat = "full" makes a third of the model\'s')
        if plan.work.execution.get("dispatch") == "dense":
            causes.append('dispatch = "dense" runs every expert on every token')
        if plan.work.execution.get("dispatch") == "capacity":
            causes.append("capacity_factor and one-hot einsums (group_size) cost their share")
        if plan.work.execution.get("dispatch") == "dropless" and (plan.work.execution.get("buffer_factor") or 1) > 1:
            causes.append("the experts' kernels count all the room for rows (buffer_factor), filled or not")
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
            f"{memory.padding / memory.arguments:.0%}: axes that are cut to less than a tile's 8 × 128.",
        )
