"""The C function of `attention_kernels.cached_cpu`: new tokens' keys and values are stored, then they attend to theirs.

A chunk is one row's share of one key/value head: its slots are read where they are stored, in one or more runs of slots
that follow one another.

Letters of this file besides the package's: G query heads of a key/value head; S slots of a row, or of a block.
"""

import contextlib
from collections.abc import Iterator

from llvmlite import ir

from qwen_moe_jax.nn.kernels import LANES
from qwen_moe_jax.nn.kernels.llvm.call import CHUNKS, DONE, JOB_FIELDS, NEXT, Operands, write_handler
from qwen_moe_jax.nn.kernels.llvm.code import FLOAT, INT32, INT64, Code, Int, Variable
from qwen_moe_jax.nn.kernels.llvm.formats import FLOATS, Format
from qwen_moe_jax.nn.kernels.llvm.product import write_multiply
from qwen_moe_jax.nn.kernels.llvm.vectors import added, broadcast, constant, exp, folded, larger, multiply_add

#: Arguments of the call: queries float32 [B, T, N, H], already scaled; new keys and values [B, T, K, H] as they are
#: stored; numbers int32 [3]: the layer, the sliding window or 0, and whether there is a table; tokens of each row
#: before these int32 [B]; how many of these are tokens int32 [B]; the table of blocks int32 [B, M]; keys and values
#: [L, P, S, K, H], which are its second and third result. The first is [B, T, N, H], float32.
QUERIES, NEW_KEYS, NEW_VALUES, NUMBERS, LENGTHS, COUNTS, TABLE, KEYS, VALUES = range(9)

#: Fields of a job: addresses of the buffers, sizes, and the first slot of the layer.
(
    AT_QUERIES, AT_NEW_KEYS, AT_NEW_VALUES, AT_LENGTHS, AT_COUNTS, AT_TABLE, AT_KEYS, AT_VALUES, AT_RESULTS,
    TOKENS, HEADS, KV_HEADS, HEAD_DIM, SLOTS, BLOCKS, TABLE_WIDTH, LAYER, WINDOW, PAGED, THREADS, END,
) = range(JOB_FIELDS, JOB_FIELDS + 168, 8)  # fmt: skip

#: Numbers of queries, keys and values of a call from which on a second thread is worth waking.
WORTH_A_THREAD = 2**14
#: Query heads and vectors of a value that are summed at once: their sums stay in registers.
SUMMED_HEADS, SUMMED_VECTORS = (4, 2, 1), (4, 1)


def write_attention(module: ir.Module, format: Format, name: str) -> None:
    """Writes the function `name` for keys and values of a format."""
    write_handler(module, _write_make_job(module), _write_run_chunk(module, format), name, THREADS)


def _write_make_job(module: ir.Module) -> Code:
    code = Code(module, "make_job", 1, inner=True)
    operands = Operands(code)
    data, dimension = operands.data, operands.dimension
    arguments = [operands.argument(number) for number in range(9)]
    queries, keys, numbers = arguments[QUERIES], arguments[KEYS], data(arguments[NUMBERS])
    job = code.call("malloc", END)
    for field, argument in (
        (AT_QUERIES, QUERIES), (AT_NEW_KEYS, NEW_KEYS), (AT_NEW_VALUES, NEW_VALUES), (AT_LENGTHS, LENGTHS),
        (AT_COUNTS, COUNTS), (AT_TABLE, TABLE), (AT_KEYS, KEYS), (AT_VALUES, VALUES),
    ):  # fmt: skip
        code.write(job, field, data(arguments[argument]))
    rows, kv_heads = dimension(queries, 0), dimension(keys, 3)
    for field, value in (
        (AT_RESULTS, data(operands.result(0))), (TOKENS, dimension(queries, 1)), (HEADS, dimension(queries, 2)),
        (KV_HEADS, kv_heads), (HEAD_DIM, dimension(keys, 4)), (SLOTS, dimension(keys, 2)),
        (BLOCKS, dimension(keys, 1)), (TABLE_WIDTH, dimension(arguments[TABLE], 1)),
        (LAYER, code.read(numbers, kind=INT32)), (WINDOW, code.read(numbers, 4, kind=INT32)),
        (PAGED, code.read(numbers, 8, kind=INT32)), (NEXT, 0), (DONE, 0),
    ):  # fmt: skip
        code.write(job, field, value)
    tokens = Variable(code, INT64, code.integer(0))
    with code.count(rows) as row:
        length = code.read(data(arguments[LENGTHS]) + row * 4, kind=INT32)
        tokens.set(tokens.get() + length * code.read(data(arguments[COUNTS]) + row * 4, kind=INT32))
    read = tokens.get() * kv_heads * dimension(keys, 4)
    code.write(job, CHUNKS, rows * kv_heads)
    code.write(job, THREADS, code.select(read >= WORTH_A_THREAD, rows * kv_heads, 1))
    code.end(job)
    return code


