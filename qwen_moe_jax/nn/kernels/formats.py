"""How the numbers of a matrix are stored: what a kind of weights brings to `picked_matmul`.

Only `nn.kernels` imports this, where llvmlite is installed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from qwen_moe_jax.nn.kernels.code import FLOAT, INT16, INT32, Code, Int
from qwen_moe_jax.nn.kernels.cpu import LANES

FLOATS = ir.VectorType(FLOAT, LANES)
_BITS = ir.VectorType(INT32, LANES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How a matrix [O, I] is stored, I a multiple of `LANES`.

    Attributes:
        bits: of a number in the first array, whose rows follow one another.
        arrays: how many arrays store a stack of matrices.
        read: writes the code that reads the `LANES` numbers of one row from column `column` on, as `FLOATS`: of
            (code, the arrays' addresses, row, column, I), where rows are counted over the whole stack.
        finish: writes the code that turns the float32 sum of one row into the result, of (code, the arrays' addresses,
            row, sum, I): a scale of the whole row, for example. None leaves it as it is.
    """

    bits: int
    arrays: int = 1
    read: Callable[[Code, Sequence[Int], Int, Int, Int], Any]
    finish: Callable[[Code, Sequence[Int], Int, Any, Int], Any] | None = None


def _read_float32(code: Code, arrays: Sequence[Int], row: Int, column: Int, inputs: Int) -> Any:
    return code.read(arrays[0] + (row * inputs + column) * 4, kind=FLOATS)


def _read_bfloat16(code: Code, arrays: Sequence[Int], row: Int, column: Int, inputs: Int) -> Any:
    narrow = code.read(arrays[0] + (row * inputs + column) * 2, kind=ir.VectorType(INT16, LANES))
    bits = code.builder.shl(code.builder.zext(narrow, _BITS), ir.Constant(_BITS, [16] * LANES))
    return code.builder.bitcast(bits, FLOATS)


#: By name: where one array stores a stack, that of its dtype.
FORMATS = {"float32": Format(bits=32, read=_read_float32), "bfloat16": Format(bits=16, read=_read_bfloat16)}
