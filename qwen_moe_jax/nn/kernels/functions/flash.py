"""The C function of `attention_kernels.flash_cpu`: queries attend to keys and values where these are stored.

A chunk is a block of tokens of one row, in the query heads that share a key/value head. They meet one block of keys
after the other, each tile of their rows by itself: its scores stay in the first cache. Softmax is computed online, so
no query's scores are in memory as a whole, and keys that no query of a tile sees cost nothing. Source: Dao, arXiv
2307.08691.

Letters of this file besides the package's: G query heads of a key/value head.
"""

import itertools
from typing import NamedTuple

from llvmlite import ir

from qwen_moe_jax.nn.kernels import LANES
from qwen_moe_jax.nn.kernels.functions.attention import (
    AT_COUNTS,
    AT_KEYS,
    AT_LENGTHS,
    AT_QUERIES,
    AT_RESULTS,
    AT_TABLE,
    AT_VALUES,
    BLOCKS,
    END,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYER,
    PAGED,
    SLOTS,
    TABLE_WIDTH,
    THREADS,
    TOKENS,
    WINDOW,
)  # fmt: skip
from qwen_moe_jax.nn.kernels.functions.flash_blocks import (
    KEYS,
    LOW,
    QUERIES,
    SCORES,
    UNSEEN,
    Seen,
    panels_of,
    write_pack_keys,
)
from qwen_moe_jax.nn.kernels.llvm.call import CHUNKS, DONE, NEXT, Operands, write_handler
from qwen_moe_jax.nn.kernels.llvm.code import FLOAT, INT32, INT64, Code, Int, Variable
from qwen_moe_jax.nn.kernels.llvm.formats import FLOATS
from qwen_moe_jax.nn.kernels.llvm.tiles import Numbers, write_narrow, write_pack_rows, write_tiles
from qwen_moe_jax.nn.kernels.llvm.vectors import added, broadcast, constant, exp, folded, larger

#: Arguments of the call: queries [B, T, N, H]; numbers int32 [4]: the layer, the sliding window or 0, whether there is
#: a table, and whether there are segments; the factor of scores float32 [1]; tokens of each row before these int32 [B];
#: how many of these are tokens int32 [B]; the table of blocks int32 [B, M]; segments of the row's tokens, from its
#: first key on, int32 [B, T], 0 for padding; keys and values [L, P, S, K, H] in the dtype of the queries.
#: Results: [B, T, N, H] in their dtype; each query's largest score and the sum of its weights, float32 [2, B, T, N].
QUERIES_, NUMBERS, SCALE, LENGTHS, COUNTS, TABLE, SEGMENTS, KEYS_, VALUES = range(9)

#: Fields of a job after those of `nn.kernels.functions.attention`.
AT_SEGMENTS, AT_SUMS, FACTOR, PARTS, ROWS_, LAST = range(END, END + 48, 8)


class Memory(NamedTuple):
    """Addresses of a chunk's memory.

    Attributes:
        keys, values: of a block, packed; gathered: keys as they are stored.
        segments: of the keys of a block, int32.
        queries: of all heads float32 [G, QUERIES, H], where those in memory are not float32.
        mixed: sums of values float32 [G, QUERIES, H].
        largest, sums: of the scores of a query, and of its weights, float32 [G, QUERIES].
        scores: of a tile.
        end: of all.
    """

    keys: Int
    values: Int
    gathered: Int
    segments: Int
    queries: Int
    mixed: Int
    largest: Int
    sums: Int
    scores: Int
    end: Int

    @classmethod
    def of(cls, begin: Int, group: Int, head_dim: Int, numbers: Numbers, height: int, panel: int) -> "Memory":
        """From an address on."""
        queries = group * (QUERIES * 4)
        wide = queries * head_dim
        sizes = [
            head_dim * (KEYS * 4), panels_of(head_dim, panel) * (panel * KEYS * 4), head_dim * (KEYS * numbers.size),
            KEYS * 4, wide if numbers.widened else 0, wide, queries, queries, height * SCORES,
        ]  # fmt: skip
        return cls(*itertools.accumulate(sizes, initial=begin))


def write_flash_attention(module: ir.Module, numbers: Numbers, height: int, vectors: int, name: str) -> None:
    """Writes the function `name` for numbers of a kind, by tiles of `height` rows and `vectors` vectors."""
    write_handler(module, _write_make_job(module), _write_run_chunk(module, numbers, height, vectors), name, THREADS)


