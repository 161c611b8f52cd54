"""A C function that XLA calls, which shares its work, a job of many chunks, with XLA's threads.

Offsets are those of the structs in xla/ffi/api/c_api.h, which jaxlib brings along (`jax.ffi.include_dir()`), of API
version 0.3: they change with the major version only, which XLA compares when the function is registered.
"""

from typing import Any

from llvmlite import ir

from qwen_moe_jax.nn.kernels.llvm.code import INT32, INT64, Code, Int, Variable

#: Fields of XLA_FFI_CallFrame.
FRAME_EXTENSION, FRAME_API, FRAME_CONTEXT = 8, 16, 24
FRAME_NUM_ARGUMENTS, FRAME_ARGUMENTS, FRAME_NUM_RESULTS, FRAME_RESULTS = 56, 72, 96, 112
#: Fields of XLA_FFI_Metadata_Extension and XLA_FFI_Metadata.
EXTENSION_TYPE, EXTENSION_METADATA, METADATA = 8, 24, 1
VERSION_MAJOR, VERSION_MINOR, TRAITS, STATE_TYPE = 24, 28, 32, 40
#: Fields of XLA_FFI_Buffer and XLA_FFI_Api.
BUFFER_DATA, BUFFER_RANK, BUFFER_DIMS = 24, 32, 40
API_ERROR_DESTROY, API_SCHEDULE, API_NUM_THREADS = 64, 136, 144

#: Fields that every job begins with, int64 each: the next chunk, how many are done, users of the job, chunks.
NEXT, DONE, USERS, CHUNKS, JOB_FIELDS = range(0, 40, 8)

#: Times that a thread looks whether the others are done before it lets other processes run.
LOOKS = 2000


def write_handler(
    module: ir.Module, make_job: Code, run_chunk: Code, name: str, threads_field: int | None = None
) -> None:
    """Writes the function `name` of (XLA_FFI_CallFrame*), which returns null.

    Args:
        module: that it becomes part of.
        make_job: the function of (XLA_FFI_CallFrame*) that returns a job in memory of its own; of the fields that every
            job begins with, it sets all but the users.
        run_chunk: the function of (job, number of the chunk).
        name: of the function.
        threads_field: of a job, that says how many threads are worth waking; None: one a chunk, of three or more.
    """
    leave = _write_leave(module)
    task = _write_task(module, run_chunk, leave)
    api_call, threads, schedule = _write_pool(module, task, leave)
    code = Code(module, name, 1)
    (frame,) = code.arguments
    extension = code.read(frame, FRAME_EXTENSION)
    with code.builder.if_else(extension.equals(0)) as (run, answer):
        with run:
            job = code.call(make_job, frame)
            chunks = code.read(job, CHUNKS)
            others = Variable(code, INT64, code.integer(0))
            wanted = code.select(chunks >= 3, chunks, 1) if threads_field is None else code.read(job, threads_field)
            with code.when(wanted >= 2):
                others.set(code.call(threads, frame).at_most(wanted) - 1)
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


class Operands:
    """The arguments and results of a call, whose XLA_FFI_CallFrame is the function's only argument."""

    def __init__(self, code: Code):
        [frame] = code.arguments
        self._code = code
        self._arguments, self._results = code.read(frame, FRAME_ARGUMENTS), code.read(frame, FRAME_RESULTS)
        self.results = code.read(frame, FRAME_NUM_RESULTS)

    def argument(self, number: Int | int) -> Int:
        """The buffer of an argument."""
        return self._code.read(self._arguments + self._code.integer(number) * 8)

    def result(self, number: Int | int) -> Int:
        """The buffer of a result."""
        return self._code.read(self._results + self._code.integer(number) * 8)

    def data(self, buffer: Int) -> Int:
        """The address of a buffer's numbers."""
        return self._code.read(buffer, BUFFER_DATA)

    def dimension(self, buffer: Int, axis: int) -> Int:
        """The length of an axis of a buffer."""
        return self._code.read(self._code.read(buffer, BUFFER_DIMS), 8 * axis)

    def size(self, buffer: Int) -> Int:
        """How many numbers a buffer has."""
        product = Variable(self._code, INT64, self._code.integer(1))
        with self._code.count(self._code.read(buffer, BUFFER_RANK)) as axis:
            product.set(product.get() * self._code.read(self._code.read(buffer, BUFFER_DIMS) + axis * 8))
        return product.get()


def _write_leave(module: ir.Module) -> Code:
    """One user of a job less; the last one frees it."""
    code = Code(module, "leave", 1, inner=True)
    (job,) = code.arguments
    with code.when(code.add_atomically(job, USERS, -1).equals(1)):
        code.call("free", job)
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
