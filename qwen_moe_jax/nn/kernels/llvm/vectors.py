"""Functions of vectors of `LANES` floats in C functions: exponentials, sums and largest numbers."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from qwen_moe_jax.nn.kernels import LANES
from qwen_moe_jax.nn.kernels.llvm.code import INT32, Code
from qwen_moe_jax.nn.kernels.llvm.formats import FLOATS

_INTEGERS = ir.VectorType(INT32, LANES)
#: Below this, exp is 0 here: the result would be no normal number.
_LOWEST = -87.0
#: 2^23 + 2^22: added to a small number, it leaves its nearest integer in the low bits.
_ROUNDING = 12582912.0
#: Of exp on [-log(2) / 2, log(2) / 2], from Cephes' expf: exp(r) = 1 + r + r^2 p(r).
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
#: log(2) in two parts, the first of which has few bits.
_LOG2_HIGH, _LOG2_LOW = 0.693359375, -2.12194440e-4


def constant(number: float) -> Any:
    """A vector of one number."""
    return ir.Constant(FLOATS, [number] * LANES)


def broadcast(code: Code, number: Any) -> Any:
    """A vector of one float."""
    first = code.builder.insert_element(ir.Constant(FLOATS, ir.Undefined), number, INT32(0))
    return code.builder.shuffle_vector(first, first, ir.Constant(_INTEGERS, [0] * LANES))


def multiply_add(code: Code, left: Any, right: Any, more: Any) -> Any:
    """`left * right + more`, rounded once where the processor can."""
    return code.builder.fadd(code.builder.fmul(left, right, flags=["contract"]), more, flags=["contract"])


def larger(code: Code, left: Any, right: Any) -> Any:
    """The larger number of each pair."""
    return code.builder.select(code.builder.fcmp_ordered(">", left, right), left, right)


def exp(code: Code, x: Any) -> Any:
    """The exponential of numbers up to 88, to about the last bit; 0 below -87."""
    builder = code.builder
    bounded = larger(code, x, constant(_LOWEST))
    shifted = multiply_add(code, bounded, constant(1.44269504088896341), constant(_ROUNDING))
    power = builder.fsub(shifted, constant(_ROUNDING))
    rest = multiply_add(code, power, constant(-_LOG2_HIGH), bounded)
    rest = multiply_add(code, power, constant(-_LOG2_LOW), rest)
    sum = constant(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        sum = multiply_add(code, sum, rest, constant(coefficient))
    sum = builder.fadd(multiply_add(code, builder.fmul(rest, rest), sum, rest), constant(1.0))
    # 2^power: an exponent in its bits.
    bits = builder.sub(builder.bitcast(shifted, _INTEGERS), builder.bitcast(constant(_ROUNDING), _INTEGERS))
    bits = builder.shl(builder.add(bits, ir.Constant(_INTEGERS, [127] * LANES)), ir.Constant(_INTEGERS, [23] * LANES))
    result = builder.fmul(sum, builder.bitcast(bits, FLOATS))
    return builder.select(builder.fcmp_ordered("<", x, constant(_LOWEST)), constant(0.0), result)


def silu(code: Code, x: Any) -> Any:
    """`x / (1 + exp(-x))`."""
    negative = code.builder.fsub(constant(0.0), x)
    smaller = code.builder.fcmp_ordered("<", negative, constant(88.0))
    bounded = code.builder.select(smaller, negative, constant(88.0))
    return code.builder.fdiv(x, code.builder.fadd(constant(1.0), exp(code, bounded)))


def folded(code: Code, vector: Any, join: Callable[[Code, Any, Any], Any]) -> Any:
    """One float of a vector's numbers, which `join` joins pair by pair."""
    length = LANES
    while length > 1:
        length //= 2
        index = ir.Constant(_INTEGERS, [(lane + length) % LANES for lane in range(LANES)])
        vector = join(code, vector, code.builder.shuffle_vector(vector, vector, index))
    return code.builder.extract_element(vector, INT32(0))


def added(code: Code, left: Any, right: Any) -> Any:
    """The sum of each pair."""
    return code.builder.fadd(left, right)
