"""The C function of the gradients of attention over whole rows, `attention_kernels.flash_cpu`.

A chunk is a row and a key/value head. Blocks of keys meet the blocks of queries that see them, in all query heads that
share the head: their weights are computed again from the logarithms of the queries' sums, and the gradients of keys and
values are summed over the queries, those of queries over the keys. Source: Dao, arXiv 2307.08691.

Letters of this file besides the package's: G query heads of a key/value head.
"""

import itertools
from typing import NamedTuple

from llvmlite import ir

from qwen_moe_jax.nn.kernels import LANES
from qwen_moe_jax.nn.kernels.functions.attention import HEAD_DIM, HEADS, KV_HEADS, THREADS, TOKENS, WINDOW
from qwen_moe_jax.nn.kernels.functions.flash import AT_SEGMENTS, FACTOR, LAST, segment_of, visible, write_segments
from qwen_moe_jax.nn.kernels.functions.flash_blocks import KEYS, SCORES, Seen, panels_of
from qwen_moe_jax.nn.kernels.llvm.call import CHUNKS, DONE, NEXT, Operands, write_handler
from qwen_moe_jax.nn.kernels.llvm.code import FLOAT, INT32, Code, Int
from qwen_moe_jax.nn.kernels.llvm.formats import FLOATS
from qwen_moe_jax.nn.kernels.llvm.tiles import (
    Numbers,
    write_narrow,
    write_pack_rows,
    write_pack_transposed,
    write_tiles,
)
from qwen_moe_jax.nn.kernels.llvm.vectors import broadcast, constant, exp

#: Arguments of the call: queries and the gradients of their results [B, T, N, H]; keys and values [B, T, K, H], all of
#: one dtype; of each query how much its weights would grow together, and the logarithm of its sum, float32 [B, T, N];
#: segments int32 [B, T]; the sliding window or 0, int32 [1]; the factor of scores float32 [1].
#: Results: the gradients of queries, keys and values.
QUERIES, GRADIENT, KEYS_, VALUES, TOGETHER, LOGSUMEXP, SEGMENTS, NUMBERS, SCALE = range(9)
#: Fields of a job after those of `flash`: addresses of the arguments and of the results.
ADDRESSES = range(LAST, LAST + 48, 8)
OF_QUERIES, OF_KEYS, OF_VALUES = range(LAST + 48, LAST + 72, 8)

#: Queries of a token's head, of a block.
BLOCK = 64


class Memory(NamedTuple):
    """Addresses of a chunk's memory.

    Attributes:
        keys, values: of a block, transposed; key_rows: keys as they are; gathered: either as they are stored.
        segments: of the keys of a block, int32.
        queries, gradient: of a block of queries, as panels.
        query_rows, gradient_rows: the same row by row, where those in memory are not float32.
        weights, of_scores: [BLOCK, KEYS].
        of_keys, of_values: of a block; of_queries [G, T, H].
        end: of all.
    """

    keys: Int
    values: Int
    key_rows: Int
    gathered: Int
    segments: Int
    queries: Int
    gradient: Int
    query_rows: Int
    gradient_rows: Int
    weights: Int
    of_scores: Int
    of_keys: Int
    of_values: Int
    of_queries: Int
    end: Int

    @classmethod
    def of(cls, begin: Int, job: Int, numbers: Numbers, panel: int) -> "Memory":
        """From an address on."""
        code = begin.code
        heads, kv_heads, tokens, head_dim = (code.read(job, field) for field in (HEADS, KV_HEADS, TOKENS, HEAD_DIM))
        padded = panels_of(head_dim, panel) * panel
        block, rows = padded * (BLOCK * 4), padded * (BLOCK * 4 if numbers.widened else 0)
        sizes = [
            head_dim * (KEYS * 4), head_dim * (KEYS * 4), padded * (KEYS * 4), head_dim * (KEYS * numbers.size),
            KEYS * 4, block, block, rows, rows, BLOCK * SCORES, BLOCK * SCORES, head_dim * (KEYS * 4),
            head_dim * (KEYS * 4), heads // kv_heads * tokens * head_dim * 4,
        ]  # fmt: skip
        return cls(*itertools.accumulate(sizes, initial=begin))


def write_flash_gradients(module: ir.Module, numbers: Numbers, height: int, vectors: int, name: str) -> None:
    """Writes the function `name` for numbers of a kind, by tiles of `height` rows and `vectors` vectors."""
    write_handler(module, _write_make_job(module), _write_run_chunk(module, numbers, height, vectors), name, THREADS)


