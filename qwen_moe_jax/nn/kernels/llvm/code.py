"""Writing C functions in LLVM's intermediate code, in as few words as Python allows.

Addresses are int64.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from llvmlite import ir

INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()


@dataclasses.dataclass(frozen=True, eq=False)
class Int:
    """An int64 of a function that is being written."""

    code: "Code"
    value: Any

    def __add__(self, other: "Int | int") -> "Int":
        return Int(self.code, self.code.builder.add(self.value, self.code.integer(other).value))

    def __sub__(self, other: "Int | int") -> "Int":
        return Int(self.code, self.code.builder.sub(self.value, self.code.integer(other).value))

    def __mul__(self, other: "Int | int") -> "Int":
        return Int(self.code, self.code.builder.mul(self.value, self.code.integer(other).value))

    def __floordiv__(self, other: "Int | int") -> "Int":
        return Int(self.code, self.code.builder.sdiv(self.value, self.code.integer(other).value))

    def __mod__(self, other: "Int | int") -> "Int":
        return Int(self.code, self.code.builder.srem(self.value, self.code.integer(other).value))

    def __lt__(self, other: "Int | int") -> Any:
        return self.code.builder.icmp_signed("<", self.value, self.code.integer(other).value)

    def __ge__(self, other: "Int | int") -> Any:
        return self.code.builder.icmp_signed(">=", self.value, self.code.integer(other).value)

    def equals(self, other: "Int | int") -> Any:
        """Whether they are equal."""
        return self.code.builder.icmp_signed("==", self.value, self.code.integer(other).value)

    def at_most(self, other: "Int | int") -> "Int":
        """The smaller of the two."""
        other = self.code.integer(other)
        return Int(self.code, self.code.builder.select(self < other, self.value, other.value))

    def at_least(self, other: "Int | int") -> "Int":
        """The larger of the two."""
        other = self.code.integer(other)
        return Int(self.code, self.code.builder.select(self < other, other.value, self.value))


class Variable:
    """A number or vector that a function changes."""

    def __init__(self, code: "Code", kind: ir.Type, value: Any):
        self.code = code
        with code.builder.goto_entry_block():
            self._slot = code.builder.alloca(kind)
        self._kind = kind
        self.set(value)

    def get(self) -> Any:
        """Its value now."""
        value = self.code.builder.load(self._slot, typ=self._kind)
        return Int(self.code, value) if self._kind is INT64 else value

    def set(self, value: Any) -> None:
        """Changes it."""
        self.code.builder.store(value.value if isinstance(value, Int) else value, self._slot)


class Code:
    """A C function that is being written.

    Args:
        module: that it becomes part of.
        name: of the function.
        count: how many int64 it takes; it returns one.
        inner: whether only functions of the module call it.
    """

    def __init__(self, module: ir.Module, name: str, count: int, *, inner: bool = False):
        self.function = ir.Function(module, ir.FunctionType(INT64, [INT64] * count), name)
        if inner:
            self.function.linkage = "internal"
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.arguments = [Int(self, value) for value in self.function.args]

    def integer(self, number: "Int | int") -> Int:
        """A constant."""
        return number if isinstance(number, Int) else Int(self, ir.Constant(INT64, number))

    def read(self, address: Int, offset: int = 0, kind: ir.Type = INT64) -> Any:
        """What is stored at an address: an `Int` of integers of 32 and 64 bits, which are signed."""
        value = self.builder.load(self._pointer(address + offset), typ=kind, align=1)
        if kind is INT32:
            value = self.builder.sext(value, INT64)
        return Int(self, value) if kind in (INT32, INT64) else value

    def write(self, address: Int, offset: int, value: Any, kind: ir.Type = INT64) -> None:
        """Stores at an address."""
        if not isinstance(value, ir.Value):
            value = self.integer(value).value
            value = self.builder.trunc(value, kind) if kind is INT32 else value
        self.builder.store(value, self._pointer(address + offset), align=1)

    def prefetch(self, address: Int, cache: int = 1) -> None:
        """Asks for what is stored at an address, which need not exist, to be read soon into a cache: 1, 2 or 3."""
        kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), INT32, INT32, INT32])
        name = "llvm.prefetch.p0"
        function = self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)
        numbers = [ir.Constant(INT32, number) for number in (0, 4 - cache, 1)]  # to read, data
        self.builder.call(function, [self._pointer(address), *numbers])

    def add_atomically(self, address: Int, offset: int, value: int) -> Int:
        """Adds to an int64 that several threads change; what it was before."""
        place = self._pointer(address + offset)
        return Int(self, self.builder.atomic_rmw("add", place, ir.Constant(INT64, value), "seq_cst"))

    def call(self, function: "Code | Int | str", *arguments: Int | int) -> Int:
        """Calls a function of the module, of an address, or of the C library by its name."""
        values = [self.integer(argument).value for argument in arguments]
        kind = ir.FunctionType(INT64, [INT64] * len(values))
        if isinstance(function, Code):
            return Int(self, self.builder.call(function.function, values))
        if isinstance(function, Int):
            pointer = self.builder.inttoptr(function.value, kind.as_pointer())
            return Int(self, self.builder.call(pointer, values))
        known = self.builder.module.globals.get(function)
        return Int(self, self.builder.call(known or ir.Function(self.builder.module, kind, function), values))

    def address_of(self, function: "Code") -> Int:
        """The address of a function of the module."""
        return Int(self, self.builder.ptrtoint(function.function, INT64))

    def select(self, condition: Any, left: Int | int, right: Int | int) -> Int:
        """The left number if the condition holds, else the right one."""
        return Int(self, self.builder.select(condition, self.integer(left).value, self.integer(right).value))

    def when(self, condition: Any) -> contextlib.AbstractContextManager:
        """What is only done if the condition holds."""
        return self.builder.if_then(condition)

    @contextlib.contextmanager
    def count(self, stop: Int | int, start: Int | int = 0, step: int = 1) -> Iterator[Int]:
        """A loop over numbers."""
        at = Variable(self, INT64, self.integer(start))
        with self.loop() as leave_if:
            leave_if(at.get() >= stop)
            number = at.get()
            yield number
            at.set(number + step)

    @contextlib.contextmanager
    def loop(self) -> Iterator[Any]:
        """A loop that ends where it calls the function `leave_if` with a condition that holds."""
        body, after = (self.function.append_basic_block(name) for name in ("body", "after"))

        def leave_if(condition: Any) -> None:
            on = self.function.append_basic_block("on")
            self.builder.cbranch(condition, after, on)
            self.builder.position_at_end(on)

        self.builder.branch(body)
        self.builder.position_at_end(body)
        yield leave_if
        self.builder.branch(body)
        self.builder.position_at_end(after)

    def end(self, value: Int | int = 0) -> None:
        """Returns from the function."""
        self.builder.ret(self.integer(value).value)

    def _pointer(self, address: Int) -> Any:
        return self.builder.inttoptr(address.value, ir.PointerType())
