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

#: Tasks that a thread of the pool may have queued: parts of operations whose other threads did them first. XLA runs a
#: task at once where the queue is full.
QUEUE = 1024
#: Bytes that a queued task keeps, as the C library allocates them: a work queue of 2,560, closures of 256, 128 and 128.
TASK = 2576 + 272 + 2 * 144 + 32
#: Columns of a matrix that a thread packs at a time, with all that is contracted.
PACKED_COLUMNS = 64
#: Bytes by which packed operands exceed the operands, since blocks are whole.
BLOCKS = 2**18
#: The package's own products, and the vectors of 16 numbers of a panel.
_OWN = re.compile(r"qwen_moe_jax_(plain|transposed|outer)_matmul_\w+_\d+x(\d+)")
#: Numbers of a chunk's panels, what is contracted at a time, and rows of a chunk, as in `nn.kernels.functions.grouped`.
_PANELS, _CONTRACTED, _ROWS = 2**16, 512, 256


def run_time_bytes(module: Module, devices: int, cores: int | None = None) -> int:
    """The most bytes a device, of simulated ones in one process.

    Args:
        module: the compiled program.
        devices: how many there are.
        cores: of the machine; those of this one if left out.
    """
    pool = max(devices, cores or os.cpu_count() or 1)
    threads = 1 + math.ceil(pool / devices)
    packed = max((packed_bytes(module, run, threads) for run in module.runs), default=0)
    return math.ceil(pool / devices) * QUEUE * TASK + packed


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
    contracted = max(left.shape[0] // sizes.shape[0], 128) if outer else left.shape[1]
    columns = max(_PANELS // (min(contracted, _CONTRACTED) * panel), 1) * panel
    columns = min(columns, math.ceil(width / panel) * panel)
    narrow = result.bytes < 4 * math.prod(result.shape)
    rows = min(height, _ROWS)
    packed = columns * _CONTRACTED + (rows * _CONTRACTED if outer or narrow else 0) + (rows * columns if narrow else 0)
    return 4 * packed + 64
