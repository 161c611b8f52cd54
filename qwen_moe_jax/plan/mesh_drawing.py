"""A mesh as SVG: devices are squares; those that share an axis with device 0 have the axis' colour and letter.

The innermost axis runs along a row, the next down the rows; a third and a fourth make blocks of them, left to right and
top to bottom. Long axes leave out their middle. `templates/mesh.svg.j2` writes what is computed here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from qwen_moe_jax.text import format_mesh
from qwen_moe_jax.web_page import render_markup

TEMPLATES = Path(__file__).parent / "templates"

# All lengths are pixels.
CELL, GAP = 24, 4
PADDING = 7  # of a block
BLOCK_GAP = 8
LABEL = 22  # height or width of an axis' name
NARROWEST = 120

#: How many positions along an axis are drawn: of a single axis, of two, within blocks, and of blocks.
ALONE, OF_TWO, WITHIN, BLOCKS = 16, 10, 5, 4


def mesh_svg(mesh: Mapping[str, int]) -> Markup:
    """The drawing. Classes `axis0`, `axis1`, … colour the axes by their order in the mesh.

    Args:
        mesh: sizes of the axes, outermost first. Of five that are larger than 1, the outermost is left out: its other
            devices are like those that are drawn.
    """
    return render_markup("mesh.svg.j2", TEMPLATES, _Layout(mesh).drawing())


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A device's square, its CSS classes, its letter and its coordinates in the mesh, in words."""

    x: int
    y: int
    kind: str
    letter: str
    title: str


@dataclass(frozen=True, kw_only=True)
class AxisName:
    """An axis' name at a line as long as the squares it names.

    Attributes:
        color: its CSS class.
        text: name and size: "expert 8".
        path: the line, with a tick at both ends, as SVG path data.
        transform: of the text, which starts at the origin: a translation, and a rotation of the axes that run down.
    """

    color: str
    text: str
    path: str
    transform: str


@dataclass(frozen=True, kw_only=True)
class MeshDrawing:
    """What `mesh.svg.j2` writes. `blocks` and `ellipses` are (x, y) of their corners and centres."""

    width: int
    height: int
    label: str
    cell_size: int
    block_size: tuple[int, int]
    blocks: tuple[tuple[int, int], ...]
    cells: tuple[Cell, ...]
    ellipses: tuple[tuple[float, float], ...]
    names: tuple[AxisName, ...]


@dataclass(frozen=True)
class _Axis:
    """One direction of the drawing. `positions` are those drawn; None where some are left out."""

    name: str
    number: int
    size: int
    positions: tuple[int | None, ...]


_ONE = _Axis("", -1, 1, (0,))


