"""The C function of `nn.kernels.sorting`: a counting sort, which passes over the keys twice."""

from llvmlite import ir

from qwen_moe_jax.nn.kernels.llvm.call import CHUNKS, DONE, JOB_FIELDS, NEXT, Operands, write_handler
from qwen_moe_jax.nn.kernels.llvm.code import INT32, Code

#: Fields of a job: addresses of the keys int32 [N], and of the results: the item of each row int32 [R], N for none; the
#: row of each item int32 [N], R for none; how many items each key has, int32 [K]; and the three sizes.
KEYS, ITEMS, ROWS, SIZES, N, R, K, THREADS, END = range(JOB_FIELDS, JOB_FIELDS + 72, 8)


def write_counting_sort(module: ir.Module, name: str) -> None:
    """Writes the function `name`. A job is one chunk."""
    write_handler(module, _write_make_job(module), _write_run_chunk(module), name, THREADS)


def _write_make_job(module: ir.Module) -> Code:
    code = Code(module, "make_job", 1, inner=True)
    operands = Operands(code)
    data, dimension = operands.data, operands.dimension
    keys, (items, rows, sizes) = operands.argument(0), (operands.result(number) for number in range(3))
    job = code.call("malloc", END)
    for field, value in (
        (KEYS, data(keys)), (ITEMS, data(items)), (ROWS, data(rows)), (SIZES, data(sizes)), (N, dimension(keys, 0)),
        (R, dimension(items, 0)), (K, dimension(sizes, 0)), (NEXT, 0), (DONE, 0), (CHUNKS, 1), (THREADS, 1),
    ):  # fmt: skip
        code.write(job, field, value)
    code.end(job)
    return code


def _write_run_chunk(module: ir.Module) -> Code:
    code = Code(module, "run_chunk", 2, inner=True)
    job, _ = code.arguments
    at_keys, items, at_rows, sizes, count, rows, keys = (
        code.read(job, field) for field in (KEYS, ITEMS, ROWS, SIZES, N, R, K)
    )
    code.call("memset", sizes, 0, keys * 4)
    with code.count(count) as item:
        key = code.read(at_keys + item * 4, kind=INT32)
        with code.when(code.builder.and_(key >= 0, key < keys)):
            at = sizes + key * 4
            code.write(at, 0, code.builder.trunc((code.read(at, kind=INT32) + 1).value, INT32))
    starts = code.call("malloc", keys * 8 + 8)
    code.write(starts, 0, 0)
    with code.count(keys) as key:
        code.write(starts + key * 8, 8, code.read(starts + key * 8) + code.read(sizes + key * 4, kind=INT32))
    used = code.read(starts + keys * 8)
    with code.count(count) as item:
        key, at_row = code.read(at_keys + item * 4, kind=INT32), at_rows + item * 4
        code.write(at_row, 0, code.builder.trunc(rows.value, INT32))
        with code.when(code.builder.and_(key >= 0, key < keys)):
            at = starts + key * 8
            row = code.read(at)
            code.write(at, 0, row + 1)
            code.write(at_row, 0, code.builder.trunc(row.value, INT32))
            with code.when(row < rows):
                code.write(items + row * 4, 0, code.builder.trunc(item.value, INT32))
    with code.count(rows, used) as row:
        code.write(items + row * 4, 0, code.builder.trunc(count.value, INT32))
    code.call("free", starts)
    code.end()
    return code
