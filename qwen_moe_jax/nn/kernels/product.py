"""The innermost loops of `picked_matmul`: a block of a matrix times some rows.

Only `nn.kernels` imports this, where llvmlite is installed.
"""

from typing import Any

from llvmlite import ir

from qwen_moe_jax.nn.kernels.code import INT64, Code, Int, Variable
from qwen_moe_jax.nn.kernels.cpu import LANES
from qwen_moe_jax.nn.kernels.formats import FLOATS, Format

#: Rows of the matrix that are read side by side, and rows that they meet at once: their sums stay in registers.
OUTPUTS, ROWS = 4, (4, 2, 1)


def write_multiply(module: ir.Module, format: Format) -> Code:
    """The function of (address of the arrays' addresses, first row of the matrix, how many, I, x, rows, y, O).

    Rows of the matrix are counted over the whole stack. x is the address of float32 [rows, I], y that of the first
    result, of rows of O numbers.
    """
    code = Code(module, "multiply", 8, inner=True)
    table, first, outputs, inputs, x, rows, y, width = code.arguments
    arrays = [code.read(table, 8 * number) for number in range(format.arrays)]
    whole = outputs - outputs % OUTPUTS
    for count, begin, end in ((OUTPUTS, code.integer(0), whole), (1, whole, outputs)):
        with code.count(end, begin, count) as output:
            row = Variable(code, INT64, code.integer(0))
            for block in ROWS:
                with code.loop() as leave_if:
                    leave_if(rows - row.get() < block)
                    at = row.get()
                    from_x, to_y = x + at * inputs * 4, y + (at * width + output) * 4
                    _write_block(code, format, arrays, first + output, count, inputs, from_x, block, to_y, width)
                    row.set(at + block)
    code.end()
    return code


def _write_block(
    code: Code, format: Format, arrays: list[Int], first: Int, count: int, inputs: Int, x: Int, rows: int, y: Int,
    width: Int,
) -> None:  # fmt: skip
    """`count` rows of the matrix times `rows` rows, whose sums are in registers."""
    zeros = ir.Constant(FLOATS, [0.0] * LANES)
    # Few sums would wait for each other: then there are two of each.
    copies = 2 if rows * count <= 4 else 1
    sums = [[[Variable(code, FLOATS, zeros) for _ in range(count)] for _ in range(rows)] for _ in range(copies)]

    def add(column: Int, copy: int) -> None:
        weights = [format.read(code, arrays, first + number, column, inputs) for number in range(count)]
        for row in range(rows):
            x_row = code.read(x + (inputs * row + column) * 4, kind=FLOATS)
            for number in range(count):
                variable = sums[copy][row][number]
                scaled = code.builder.fmul(x_row, weights[number], flags=["contract"])  # one operation with the sum
                variable.set(code.builder.fadd(scaled, variable.get(), flags=["contract"]))

    step = copies * LANES
    whole = inputs - inputs % step
    with code.count(whole, step=step) as column:
        for copy in range(copies):
            add(column + copy * LANES, copy)
    if copies > 1:
        with code.count(inputs, whole, LANES) as column:
            add(column, 0)
    for row in range(rows):
        for number in range(count):
            total = sums[0][row][number].get()
            for copy in range(1, copies):
                total = code.builder.fadd(total, sums[copy][row][number].get())
            result = _sum_of_lanes(code, total)
            if format.finish is not None:
                result = format.finish(code, arrays, first + number, result, inputs)
            code.write(y + (width * row + number) * 4, 0, result)


def _sum_of_lanes(code: Code, vector: Any) -> Any:
    """The sum of a vector's numbers, halves by halves."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        index = ir.VectorType(ir.IntType(32), lanes)
        low, high = (
            code.builder.shuffle_vector(vector, vector, ir.Constant(index, list(range(start, start + lanes))))
            for start in (0, lanes)
        )
        vector = code.builder.fadd(low, high)
    return code.builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))
