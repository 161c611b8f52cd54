"""What a compiled program does: how often each instruction runs, the FLOPs of its products, the bytes it moves.

XLA's own cost analysis counts the body of a loop once and says nothing of GPUs; here a loop's body counts as often as
it runs. `dropless` counts as with a balanced load: no rounds for rows beyond its buffers, and of these the rows that
are filled. Shapes in the text are those of one device.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Iterator

from qwen_moe_jax.attention_kernels.splash import PRODUCT_FLOPS
from qwen_moe_jax.moe.dispatch.overflow import SCOPE
from qwen_moe_jax.plan.cpu_kernels import product_flops, stores_what_it_is_given
from qwen_moe_jax.plan.hlo_text import (
    NAME,
    Array,
    Instruction,
    bare,
    numbers,
    parameter_number,
    read_instruction,
    whole_lines,
)

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
#: Instructions that only name arrays that are there already.
_FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast while call call-start async-start conditional after-all "
    "partition-id opt-barrier "
    "copy-done dynamic-slice-done dynamic-update-slice-done all-gather-done all-reduce-done collective-permute-done "
    "async-done async-update call-done".split()
)

#: Instructions that start a computation, which others do not wait for.
_STARTS = ("call-start", "async-start")

#: Instructions of which only as much is read of their first operand as they make.
_SLICES = ("dynamic-slice", "slice", "gather")

#: Instructions that copy a part of an array in the host's memory, and which of their results is it on the device.
_HOST_COPIES = {"dynamic-slice-start": -2, "dynamic-update-slice-start": 1}

#: Instructions of which a fusion makes as much as is taken of their result.
_CONVERSIONS = ("bitcast", "reshape", "bitcast-convert", "convert")

#: Instructions that update a part of an array in place, and which of their operands is that part.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}

#: The products of a splash kernel, each of all pairs of blocks. Forward: scores, and values by their weights. Backward:
#: scores and the gradient of weights, again in both kernels; by these the gradient of queries, or of keys and values.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_SPLASH = re.compile(rf"{PRODUCT_FLOPS}(\d+).*\bsplash_mha_({'|'.join(_SPLASH_PRODUCTS)})_")

#: On TPUs, an asynchronous all-gather is a chain of fusions, each of a part of it and of other work. All of them name
#: the whole collective with the number of the chain; the first ends in a custom call, the last in another.
_CHAINED = re.compile(r'\bchain_id="')
_CHAIN_CALLS = ("AsyncCollectiveStart", "AsyncCollectiveDone")

#: An array that something else fills.
_UNINITIALISED = 'custom_call_target="AllocateBuffer"'

#: The source of a TPU's grouped products, whose kernels pass over tiles without rows.
_GROUPED = re.compile(r"\bjit\(t?gmm\)")


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction in its context.

    Attributes:
        instruction: it.
        computation: that it is in.
        times: how often it runs in a step; None where a loop's trip count is not known.
        layers: the trip count of the loop over layers that it is in; 0 outside of one.
        fused: whether it is inside a fusion, so that its result is not written to memory.
        started: whether other instructions run meanwhile, as on a TPU's SparseCores.
    """

    instruction: Instruction
    computation: dict[str, Instruction]
    times: int | None
    layers: int
    fused: bool
    started: bool = False

    @property
    def moves(self) -> bool:
        """Whether it reads and writes memory itself."""
        return not (self.fused or self.instruction.opcode in _FREE)


