"""The C functions of `model.cross_entropy_cpu`: what the loss needs of rows of logits, and the gradient of the logits.

A chunk is a few rows, each of which is read again while it is in the caches.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from qwen_moe_jax.nn.kernels import LANES
from qwen_moe_jax.nn.kernels.llvm.call import CHUNKS, DONE, JOB_FIELDS, NEXT, Operands, write_handler
from qwen_moe_jax.nn.kernels.llvm.code import FLOAT, INT32, Code, Int, Variable
from qwen_moe_jax.nn.kernels.llvm.formats import FLOATS, Format
from qwen_moe_jax.nn.kernels.llvm.vectors import added, broadcast, constant, exp, folded, larger

#: Fields of a job after those of every job: rows, numbers of a row, and the addresses of the buffers in their order.
ROWS, WIDTH, BUFFERS = range(JOB_FIELDS, JOB_FIELDS + 24, 8)
#: Rows of a chunk.
SOME = 8
#: The lowest float32.
_LOWEST = -3.4028234663852886e38


def write_log_softmax(module: ir.Module, format: Format, name: str) -> None:
    """Writes the function of logits float32 [R, V] and targets int32 [R].

    Its results are float32 [R]: the target's logit, or 0 where the target is no column; the largest logit; and the sum
    of exp(logit - the largest).
    """
    summed = _write_summed(module)
    code = Code(module, "run_chunk", 2, inner=True)
    with _rows(code, 5) as (number, line, width, (_, targets, of_target, of_largest, of_sum)):
        target = code.read(targets + number, kind=INT32)
        logit = Variable(code, FLOAT, ir.Constant(FLOAT, 0.0))
        with code.when(_is_column(code, target, width)):
            logit.set(code.read(line + target * 4, kind=FLOAT))
        code.write(of_target + number, 0, logit.get())
        code.call(summed, line, width, of_largest + number, of_sum + number)
    code.end()
    write_handler(module, _write_make_job(module, 2, 3), code, name)


def write_softmax_gradient(module: ir.Module, format: Format, name: str) -> None:
    """Writes the function of logits, targets, logsumexp, and the gradients of the target's logit and of logsumexp.

    Logits are float32 [R, V], targets int32 [R], the others float32 [R]. Its result, the gradient of the logits, may be
    written over them.
    """
    scaled = _write_scaled(module)
    code = Code(module, "run_chunk", 2, inner=True)
    with _rows(code, 6) as (number, line, width, (logits, targets, logsumexp, of_target, of_logsumexp, result)):
        to = result + (line - logits)
        code.call(scaled, line, width, logsumexp + number, of_logsumexp + number, to)
        target = code.read(targets + number, kind=INT32)
        with code.when(_is_column(code, target, width)):
            here = to + target * 4
            more = code.read(of_target + number, kind=FLOAT)
            code.write(here, 0, code.builder.fadd(code.read(here, kind=FLOAT), more))
    code.end()
    write_handler(module, _write_make_job(module, 5, 1), code, name)


def _write_make_job(module: ir.Module, arguments: int, results: int) -> Code:
    """The job of so many arguments, the logits first, and results; without its users."""
    code = Code(module, "make_job", 1, inner=True)
    operands = Operands(code)
    buffers = [operands.argument(number) for number in range(arguments)]
    buffers += [operands.result(number) for number in range(results)]
    rows, width = (operands.dimension(buffers[0], axis) for axis in (0, 1))
    job = code.call("malloc", BUFFERS + 8 * len(buffers))
    for field, value in ((NEXT, 0), (DONE, 0), (CHUNKS, (rows + (SOME - 1)) // SOME), (ROWS, rows), (WIDTH, width)):
        code.write(job, field, value)
    for number, buffer in enumerate(buffers):
        code.write(job, BUFFERS + 8 * number, operands.data(buffer))
    code.end(job)
    return code


@contextlib.contextmanager
def _rows(code: Code, buffers: int) -> Iterator[tuple[Int, Int, Int, list[Int]]]:
    """The loop over a chunk's rows: 4 times a row's number, the address of its logits, their number, the buffers."""
    job, chunk = code.arguments
    rows, width = code.read(job, ROWS), code.read(job, WIDTH)
    addresses = [code.read(job, BUFFERS + 8 * number) for number in range(buffers)]
    with code.count((chunk * SOME + SOME).at_most(rows), start=chunk * SOME) as row:
        yield row * 4, addresses[0] + row * width * 4, width, addresses


def _is_column(code: Code, target: Int, width: Int) -> Any:
    return code.builder.and_(target >= 0, target < width)


def _write_summed(module: ir.Module) -> Code:
    """The function of (row, its numbers, where the largest is written, where the sum is)."""
    code = Code(module, "summed", 4, inner=True)
    line, width, to_largest, to_sum = code.arguments
    largest = Variable(code, FLOATS, constant(_LOWEST))
    with code.count(width, step=LANES) as column:
        largest.set(larger(code, largest.get(), code.read(line + column * 4, kind=FLOATS)))
    most = folded(code, largest.get(), larger)
    code.write(to_largest, 0, most)
    subtracted = Variable(code, FLOATS, broadcast(code, most))
    sum = Variable(code, FLOATS, constant(0.0))
    with code.count(width, step=LANES) as column:
        difference = code.builder.fsub(code.read(line + column * 4, kind=FLOATS), subtracted.get())
        sum.set(code.builder.fadd(sum.get(), _exp_or_nan(code, difference)))
    code.write(to_sum, 0, folded(code, sum.get(), added))
    code.end()
    return code


def _write_scaled(module: ir.Module) -> Code:
    """The function of (row, its numbers, where logsumexp is, where the factor is, where the products are written)."""
    code = Code(module, "scaled", 5, inner=True)
    line, width, logsumexp, factor, to = code.arguments
    broadcasts = [broadcast(code, code.read(at, kind=FLOAT)) for at in (logsumexp, factor)]
    subtracted, factors = (Variable(code, FLOATS, numbers) for numbers in broadcasts)
    with code.count(width, step=LANES) as column:
        difference = code.builder.fsub(code.read(line + column * 4, kind=FLOATS), subtracted.get())
        code.write(to + column * 4, 0, code.builder.fmul(_exp_or_nan(code, difference), factors.get()))
    code.end()
    return code


def _exp_or_nan(code: Code, x: Any) -> Any:
    """exp(x), and NaN of NaN: a step whose loss is not finite changes nothing."""
    return code.builder.select(code.builder.fcmp_unordered("uno", x, x), x, exp(code, x))
