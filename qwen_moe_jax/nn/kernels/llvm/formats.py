"""How the numbers of a matrix are stored: what a kind of weights brings to `picked_matmul`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from qwen_moe_jax.nn.kernels import LANES
from qwen_moe_jax.nn.kernels.llvm.code import FLOAT, INT8, INT16, INT32, Code, Int

FLOATS = ir.VectorType(FLOAT, LANES)
_BITS = ir.VectorType(INT32, LANES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How a matrix [O, I] is stored, I a multiple of `LANES`.

    Attributes:
        bits: of a number in the first array.
        arrays: how many arrays store a stack of matrices.
        read: writes the code that reads the `LANES` numbers of one row from column `column` on, as `FLOATS`: of
            (code, the arrays' addresses, row, column, I, O), where rows are counted over the whole stack.
        finish: writes the code that turns the float32 sum of one row into the result, of (code, the arrays' addresses,
            row, sum, I): a scale of the whole row, for example. None leaves it as it is.
        strided: whether the last of the arrays' addresses is not one, but the distance from one row of the first array
            to the next, in numbers. Otherwise they follow one another.
    """

    bits: int
    arrays: int = 1
    read: Callable[[Code, Sequence[Int], Int, Int, Int, Int], Any]
    finish: Callable[[Code, Sequence[Int], Int, Any, Int], Any] | None = None
    strided: bool = False

    def as_strided(self) -> "Format":
        """The same numbers in rows that do not follow one another, of a format of one array."""

        def read(code: Code, arrays: Sequence[Int], row: Int, column: Int, inputs: Int, outputs: Int) -> Any:
            return self.read(code, arrays[:1], row, column, arrays[1], outputs)

        return dataclasses.replace(self, arrays=2, read=read, strided=True)


def _read_float32(code: Code, arrays: Sequence[Int], row: Int, column: Int, inputs: Int, outputs: Int) -> Any:
    return code.read(arrays[0] + (row * inputs + column) * 4, kind=FLOATS)


def _read_bfloat16(code: Code, arrays: Sequence[Int], row: Int, column: Int, inputs: Int, outputs: Int) -> Any:
    narrow = code.read(arrays[0] + (row * inputs + column) * 2, kind=ir.VectorType(INT16, LANES))
    bits = code.builder.shl(code.builder.zext(narrow, _BITS), ir.Constant(_BITS, [16] * LANES))
    return code.builder.bitcast(bits, FLOATS)


def _read_int8(code: Code, arrays: Sequence[Int], row: Int, column: Int, inputs: Int, outputs: Int) -> Any:
    narrow = code.read(arrays[0] + row * inputs + column, kind=ir.VectorType(INT8, LANES))
    return code.builder.sitofp(code.builder.sext(narrow, _BITS), FLOATS)


def _scale_int8(code: Code, arrays: Sequence[Int], row: Int, sum: Any, inputs: Int) -> Any:
    return code.builder.fmul(sum, code.read(arrays[1] + row * 4, kind=FLOAT))


def _read_int4(group: int) -> Callable[[Code, Sequence[Int], Int, Int, Int, Int], Any]:
    """`read` of int4 with a scale for every `group` inputs, as `nn.quantised` packs them."""

    def read(code: Code, arrays: Sequence[Int], row: Int, column: Int, inputs: Int, outputs: Int) -> Any:
        half = ir.VectorType(INT8, LANES // 2)
        packed = code.read(arrays[0] + (row * inputs + column) // 2, kind=half)
        low = code.builder.and_(packed, ir.Constant(half, [15] * (LANES // 2)))
        high = code.builder.lshr(packed, ir.Constant(half, [4] * (LANES // 2)))
        order = ir.Constant(ir.VectorType(INT32, LANES), list(range(LANES)))
        numbers = code.builder.zext(code.builder.shuffle_vector(low, high, order), _BITS)
        numbers = code.builder.sub(numbers, ir.Constant(_BITS, [8] * LANES))
        at = (row // outputs * (inputs // group) + column // group) * outputs + row % outputs
        bits = code.builder.shl(code.builder.zext(code.read(arrays[1] + at * 2, kind=INT16), INT32), INT32(16))
        scale = code.builder.bitcast(bits, FLOAT)
        first = code.builder.insert_element(ir.Constant(FLOATS, ir.Undefined), scale, INT32(0))
        scales = code.builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(INT32, LANES), [0] * LANES))
        return code.builder.fmul(code.builder.sitofp(numbers, FLOATS), scales)

    return read


#: By name: where one array stores a stack, that of its dtype; int4 with the size of its groups.
FORMATS = {
    "float32": Format(bits=32, read=_read_float32),
    "bfloat16": Format(bits=16, read=_read_bfloat16),
    "int8": Format(bits=8, arrays=2, read=_read_int8, finish=_scale_int8),
    **{f"int4_{group}": Format(bits=4, arrays=2, read=_read_int4(group)) for group in (16, 32, 64, 128, 256)},
}
