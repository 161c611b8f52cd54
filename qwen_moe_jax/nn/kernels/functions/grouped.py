"""The C functions that XLA calls for `matmul`: the three products of ragged groups of rows with a stack of matrices.

A job has entries: a part of a group's rows (of the results' rows, for the gradient of the weights). A chunk is an entry
times some columns of the result: their panels are packed, and then each tile of the entry's rows meets all of them.
"""

from typing import Literal

from llvmlite import ir

from qwen_moe_jax.nn.kernels import LANES
from qwen_moe_jax.nn.kernels.llvm.call import CHUNKS, DONE, JOB_FIELDS, NEXT, Operands, write_handler
from qwen_moe_jax.nn.kernels.llvm.code import INT32, INT64, Code, Variable
from qwen_moe_jax.nn.kernels.llvm.tiles import (
    Left,
    Numbers,
    write_narrow,
    write_pack_rows,
    write_pack_transposed,
    write_tiles,
)

#: Rows [R, I] times the transposes of [M, O, I]; rows [R, O] times [M, O, I]; sums of outer products, [E, O, I].
Product = Literal["transposed", "plain", "outer"]

#: Fields of a job after those of every job, int64 each: the addresses of the left factor, the right one and the result;
#: their widths, of a row; steps of the contraction, as many numbers; columns of a chunk, chunks of an entry.
LEFT, RIGHT, RESULT, LEFT_WIDTH, RIGHT_WIDTH, WIDTH, HEIGHT, COLUMNS, PARTS, ENTRIES = range(
    JOB_FIELDS, JOB_FIELDS + 80, 8
)
#: Fields of an entry: which matrix, the first of its group's rows, how many, the first row of the result that is meant
#: (of its matrix, for outer products), and how many.
MATRIX, ROW, ROWS, BEGIN, COUNT, ENTRY_SIZE = range(0, 48, 8)

#: Rows of an entry.
LONGEST = 256
#: Bytes of a chunk's panels at most, and numbers that are contracted at a time: they should stay in the second cache.
PANELS, CONTRACTED = 2**18, 512


def write_grouped_matmul(
    module: ir.Module, product: Product, numbers: Numbers, height: int, vectors: int, name: str
) -> None:
    """Writes the function `name` of (XLA_FFI_CallFrame*), which returns null, and what it calls.

    Args:
        module: that it becomes part of.
        product: which.
        numbers: that are multiplied.
        height: rows of a tile.
        vectors: of `LANES` numbers, of a panel's steps.
        name: of the function.
    """
    make_job = _write_make_job(module, product, numbers, LANES * vectors)
    write_handler(module, make_job, _write_run_chunk(module, product, numbers, height, vectors), name)


