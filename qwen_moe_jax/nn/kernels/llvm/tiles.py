"""The innermost loops of `matmul`: a tile of a product, whose sums stay in registers, and the packing of what it reads.

A tile is some rows of the left factor times a *panel* of the right one: for every step of the contraction, the panel
has the numbers of its columns one after another, as vectors are loaded, where a row's number is broadcast. A step is 4
bytes: a float32 or, where the processor multiplies them, two bfloat16.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from llvmlite import ir

from qwen_moe_jax.nn.kernels import LANES
from qwen_moe_jax.nn.kernels.llvm.code import FLOAT, INT16, INT32, INT64, Code, Int, Variable
from qwen_moe_jax.nn.kernels.llvm.formats import FLOATS

#: How the left factor is stored: [rows, steps], or [steps, rows].
Left = Literal["rows", "columns"]

_INTS = ir.VectorType(INT32, LANES)
_SHORTS = ir.VectorType(INT16, LANES)


class _BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What is multiplied, and how.

    Attributes:
        size: bytes of a number in memory.
        pairs: whether a step has two numbers, multiplied and summed by one instruction.
    """

    size: int
    pairs: bool = False

    @property
    def widened(self) -> bool:
        """Whether numbers become float32 when they are packed."""
        return self.size < 4 and not self.pairs


#: bfloat16 becomes float32 where there is no instruction for pairs of it.
NUMBERS = {"float32": Numbers(4), "bfloat16": Numbers(2), "bfloat16 pairs": Numbers(2, pairs=True)}