def _write_make_job(module: ir.Module) -> Code:
    code = Code(module, "make_job", 1, inner=True)
    operands = Operands(code)
    data, dimension = operands.data, operands.dimension
    arguments = [operands.argument(number) for number in range(9)]
    job = code.call("malloc", OF_VALUES + 8)
    for field, argument in zip(ADDRESSES, range(6), strict=True):
        code.write(job, field, data(arguments[argument]))
    for number, field in enumerate((OF_QUERIES, OF_KEYS, OF_VALUES)):
        code.write(job, field, data(operands.result(number)))
    queries, keys = arguments[QUERIES], arguments[KEYS_]
    chunks = dimension(queries, 0) * dimension(keys, 2)
    for field, value in (
        (AT_SEGMENTS, data(arguments[SEGMENTS])), (TOKENS, dimension(queries, 1)), (HEADS, dimension(queries, 2)),
        (KV_HEADS, dimension(keys, 2)), (HEAD_DIM, dimension(keys, 3)),
        (WINDOW, code.read(data(arguments[NUMBERS]), kind=INT32)), (NEXT, 0), (DONE, 0), (CHUNKS, chunks),
        (THREADS, chunks),
    ):  # fmt: skip
        code.write(job, field, value)
    code.write(job, FACTOR, code.read(data(arguments[SCALE]), kind=FLOAT))
    code.end(job)
    return code


