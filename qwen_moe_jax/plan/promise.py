"""The order in which a search compiles its drafts, and why it does not compile the others.

Per mesh, only settings are left that no others of the mesh beat in time and memory. The first compilations go to
meshes, each under its most promising settings; the last third to further settings of the best of them, whose plan says
how far the arithmetic was from the compiler's memory.
"""

import dataclasses
from collections.abc import Sequence

from qwen_moe_jax.plan.draft import Draft
from qwen_moe_jax.plan.result import Plan
from qwen_moe_jax.plan.settings import format_settings
from qwen_moe_jax.units import format_bytes

#: Why a draft was not compiled; a colon and the numbers follow.
BEATEN = "no faster and no smaller than other settings of the mesh"
TOO_LARGE = "does not fit"
SLOWER = "less promising"


class Waiting:
    """The drafts that may be compiled.

    Attributes:
        drafts: those that are left, the most promising first.
    """

    def __init__(self, drafts: Sequence[Draft], keep: int):
        """All drafts of a search, the most promising first, of which `keep` will be compiled."""
        self.drafts, self._beaten = unbeaten(drafts)
        firsts: dict[tuple[int, ...], Draft] = {}
        for draft in self.drafts:
            firsts.setdefault(_mesh(draft), draft)
        self._firsts = in_turns(list(firsts.values()))
        self._for_meshes = keep - (keep // 3 if len(firsts) < len(self.drafts) else 0)

    def take(self, compiled: Sequence[tuple[Draft, Plan]]) -> Draft:
        """The next one to compile; `compiled` are those that were, the best first."""
        draft = None
        if len(compiled) >= self._for_meshes or not self._firsts:
            draft = self._variant(*compiled[0]) if compiled else None
        draft = draft or (self._firsts[0] if self._firsts else self.drafts[0])
        self.drafts = [other for other in self.drafts if other is not draft]
        self._firsts = [other for other in self._firsts if other is not draft]
        return draft

    def _variant(self, best: Draft, plan: Plan) -> Draft | None:
        """The most promising settings of the best mesh that are left, with the memory that its plan lets expect."""
        others = [draft for draft in self.drafts if _mesh(draft) == _mesh(best)]
        found = plan.memory.total
        ratio = 1.0 if found is None else max(found - best.arguments, 0) / max(best.workspace, 1)

        def corrected(draft: Draft) -> Draft:
            return dataclasses.replace(draft, workspace=round(draft.workspace * ratio))

        nearest = min(others, key=lambda draft: promise(corrected(draft)), default=None)
        if nearest is None or (plan.memory.fits and corrected(nearest).fits is False):
            return None
        return nearest

    def left(self, best: Draft) -> list[tuple[Draft, str]]:
        """Those that were not compiled, with the reason."""
        return [*((draft, _reason(draft, best)) for draft in sorted(self.drafts, key=promise)), *self._beaten]


def promise(draft: Draft) -> tuple[float, ...]:
    """A key by which the most promising drafts come first."""
    if draft.fits is False:
        return (1, draft.total)
    return (0, _time(draft), draft.total)


def unbeaten(drafts: Sequence[Draft]) -> tuple[list[Draft], list[tuple[Draft, str]]]:
    """Drafts that no other of their mesh beats in time and memory, in their order, and the others with the reason."""
    of_mesh: dict[tuple[int, ...], list[Draft]] = {}
    for draft in drafts:
        of_mesh.setdefault(_mesh(draft), []).append(draft)
    reasons: dict[int, str] = {}
    for alike in of_mesh.values():
        smallest: Draft | None = None
        for draft in sorted(alike, key=lambda one: (_time(one), one.total)):
            if smallest is not None and smallest.total <= draft.total:
                reasons[id(draft)] = f"{BEATEN}: {format_settings(smallest.settings)}"
            else:
                smallest = draft
    left = [draft for draft in drafts if id(draft) not in reasons]
    return left, [(draft, reasons[id(draft)]) for draft in drafts if id(draft) in reasons]


def in_turns(drafts: Sequence[Draft], at_once: int = 2) -> list[Draft]:
    """Drafts in the order to compile them: the best two of each form, then the next two.

    Meshes that split the same axes are of one form. The formulas err about them in the same way, so that one error
    could otherwise choose all that are compiled.

    Args:
        drafts: the most promising first.
        at_once: how many of a form before the next form.
    """
    seen: dict[tuple[str, ...], int] = {}
    turns = []
    for draft in drafts:
        form = tuple(axis for axis, size in draft.mesh.items() if size > 1)
        # Drafts that may not fit come last.
        turns.append((draft.fits is False, seen.get(form, 0) // at_once))
        seen[form] = seen.get(form, 0) + 1
    return [draft for _, draft in sorted(zip(turns, drafts, strict=True), key=lambda item: item[0])]


def _mesh(draft: Draft) -> tuple[int, ...]:
    return tuple(draft.mesh.values())


def _time(draft: Draft) -> float:
    """Seconds or, where there are none, bytes sent."""
    return draft.sent if draft.seconds is None else draft.seconds


def _reason(draft: Draft, best: Draft) -> str:
    if draft.fits is False:
        return f"{TOO_LARGE}: about {format_bytes(draft.total)} of {format_bytes(draft.available)}"
    if not _time(best):
        return f"{SLOWER}: sends about {format_bytes(draft.sent)}"
    of_what = "bytes sent" if draft.seconds is None else "seconds"
    return f"{SLOWER}: about {_time(draft) / _time(best):.2f} times the estimated {of_what} of the best"
