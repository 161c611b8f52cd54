"""The C function that XLA calls for `picked_matmul`: it reads the call and shares the work with XLA's threads.

Only `nn.kernels` imports this, where llvmlite is installed. Offsets are those of the structs in xla/ffi/api/c_api.h,
which jaxlib brings along (`jax.ffi.include_dir()`), of API version 0.3: they change with the major version only, which
XLA compares when the function is registered.
"""

from typing import Any

from llvmlite import ir

from qwen_moe_jax.nn.kernels.code import INT32, INT64, Code, Int, Variable
from qwen_moe_jax.nn.kernels.formats import Format
from qwen_moe_jax.nn.kernels.product import OUTPUTS, write_multiply

#: Fields of XLA_FFI_CallFrame.
FRAME_EXTENSION, FRAME_API, FRAME_CONTEXT = 8, 16, 24
FRAME_NUM_ARGUMENTS, FRAME_ARGUMENTS, FRAME_NUM_RESULTS, FRAME_RESULTS = 56, 72, 96, 112
#: Fields of XLA_FFI_Metadata_Extension and XLA_FFI_Metadata.
EXTENSION_TYPE, EXTENSION_METADATA, METADATA = 8, 24, 1
VERSION_MAJOR, VERSION_MINOR, TRAITS, STATE_TYPE = 24, 28, 32, 40
#: Fields of XLA_FFI_Buffer and XLA_FFI_Api.
BUFFER_DATA, BUFFER_DIMS = 24, 40
API_ERROR_DESTROY, API_SCHEDULE, API_NUM_THREADS = 64, 136, 144

#: Fields of a job, int64 each: the next chunk, how many are done, users of the job, chunks, stacks, chunks of a group
#: in all stacks, I, and the address of x. After them those of each stack and of each group that has rows.
NEXT, DONE, USERS, CHUNKS, STACKS, CHUNKS_OF_GROUP, INPUTS, X, TABLES = range(0, 72, 8)
#: Fields of a stack, followed by the addresses of its arrays.
STACK_OUTPUTS, STACK_STEP, STACK_Y, STACK_ARRAYS = range(0, 32, 8)
#: Fields of a group.
GROUP_MATRIX, GROUP_ROW, GROUP_ROWS, GROUP_SIZE = range(0, 32, 8)

#: Numbers of a matrix in a chunk, which one thread multiplies.
CHUNK = 2**15
#: Times that a thread looks whether the others are done before it lets other processes run.
LOOKS = 2000


def write_handler(module: ir.Module, format: Format, name: str) -> None:
    """Writes the function `name` of (XLA_FFI_CallFrame*), which returns null, and what it calls."""
    leave = _write_leave(module)
    task = _write_task(module, _write_run_chunk(module, format), leave)
    make_job = _write_make_job(module, format)
    api_call, threads, schedule = _write_pool(module, task, leave)
    code = Code(module, name, 1)
    (frame,) = code.arguments
    extension = code.read(frame, FRAME_EXTENSION)
    with code.builder.if_else(extension.equals(0)) as (run, answer):
        with run:
            job = code.call(make_job, frame)
            chunks = code.read(job, CHUNKS)
            others = Variable(code, INT64, code.integer(0))
            with code.when(chunks >= 3):
                others.set(code.call(threads, frame).at_most(chunks) - 1)
            # The job is used by the others, by this thread's own task, and until it is done.
            code.write(job, USERS, others.get() + 2)
            code.call(schedule, frame, job, others.get())
            code.call(task, job)
            looks = Variable(code, INT64, code.integer(0))
            with code.loop() as leave_if:
                leave_if(code.add_atomically(job, DONE, 0) >= chunks)
                looks.set(looks.get() + 1)
                with code.when(looks.get() >= LOOKS):
                    code.call("sched_yield")
            code.call(leave, job)
        with answer, code.when(code.read(extension, EXTENSION_TYPE, INT32).equals(METADATA)):
            metadata = code.read(extension, EXTENSION_METADATA)
            for field, value in ((VERSION_MAJOR, 0), (VERSION_MINOR, 3), (TRAITS, 0)):
                code.write(metadata, field, value, INT32)
            code.write(metadata, STATE_TYPE, 0)
    code.end()


def _write_leave(module: ir.Module) -> Code:
    """One user of a job less; the last one frees it."""
    code = Code(module, "leave", 1, inner=True)
    (job,) = code.arguments
    with code.when(code.add_atomically(job, USERS, -1).equals(1)):
        code.call("free", job)
    code.end()
    return code


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


