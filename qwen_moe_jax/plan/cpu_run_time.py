"""Memory of XLA's run time on CPUs, which no compiled program lists: queued tasks, and what products pack.

All of it was found by logging every allocation of train steps on eight simulated devices (jax 0.10.2); see
`benchmarks/results/plan.md`, "What a run takes next to its program". Threads are those of XLA's pool, one a device or
one a core, whichever are more, and one more for each device that waits for them.
"""

import math
import os
import re

from qwen_moe_jax.plan.hlo import Module, Run
from qwen_moe_jax.plan.hlo_text import numbers

#: Tasks that a thread of the pool may have queued. XLA runs a task at once where the queue is full.
QUEUE = 1024
#: Bytes that a queued task keeps, as the C library allocates them: a work queue of 2,560, closures of 256, 128 and 128.
TASK = 2576 + 272 + 2 * 144 + 32
#: The same of a task of this package's functions: a closure, and a share of the job.
OWN_TASK = 512
#: Tasks of a product that XLA leaves to neither YNNPACK nor this package, as counted.
OF_A_DOT = 2
#: What a device keeps of its operations, their arguments and events while a step runs; 0.13 to 0.25 MB were measured.
LISTS = 2**18
#: Bytes from which on the C library asks the system for an allocation and gives it back: its M_MMAP_THRESHOLD at most.
ASKED = 2**25
#: Columns of a matrix that a thread packs at a time, with all that is contracted.
PACKED_COLUMNS = 64
#: Bytes by which packed operands exceed the operands, since blocks are whole.
BLOCKS = 2**18
#: In how many parts XLA divides an operation, by its axes.
_PARTS = re.compile(r'"outer_dimension_partitions":\[([^\]]*)\]')
#: How the names of all of the package's functions begin.
_OWN_CALL = "qwen_moe_jax_"
#: The package's own products, and the vectors of 16 numbers of a panel.
_OWN = re.compile(r"qwen_moe_jax_(plain|transposed|outer)_matmul_\w+_\d+x(\d+)")
#: Numbers of a chunk's panels, what is contracted at a time, and rows of a chunk: those of `functions.grouped`.
_PANELS, _CONTRACTED, _ROWS = 2**16, 512, 256


def run_time_bytes(module: Module, devices: int, cores: int | None = None) -> int:
    """The most bytes a device, of simulated ones in one process.

    Args:
        module: the compiled program, with the rounds of the worst routing (`with_overflow`).
        devices: how many there are.
        cores: of the machine; those of this one if left out.
    """
    pool = max(devices, cores or os.cpu_count() or 1)
    threads = 1 + math.ceil(pool / devices)
    packed = max((packed_bytes(module, run, threads) for run in module.runs), default=0)
    return queued_bytes(module, pool, math.ceil(pool / devices)) + packed + LISTS


def fresh_bytes(temporaries: int) -> int:
    """Bytes of temporaries that the system hands out anew in every step: all, which are one allocation, or none."""
    return temporaries if temporaries >= ASKED else 0


def queued_bytes(module: Module, pool: int, queues: int) -> int:
    """The most bytes of a device's tasks that wait in the queues of the pool.

    An operation in parts offers all but one of them to the pool, and then does itself what no other thread has begun.
    Where each thread of the pool runs a device, nobody takes the tasks before the step ends: they add up over it.
    """
    full, total = queues * QUEUE * TASK, 0
    for run in module.runs:
        if run.fused or not (one := _task_bytes(run, pool)):
            continue
        if run.times is None:  # as often as it takes
            return full
        total += one * run.times
    return min(total, full)


def _task_bytes(run: Run, pool: int) -> int:
    """Bytes of the tasks that an instruction offers to the pool each time it runs."""
    instruction = run.instruction
    if _OWN_CALL in (instruction.attribute("custom_call_target") or ""):
        return (pool - 1) * OWN_TASK
    if instruction.opcode == "dot":
        return OF_A_DOT * TASK
    parts = _PARTS.search(instruction.attributes)
    return (math.prod(int(part) for part in re.findall(r"\d+", parts[1])) - 1) * TASK if parts else 0


def packed_bytes(module: Module, run: Run, threads: int) -> int:
    """The most bytes that so many threads pack of the operands of a product; 0 for other instructions.

    Each thread packs some columns of a plain product; of products in batches, and of those that sum over the rows of
    the left operand, XLA packs the operands as a whole.
    """
    instruction = run.instruction
    if instruction.opcode == "custom-call":
        return threads * _own_bytes(module, run)
    if instruction.opcode != "dot":
        return 0
    left, right = module.operand_arrays(run)[:2]
    summed = numbers(instruction.attribute("lhs_contracting_dims"))
    whole = left.bytes + right.bytes + BLOCKS
    if len(left.shape) > 2 or list(summed) != [len(left.shape) - 1]:
        return whole
    width = left.bytes // max(math.prod(left.shape), 1)
    return min(whole, threads * (PACKED_COLUMNS * left.shape[summed[0]] * max(width, 4) + 64))


def _own_bytes(module: Module, run: Run) -> int:
    """Bytes that one thread packs in a product of `nn.kernels.functions.grouped`; 0 for other calls."""
    named = _OWN.search(run.instruction.attribute("custom_call_target") or "")
    if named is None:
        return 0
    outer, panel = named[1] == "outer", 16 * int(named[2])
    left, _, sizes = module.operand_arrays(run)[:3]
    result = run.instruction.results[0]
    height, width = result.shape[-2:]
    contracted = left.shape[0] if outer else left.shape[1]  # all rows may be of one group
    expected = max(left.shape[0] // sizes.shape[0], 128) if outer else contracted
    columns = max(_PANELS // (min(expected, _CONTRACTED) * panel), 1) * panel
    columns = min(columns, math.ceil(width / panel) * panel)
    held = min(max(_PANELS // columns // 16 * 16, 16), _CONTRACTED, contracted)
    narrow = result.bytes < 4 * math.prod(result.shape)
    rows = min(height, _ROWS)
    packed = columns * held + (rows * held if outer or narrow else 0) + (rows * columns if narrow else 0)
    return 4 * packed + 64
