"""The text of a compiled program, line by line: arrays and instructions, as XLA writes them."""

import dataclasses
import math
import re
from collections.abc import Iterator

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
#: A TPU's layout, which has tiles, of an array in memory on the chip: any space but 0, its HBM, and 5, the host's.
_ON_CHIP = re.compile(r":.*T\(.*S\([^05]\)")
#: A layout of an array in the host's memory.
_ON_HOST = re.compile(r":.*S\(5\)")
_BYTES = {"pred": 1, "c64": 8, "c128": 16}
NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in the program's text: dtype and shape of one device's shard.

    Attributes:
        dtype: XLA's name of it: "bf16", "f32", "s32".
        shape: of one device's shard.
        on_chip: whether it is in a TPU core's own memory, so that no bandwidth is needed to read or write it.
        on_host: whether it is in the host's memory.
        layout: its axes, the one whose numbers are next to each other first; empty for the last one first.
    """

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False
    on_host: bool = False
    layout: tuple[int, ...] = ()

    @property
    def minor(self) -> int | None:
        """The axis whose numbers are next to each other in memory; None without more than one number."""
        order = self.layout or range(len(self.shape) - 1, -1, -1)
        return next((axis for axis in order if self.shape[axis] > 1), None)

    @property
    def bytes(self) -> int:
        """Bytes of the array, without the padding of a layout."""
        if self.dtype in ("token", "opaque"):
            return 0
        size = _BYTES.get(self.dtype)
        if size is None:
            bits = re.search(r"\d+", self.dtype)
            size = max(int(bits[0]) // 8, 1) if bits else 1
        return size * math.prod(self.shape)

    @property
    def traffic(self) -> int:
        """Bytes between the device's memory and the chip when it is read or written."""
        return 0 if self.on_chip or self.on_host else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a program.

    Attributes:
        name: its own.
        opcode: what it does: "dot", "all-gather-start", "fusion".
        results: the arrays it makes; more than one in a tuple.
        operands: names of the operands.
        attributes: the rest of the line.
        root: whether it is what its computation returns.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """The word or {…} list after `name=`; None without one."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found[1] if found else None

    @property
    def source(self) -> str:
        """The operation of the traced program that it comes from; may be empty."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


def whole_lines(text: str) -> Iterator[str]:
    """The lines of a program's text; an instruction whose kernel has metadata of its own is on several."""
    begun = ""
    for line in text.splitlines():
        if line.endswith("={") or (begun and not line.startswith("}")):
            begun += line
        else:
            yield begun + line
            begun = ""


def read_instruction(line: str) -> Instruction | None:
    """The instruction of a line; None where there is none."""
    left, separator, right = line.strip().partition(" = ")
    if not separator:
        return None
    root = left.startswith("ROOT ")
    name = left.removeprefix("ROOT ").lstrip("%")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    kind, rest = right[:end], right[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    start = len(opcode)
    stop = _closing(rest, start)
    if not re.fullmatch(r"[\w\-]+", opcode):
        return None
    inside = rest[start + 1 : stop]
    results = tuple(
        Array(
            dtype,
            numbers(dims),
            on_chip=_ON_CHIP.search(layout) is not None,
            on_host=_ON_HOST.search(layout) is not None,
            layout=numbers(layout.partition(":")[0]),
        )
        for dtype, dims, layout in _ARRAY.findall(kind)
    )
    # A constant's or a parameter's parentheses hold a value; it is kept with the attributes.
    attributes = f"{inside}), {rest[stop + 1 :]}" if opcode in ("constant", "parameter") else rest[stop + 1 :]
    return Instruction(name, opcode, results, tuple(NAME.findall(inside)), attributes, root)


def _closing(text: str, start: int) -> int:
    """The index at which the parenthesis that opens at `start` closes."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if depth == 0:
                return index
    return len(text)


def bare(name: str | None) -> str:
    """A name without its percent sign; empty for None."""
    return (name or "").lstrip("%")


def numbers(text: str | None) -> tuple[int, ...]:
    """The numbers in a list like `{0,1}`."""
    return tuple(int(number) for number in re.findall(r"\d+", text or ""))


def parameter_number(parameter: Instruction) -> int:
    """Which operand of its computation a parameter is."""
    return int(parameter.attributes.partition(")")[0])
