"""The innermost loops of `picked_matmul`: a block of a matrix times some rows."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from qwen_moe_jax.nn.kernels import LANES
from qwen_moe_jax.nn.kernels.llvm.code import INT32, INT64, Code, Int, Variable
from qwen_moe_jax.nn.kernels.llvm.formats import FLOATS, Format

#: Rows of the matrix that are read side by side, and rows that they meet at once: their sums stay in registers.
OUTPUTS, ROWS = 4, (6, 4, 2, 1)
#: How far ahead rows of the matrix are fetched, in blocks of `OUTPUTS` rows.
AHEAD = 2


def write_multiply(module: ir.Module, format: Format, name: str = "multiply") -> Code:
    """The function of (address of the arrays' addresses, first row of the matrix, how many, I, x, rows, y, O).

    Rows of the matrix are counted over the whole stack. x is the address of float32 [rows, I], y that of the first
    result, of rows of O numbers.
    """
    code = Code(module, name, 8, inner=True)
    table, first, outputs, inputs, x, rows, y, width = code.arguments
    arrays = [code.read(table, 8 * number) for number in range(format.arrays)]
    whole, blocks = outputs - outputs % OUTPUTS, _number_of_blocks(rows)
    for count, begin, end in ((OUTPUTS, code.integer(0), whole), (1, whole, outputs)):
        with code.count(end, begin, count) as output:
            fetch = _write_fetch(code, format, arrays, first + output, count, inputs, blocks)
            row = Variable(code, INT64, code.integer(0))
            for block in ROWS:
                with code.loop() as leave_if:
                    leave_if(rows - row.get() < block)
                    at = row.get()
                    from_x, to_y = x + at * inputs * 4, y + (at * width + output) * 4
                    _write_block(code, format, arrays, first + output, count, inputs, from_x, block, to_y, width, fetch)
                    row.set(at + block)
    code.end()
    return code


def _number_of_blocks(rows: Int) -> Int:
    """In how many blocks of `ROWS` these rows are multiplied."""
    blocks, left = rows // ROWS[0], rows % ROWS[0]
    for block in ROWS[1:]:
        blocks, left = blocks + left // block, left % block
    return blocks


def _write_fetch(
    code: Code, format: Format, arrays: list[Int], first: Int, count: int, inputs: Int, blocks: Int
) -> Callable[[Int, int], None]:
    """What asks for rows of the matrix that come next, of (column, columns of a step).

    By itself, a processor reads ahead within a page of memory only. Each block of rows asks for a part of them: all
    asked for by the first, they would come while it waits, and while the others are multiplied memory would rest.
    """
    if format.strided:  # rows that do not follow one another
        following = [(first + (count + number)) * arrays[-1] * format.bits // 8 + arrays[0] for number in range(count)]

        def fetch_rows(column: Int, step: int) -> None:
            for row in following:
                code.prefetch(row + column * format.bits // 8)

        return fetch_rows
    step_bytes = code.integer(count * LANES * format.bits // 8) // blocks.at_least(1)
    ahead = Variable(code, INT64, (first + count * AHEAD) * inputs * format.bits // 8 + arrays[0])

    def fetch(column: Int, step: int) -> None:
        size = step_bytes * (step // LANES)
        for number in range(OUTPUTS):
            code.prefetch(ahead.get() + size * number // OUTPUTS, cache=2)
        ahead.set(ahead.get() + size)

    return fetch


def _write_block(
    code: Code, format: Format, arrays: list[Int], first: Int, count: int, inputs: Int, x: Int, rows: int, y: Int,
    width: Int, fetch: Callable[[Int, int], None],
) -> None:  # fmt: skip
    """`count` rows of the matrix times `rows` rows, whose sums are in registers."""
    zeros = ir.Constant(FLOATS, [0.0] * LANES)
    # Few sums would wait for each other: then there are two of each.
    copies = 2 if rows * count <= 4 else 1
    sums = [[[Variable(code, FLOATS, zeros) for _ in range(count)] for _ in range(rows)] for _ in range(copies)]

    def add(column: Int, copy: int) -> None:
        weights = [format.read(code, arrays, first + number, column, inputs, width) for number in range(count)]
        for row in range(rows):
            x_row = code.read(x + (inputs * row + column) * 4, kind=FLOATS)
            for number in range(count):
                variable = sums[copy][row][number]
                scaled = code.builder.fmul(x_row, weights[number], flags=["contract"])  # one operation with the sum
                variable.set(code.builder.fadd(scaled, variable.get(), flags=["contract"]))

    step = copies * LANES
    whole = inputs - inputs % step
    with code.count(whole, step=step) as column:
        fetch(column, step)
        for copy in range(copies):
            add(column + copy * LANES, copy)
    if copies > 1:
        with code.count(inputs, whole, LANES) as column:
            add(column, 0)
    for row in range(rows):
        totals = [variable.get() for variable in sums[0][row]]
        for copy in range(1, copies):
            more = [variable.get() for variable in sums[copy][row]]
            totals = [code.builder.fadd(*pair) for pair in zip(totals, more, strict=True)]
        results = _sums_of_lanes(code, totals)
        if format.finish is not None:
            for number in range(count):
                index = ir.Constant(INT32, number)
                result = code.builder.extract_element(results, index)
                result = format.finish(code, arrays, first + number, result, inputs)
                results = code.builder.insert_element(results, result, index)
        code.write(y + width * row * 4, 0, results)


def _sums_of_lanes(code: Code, vectors: list[Any]) -> Any:
    """A vector of the sums of each vector's numbers. The number of vectors is a power of two."""
    width = length = LANES  # of the vectors, and of the parts of them that belong to one sum
    while length > 1:
        pair = min(len(vectors), 2)
        length //= 2
        lanes = [start + lane for start in range(0, pair * width, 2 * length) for lane in range(length)]
        index, added = ir.VectorType(INT32, len(lanes)), []
        for number in range(0, len(vectors), pair):
            both = vectors[number], vectors[number + pair - 1]
            halves = [
                code.builder.shuffle_vector(*both, ir.Constant(index, [lane + offset for lane in lanes]))
                for offset in (0, length)
            ]
            added.append(code.builder.fadd(*halves))
        vectors, width = added, len(lanes)
    return vectors[0]