def _write_run_chunk(module: ir.Module, numbers: Numbers, height: int, vectors: int) -> Code:
    """The gradients of a row and a key/value head."""
    panel = vectors * LANES
    pack_rows = write_pack_rows(module, numbers)
    pack, store = _write_pack_block(module, numbers, panel, pack_rows), _write_store(module, numbers)
    meet = _write_meet(module, numbers, height, vectors, pack_rows)
    code = Code(module, "run_chunk", 2, inner=True)
    job, chunk = code.arguments
    kv_heads, tokens, head_dim, heads, window = (
        code.read(job, field) for field in (KV_HEADS, TOKENS, HEAD_DIM, HEADS, WINDOW)
    )
    row, head, group = chunk // kv_heads, chunk % kv_heads, heads // kv_heads
    allocated = code.call("malloc", Memory.of(code.integer(0), job, numbers, panel).end + 64)
    memory = Memory.of((allocated + 63) // 64 * 64, job, numbers, panel)
    code.call("memset", memory.of_queries, 0, memory.end - memory.of_queries)
    with code.count(tokens, step=KEYS) as key:
        keys = (tokens - key).at_most(KEYS)
        at = ((row * tokens + key) * kv_heads + head) * head_dim * numbers.size
        for field, transposed, rows in (
            (ADDRESSES[KEYS_], memory.keys, memory.key_rows),
            (ADDRESSES[VALUES], memory.values, code.integer(0)),
        ):
            code.call(pack, job, code.read(job, field) + at, keys, transposed, rows, memory.gathered)
        write_segments(code, job, row, key, keys, memory.segments)
        code.call("memset", memory.of_keys, 0, memory.of_queries - memory.of_keys)
        last = code.select(window >= 1, (key + keys + window - 1).at_most(tokens), tokens)
        with code.count(last, key // BLOCK * BLOCK, BLOCK) as query, code.count(group) as member:
            code.call(meet, job, row, head * group + member, member, query, key, keys, memory.keys)
        for field, source in ((OF_KEYS, memory.of_keys), (OF_VALUES, memory.of_values)):
            code.call(store, source, keys, head_dim, code.read(job, field) + at, kv_heads)
    with code.count(group) as member:
        at = (row * tokens * heads + head * group + member) * head_dim * numbers.size
        source = memory.of_queries + member * tokens * head_dim * 4
        code.call(store, source, tokens, head_dim, code.read(job, OF_QUERIES) + at, heads)
    code.call("free", allocated)
    code.end()
    return code


def _write_pack_block(module: ir.Module, numbers: Numbers, panel: int, pack_rows: Code) -> Code:
    """The function of (job, keys or values of a head, how many, memory for panels of [H, count] of them, for panels of
    [count, H] or 0, for [KEYS, H] numbers).
    """
    pack_transposed, line = write_pack_transposed(module, numbers), 4 * panel
    code = Code(module, "pack_block", 6, inner=True)
    job, source, count, transposed, as_rows, gathered = code.arguments
    head_dim = code.read(job, HEAD_DIM)
    size = head_dim * numbers.size
    stride, padded = size * code.read(job, KV_HEADS), (count + (LANES - 1)) // LANES * LANES
    with code.count(count) as token:
        code.call("memcpy", gathered + token * size, source + token * stride, size)
    code.call("memset", gathered + count * size, 0, (padded - count) * size)
    with code.count(panels_of(padded, panel)) as number:
        rows = (padded - number * panel).at_most(panel)
        target = transposed + number * head_dim * line
        code.call(pack_transposed, gathered + number * panel * size, size, rows, head_dim, target, line)
    with code.when(as_rows >= 1), code.count(panels_of(head_dim, panel)) as number:
        columns, target = (head_dim - number * panel).at_most(panel), as_rows + number * count * line
        code.call(pack_rows, gathered + number * (panel * numbers.size), size, count, columns, target, line)
    code.end()
    return code


def _write_meet(module: ir.Module, numbers: Numbers, height: int, vectors: int, pack_rows: Code) -> Code:
    """The function of (job, row, head, which of the group's heads, first query, first key, how many, memory): a block
    of queries of one head meets a block of keys.
    """
    panel, line = vectors * LANES, 4 * vectors * LANES
    by_query, by_key = (
        write_tiles(module, Numbers(4), "rows", height, vectors),
        write_tiles(module, Numbers(4), "columns", height, vectors),
    )
    weigh, sum_keys = _write_weigh(module), _write_sum_keys(module, by_key, height, panel)
    code = Code(module, "meet", 8, inner=True)
    job, row, head, member, begin, key, keys, begin_memory = code.arguments
    memory = Memory.of(begin_memory, job, numbers, panel)
    tokens, heads, head_dim = (code.read(job, field) for field in (TOKENS, HEADS, HEAD_DIM))
    count = (tokens - begin).at_most(BLOCK)
    at_head = (row * tokens + begin) * heads + head
    lefts, stride = [], heads * head_dim * numbers.size
    for field, panels, rows in (
        (ADDRESSES[QUERIES], memory.queries, memory.query_rows),
        (ADDRESSES[GRADIENT], memory.gradient, memory.gradient_rows),
    ):
        source = code.read(job, field) + at_head * head_dim * numbers.size
        with code.count(panels_of(head_dim, panel)) as number:
            columns, target = (head_dim - number * panel).at_most(panel), panels + number * count * line
            code.call(pack_rows, source + number * (panel * numbers.size), stride, count, columns, target, line)
        if numbers.widened:
            code.call(pack_rows, source, stride, count, head_dim, rows, head_dim * 4)
        lefts.append(rows if numbers.widened else source)
    stride = head_dim * 4 if numbers.widened else stride
    from_key, to_key = visible(code, job, begin, begin + count - 1, key, keys)
    from_key = from_key // panel * panel
    tile_count = (count + (height - 1)) // height
    high = (count + tile_count - 1) // tile_count
    with code.count(tile_count) as tile:
        query = tile * high
        some, at = high.at_most(count - query), begin + query
        low, end = visible(code, job, at, at + some - 1, key, keys)
        low = low // panel * panel
        padded = (end + (LANES - 1)) // LANES * LANES
        for scores in (memory.weights, memory.of_scores):  # what no query of the tile sees
            with code.count(some) as index:
                line_of_query = scores + (query + index) * SCORES
                before, after = low.at_most(to_key), padded.at_least(from_key).at_most(KEYS)
                code.call("memset", line_of_query + from_key * 4, 0, (before - from_key).at_least(0) * 4)
                code.call("memset", line_of_query + after * 4, 0, (to_key - after).at_least(0) * 4)
        with code.when(low < end):
            with code.count(panels_of(padded, panel), low // panel) as number:
                for left, panels, scores in (
                    (lefts[0], memory.keys, memory.weights), (lefts[1], memory.values, memory.of_scores),
                ):  # fmt: skip
                    code.call(
                        by_query, left + query * stride, stride, panels + number * head_dim * line, head_dim,
                        scores + query * SCORES + number * line, SCORES, padded - number * panel, 0, some,
                    )  # fmt: skip
            with code.count(some) as index:
                first, most = visible(code, job, at + index, at + index, key, keys)
                of_query = (at_head + (query + index) * heads) * 4
                code.call(
                    weigh, job, memory.weights + (query + index) * SCORES,
                    memory.of_scores + (query + index) * SCORES, low, padded, first, most, memory.segments,
                    segment_of(code, job, row, at + index), code.read(job, ADDRESSES[LOGSUMEXP]) + of_query,
                    code.read(job, ADDRESSES[TOGETHER]) + of_query,
                )  # fmt: skip
            with code.count(panels_of(head_dim, panel)) as number:
                result = memory.of_queries + (member * tokens + at) * head_dim * 4 + number * line
                code.call(
                    by_query, memory.of_scores + query * SCORES + low * 4, SCORES,
                    memory.key_rows + (number * keys + low) * line, end - low, result, head_dim * 4,
                    head_dim - number * panel, 1, some,
                )  # fmt: skip
    for scores, panels, sums in (
        (memory.weights, memory.gradient, memory.of_values), (memory.of_scores, memory.queries, memory.of_keys),
    ):  # fmt: skip
        code.call(sum_keys, job, scores, panels, sums, begin, count, key, from_key, to_key)
    code.end()
    return code


def _write_sum_keys(module: ir.Module, by_key: Code, height: int, panel: int) -> Code:
    """The function of (job, scores [BLOCK, KEYS], panels of the queries, sums, first query, how many, position of the
    first key, the first key of the block, that after the last): scores^T times what the queries have is added.
    """
    line = 4 * panel
    code = Code(module, "sum_keys", 9, inner=True)
    job, scores, panels, sums, begin, count, key, from_key, to_key = code.arguments
    head_dim, window = code.read(job, HEAD_DIM), code.read(job, WINDOW)
    keys = to_key - from_key
    tile_count = (keys + (height - 1)) // height
    high = (keys + tile_count - 1) // tile_count.at_least(1)
    with code.count(tile_count) as tile:
        at = from_key + tile * high
        some = high.at_most(to_key - at)
        low = (key + at - begin).at_least(0)
        end = code.select(window >= 1, (key + at + some - 1 + window - begin).at_most(count), count)
        with code.when(low < end), code.count(panels_of(head_dim, panel)) as number:
            code.call(
                by_key, scores + low * SCORES + at * 4, SCORES, panels + (number * count + low) * line, end - low,
                sums + at * head_dim * 4 + number * line, head_dim * 4, head_dim - number * panel, 1, some,
            )  # fmt: skip
    code.end()
    return code


def _write_weigh(module: ir.Module) -> Code:
    """The function of (job, scores of a query, gradients of its weights, the first, that after the last, the first that
    is seen, that after the last, segments of the keys, that of the query, address of the logarithm of its sum, of what
    its weights would grow together): they become weights, and gradients of the scores.
    """
    code = Code(module, "weigh", 11, inner=True)
    job, scores, gradients, begin, end, low, high, segments, segment, at_logsumexp, at_together = code.arguments
    builder = code.builder
    factor, logsumexp, together = (
        broadcast(code, code.read(address, kind=FLOAT)) for address in (job + FACTOR, at_logsumexp, at_together)
    )
    seen, zeros = Seen(code, low, high, segment, segments), constant(0.0)
    with code.count(end, begin, LANES) as index:
        score = builder.fmul(code.read(scores + index * 4, kind=FLOATS), factor)
        weight = builder.select(seen.at(index), exp(code, builder.fsub(score, logsumexp)), zeros)
        more = builder.fsub(code.read(gradients + index * 4, kind=FLOATS), together)
        code.write(scores + index * 4, 0, weight)
        code.write(gradients + index * 4, 0, builder.fmul(builder.fmul(weight, more), factor))
    code.end()
    return code


def _write_store(module: ir.Module, numbers: Numbers) -> Code:
    """The function of (sums float32 [count, H], count, H, where the first belongs, heads of the result)."""
    narrow = write_narrow(module) if numbers.widened else None
    code = Code(module, "store", 5, inner=True)
    source, count, head_dim, target, heads = code.arguments
    stride = heads * head_dim * numbers.size
    if narrow is not None:
        code.call(narrow, source, head_dim * 4, count, head_dim, target, stride)
    else:
        with code.count(count) as row:
            code.call("memcpy", target + row * stride, source + row * head_dim * 4, head_dim * 4)
    code.end()
    return code