def _write_run_chunk(module: ir.Module, format: Format) -> Code:
    """Stores the new keys and values of a row and head, then computes the results of its tokens."""
    attend = _write_attend(module, format)
    code = Code(module, "run_chunk", 2, inner=True)
    job, chunk = code.arguments
    kv_heads, tokens, head_dim, heads = (code.read(job, field) for field in (KV_HEADS, TOKENS, HEAD_DIM, HEADS))
    row, head = chunk // kv_heads, chunk % kv_heads
    length, count = (code.read(code.read(job, field) + row * 4, kind=INT32) for field in (AT_LENGTHS, AT_COUNTS))
    size = head_dim * (format.bits // 8)
    with code.count(count.at_most(tokens)) as token:
        slot = slot_at(code, job, row, length + token)
        new = ((row * tokens + token) * kv_heads + head) * size
        stored = (slot * kv_heads + head) * size
        for source, target in ((AT_NEW_KEYS, AT_KEYS), (AT_NEW_VALUES, AT_VALUES)):
            code.call("memcpy", code.read(job, target) + stored, code.read(job, source) + new, size)
    group = heads // kv_heads
    longest = (length + tokens + (LANES - 1)) // LANES * LANES
    scores = code.call("malloc", group * longest * 4)
    with code.count(tokens) as token:
        at = ((row * tokens + token) * heads + head * group) * head_dim * 4
        results = code.read(job, AT_RESULTS) + at
        code.call("memset", results, 0, group * head_dim * 4)
        with code.when(token < count):
            code.call(attend, job, row, head, length + token, code.read(job, AT_QUERIES) + at, results, scores)
    code.call("free", scores)
    code.end()
    return code


def _write_attend(module: ir.Module, format: Format) -> Code:
    """Attention of the G queries of one token and key/value head, whose results are zeros: of (job, row, head,
    position, address of the queries, that of the results, memory for scores).
    """
    multiply = write_multiply(module, format.as_strided(), "multiply_keys")
    softmax, add_values = _write_softmax(module), _write_add_values(module, format)
    code = Code(module, "attend", 7, inner=True)
    job, row, head, position, queries, results, scores = code.arguments
    kv_heads, head_dim, window = (code.read(job, field) for field in (KV_HEADS, HEAD_DIM, WINDOW))
    group = code.read(job, HEADS) // kv_heads
    first = code.select(window >= 1, (position - window + 1).at_least(0), 0)
    count = position - first + 1
    width, stride = (count + (LANES - 1)) // LANES * LANES, kv_heads * head_dim
    arrays = Int(code, code.builder.ptrtoint(code.builder.alloca(ir.ArrayType(INT64, 2)), INT64))
    code.write(arrays, 8, stride)

    def address(field: int, slot: Int) -> Int:
        return code.read(job, field) + (slot * kv_heads + head) * head_dim * (format.bits // 8)

    with runs(code, job, row, first, count) as (begin, slot, length):
        code.write(arrays, 0, address(AT_KEYS, slot))
        code.call(multiply, arrays, 0, length, head_dim, queries, group, scores + begin * 4, width)
    code.call(softmax, scores, group, count, width)
    with runs(code, job, row, first, count) as (begin, slot, length):
        values = address(AT_VALUES, slot)
        code.call(add_values, values, stride, length, head_dim, scores + begin * 4, width, group, results)
    code.end()
    return code


def slot_at(code: Code, job: Int, row: Int, position: Int) -> Int:
    """The slot of a row's position, counted over all layers and blocks."""
    slots, blocks, layer = (code.read(job, field) for field in (SLOTS, BLOCKS, LAYER))
    block = Variable(code, INT64, row)
    with code.when(code.read(job, PAGED) >= 1):
        number = row * code.read(job, TABLE_WIDTH) + position // slots
        block.set(code.read(code.read(job, AT_TABLE) + number * 4, kind=INT32))
    return (layer * blocks + block.get()) * slots + position % slots


@contextlib.contextmanager
def runs(code: Code, job: Int, row: Int, first: Int, count: Int) -> Iterator[tuple[Int, Int, Int]]:
    """A loop over the runs of slots that follow one another: tokens before it, its first slot, and its length."""
    slots, done = code.read(job, SLOTS), Variable(code, INT64, code.integer(0))
    with code.loop() as leave_if:
        leave_if(done.get() >= count)
        before = done.get()
        position = first + before
        length = (slots - position % slots).at_most(count - before)
        yield before, slot_at(code, job, row, position), length
        done.set(before + length)


def _write_softmax(module: ir.Module) -> Code:
    """Of (address of scores float32 [G, width], G, how many scores count, width): they become weights."""
    code = Code(module, "softmax", 4, inner=True)
    scores, heads, count, width = code.arguments
    lowest = ir.Constant(FLOAT, float("-inf"))
    with code.count(heads) as head:
        row = scores + head * width * 4
        with code.count(width, count) as index:
            code.write(row + index * 4, 0, lowest)
        top = Variable(code, FLOATS, constant(float("-inf")))
        with code.count(width, step=LANES) as index:
            top.set(larger(code, code.read(row + index * 4, kind=FLOATS), top.get()))
        highest = broadcast(code, folded(code, top.get(), larger))
        total = Variable(code, FLOATS, constant(0.0))
        with code.count(width, step=LANES) as index:
            weight = exp(code, code.builder.fsub(code.read(row + index * 4, kind=FLOATS), highest))
            code.write(row + index * 4, 0, weight)
            total.set(code.builder.fadd(total.get(), weight))
        share = broadcast(code, code.builder.fdiv(ir.Constant(FLOAT, 1.0), folded(code, total.get(), added)))
        with code.count(width, step=LANES) as index:
            code.write(row + index * 4, 0, code.builder.fmul(code.read(row + index * 4, kind=FLOATS), share))
    code.end()
    return code


def _write_add_values(module: ir.Module, format: Format) -> Code:
    """Adds values times their weights: of (address of values, distance between them in numbers, how many, H, address of
    weights [G, width], width, G, address of sums float32 [G, H]).
    """
    code = Code(module, "add_values", 8, inner=True)
    values, stride, count, head_dim, weights, width, heads, sums = code.arguments
    head = Variable(code, INT64, code.integer(0))
    for summed in SUMMED_HEADS:
        with code.loop() as leave_if:
            leave_if(heads - head.get() < summed)
            column = Variable(code, INT64, code.integer(0))
            for vectors in SUMMED_VECTORS:
                with code.loop() as leave_columns_if:
                    leave_columns_if(head_dim - column.get() < vectors * LANES)
                    _write_add_block(code, format, head.get(), summed, column.get(), vectors)
                    column.set(column.get() + vectors * LANES)
            head.set(head.get() + summed)
    code.end()
    return code


def _write_add_block(code: Code, format: Format, head: Int, heads: int, column: Int, vectors: int) -> None:
    """`add_values` for some heads and some vectors of columns."""
    values, stride, count, head_dim, weights, width, _, sums = code.arguments

    def sum_at(number: int, vector: int) -> Int:
        return sums + ((head + number) * head_dim + column + vector * LANES) * 4

    block = [
        [Variable(code, FLOATS, code.read(sum_at(number, vector), kind=FLOATS)) for vector in range(vectors)]
        for number in range(heads)
    ]
    with code.count(count) as index:
        found = [
            format.read(code, [values], index, column + vector * LANES, stride, count) for vector in range(vectors)
        ]
        for number in range(heads):
            weight = broadcast(code, code.read(weights + ((head + number) * width + index) * 4, kind=FLOAT))
            for variable, value in zip(block[number], found, strict=True):
                variable.set(multiply_add(code, weight, value, variable.get()))
    for number in range(heads):
        for vector, variable in enumerate(block[number]):
            code.write(sum_at(number, vector), 0, variable.get())