def _write_make_job(module: ir.Module, product: Product, numbers: Numbers, panel: int) -> Code:
    """The job of an XLA_FFI_CallFrame, without its users.

    The arguments are the left factor, the right factor, the groups' sizes and, but for outer products, the number of
    the first matrix.
    """
    code = Code(module, "make_job", 1, inner=True)
    operands = Operands(code)
    data, dimension = operands.data, operands.dimension
    left, right, sizes = (operands.argument(number) for number in range(3))
    result = operands.result(0)
    rows, groups = dimension(left, 0), dimension(sizes, 0)
    outer = product == "outer"
    width, height = (dimension(result, 2), dimension(result, 1)) if outer else (dimension(result, 1), rows)
    most = groups * ((height + LONGEST - 1) // LONGEST) if outer else groups + rows // LONGEST
    job = code.call("malloc", most * ENTRY_SIZE + ENTRIES)
    left_width, right_width = dimension(left, 1), dimension(right, 1 if outer else 2)
    # Rows of a group are as many as are expected, for outer products.
    contracted = (rows // groups).at_least(128) if outer else left_width
    columns = (code.integer(PANELS // 4) // (contracted.at_most(CONTRACTED) * panel)).at_least(1) * panel
    columns = columns.at_most((width + panel - 1) // panel * panel)
    parts = (width + columns - 1) // columns
    fields = {
        NEXT: 0, DONE: 0, LEFT: data(left), RIGHT: data(right), RESULT: data(result), LEFT_WIDTH: left_width,
        RIGHT_WIDTH: right_width, WIDTH: width, HEIGHT: height, COLUMNS: columns, PARTS: parts,
    }  # fmt: skip
    for field, value in fields.items():
        code.write(job, field, value)
    first = code.integer(0) if outer else code.read(data(operands.argument(3)), kind=INT32)
    entry, row = Variable(code, INT64, job + ENTRIES), Variable(code, INT64, code.integer(0))
    with code.count(groups) as group:
        size = code.read(data(sizes) + group * 4, kind=INT32).at_most(rows - row.get()).at_least(0)
        whole = height if outer else size
        # Parts of nearly equal size.
        count = (whole + LONGEST - 1) // LONGEST
        longest = (whole + count - 1) // count.at_least(1)
        if outer:  # whole vectors
            longest = (longest + LANES - 1) // LANES * LANES
        with code.count(count) as part:
            begin = part * longest
            values = {
                MATRIX: first + group, ROW: row.get(), ROWS: size, BEGIN: begin if outer else row.get() + begin,
                COUNT: longest.at_most(whole - begin).at_least(0),
            }  # fmt: skip
            for field, value in values.items():
                code.write(entry.get(), field, value)
            entry.set(entry.get() + ENTRY_SIZE)
        row.set(row.get() + size)
    code.write(job, CHUNKS, (entry.get() - job - ENTRIES) // ENTRY_SIZE * parts)
    if not outer:  # rows of no group
        line = width * numbers.size
        code.call("memset", data(result) + row.get() * line, 0, (rows - row.get()) * line)
    code.end(job)
    return code


def _write_run_chunk(module: ir.Module, product: Product, numbers: Numbers, height: int, vectors: int) -> Code:
    """Chunk number n of a job."""
    outer, size, panel = product == "outer", numbers.size, LANES * vectors
    packs_left = numbers.widened or outer
    add, narrow = _write_add_product(module, product, numbers, height, vectors), write_narrow(module)
    code = Code(module, "run_chunk", 2, inner=True)
    job, chunk = code.arguments
    fields = (LEFT, RIGHT, RESULT, LEFT_WIDTH, RIGHT_WIDTH, WIDTH, HEIGHT, COLUMNS, PARTS)
    left, right, result, left_width, right_width, width, result_height, most, parts = (
        code.read(job, field) for field in fields
    )
    entry = job + ENTRIES + chunk // parts * ENTRY_SIZE
    matrix, row, rows, begin, count = (code.read(entry, field) for field in (MATRIX, ROW, ROWS, BEGIN, COUNT))
    column = chunk % parts * most
    columns = most.at_most(width - column)
    # Where the factors and the result of this chunk begin.
    if product == "transposed":
        at_right = (matrix * width + column) * right_width
    else:
        at_right = (row if outer else matrix * left_width) * right_width + column
    at_left = row * left_width + begin if outer else begin * left_width
    at_result = ((matrix * result_height if outer else code.integer(0)) + begin) * width + column
    from_left, from_right, to = left + at_left * size, right + at_right * size, result + at_result * size
    contracted = rows if outer else left_width

    widest = (most + panel - 1) // panel * panel
    # A group of outer products may have more rows than were expected when the columns were chosen.
    held = (code.integer(PANELS // 4) // widest // LANES * LANES).at_least(LANES).at_most(CONTRACTED)
    held = held.at_most(contracted.at_least(1))
    of_panels = widest * held * 4
    of_left = count * held * 4 if packs_left else code.integer(0)
    of_result = count * columns * 4 if size == 2 else code.integer(0)
    memory = code.call("malloc", of_panels + of_left + of_result + 64)
    panels = (memory + 63) // 64 * 64
    wide, wide_stride = (panels + of_panels + of_left, columns * 4) if size == 2 else (to, width * 4)
    # Without rows the result is zeros: there is one step at least.
    blocks = ((contracted + held - 1) // held).at_least(1)
    with code.count(blocks) as block:
        start = block * held
        some = (contracted - start).at_most(held)
        left_step = left_width * size if outer else code.integer(size)
        right_step = code.integer(size) if product == "transposed" else right_width * size
        code.call(
            add, from_left + start * left_step, left_width * size, from_right + start * right_step, right_width * size,
            some, count, columns, panels, wide, wide_stride, block.at_most(1),
        )  # fmt: skip
    if size == 2:
        code.call(narrow, wide, wide_stride, count, columns, to, width * size)
    code.call("free", memory)
    code.end()
    return code


def _write_add_product(module: ir.Module, product: Product, numbers: Numbers, height: int, vectors: int) -> Code:
    """The function that adds a product to a result, or, where `add` is 0, writes it.

    Its arguments are left, its stride, right, its stride, contracted, rows, columns, memory, result, its stride, add.
    The left factor is [rows, contracted], but [contracted, rows] for outer products; the right one [columns,
    contracted] if it is transposed, else [contracted, columns]. Panels, and what is packed of the left factor, are
    written to the memory.
    """
    outer, panel = product == "outer", LANES * vectors
    kind: Left = "columns" if outer else "rows"
    pack_rows, pack_transposed = write_pack_rows(module, numbers), write_pack_transposed(module, numbers)
    tiles = write_tiles(module, numbers, kind, height, vectors)
    code = Code(module, "add_product", 11, inner=True)
    left, stride, right, right_stride, contracted, count, columns, memory, result, result_stride, adds = code.arguments
    steps = (contracted + 1) // 2 if numbers.pairs else contracted
    line = 4 * panel  # bytes of a panel's step
    number_panels = (columns + panel - 1) // panel
    with code.count(number_panels) as number:
        at, some = number * panel, (columns - number * panel).at_most(panel)
        target = memory + number * steps * line
        if product == "transposed":
            code.call(pack_transposed, right + at * right_stride, right_stride, some, steps, target, line)
        else:
            code.call(pack_rows, right + at * numbers.size, right_stride, contracted, some, target, line)
    if numbers.widened or outer:  # columns of a wide array would be in few sets of the cache
        packed = memory + number_panels * steps * line
        if outer:
            code.call(pack_rows, left, stride, contracted, count, packed, count * 4)
            left, stride = packed, count * 4
        else:
            code.call(pack_rows, left, stride, count, contracted, packed, contracted * 4)
            left, stride = packed, contracted * 4
    # Tiles of nearly equal height: a short one takes as long for a step as one of 4 rows.
    tile_count = (count + height - 1) // height
    high = (count + tile_count - 1) // tile_count.at_least(1)
    with code.count(tile_count) as tile:
        row = tile * high
        with code.count(number_panels) as number:
            code.call(
                tiles, left + row * (4 if outer else stride), stride, memory + number * steps * line, steps,
                result + row * result_stride + number * panel * 4, result_stride, columns - number * panel, adds,
                high.at_most(count - row),
            )  # fmt: skip
    code.end()
    return code