class _Layout:
    """Four directions; those that the mesh does not need have a single position."""

    def __init__(self, mesh: Mapping[str, int]) -> None:
        self.mesh = mesh
        split = [(name, number, size) for number, (name, size) in enumerate(mesh.items()) if size > 1]
        in_blocks = len(split) > 2
        limits = [WITHIN, WITHIN, BLOCKS, BLOCKS] if in_blocks else [ALONE if len(split) == 1 else OF_TWO] * 2
        axes = [_Axis(*axis, _positions(axis[2], limit)) for axis, limit in zip(reversed(split), limits, strict=False)]
        self.x, self.y, self.block_x, self.block_y = [*axes, *[_ONE] * (4 - len(axes))]
        self.padding = PADDING if in_blocks else 0
        self.block_width = _extent(self.x, CELL, GAP) + 2 * self.padding
        self.block_height = _extent(self.y, CELL, GAP) + 2 * self.padding
        # Names of the blocks' axes are above and to the left, those of the squares below and to the right. Without
        # blocks, the squares' names are above and to the left.
        self.above, self.left = (self.block_x, self.block_y) if in_blocks else (self.x, self.y)
        self.below, self.right = (self.x, self.y) if in_blocks else (_ONE, _ONE)
        self.left_at, self.top_at = LABEL * (self.left is not _ONE), LABEL * (self.above is not _ONE)
        self.right_end = self.left_at + _extent(self.block_x, self.block_width, BLOCK_GAP)
        self.bottom_end = self.top_at + _extent(self.block_y, self.block_height, BLOCK_GAP)

    def drawing(self) -> MeshDrawing:
        blocks = list(self._blocks())
        ellipses = [center for _, _, center in blocks if center is not None]
        cells: list[Cell] = []
        for (x, y), at, center in blocks:
            if center is None:
                self._add_cells(x + self.padding, y + self.padding, at, cells, ellipses)
        return MeshDrawing(
            width=max(self.right_end + LABEL * (self.right is not _ONE), NARROWEST) + 1,
            height=self.bottom_end + LABEL * (self.below is not _ONE) + 1,
            label=f"The mesh: {format_mesh(self.mesh)}",
            cell_size=CELL,
            block_size=(self.block_width, self.block_height),
            blocks=tuple(corner for corner, _, center in blocks if center is None and self.padding),
            cells=tuple(cells),
            ellipses=tuple(ellipses),
            names=tuple(self._names()),
        )

    def _blocks(self) -> Iterator[tuple[tuple[int, int], tuple[int, int], tuple[float, float] | None]]:
        """Corner and position of every block, and its centre where an ellipsis replaces it."""
        for row, block_y in enumerate(self.block_y.positions):
            for column, block_x in enumerate(self.block_x.positions):
                x = self.left_at + column * (self.block_width + BLOCK_GAP)
                y = self.top_at + row * (self.block_height + BLOCK_GAP)
                if block_x is None or block_y is None:
                    yield (x, y), (0, 0), (x + self.block_width / 2, y + self.block_height / 2)
                else:
                    yield (x, y), (block_x, block_y), None

    def _add_cells(
        self, left: int, top: int, block: tuple[int, int], cells: list[Cell], ellipses: list[tuple[float, float]]
    ) -> None:
        for row, y in enumerate(self.y.positions):
            for column, x in enumerate(self.x.positions):
                at_x, at_y = left + column * (CELL + GAP), top + row * (CELL + GAP)
                if x is None or y is None:
                    ellipses.append((at_x + CELL / 2, at_y + CELL / 2))
                    continue
                position = {self.x: x, self.y: y, self.block_x: block[0], self.block_y: block[1]}
                by_name = {axis.name: index for axis, index in position.items()}
                title = ", ".join(f"{name} {by_name.get(name, 0)}" for name in self.mesh)
                kind, letter = _kind(position)
                cells.append(Cell(x=at_x, y=at_y, kind=kind, letter=letter, title=title))

    def _names(self) -> Iterator[AxisName]:
        if self.above is not _ONE:
            yield _across(self.above, self.left_at, self.right_end, 14, 1)
        if self.left is not _ONE:
            yield _down(self.left, self.top_at, self.bottom_end, 14, 1)
        if self.below is not _ONE:
            start = self.left_at + self.padding
            yield _across(self.below, start, start + self.block_width - 2 * self.padding, self.bottom_end + 8, -1)
        if self.right is not _ONE:
            start = self.top_at + self.padding
            yield _down(self.right, start, start + self.block_height - 2 * self.padding, self.right_end + 8, -1)


def _kind(position: Mapping[_Axis, int]) -> tuple[str, str]:
    """CSS classes and letter of a square: device 0, one that differs from it in one axis, or another."""
    differing = [axis for axis, index in position.items() if index]
    if not differing:
        return "first", "0"
    if len(differing) == 1:
        return f"peer axis{differing[0].number}", differing[0].name[:1]
    return "other", ""


def _positions(size: int, limit: int) -> tuple[int | None, ...]:
    return tuple(range(size)) if size <= limit else (*range(limit - 2), None, size - 1)


def _extent(axis: _Axis, each: int, gap: int) -> int:
    return len(axis.positions) * (each + gap) - gap


def _across(axis: _Axis, start: int, end: int, y: int, side: int) -> AxisName:
    """The name of an axis that runs along the rows; `side` 1 is above the squares, -1 below."""
    line, text = (y + 3, y - 2) if side > 0 else (y - 3, y + 11)
    path = f"M{start} {line}v{4 * side}v{-4 * side}H{end}v{4 * side}"
    return _name(axis, path, f"translate({start} {text})")


def _down(axis: _Axis, start: int, end: int, x: int, side: int) -> AxisName:
    """The name of an axis that runs down the rows; `side` 1 is to the left of the squares, -1 to the right."""
    line, text = (x + 3, x - 2) if side > 0 else (x - 3, x + 11)
    path = f"M{line} {start}h{4 * side}h{-4 * side}V{end}h{4 * side}"
    return _name(axis, path, f"translate({text} {end}) rotate(-90)")


def _name(axis: _Axis, path: str, transform: str) -> AxisName:
    return AxisName(color=f"axis{axis.number}", text=f"{axis.name} {axis.size}", path=path, transform=transform)