def _write_task(module: ir.Module, run_chunk: Code, leave: Code) -> Code:
    """What each thread does with a job: chunks until there are none left."""
    code = Code(module, "task", 1, inner=True)
    (job,) = code.arguments
    with code.loop() as leave_if:
        chunk = code.add_atomically(job, NEXT, 1)
        leave_if(chunk >= code.read(job, CHUNKS))
        code.call(run_chunk, job, chunk)
        code.add_atomically(job, DONE, 1)
    code.call(leave, job)
    code.end()
    return code


def _write_make_job(module: ir.Module, format: Format) -> Code:
    """The job of an XLA_FFI_CallFrame, whose arguments are x, matrices, sizes and the stacks; without its users."""
    code = Code(module, "make_job", 1, inner=True)
    (frame,) = code.arguments
    arguments, results = code.read(frame, FRAME_ARGUMENTS), code.read(frame, FRAME_RESULTS)
    stacks = code.read(frame, FRAME_NUM_RESULTS)

    def buffer(table: Int, number: Int | int) -> Int:
        return code.read(table + code.integer(number) * 8)

    def data(buffer: Int) -> Int:
        return code.read(buffer, BUFFER_DATA)

    def dimension(buffer: Int, axis: int) -> Int:
        return code.read(code.read(buffer, BUFFER_DIMS), 8 * axis)

    x, matrices, sizes = (buffer(arguments, number) for number in range(3))
    rows, inputs, groups = dimension(x, 0), dimension(x, 1), dimension(sizes, 0)
    job = code.call("malloc", stacks * _stack_size(format) + groups * GROUP_SIZE + TABLES)
    for field, value in ((NEXT, 0), (DONE, 0), (STACKS, stacks), (INPUTS, inputs), (X, data(x))):
        code.write(job, field, value)
    # A number of outputs that blocks of the innermost loop divide.
    step = (code.integer(CHUNK) // (inputs * OUTPUTS)).at_least(1) * OUTPUTS
    per_group = Variable(code, INT64, code.integer(0))
    with code.count(stacks) as number:
        stack, y = job + TABLES + number * _stack_size(format), buffer(results, number)
        outputs = dimension(y, 1)
        for field, value in ((STACK_OUTPUTS, outputs), (STACK_STEP, step), (STACK_Y, data(y))):
            code.write(stack, field, value)
        for array in range(format.arrays):
            operand = buffer(arguments, number * format.arrays + (3 + array))
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
        y = buffer(results, number)
        outputs = dimension(y, 1)
        code.call("memset", data(y) + row.get() * outputs * 4, 0, (rows - row.get()) * outputs * 4)
    code.end(job)
    return code


def _write_pool(module: ir.Module, task: Code, leave: Code) -> tuple[Code, Code, Code]:
    """Calls of XLA's thread pool: any of them, whether it failed; its threads; and offering them a job."""
    code = Code(module, "api_call", 3, inner=True)
    frame, function, arguments = code.arguments
    api = code.read(frame, FRAME_API)
    error = code.call(code.read(api + function), arguments)
    with code.when(error >= 1):  # a pointer
        for field, value in ((0, 24), (8, 0), (16, error)):
            code.write(arguments, field, value)
        code.call(code.read(api, API_ERROR_DESTROY), arguments)
    code.end(error)
    api_call = code

    def arguments_of(code: Code, frame: Int, *more: Any) -> Int:
        arguments = code.call("malloc", 64)
        fields = (24 + 8 * len(more), 0, code.read(frame, FRAME_CONTEXT), *more)
        for number, value in enumerate(fields):
            code.write(arguments, 8 * number, value)
        return arguments

    code = Code(module, "threads", 1, inner=True)
    (frame,) = code.arguments
    arguments = arguments_of(code, frame, 0)
    code.write(arguments, 24, arguments + 48)
    code.write(arguments, 48, 1)
    code.call(api_call, frame, API_NUM_THREADS, arguments)
    found = code.read(arguments, 48)
    code.call("free", arguments)
    code.end(found)
    threads = code

    code = Code(module, "schedule", 3, inner=True)
    frame, job, others = code.arguments
    with code.count(others):
        arguments = arguments_of(code, frame, code.address_of(task), job)
        error = code.call(api_call, frame, API_SCHEDULE, arguments)
        with code.when(error >= 1):
            code.call(leave, job)
        code.call("free", arguments)
    code.end()
    return api_call, threads, code


def _stack_size(format: Format) -> int:
    return STACK_ARRAYS + 8 * format.arrays