def _write_make_job(module: ir.Module) -> Code:
    code = Code(module, "make_job", 1, inner=True)
    operands = Operands(code)
    data, dimension = operands.data, operands.dimension
    arguments = [operands.argument(number) for number in range(9)]
    queries, keys, numbers = arguments[QUERIES_], arguments[KEYS_], data(arguments[NUMBERS])
    job = code.call("malloc", LAST)
    for field, argument in (
        (AT_QUERIES, QUERIES_), (AT_LENGTHS, LENGTHS), (AT_COUNTS, COUNTS), (AT_TABLE, TABLE), (AT_KEYS, KEYS_),
        (AT_VALUES, VALUES),
    ):  # fmt: skip
        code.write(job, field, data(arguments[argument]))
    rows, tokens, kv_heads = dimension(queries, 0), dimension(queries, 1), dimension(keys, 3)
    has_segments = code.read(numbers, 12, kind=INT32) >= 1
    parts = panels_of(tokens, QUERIES)
    chunks = rows * kv_heads * parts
    for field, value in (
        (AT_RESULTS, data(operands.result(0))), (AT_SUMS, data(operands.result(1))), (TOKENS, tokens),
        (HEADS, dimension(queries, 2)), (KV_HEADS, kv_heads), (HEAD_DIM, dimension(keys, 4)),
        (SLOTS, dimension(keys, 2)), (BLOCKS, dimension(keys, 1)), (TABLE_WIDTH, dimension(arguments[TABLE], 1)),
        (LAYER, code.read(numbers, kind=INT32)), (WINDOW, code.read(numbers, 4, kind=INT32)),
        (PAGED, code.read(numbers, 8, kind=INT32)), (PARTS, parts), (ROWS_, rows), (NEXT, 0), (DONE, 0),
        (AT_SEGMENTS, code.select(has_segments, data(arguments[SEGMENTS]), 0)), (CHUNKS, chunks), (THREADS, chunks),
    ):  # fmt: skip
        code.write(job, field, value)
    code.write(job, FACTOR, code.read(data(arguments[SCALE]), kind=FLOAT))
    code.end(job)
    return code


