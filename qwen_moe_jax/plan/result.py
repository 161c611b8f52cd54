"""A plan as plain data: the request, a device's memory, what is computed and sent, and what bounds the step.

Bytes are those of one device unless a field says otherwise; where devices differ, of the
fullest. Seconds of the roofline are estimates; those of `CompileCost` were measured.
"""

import dataclasses
import json
from typing import Any, Literal

Purpose = Literal["train", "prefill", "decode", "forward"]

#: Collectives by XLA's names.
CollectiveKind = Literal[
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"
]


#: Where speeds are from that were not measured.
PUBLISHED = "published peaks"

#: What a step waits for.
Bound = Literal["compute", "memory", "network"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The hardware of the plan.

    Attributes:
        name: as it was requested: "tpu:v5p:4x8x8", "gpu:h200:8", "cpu:8".
        platform: of the compiler.
        chip: as people call it: "TPU v5p", "H200", "simulated CPU".
        devices: how many.
        memory_bytes: of one device, as far as a program may use it; None for a simulated device.
        peak_flops: dense bfloat16 FLOP/s of one device; None where it is not known.
        memory_bandwidth: bytes a second between a device and its memory; None where it is not known.
    """

    name: str
    platform: Literal["cpu", "tpu", "gpu"]
    chip: str
    devices: int
    memory_bytes: int | None
    peak_flops: float | None
    memory_bandwidth: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The model that is planned.

    Attributes:
        name: of the checkpoint, config file or run.
        model_type: its family, as the Hub has it.
        parameters, active_parameters: all of them; those that one token passes through.
        layers, sparse_layers: how many; those with a router.
        experts, experts_per_token: of a sparse layer; 0 in a dense model.
    """

    name: str
    model_type: str
    parameters: int
    active_parameters: int
    layers: int
    sparse_layers: int
    experts: int
    experts_per_token: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One step of the model.

    Attributes:
        purpose: which program.
        rows: sequences in a step, over all devices.
        tokens_per_row: new tokens of each: its length in training, a chunk of the prompt in prefill, 1 in decoding.
        context: capacity of the cache in tokens a row, prompt and answer; 0 without a cache.
        accumulation_steps: micro-batches that the rows are split into.
        dtype, param_dtype: of the activations and of the weights.
        sharding: the rules for weights, by name (`SHARDING_RULES`) or in words.
        execution: the other settings of `ExecutionConfig`, resolved.
    """

    purpose: Purpose
    rows: int
    tokens_per_row: int
    context: int
    accumulation_steps: int
    dtype: str
    param_dtype: str
    sharding: str
    execution: dict[str, Any]

    @property
    def tokens(self) -> int:
        """New tokens of a step, over all devices."""
        return self.rows * self.tokens_per_row

    @property
    def weights(self) -> str:
        """What the weights are stored as, in words: a dtype, and the bits of the matrices where they are quantised."""
        low_bit = self.execution.get("weights")
        return self.param_dtype if low_bit is None else f"{low_bit} and {self.param_dtype}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacedArray:
    """An argument of the program with its sharding.

    Attributes:
        name: its path, layers stacked: "model.layers.segments.0.0.mlp.experts.gate_proj".
        shape: of the whole array.
        dtype: of its numbers.
        spec: for each dimension the mesh axes it is sharded over; none for one that is not sharded.
        bytes: of one device's shard.
        memory_kind: the memory it is in, by JAX's name: "device", or "pinned_host", that of the host.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: tuple[tuple[str, ...], ...]
    bytes: int
    memory_kind: str = "device"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Arguments that belong together: "parameters", "optimizer state", "cache", "batch".

    Attributes:
        name: what people call it.
        arrays: by name.
    """

    name: str
    arrays: tuple[PlacedArray, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.bytes for array in self.arrays)

    @property
    def device_bytes(self) -> int:
        """Bytes of the arrays in a device's memory."""
        return sum(array.bytes for array in self.arrays if array.memory_kind == "device")

    @property
    def host_bytes(self) -> int:
        """Bytes of the arrays in the host's memory, of one device's shards."""
        return self.bytes - self.device_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """A device's memory at the peak of a step.

    The arguments are arithmetic (a step's new state reuses the memory of the old one); the rest is from the compiler,
    and None where it refused the program.

    Attributes:
        groups: the arguments.
        padding: bytes that the layout of the arguments adds (tiles of TPUs); negative where not all are used.
        gradients: bytes of them, which are among the temporaries; 0 where there are none.
        outputs: bytes of results that do not reuse an argument's memory.
        temporaries: all that lives only within the step: activations, gradients, buffers of collectives.
        code: the program itself.
        needed: the compiler's own total, where it refused the program for lack of memory; None where it did not.
        available: as `Target.memory_bytes`.
        host_temporaries: of the step in the host's memory, of one device.
        run_time: at most, of XLA's run time next to the program; 0 but on CPUs, where it was measured.
    """

    groups: tuple[Group, ...]
    padding: int | None
    gradients: int
    outputs: int | None
    temporaries: int | None
    code: int | None
    needed: int | None
    available: int | None
    host_temporaries: int = 0
    run_time: int = 0

    @property
    def arguments(self) -> int:
        """Bytes of all groups in a device's memory."""
        return sum(group.device_bytes for group in self.groups)

    @property
    def host_arguments(self) -> int:
        """Bytes of all groups in the host's memory, of one device's shards."""
        return sum(group.host_bytes for group in self.groups)

    @property
    def compiled(self) -> int | None:
        """Bytes at the peak that the compiled program lists, without itself; None where the compiler refused it."""
        if self.temporaries is None:
            return None
        return self.arguments + self.temporaries + (self.padding or 0) + (self.outputs or 0)

    @property
    def total(self) -> int | None:
        """Bytes at the peak; None where the compiler refused the program and gave no number."""
        return self.needed if self.compiled is None else self.compiled + (self.code or 0) + self.run_time

    @property
    def fits(self) -> bool | None:
        """Whether the step fits into a device's memory; None where a device's memory is not known."""
        if self.temporaries is None:
            return False
        return None if self.free is None else self.free >= 0

    @property
    def free(self) -> int | None:
        """Bytes that are left, negative for what is missing; None where either number is not known."""
        return None if self.total is None or self.available is None else self.available - self.total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations of a step, over all devices.

    Attributes:
        model: what the model's definition asks for, as it is counted for model FLOPs utilisation.
        program: of the matrix products that the compiled program has; None where it was not compiled, or holds kernels
            or loops of unknown work.
    """

    model: float
    program: float | None

    @property
    def ratio(self) -> float | None:
        """Program over model FLOPs: recomputation, one-hot einsums, masked-out scores, padding and second copies."""
        return None if self.program is None else self.program / self.model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """Equal collectives: of one kind, over the same axes, of the same size, with the same source.

    Attributes:
        kind: what XLA calls it.
        axes: the mesh axes it runs over; empty where the group is along no axes of the mesh.
        devices: of a group.
        dtype: of the numbers in the compiled program.
        shape: of the largest array that goes in or comes out on one device.
        bytes: that a device sends each time, by an algorithm that sends no byte twice: a ring or direct exchange.
        count: times in a step; a loop's are multiplied; None where a loop's trip count is not known.
        in_layers: whether it is in the loop over the layers.
        widened_from: the dtype it would have on an accelerator, where the CPU's compiler computes it in a wider one;
            `bytes` are of this one then.
        source: the operation of the traced program that asked for it, as XLA kept it; may be empty.
        asynchronous: whether the compiler lets other work run meanwhile.
    """

    kind: CollectiveKind
    axes: tuple[str, ...]
    devices: int
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    count: int | None
    in_layers: bool
    widened_from: str | None
    source: str
    asynchronous: bool = False

    @property
    def bytes_per_step(self) -> int | None:
        """`bytes` times `count`; None where the count is not known."""
        return None if self.count is None else self.bytes * self.count


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisTraffic:
    """What a device sends along one axis, or along several at once, in a step.

    Attributes:
        axes: of the mesh.
        bytes: sent by a device.
        bandwidth: bytes a second that a device can send there; None where it is not known.
        network: what the bytes travel over: "ICI", "NVLink", "InfiniBand"; empty where it is not known.
        seconds: bytes / bandwidth.
    """

    axes: tuple[str, ...]
    bytes: int
    bandwidth: float | None
    network: str
    seconds: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """The time of a step as an interval, by published or measured speeds: from perfect overlap to none.

    Published speeds are taken as they are: nothing is taken off for latency, for matmuls that do not fill the chip, or
    for a network that others use. By measured ones, every operation and collective takes what a small one takes, too.

    Attributes:
        compute: seconds of the program's FLOPs at the chip's peak.
        memory: seconds for the bytes that must come from a device's memory.
        memory_bytes: those bytes.
        traffic: by axes; each its own seconds.
        network: seconds of all traffic, one after the other.
        bound: what takes longest: "compute", "memory" or "network".
        seconds: of a step, if the three overlap perfectly.
        seconds_without_overlap: if none of them does.
        tokens_per_second: by `seconds`, over all devices.
        utilisation: model FLOPs over what the chips could do in `seconds`, 0 to 1.
        operations: seconds that so many operations on few numbers take; 0 where it is not measured.
        pages: seconds in which the system hands out the memory of temporaries anew; 0 where it is not measured.
        speeds: where the speeds are from: "published peaks", or the measurement with its date and devices.
        assumptions: that both ends of the interval rest on, in words.
        expected: seconds of a step, if its parts take what they took in steps that were measured; None without such.
    """

    compute: float
    memory: float
    memory_bytes: int
    traffic: tuple[AxisTraffic, ...]
    network: float
    bound: Bound
    seconds: float
    seconds_without_overlap: float
    tokens_per_second: float
    utilisation: float
    operations: float = 0.0
    pages: float = 0.0
    speeds: str = PUBLISHED
    assumptions: tuple[str, ...] = ()
    expected: float | None = None

    @property
    def parts(self) -> tuple[float, float, float, float, float]:
        """Seconds of compute, memory, network, operations and pages."""
        return self.compute, self.memory, self.network, self.operations, self.pages

    @property
    def likely(self) -> float:
        """`expected` or, where no steps were measured, `seconds_without_overlap`, by which plans are ranked."""
        return self.seconds_without_overlap if self.expected is None else self.expected


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remark:
    """An observation that a reviewer would make.

    Attributes:
        about: one word: "memory", "replicated", "gathered experts", "flops", "padding", "collectives".
        text: what was found, and what could be done, in a sentence or two.
    """

    about: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileCost:
    """The cost of planning, measured on the machine that planned.

    Attributes:
        trace_seconds: to trace and lower the program.
        compile_seconds: in XLA, until it was done or refused.
        peak_host_bytes: the most memory the process had so far.
    """

    trace_seconds: float
    compile_seconds: float
    peak_host_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The result of compiling one step for a target.

    Attributes:
        target: the hardware.
        mesh: sizes of the axes, in their order.
        model: what is run.
        work: one step of it.
        memory: what a device holds.
        flops: what is computed.
        collectives: what is sent, largest first; empty where the program was refused.
        roofline: None where the chip's numbers are not known or the program was refused.
        remarks: in the order of their weight.
        refusal: why the compiler did not take the program, in its words; None if it did.
        cost: of planning.
        versions: of what planned: jax, jaxlib, the target's compiler, qwen_moe_jax.
    """

    target: Target
    mesh: dict[str, int]
    model: Model
    work: Work
    memory: Memory
    flops: Flops
    collectives: tuple[Collective, ...]
    roofline: Roofline | None
    remarks: tuple[Remark, ...]
    refusal: str | None
    cost: CompileCost
    versions: dict[str, str]

    def to_json(self) -> str:
        """All fields and properties as one JSON object, keys as named here."""
        return json.dumps(_plain(self), ensure_ascii=False, indent=1) + "\n"


def _plain(value: object) -> object:
    """Dataclasses as mappings with their properties, tuples as lists."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        names += [name for name, kind in vars(type(value)).items() if isinstance(kind, property)]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
