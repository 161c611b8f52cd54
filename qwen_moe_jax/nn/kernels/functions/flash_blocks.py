"""What the C functions of attention over whole rows share: blocks of keys, packed, and which of them a query sees."""

from typing import Any

from llvmlite import ir

from qwen_moe_jax.nn.kernels import LANES
from qwen_moe_jax.nn.kernels.functions.attention import (
    AT_KEYS,
    AT_VALUES,
    HEAD_DIM,
    KV_HEADS,
    runs,
)
from qwen_moe_jax.nn.kernels.llvm.code import INT32, Code, Int
from qwen_moe_jax.nn.kernels.llvm.tiles import Numbers, write_pack_transposed

#: Queries of a token's head, and keys, of a block.
QUERIES, KEYS = 128, 256
#: Bytes from one row of a block's scores to the next: their columns are in many sets of the cache.
SCORES = (KEYS + LANES) * 4
#: A score that is not seen, and one that is larger than any of these and smaller than any other.
UNSEEN, LOW = -1e30, -1e29

INTS = ir.VectorType(INT32, LANES)


def panels_of(width: Int | int, panel: int) -> Any:
    """How many panels hold so many columns."""
    return (width + (panel - 1)) // panel


def write_pack_keys(module: ir.Module, numbers: Numbers, panel: int, pack_rows: Code) -> Code:
    """The function of (job, row, head, first position, how many, memory of keys, of values, of [KEYS, H] numbers).

    Keys become panels of [H, count], zeros up to a multiple of `LANES`, values panels of [count, H].
    """
    pack_transposed = write_pack_transposed(module, numbers)
    code = Code(module, "pack_keys", 8, inner=True)
    job, row, head, first, count, of_keys, of_values, gathered = code.arguments
    kv_heads, head_dim = code.read(job, KV_HEADS), code.read(job, HEAD_DIM)
    size, line = head_dim * numbers.size, 4 * panel
    with runs(code, job, row, first, count) as (begin, slot, length):
        at = (slot * kv_heads + head) * size
        with code.count(length) as token:
            source = code.read(job, AT_KEYS) + at + token * kv_heads * size
            code.call("memcpy", gathered + (begin + token) * size, source, size)
        with code.count(panels_of(head_dim, panel)) as number:
            source = code.read(job, AT_VALUES) + at + number * (panel * numbers.size)
            target = of_values + (number * count + begin) * line
            columns = (head_dim - number * panel).at_most(panel)
            code.call(pack_rows, source, size * kv_heads, length, columns, target, line)
    padded = (count + (LANES - 1)) // LANES * LANES
    code.call("memset", gathered + count * size, 0, (padded - count) * size)
    with code.count(panels_of(padded, panel)) as number:
        rows = (padded - number * panel).at_most(panel)
        source, target = gathered + number * panel * size, of_keys + number * head_dim * line
        code.call(pack_transposed, source, size, rows, head_dim, target, line)
    code.end()
    return code


def broadcast_int(code: Code, number: Int) -> Any:
    """A vector of one int32."""
    narrow = code.builder.trunc(number.value, INT32)
    first = code.builder.insert_element(ir.Constant(INTS, ir.Undefined), narrow, INT32(0))
    return code.builder.shuffle_vector(first, first, ir.Constant(INTS, [0] * LANES))


class Seen:
    """Which keys of a block a query sees: those of its segment, from one number on and before another one.

    Args:
        code: the function that is being written.
        low, high: of the keys of the block.
        segment: of the query.
        segments: address of those of the block's keys.
    """

    def __init__(self, code: Code, low: Int, high: Int, segment: Int, segments: Int):
        self._code, self._segments = code, segments
        self._low, self._high, self._segment = (broadcast_int(code, number) for number in (low, high, segment))

    def at(self, index: Int) -> Any:
        """Of `LANES` keys from a number on."""
        builder = self._code.builder
        numbers = builder.add(broadcast_int(self._code, index), ir.Constant(INTS, list(range(LANES))))
        same = builder.icmp_signed("==", self._code.read(self._segments + index * 4, kind=INTS), self._segment)
        after = builder.icmp_signed(">=", numbers, self._low)
        return builder.and_(same, builder.and_(after, builder.icmp_signed("<", numbers, self._high)))
