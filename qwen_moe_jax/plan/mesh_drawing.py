"""A mesh as SVG: its devices as squares, those that share an axis with the first in the colour and letter of the axis.

The innermost axis runs along a row, the next down the rows; a third and a fourth make blocks of them, side by side and
one below the other. Long axes leave out their middle.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape

# All lengths are pixels.
CELL, GAP = 24, 4
PADDING = 7  # of a block
BLOCK_GAP = 8
LABEL = 22  # what an axis' name takes beside the squares

#: How many places along an axis are drawn: of one axis alone, of two, within blocks, and of blocks.
ALONE, OF_TWO, WITHIN, BLOCKS = 16, 10, 5, 4


def mesh_svg(mesh: Mapping[str, int]) -> str:
    """The drawing; classes `axis0`, `axis1`, … colour the axes, by their places in the mesh.

    Args:
        mesh: sizes of up to four axes, outermost first.
    """
    return _Drawing(mesh).svg()


@dataclass(frozen=True)
class _Axis:
    """One direction of the drawing. `places` are the positions drawn, None where some are left out."""

    name: str
    number: int
    size: int
    places: tuple[int | None, ...]


_ONE = _Axis("", -1, 1, (0,))


class _Drawing:
    """Four directions, those that the mesh does not need having one place."""

    def __init__(self, mesh: Mapping[str, int]) -> None:
        self.mesh = mesh
        split = [(name, number, size) for number, (name, size) in enumerate(mesh.items()) if size > 1]
        blocks = len(split) > 2
        limits = [WITHIN, WITHIN, BLOCKS, BLOCKS] if blocks else [ALONE if len(split) == 1 else OF_TWO] * 2
        axes = [_Axis(*axis, _places(axis[2], limit)) for axis, limit in zip(reversed(split), limits, strict=False)]
        self.x, self.y, self.block_x, self.block_y = [*axes, *[_ONE] * (4 - len(axes))]
        self.padding = PADDING if blocks else 0
        self.block_wide = _extent(self.x, CELL, GAP) + 2 * self.padding
        self.block_high = _extent(self.y, CELL, GAP) + 2 * self.padding
        # Names of the blocks' axes stand above and to the left of all, those of the squares on the other two sides;
        # without blocks there is room above and to the left.
        self.above, self.left = (self.block_x, self.block_y) if blocks else (self.x, self.y)
        self.below, self.right = (self.x, self.y) if blocks else (_ONE, _ONE)
        self.left_at, self.top_at = LABEL * (self.left is not _ONE), LABEL * (self.above is not _ONE)

    def svg(self) -> str:
        all_wide = _extent(self.block_x, self.block_wide, BLOCK_GAP)
        all_high = _extent(self.block_y, self.block_high, BLOCK_GAP)
        right_end, bottom_end = self.left_at + all_wide, self.top_at + all_high
        drawn = [*self._blocks()]
        if self.above is not _ONE:
            drawn.append(_across(self.above, self.left_at, self.left_at + all_wide, 14, 1))
        if self.left is not _ONE:
            drawn.append(_down(self.left, self.top_at, self.top_at + all_high, 14, 1))
        inset, first_wide, first_high = self.padding, self.block_wide, self.block_high
        if self.below is not _ONE:
            start = self.left_at + inset
            drawn.append(_across(self.below, start, start + first_wide - 2 * inset, bottom_end + 8, -1))
        if self.right is not _ONE:
            start = self.top_at + inset
            drawn.append(_down(self.right, start, start + first_high - 2 * inset, right_end + 8, -1))
        wide = max(right_end + LABEL * (self.right is not _ONE), 120) + 1
        high = bottom_end + LABEL * (self.below is not _ONE) + 1
        told = ", ".join(f"{name} {size}" for name, size in self.mesh.items())
        return (
            f'<svg class="mesh" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" role="img" '
            f'aria-label="{escape(f"The mesh: {told}")}">\n{"".join(drawn)}</svg>'
        )

    def _blocks(self) -> Iterator[str]:
        for row, block_y in enumerate(self.block_y.places):
            for column, block_x in enumerate(self.block_x.places):
                left = self.left_at + column * (self.block_wide + BLOCK_GAP)
                top = self.top_at + row * (self.block_high + BLOCK_GAP)
                if block_x is None or block_y is None:
                    middle_x, middle_y = left + self.block_wide / 2, top + self.block_high / 2
                    yield f'<text class="more" x="{middle_x:g}" y="{middle_y + 4:g}">…</text>'
                    continue
                if self.padding:
                    yield (
                        f'<rect class="block" x="{left}.5" y="{top}.5" width="{self.block_wide}" '
                        f'height="{self.block_high}" rx="6"/>'
                    )
                yield from self._cells(left + self.padding, top + self.padding, block_x, block_y)

    def _cells(self, left: int, top: int, block_x: int, block_y: int) -> Iterator[str]:
        for row, y in enumerate(self.y.places):
            for column, x in enumerate(self.x.places):
                at_x, at_y = left + column * (CELL + GAP), top + row * (CELL + GAP)
                middle = f'x="{at_x + CELL / 2:g}" y="{at_y + CELL / 2 + 4:g}"'
                if x is None or y is None:
                    yield f'<text class="more" {middle}>…</text>'
                    continue
                kind, letter = self._kind({self.x: x, self.y: y, self.block_x: block_x, self.block_y: block_y})
                where = {self.x.name: x, self.y.name: y, self.block_x.name: block_x, self.block_y.name: block_y}
                told = ", ".join(f"{name} {where.get(name, 0)}" for name in self.mesh)
                box = f'<rect class="{kind}" x="{at_x}" y="{at_y}" width="{CELL}" height="{CELL}" rx="4"/>'
                mark = f"<text {middle}>{letter}</text>" if letter else ""
                yield f"<g><title>{escape(told)}</title>{box}{mark}</g>\n"

    def _kind(self, at: Mapping[_Axis, int]) -> tuple[str, str]:
        """Class and letter of a square: the first device, one that shares a line with it, or another."""
        away = [axis for axis, place in at.items() if place]
        if not away:
            return "first", "0"
        if len(away) == 1:
            return f"peer axis{away[0].number}", escape(away[0].name[:1])
        return "other", ""


def _places(size: int, limit: int) -> tuple[int | None, ...]:
    return tuple(range(size)) if size <= limit else (*range(limit - 2), None, size - 1)


def _extent(axis: _Axis, each: int, gap: int) -> int:
    return len(axis.places) * (each + gap) - gap


def _across(axis: _Axis, start: int, end: int, y: int, side: int) -> str:
    """An axis' name over a line as long as the squares it names; `side` 1 stands above them, -1 below."""
    line, text = (y + 3, y - 2) if side > 0 else (y - 3, y + 11)
    return (
        f'<g class="name axis{axis.number}"><path d="M{start} {line}v{4 * side}v{-4 * side}H{end}v{4 * side}"/>'
        f'<text x="{start}" y="{text}">{escape(axis.name)} {axis.size}</text></g>\n'
    )


def _down(axis: _Axis, start: int, end: int, x: int, side: int) -> str:
    """The same for the axis that runs down; `side` 1 stands to the left."""
    line, text = (x + 3, x - 2) if side > 0 else (x - 3, x + 11)
    return (
        f'<g class="name axis{axis.number}"><path d="M{line} {start}h{4 * side}h{-4 * side}V{end}h{4 * side}"/>'
        f'<text transform="translate({text} {end}) rotate(-90)">{escape(axis.name)} {axis.size}</text></g>\n'
    )
