"""Documents that are longer than a row: split, truncated or dropped (`data.too_long`), and counted."""

from collections.abc import Iterable, Iterator
from typing import Literal

from train.data.chat import Turns
from train.data.sources import Record


class LengthRule:
    """Applies `data.too_long` to the documents of a source.

    Attributes:
        documents: the number of documents that were read.
        too_long: the number of those with more than `seq_len` tokens.
        longest: the tokens of the longest.
    """

    def __init__(self, rule: Literal["split", "truncate", "drop"], seq_len: int) -> None:
        self._rule, self._seq_len = rule, seq_len
        self.documents = self.too_long = self.longest = 0

    def apply(self, documents: Iterable[tuple[Record, Turns]]) -> Iterator[tuple[Record, Turns]]:
        """The documents to write. Split ones are left whole: packing continues them in the next row."""
        for record, turns in documents:
            self.documents += 1
            self.longest = max(self.longest, len(turns.ids))
            if len(turns.ids) > self._seq_len:
                self.too_long += 1
                if self._rule == "drop":
                    continue
                if self._rule == "truncate":
                    turns = Turns(turns.ids[: self._seq_len], turns.learned[: self._seq_len])
            yield record, turns

    def notes(self, source: str) -> list[str]:
        """What the start of a run says about the long documents; nothing where there are none."""
        if not self.too_long:
            return []
        done = {"split": "split over rows", "truncate": "truncated", "drop": "left out"}[self._rule]
        return [
            f"{self.too_long:,} of {self.documents:,} documents of {source} are longer than a row of {self._seq_len} "
            f"tokens (the longest has {self.longest:,}): {done} (data.too_long)"
        ]