class Module:
    """A parsed program.

    Args:
        text: of `compiled.as_text()`.
        layer_repeats: the trip counts of the scans over layers, by which they are recognised.
        open_loop_times: the trip count of an outermost loop whose end depends on data: 1 where one of its iterations is
            the step. None: not known.
        balanced_rows: that the experts of a device have at a balanced load, each time they are multiplied. None takes
            buffers as filled.
    """

    def __init__(
        self,
        text: str,
        layer_repeats: frozenset[int] = frozenset(),
        open_loop_times: int | None = None,
        balanced_rows: int | None = None,
    ):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ""
        self._layer_repeats = layer_repeats
        self._open_loop_times = open_loop_times
        self._overflow_rounds = 0  # a balanced load is served without them
        self.balanced_rows = balanced_rows
        current: dict[str, Instruction] = {}
        for line in whole_lines(text):
            if line.endswith("{") and not line.startswith(" ") and (head := _HEAD.match(line)):
                current = self.computations[head[1]] = {}
                if line.startswith("ENTRY"):
                    self._entry = head[1]
            elif line.startswith(" ") and (instruction := read_instruction(line)) is not None:
                current[instruction.name] = instruction
        self.runs: tuple[Run, ...] = tuple(self._walk(self._entry, 1, 0, False, False, False))

    def with_overflow(self, rounds: int) -> "Module":
        """The program where each layer of `dropless` takes so many rounds for rows beyond its buffers."""
        found = copy.copy(self)
        found._overflow_rounds = rounds
        found.runs = tuple(found._walk(self._entry, 1, 0, False, False, False))
        return found

    def _walk(
        self, name: str, times: int | None, layers: int, fused: bool, looped: bool, started: bool
    ) -> Iterator[Run]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield Run(instruction, computation, times, layers, fused, started)
            if instruction.opcode == "while":
                trips = self.trips(instruction, computation)
                if trips is None and f"{SCOPE}/" in instruction.source:
                    trips = self._overflow_rounds
                elif trips is None and not looped:
                    trips = self._open_loop_times
                body = bare(instruction.attribute("body"))
                inside = layers
                if trips in self._layer_repeats and not layers and "shard_map" not in instruction.source:
                    inside = trips or 0
                rounds = None if trips is None or times is None else times * trips
                yield from self._walk(body, rounds, inside, fused, True, started)
            within = fused or instruction.opcode == "fusion", looped, started or instruction.opcode in _STARTS
            for called in self._called(instruction):
                yield from self._walk(called, times, layers, *within)

    def _called(self, instruction: Instruction) -> list[str]:
        if instruction.opcode in ("fusion", "call", *_STARTS):
            words = [instruction.attribute("calls"), instruction.attribute("to_apply")]
        elif instruction.opcode == "conditional":  # every branch counts: which one is taken is not known
            branches = instruction.attribute("branch_computations") or ""
            words = [*NAME.findall(branches), instruction.attribute("true_computation")]
            words.append(instruction.attribute("false_computation"))
        else:
            return []
        return [name for word in words if word and (name := bare(word)) in self.computations]

    def trips(self, loop: Instruction, around: dict[str, Instruction]) -> int | None:
        """A loop's trip count: as the text states it, or by its counter, from 0 in steps of 1 to a constant."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition = self.computations.get(bare(loop.attribute("condition")), {})
        root = next((one for one in condition.values() if one.root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        limit = condition.get(root.operands[1])
        if limit is not None and limit.opcode == "get-tuple-element":  # carried along: what went in at the start
            start = around.get(loop.operands[0])
            if start is None or start.opcode != "tuple":
                return None
            limit = around.get(start.operands[int(limit.attribute("index") or 0)])
        value = re.match(r"(\d+)\)", limit.attributes) if limit is not None and limit.opcode == "constant" else None
        return int(value[1]) if value else None

    def operand_arrays(self, run: Run) -> list[Array]:
        """The arrays of its operands, in order."""
        found = [run.computation.get(name) for name in run.instruction.operands]
        return [array for one in found if one is not None for array in one.results]

    def matmul_flops(self) -> float | None:
        """FLOPs of a step on one device: two for each multiply-and-add of a dot or convolution, and what kernels state.

        None where a kernel does not state its FLOPs, or a loop around one has an unknown trip count.
        """
        total = 0.0
        for run in self.runs:
            one = self.flops(run)
            if one is None or (one and run.times is None):
                return None
            total += one * (run.times or 0)
        return total

    def flops(self, run: Run) -> float | None:
        """FLOPs of the matrix product that an instruction is, each time it runs; None where a kernel does not say."""
        instruction = run.instruction
        if instruction.opcode == "dot":
            left = run.computation[instruction.operands[0]].results[0]
            summed = numbers(instruction.attribute("lhs_contracting_dims"))
            return 2.0 * math.prod(instruction.results[0].shape) * math.prod(left.shape[axis] for axis in summed)
        if instruction.opcode == "convolution":
            return _convolution_flops(instruction, *(run.computation[name].results[0] for name in instruction.operands))
        if instruction.opcode == "custom-call":
            return self._custom_flops(run)
        return 0.0

    def _custom_flops(self, run: Run) -> float | None:
        instruction = run.instruction
        if stated := re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes):
            return float(stated[1]) * self._filled(run)[1]
        if splash := _SPLASH.search(instruction.source):
            return float(splash[1]) * _SPLASH_PRODUCTS[splash[2]]
        target = instruction.attribute("custom_call_target") or ""
        shapes = [array.shape for array in self.operand_arrays(run)], [array.shape for array in instruction.results]
        if (known := product_flops(target.strip('"'), *shapes, self.balanced_rows)) is not None:
            return known
        if "gemm" in target or "matmul" in target:
            left = run.computation[instruction.operands[0]].results[0]
            summed = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
            if summed is None:
                return None
            axes = [int(axis) for axis in re.findall(r"\d+", summed[1])]
            return 2.0 * math.prod(instruction.results[0].shape) * math.prod(left.shape[axis] for axis in axes)
        return None if "triton" in target or "tpu_custom_call" in target else 0.0

    def _filled(self, run: Run) -> tuple[int, float]:
        """The rows of a grouped product's buffer, and the share of them in tiles that are multiplied; (0, 1) of others.

        The kernel's operands are the number of tiles that have rows, the experts' first rows [E + 1], for each tile
        that may be needed its expert and its rows, and the matrices. Where an expert ends within a tile, the tile is
        multiplied once more for the next one.
        """
        if self.balanced_rows is None or not _GROUPED.search(run.instruction.source):
            return 0, 1.0
        _, starts, tiles, *rest = self.operand_arrays(run)
        rows = next(array.shape[0] for array in rest if len(array.shape) == 2)
        experts = starts.shape[0] - 1
        tile = rows // (tiles.shape[0] - experts + 1)
        return rows, min(1.0, (self.balanced_rows + (experts - 1) * tile) / rows)

    def operations(self) -> int:
        """Operations that a device runs in a step, a fusion as one; those of loops of unknown trip count once."""
        return sum(1 if run.times is None else run.times for run in self.runs if run.moves)

    def is_asynchronous(self, run: Run) -> bool:
        """Whether a collective may run while other instructions do."""
        instruction = run.instruction
        started = instruction.opcode.endswith("-start") and '"is_sync":true' not in instruction.attributes
        return run.started or started or _CHAINED.search(instruction.attributes) is not None

    def goes_on(self, run: Run) -> bool:
        """Whether it is a collective that another fusion has started, and so has been counted there."""
        if not (run.fused and _CHAINED.search(run.instruction.attributes)):
            return False
        return not _starts(run.instruction, run.computation)

    def memory_bytes(self) -> float:
        """Bytes that a device's instructions read and write in a step, a fusion as one instruction.

        An operand that is only sliced counts as its slices, and a result that is written into one that exists as what
        is written. What a TPU keeps on the chip counts where it is copied from memory or back, and not else. Of the
        stack of all layers, a kernel in the loop over them reads one layer's part; what it reads several times counts
        once. A kernel that updates an operand in place writes as much of it as it reads, or what it is given to store.
        A loop of unknown trip count counts once.
        """
        total = 0.0
        for run in self.runs:
            if not run.moves:
                continue
            total += self.moved(run) * (1 if run.times is None else run.times)
        return total

    def transposed_bytes(self) -> int:
        """Bytes that copies read and write in a step in another order than their operand has in memory."""
        total = 0
        for run in self.runs:
            one = run.instruction
            if one.opcode not in ("copy", "transpose") or one.operands[0] not in run.computation:
                continue
            taken, made = run.computation[one.operands[0]].results[0], one.results[0]
            axes = numbers(one.attribute("dimensions")) or range(len(made.shape))  # of the operand
            if made.minor is not None and axes[made.minor] != taken.minor:
                total += 2 * made.bytes * (1 if run.times is None else run.times)
        return total

    def moved(self, run: Run) -> int:
        """Bytes that an instruction outside of a fusion reads and writes, each time it runs."""
        instruction, computation = run.instruction, run.computation
        written = sum(array.traffic for array in instruction.results)
        if instruction.opcode in _SLICES:
            return written + self._sliced(instruction, computation)
        if instruction.opcode == "copy-start":  # its results: the copy, the operand, and a semaphore
            return sum(array.traffic for array in instruction.results[:2])
        if instruction.opcode in _HOST_COPIES:
            return instruction.results[_HOST_COPIES[instruction.opcode]].traffic
        if instruction.opcode in _UPDATES:
            update = computation.get(instruction.operands[_UPDATES[instruction.opcode]])
            return 2 * sum(array.traffic for array in update.results) if update else 0
        if instruction.opcode == "fusion":
            return self._moved_by_fusion(instruction)
        if instruction.opcode == "ragged-all-to-all":  # the rows there are, into an array that exists
            rows = instruction.results[0].shape[0]
            return int(2 * written * min(1.0, (self.balanced_rows or rows) / rows))
        if _UNINITIALISED in instruction.attributes:
            return 0
        if instruction.opcode != "custom-call":
            return written + sum(array.traffic for array in self.operand_arrays(run))
        rows, share = self._filled(run)

        def counted(array: Array) -> int:
            return int(array.traffic * share) if array.shape[:1] == (rows,) else array.traffic

        def read(name: str) -> int:
            total = 0
            for array in computation[name].results if name in computation else ():
                layer = run.layers and array.shape and array.shape[0] % run.layers == 0 and _is_carried(run, name)
                total += array.traffic // run.layers if layer else counted(array)
            return total

        target = (instruction.attribute("custom_call_target") or "").strip('"')
        moved = sum(map(read, instruction.operands))
        for number, array in enumerate(instruction.results):
            updated = _updated_operand(instruction, number)
            if updated is None:
                moved += counted(array)
            elif not stores_what_it_is_given(target):
                moved += read(updated)
        return moved

    def _moved_by_fusion(self, fusion: Instruction) -> int:
        fused = self.computations.get(bare(fusion.attribute("calls")), {})
        users = _users(fused)
        passed = _passed_on(fused, users)
        moved = sum(
            array.traffic
            for one in fused.values()
            if _CHAINED.search(one.attributes) and _starts(one, fused)
            for array in (*one.results, *(array for name in one.operands for array in fused[name].results))
        )
        for one in fused.values():
            if one.name in passed:
                continue
            if one.opcode == "parameter" and any(array.traffic for array in one.results):
                touched = self._touched(one, users)
                moved += sum(array.traffic for array in one.results) if touched is None else touched
            if one.root:
                parts = [fused[name] for name in one.operands] if one.opcode == "tuple" else [one]
                if len(parts) == len(fusion.results):
                    pairs = zip(parts, fusion.results, strict=True)
                    kept = [part for part, result in pairs if result.traffic and part.name not in passed]
                    moved += sum(_written_bytes(part, fused) for part in kept)
                else:
                    moved += sum(_written_bytes(part, fused) for part in parts)
        return moved

    def _touched(self, one: Instruction, users: dict[str, list[Instruction]]) -> int | None:
        """Bytes of an array that are read inside a fusion, and in those within it; None for all of it."""
        total, name = 0, one.name
        for taker in users.get(name, []):
            part: int | None = None
            if taker.opcode in _CONVERSIONS and not taker.root:
                part = self._touched(taker, users)
                if part is not None and (size := taker.results[0].bytes):
                    part = part * one.results[0].bytes // size
            elif taker.opcode == "fusion":
                part = self._touched_within(taker, name)
            elif taker.opcode in _SLICES and name not in taker.operands[1:]:
                part = sum(array.bytes for array in taker.results)
            elif taker.opcode in _UPDATES and name not in taker.operands[1:]:
                part = 0  # written in place: the rest is not read
            if part is None:
                return None
            total += part
        return total

    def _touched_within(self, fusion: Instruction, operand: str) -> int | None:
        """`_touched` of an operand of a fusion, inside it."""
        fused = self.computations.get(bare(fusion.attribute("calls")), {})
        positions = {position for position, name in enumerate(fusion.operands) if name == operand}
        taken = [one for one in fused.values() if one.opcode == "parameter" and parameter_number(one) in positions]
        users = _users(fused)
        parts = [self._touched(one, users) for one in taken]
        return sum(part or 0 for part in parts) if taken and None not in parts else None

    def _sliced(self, instruction: Instruction, computation: dict[str, Instruction]) -> int:
        """Bytes that a slice reads of its operand."""
        source = computation.get(instruction.operands[0])
        if source is not None and source.results and source.results[0].on_chip:
            return 0
        return sum(array.bytes for array in instruction.results)


def _updated_operand(call: Instruction, number: int) -> str | None:
    """The operand that a custom call updates in place for its result of that number; None where the result is new."""
    aliases = call.attributes.partition("output_to_operand_aliasing={")[2].partition(")}")[0]
    index = str(number) if len(call.results) > 1 else r"\d*"
    found = re.search(rf"\{{{index}\}}: \((\d+),", aliases)
    return call.operands[int(found[1])] if found else None


def _users(computation: dict[str, Instruction]) -> dict[str, list[Instruction]]:
    """The instructions that take each array."""
    users: dict[str, list[Instruction]] = {}
    for one in computation.values():
        for name in one.operands:
            users.setdefault(name, []).append(one)
    return users


def _is_carried(run: Run, name: str) -> bool:
    """Whether it is loop state, unchanged since the iteration began."""
    one = run.computation.get(name)
    while one is not None and one.opcode in ("bitcast", "reshape", "get-tuple-element"):
        one = run.computation.get(one.operands[0])
    return one is not None and one.opcode == "parameter"


def _starts(collective: Instruction, computation: dict[str, Instruction]) -> bool:
    start = _CHAIN_CALLS[0]
    return any(start in one.attributes and collective.name in one.operands for one in computation.values())


def _passed_on(fused: dict[str, Instruction], users: dict[str, list[Instruction]]) -> frozenset[str]:
    """What a fusion has only to go on with asynchronous collectives: their operands and results are in no other use."""
    chained = {one.name for one in fused.values() if _CHAINED.search(one.attributes)}
    if not chained:
        return frozenset()
    calls = {one.name for one in fused.values() if any(call in one.attributes for call in _CHAIN_CALLS)}
    idle = chained | calls | {one.name for one in fused.values() if one.root and one.opcode == "tuple"}
    passed = {
        one.name
        for one in fused.values()
        if one.opcode == "parameter" and all(user.name in idle for user in users.get(one.name, []))
    }
    return frozenset(passed | chained | calls)


def _written_bytes(root: Instruction, fused: dict[str, Instruction]) -> int:
    while root.opcode in ("bitcast", "copy") and root.operands and root.operands[0] in fused:
        root = fused[root.operands[0]]
    if root.opcode in _UPDATES and (update := fused.get(root.operands[_UPDATES[root.opcode]])) is not None:
        return sum(array.bytes for array in update.results)
    return sum(array.bytes for array in root.results)


def _convolution_flops(instruction: Instruction, left: Array, right: Array) -> float:
    """FLOPs: two for each pair of a kernel element and an input element; zeros of padding and dilation do not count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    window = instruction.attribute("window") or ""
    if labels is None:
        raise ValueError(f"convolution {instruction.name} has no dim_labels: found {instruction.attributes!r}.")
    inputs, kernel, result = labels.groups()
    spatial = sorted(set(inputs) & set("0123456789"))

    def setting(name: str, default: str) -> list[str]:
        found = re.search(rf"\b{name}=(\S+)", window.strip("{}"))
        return found[1].split("x") if found else [default] * len(spatial)

    strides, dilations = setting("stride", "1"), setting("lhs_dilate", "1")
    kernel_dilations, pads = setting("rhs_dilate", "1"), setting("pad", "0_0")
    pairs = 1
    for dimension, axis in enumerate(spatial):
        size, width = left.shape[inputs.index(axis)], right.shape[kernel.index(axis)]
        outputs = instruction.results[0].shape[result.index(axis)]
        stride, dilation, spread = int(strides[dimension]), int(dilations[dimension]), int(kernel_dilations[dimension])
        low = int(pads[dimension].split("_")[0])
        last = (size - 1) * dilation
        pairs *= sum(
            0 <= (at := out * stride - low + tap * spread) <= last and at % dilation == 0
            for out in range(outputs)
            for tap in range(width)
        )
    batch = instruction.results[0].shape[result.index("b")]
    features = instruction.results[0].shape[result.index("f")]
    batch_groups = int(instruction.attribute("batch_group_count") or 1)
    return 2.0 * pairs * batch * features * right.shape[kernel.index("i")] / batch_groups