def write_tile(module: ir.Module, numbers: Numbers, left: Left, rows: int, vectors: int) -> Code:
    """The function of (left factor, its stride, panel, steps, result, its stride, columns, add) for a tile.

    Strides are bytes. The result is float32, of as many numbers a row as the columns say: a multiple of `LANES`, of the
    panel's `vectors * LANES`. If `add` is 1, the product is added to it.
    """
    code = Code(module, f"tile_{left}_{rows}", 8, inner=True)
    at_left, stride, panel, steps, result, result_stride, columns, adds = code.arguments
    zeros = ir.Constant(FLOATS, [0.0] * LANES)
    sums = [[Variable(code, FLOATS, zeros) for _ in range(vectors)] for _ in range(rows)]

    def results(use: Callable[[Int, Variable], None]) -> None:
        for vector in range(vectors):
            with code.when(columns >= LANES * (vector + 1)):
                for row in range(rows):
                    use(result + result_stride * row + 4 * LANES * vector, sums[row][vector])

    with code.when(adds.equals(1)):
        results(lambda address, sum: sum.set(code.read(address, kind=FLOATS)))
    width = 4 * LANES * vectors
    # Addresses are registers, of which there are 16: three rows share one, and the stride.
    bases = range(0, rows, 3) if left == "rows" else range(1)
    at_rows = [Variable(code, INT64, at_left + stride * base) for base in bases]
    at_panel = Variable(code, INT64, panel)

    # One step at a time: written out four times, the loop is no faster and takes twice as long to compile.
    stop = panel + steps * width
    with code.loop() as leave_if:
        leave_if(at_panel.get() >= stop)
        right = [code.read(at_panel.get(), 4 * LANES * vector, kind=FLOATS) for vector in range(vectors)]
        for row in range(rows):
            if left == "rows":
                number = code.read(at_rows[row // 3].get() + stride * (row % 3), kind=FLOAT)
            else:
                number = code.read(at_rows[0].get(), 4 * row, kind=FLOAT)
            broadcast = _broadcast(code, number)
            for vector in range(vectors):
                sum = sums[row][vector]
                sum.set(_multiply_add(code, numbers, broadcast, right[vector], sum.get()))
        for at_row in at_rows:
            at_row.set(at_row.get() + (4 if left == "rows" else stride))
        at_panel.set(at_panel.get() + width)
    results(lambda address, sum: code.write(address, 0, sum.get()))
    code.end()
    return code


def write_tiles(module: ir.Module, numbers: Numbers, left: Left, height: int, vectors: int) -> Code:
    """The function of the same arguments as a tile's and the number of rows, at most `height`."""
    tiles = [write_tile(module, numbers, left, rows, vectors) for rows in range(1, height + 1)]
    code = Code(module, f"tiles_{left}", 9, inner=True)
    *arguments, rows = code.arguments
    for number, tile in enumerate(tiles):
        with code.when(rows.equals(number + 1)):
            code.call(tile, *arguments)
    code.end()
    return code


def write_pack_rows(module: ir.Module, numbers: Numbers) -> Code:
    """The function of (from, its stride, rows, columns, to, its stride) that packs [rows, columns] into steps.

    Each row becomes a step; of pairs, each two rows, the last one with zeros if their number is odd. Columns are a
    multiple of `LANES`.
    """
    code = Code(module, "pack_rows", 6, inner=True)
    source, stride, rows, columns, target, target_stride = code.arguments
    if not numbers.pairs:
        with code.count(rows) as row, code.count(columns, step=LANES) as column:
            numbers_16 = _read(code, numbers, source + row * stride + column * numbers.size)
            code.write(target + row * target_stride + column * 4, 0, numbers_16)
        code.end()
        return code
    zeros = ir.Constant(_INTS, [0] * LANES)
    with code.count((rows + 1) // 2) as step, code.count(columns, step=LANES) as column:
        at = source + step * stride * 2 + column * 2
        low = code.builder.zext(code.read(at, kind=_SHORTS), _INTS)
        high = Variable(code, _INTS, zeros)
        with code.when(step * 2 + 1 < rows):
            second = code.builder.zext(code.read(at + stride, kind=_SHORTS), _INTS)
            high.set(code.builder.shl(second, ir.Constant(_INTS, [16] * LANES)))
        code.write(target + step * target_stride + column * 4, 0, code.builder.or_(low, high.get()))
    code.end()
    return code


def write_pack_transposed(module: ir.Module, numbers: Numbers) -> Code:
    """The function of (from, its stride, rows, steps, to, its stride) that packs [rows, steps] into [steps, rows].

    Rows and steps are multiples of `LANES`.
    """
    code = Code(module, "pack_transposed", 6, inner=True)
    source, stride, rows, steps, target, target_stride = code.arguments
    size = 2 if numbers.widened else 4
    with code.count(rows, step=LANES) as row, code.count(steps, step=LANES) as step:
        at = source + row * stride + step * size
        vectors = [_read(code, numbers, at + stride * number) for number in range(LANES)]
        for number, vector in enumerate(_transposed(code, vectors)):
            code.write(target + (step + number) * target_stride + row * 4, 0, vector)
    code.end()
    return code


def write_narrow(module: ir.Module) -> Code:
    """The function of (from, its stride, rows, columns, to, its stride) that rounds float32 to bfloat16.

    To the nearest, of two as near to the even one. Columns are a multiple of `LANES`.
    """
    code = Code(module, "narrow", 6, inner=True)
    source, stride, rows, columns, target, target_stride = code.arguments
    sixteen, one, half = (ir.Constant(_INTS, [number] * LANES) for number in (16, 1, 0x7FFF))
    with code.count(rows) as row, code.count(columns, step=LANES) as column:
        floats = code.read(source + row * stride + column * 4, kind=FLOATS)
        bits = code.builder.bitcast(floats, _INTS)
        even = code.builder.and_(code.builder.lshr(bits, sixteen), one)
        rounded = code.builder.lshr(code.builder.add(code.builder.add(bits, half), even), sixteen)
        nan = code.builder.fcmp_unordered("uno", floats, floats)
        chosen = code.builder.select(nan, ir.Constant(_INTS, [0x7FC0] * LANES), rounded)
        code.write(target + row * target_stride + column * 2, 0, code.builder.trunc(chosen, _SHORTS))
    code.end()
    return code


def _read(code: Code, numbers: Numbers, address: Int) -> Any:
    """`LANES` steps from an address on."""
    if not numbers.widened:
        return code.read(address, kind=FLOATS)
    wide = code.builder.zext(code.read(address, kind=_SHORTS), _INTS)
    return code.builder.bitcast(code.builder.shl(wide, ir.Constant(_INTS, [16] * LANES)), FLOATS)


def _transposed(code: Code, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 numbers as the 16 of their columns, by shuffles of pairs that processors have.

    Each half of a pair's shuffle picks 2 of every 4 units: of numbers, of pairs of numbers, and of groups of 4.
    """
    groups = range(0, LANES, 4)
    units = [
        [lane + number for lane in groups for number in (0, LANES, 1, LANES + 1)],
        [lane + number for lane in groups for number in (0, 1, LANES, LANES + 1)],
        [start + number for start in (0, 8, LANES, LANES + 8) for number in range(4)],
    ]

    def shuffled(first: Any, second: Any, unit: int) -> list[Any]:
        return [
            code.builder.shuffle_vector(first, second, ir.Constant(_INTS, [lane + distance for lane in units[unit]]))
            for distance in ((0, 4) if unit == 2 else (0, 2))
        ]

    # Within the groups of 4 numbers, 4 × 4 transposes of 4 rows each.
    blocks = []
    for block in groups:
        first, second = (shuffled(rows[pair], rows[pair + 1], 0) for pair in (block, block + 2))
        blocks.append([vector for low, high in zip(first, second, strict=True) for vector in shuffled(low, high, 1)])
    # Group g of vector c of a block now has the block's rows of column 4 g + c: a 4 × 4 transpose of groups follows.
    columns: list[Any] = [None] * LANES
    for number, (first, second, third, fourth) in enumerate(zip(*blocks, strict=True)):
        halves = zip(shuffled(first, second, 2), shuffled(third, fourth, 2), strict=True)
        for parity, (left, right) in enumerate(halves):
            columns[4 * parity + number], columns[4 * parity + 8 + number] = shuffled(left, right, 2)
    return columns


def _broadcast(code: Code, number: Any) -> Any:
    first = code.builder.insert_element(ir.Constant(FLOATS, ir.Undefined), number, INT32(0))
    return code.builder.shuffle_vector(first, first, ir.Constant(_INTS, [0] * LANES))


def _multiply_add(code: Code, numbers: Numbers, left: Any, right: Any, sum: Any) -> Any:
    if not numbers.pairs:
        product = code.builder.fmul(left, right, flags=["contract"])  # one operation with the sum
        return code.builder.fadd(product, sum, flags=["contract"])
    pairs = ir.VectorType(_BFloat16(), 2 * LANES)
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    module = code.builder.module
    function = module.globals.get(name) or ir.Function(module, ir.FunctionType(FLOATS, [FLOATS, pairs, pairs]), name)
    return code.builder.call(function, [sum, *(code.builder.bitcast(vector, pairs) for vector in (left, right))])