def _write_run_chunk(module: ir.Module, numbers: Numbers, height: int, vectors: int) -> Code:
    """The results of a block of tokens; the last blocks, which see most, come first."""
    panel = vectors * LANES
    pack_rows = write_pack_rows(module, numbers)
    pack_keys = write_pack_keys(module, numbers, panel, pack_rows)
    meet, finish = _write_meet(module, numbers, height, vectors), _write_finish(module, numbers)
    code = Code(module, "run_chunk", 2, inner=True)
    job, chunk = code.arguments
    kv_heads, tokens, head_dim, heads, window, rows = (
        code.read(job, field) for field in (KV_HEADS, TOKENS, HEAD_DIM, HEADS, WINDOW, ROWS_)
    )
    group, number = heads // kv_heads, chunk % (rows * kv_heads)
    begin = (code.read(job, PARTS) - chunk // (rows * kv_heads) - 1) * QUERIES
    row, head = number // kv_heads, number % kv_heads
    length, count = (code.read(code.read(job, field) + row * 4, kind=INT32) for field in (AT_LENGTHS, AT_COUNTS))
    some = (count - begin).at_most(QUERIES).at_least(0)
    start = Memory.of(code.integer(0), group, head_dim, numbers, height, panel)
    allocated = code.call("malloc", start.end + 64)
    memory = Memory.of((allocated + 63) // 64 * 64, group, head_dim, numbers, height, panel)
    code.call("memset", memory.mixed, 0, group * head_dim * (QUERIES * 4))
    with code.count(group * QUERIES) as query:
        code.write(memory.largest + query * 4, 0, ir.Constant(FLOAT, UNSEEN))
        code.write(memory.sums + query * 4, 0, ir.Constant(FLOAT, 0.0))
    at_query = ((row * tokens + begin) * heads + head * group) * head_dim * numbers.size
    left, stride = code.read(job, AT_QUERIES) + at_query, heads * head_dim * numbers.size
    between = head_dim * numbers.size  # from one head's query to the next
    if numbers.widened:
        with code.count(group) as member:
            target = memory.queries + member * head_dim * (QUERIES * 4)
            code.call(pack_rows, left + member * between, stride, some, head_dim, target, head_dim * 4)
        left, stride, between = memory.queries, head_dim * 4, head_dim * (QUERIES * 4)
    position = length + begin
    first = code.select(window >= 1, (position - window + 1).at_least(0), 0)
    with code.count(position + some, first, KEYS) as key:
        keys = (position + some - key).at_most(KEYS)
        code.call(pack_keys, job, row, head, key, keys, memory.keys, memory.values, memory.gathered)
        write_segments(code, job, row, key, keys, memory.segments)
        with code.count(group) as member:
            of_member = member * QUERIES
            code.call(
                meet, job, left + member * between, stride, position, some, key, keys, memory.keys, memory.values,
                memory.segments, memory.mixed + of_member * head_dim * 4, memory.largest + of_member * 4,
                memory.sums + of_member * 4, memory.scores, row,
            )  # fmt: skip
    with code.count(group) as member:
        of_member = member * QUERIES
        code.call(
            finish, job, row, begin, head * group + member, memory.mixed + of_member * head_dim * 4,
            memory.largest + of_member * 4, memory.sums + of_member * 4,
        )  # fmt: skip
    code.call("free", allocated)
    code.end()
    return code


def write_segments(code: Code, job: Int, row: Int, first: Int, count: Int, target: Int) -> None:
    """The segments of a block of keys; without segments all are in segment 1."""
    source = code.read(job, AT_SEGMENTS)
    with code.when(source >= 1):
        code.call("memcpy", target, source + (row * code.read(job, TOKENS) + first) * 4, count * 4)
    with code.when(source.equals(0)), code.count(count) as key:
        code.write(target + key * 4, 0, 1, kind=INT32)


def segment_of(code: Code, job: Int, row: Int, position: Int) -> Int:
    """The segment of a row's query; -1, that of no key, for padding."""
    segment, source = Variable(code, INT64, code.integer(1)), code.read(job, AT_SEGMENTS)
    with code.when(source >= 1):
        found = code.read(source + (row * code.read(job, TOKENS) + position) * 4, kind=INT32)
        segment.set(code.select(found >= 1, found, -1))
    return segment.get()


def visible(code: Code, job: Int, first: Int, last: Int, key: Int, keys: Int) -> tuple[Int, Int]:
    """Of a block of keys, those that queries of some positions may see: the first, and that after the last."""
    window = code.read(job, WINDOW)
    low = code.select(window >= 1, (first - window + 1 - key).at_least(0), 0)
    return low, (last - key + 1).at_most(keys)


def _write_meet(module: ir.Module, numbers: Numbers, height: int, vectors: int) -> Code:
    """The function of (job, queries, their stride, position of the first, how many, position of the first key, how
    many, packed keys, packed values, their segments, sums of values, largest scores, sums, memory for scores, row).

    Tile by tile: scores, their weights, and the weighted sums of values.
    """
    panel, wide_numbers = vectors * LANES, Numbers(4)
    line = 4 * panel
    tiles, soften = write_tiles(module, wide_numbers, "rows", height, vectors), _write_soften(module)
    code = Code(module, "meet", 15, inner=True)
    job, left, stride, position, count, key, keys, of_keys, of_values, segments, mixed, largest, sums, scores, row = (
        code.arguments
    )
    head_dim = code.read(job, HEAD_DIM)
    tile_count = (count + (height - 1)) // height
    high = (count + tile_count - 1) // tile_count.at_least(1)
    with code.count(tile_count) as tile:
        query = tile * high
        some, at = high.at_most(count - query), position + query
        begin, end = visible(code, job, at, at + some - 1, key, keys)
        begin, padded = begin // panel * panel, (end + (LANES - 1)) // LANES * LANES
        with code.when(begin < end):
            with code.count(panels_of(padded, panel), begin // panel) as number:
                code.call(
                    tiles, left + query * stride, stride, of_keys + number * head_dim * line, head_dim,
                    scores + number * line, SCORES, padded - number * panel, 0, some,
                )  # fmt: skip
            with code.count(some) as member:
                low, most = visible(code, job, at + member, at + member, key, keys)
                code.call(
                    soften, job, scores + member * SCORES, begin, padded, low, most, segments,
                    segment_of(code, job, row, at + member), largest + (query + member) * 4,
                    sums + (query + member) * 4, mixed + (query + member) * head_dim * 4,
                )  # fmt: skip
            with code.count(panels_of(head_dim, panel)) as number:
                code.call(
                    tiles, scores + begin * 4, SCORES, of_values + (number * keys + begin) * line, end - begin,
                    mixed + query * head_dim * 4 + number * line, head_dim * 4, head_dim - number * panel, 1, some,
                )  # fmt: skip
    code.end()
    return code


def _write_soften(module: ir.Module) -> Code:
    """The function of (job, scores of a query, the first, that after the last, the first that is seen, that after the
    last, segments of the keys, that of the query, largest score so far, sum, sums of values).

    Scores become weights relative to the new largest score, and so do the sums.
    """
    code = Code(module, "soften", 11, inner=True)
    job, scores, begin, end, low, high, segments, segment, at_largest, at_sum, mixed = code.arguments
    builder, head_dim = code.builder, code.read(job, HEAD_DIM)
    factor = broadcast(code, code.read(job, FACTOR, kind=FLOAT))
    seen, top = Seen(code, low, high, segment, segments), Variable(code, FLOATS, constant(UNSEEN))
    with code.count(end, begin, LANES) as index:
        score = builder.fmul(code.read(scores + index * 4, kind=FLOATS), factor)
        score = builder.select(seen.at(index), score, constant(UNSEEN))
        code.write(scores + index * 4, 0, score)
        top.set(larger(code, score, top.get()))
    before = broadcast(code, code.read(at_largest, kind=FLOAT))
    largest = larger(code, broadcast(code, folded(code, top.get(), larger)), before)
    code.write(at_largest, 0, builder.extract_element(largest, INT32(0)))
    bounded = larger(code, largest, constant(LOW))  # where nothing is seen yet, weights are zeros
    total = Variable(code, FLOATS, constant(0.0))
    with code.count(end, begin, LANES) as index:
        weight = exp(code, builder.fsub(code.read(scores + index * 4, kind=FLOATS), bounded))
        code.write(scores + index * 4, 0, weight)
        total.set(builder.fadd(weight, total.get()))
    shrink = exp(code, builder.fsub(before, bounded))
    sum = builder.fmul(code.read(at_sum, kind=FLOAT), builder.extract_element(shrink, INT32(0)))
    code.write(at_sum, 0, builder.fadd(sum, folded(code, total.get(), added)))
    with code.count(head_dim, step=LANES) as column:
        code.write(mixed + column * 4, 0, builder.fmul(code.read(mixed + column * 4, kind=FLOATS), shrink))
    code.end()
    return code


def _write_finish(module: ir.Module, numbers: Numbers) -> Code:
    """The function of (job, row, first token, head, sums of values, largest scores, sums) that writes the results.

    Those of padding are zeros.
    """
    narrow = write_narrow(module)
    code = Code(module, "finish", 7, inner=True)
    job, row, begin, head, mixed, largest, sums = code.arguments
    rows, tokens, heads, head_dim = (code.read(job, field) for field in (ROWS_, TOKENS, HEADS, HEAD_DIM))
    zero, one = ir.Constant(FLOAT, 0.0), ir.Constant(FLOAT, 1.0)
    with code.count((tokens - begin).at_most(QUERIES)) as query:
        sum, at = code.read(sums + query * 4, kind=FLOAT), (row * tokens + begin + query) * heads + head
        share = code.builder.select(code.builder.fcmp_ordered("==", sum, zero), zero, code.builder.fdiv(one, sum))
        result, source = code.read(job, AT_RESULTS) + at * head_dim * numbers.size, mixed + query * head_dim * 4
        target = source if numbers.widened else result
        with code.count(head_dim, step=LANES) as column:
            scaled = code.builder.fmul(code.read(source + column * 4, kind=FLOATS), broadcast(code, share))
            code.write(target + column * 4, 0, scaled)
        if numbers.widened:
            code.call(narrow, source, 0, 1, head_dim, result, 0)
        kept = code.read(job, AT_SUMS) + at * 4
        code.write(kept, 0, code.read(largest + query * 4, kind=FLOAT))
        code.write(kept + rows * tokens * heads * 4, 0, sum)
    code.end()
    return code
