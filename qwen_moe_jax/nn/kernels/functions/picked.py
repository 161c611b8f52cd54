"""The C function that XLA calls for `picked_matmul`: its job and the job's chunks."""

from llvmlite import ir

from qwen_moe_jax.nn.kernels.llvm.call import CHUNKS, DONE, JOB_FIELDS, NEXT, Operands, write_handler
from qwen_moe_jax.nn.kernels.llvm.code import INT32, INT64, Code, Variable
from qwen_moe_jax.nn.kernels.llvm.formats import Format
from qwen_moe_jax.nn.kernels.llvm.product import OUTPUTS, write_multiply

#: Fields of a job after those of every job, int64 each: stacks, chunks of a group in all stacks, I, and the address of
#: x. After them those of each stack and of each group that has rows.
STACKS, CHUNKS_OF_GROUP, INPUTS, X, TABLES = range(JOB_FIELDS, JOB_FIELDS + 40, 8)
#: Fields of a stack, followed by the addresses of its arrays.
STACK_OUTPUTS, STACK_STEP, STACK_Y, STACK_ARRAYS = range(0, 32, 8)
#: Fields of a group.
GROUP_MATRIX, GROUP_ROW, GROUP_ROWS, GROUP_SIZE = range(0, 32, 8)

#: Numbers of a matrix in a chunk, which one thread multiplies.
CHUNK = 2**15


def write_picked_matmul(module: ir.Module, format: Format, name: str) -> None:
    """Writes the function `name` of (XLA_FFI_CallFrame*), which returns null, and what it calls."""
    write_handler(module, _write_make_job(module, format), _write_run_chunk(module, format), name)


def _write_run_chunk(module: ir.Module, format: Format) -> Code:
    """Chunk number n of a job: some rows of the matrix of one group in one of the stacks."""
    multiply = write_multiply(module, format)
    code = Code(module, "run_chunk", 2, inner=True)
    job, chunk = code.arguments
    stacks, inputs, per_group = (code.read(job, field) for field in (STACKS, INPUTS, CHUNKS_OF_GROUP))
    group = job + TABLES + stacks * _stack_size(format) + chunk // per_group * GROUP_SIZE
    part, stack = Variable(code, INT64, chunk % per_group), Variable(code, INT64, job + TABLES)
    with code.loop() as leave_if:
        outputs, step = (code.read(stack.get(), field) for field in (STACK_OUTPUTS, STACK_STEP))
        blocks = (outputs + step - 1) // step
        leave_if(part.get() < blocks)
        part.set(part.get() - blocks)
        stack.set(stack.get() + _stack_size(format))
    outputs, step, y = (code.read(stack.get(), field) for field in (STACK_OUTPUTS, STACK_STEP, STACK_Y))
    matrix, row, rows = (code.read(group, field) for field in (GROUP_MATRIX, GROUP_ROW, GROUP_ROWS))
    begin = part.get() * step
    from_x, to_y = code.read(job, X) + row * inputs * 4, y + (row * outputs + begin) * 4
    count = step.at_most(outputs - begin)
    arrays = stack.get() + STACK_ARRAYS
    code.call(multiply, arrays, matrix * outputs + begin, count, inputs, from_x, rows, to_y, outputs)
    code.end()
    return code


def _write_make_job(module: ir.Module, format: Format) -> Code:
    """The job of an XLA_FFI_CallFrame, whose arguments are x, matrices, sizes and the stacks; without its users."""
    code = Code(module, "make_job", 1, inner=True)
    operands = Operands(code)
    stacks, data, dimension = operands.results, operands.data, operands.dimension
    x, matrices, sizes = (operands.argument(number) for number in range(3))
    rows, inputs, groups = dimension(x, 0), dimension(x, 1), dimension(sizes, 0)
    job = code.call("malloc", stacks * _stack_size(format) + groups * GROUP_SIZE + TABLES)
    for field, value in ((NEXT, 0), (DONE, 0), (STACKS, stacks), (INPUTS, inputs), (X, data(x))):
        code.write(job, field, value)
    # A number of outputs that blocks of the innermost loop divide.
    step = (code.integer(CHUNK) // (inputs * OUTPUTS)).at_least(1) * OUTPUTS
    per_group = Variable(code, INT64, code.integer(0))
    with code.count(stacks) as number:
        stack, y = job + TABLES + number * _stack_size(format), operands.result(number)
        outputs = dimension(y, 1)
        for field, value in ((STACK_OUTPUTS, outputs), (STACK_STEP, step), (STACK_Y, data(y))):
            code.write(stack, field, value)
        for array in range(format.arrays):
            operand = operands.argument(number * format.arrays + (3 + array))
            code.write(stack, STACK_ARRAYS + 8 * array, data(operand))
        per_group.set(per_group.get() + (outputs + step - 1) // step)
    group = Variable(code, INT64, job + TABLES + stacks * _stack_size(format))
    row, used = Variable(code, INT64, code.integer(0)), Variable(code, INT64, code.integer(0))
    with code.count(groups) as number:
        size = code.read(data(sizes) + number * 4, kind=INT32).at_most(rows - row.get())
        with code.when(size >= 1):
            matrix = code.read(data(matrices) + number * 4, kind=INT32)
            for field, value in ((GROUP_MATRIX, matrix), (GROUP_ROW, row.get()), (GROUP_ROWS, size)):
                code.write(group.get(), field, value)
            group.set(group.get() + GROUP_SIZE)
            row.set(row.get() + size)
            used.set(used.get() + 1)
    code.write(job, CHUNKS_OF_GROUP, per_group.get())
    code.write(job, CHUNKS, used.get() * per_group.get())
    with code.count(stacks) as number:  # rows of no group
        y = operands.result(number)
        outputs = dimension(y, 1)
        code.call("memset", data(y) + row.get() * outputs * 4, 0, (rows - row.get()) * outputs * 4)
    code.end(job)
    return code


def _stack_size(format: Format) -> int:
    return STACK_ARRAYS + 8 * format.arrays
