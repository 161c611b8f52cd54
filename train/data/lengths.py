"""Documents that are longer than a row: split, truncated or dropped (`data.too_long`), and counted."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from train.data.chat import Example


def position_notes(seq_len: int, positions: int) -> list[str]:
    """What the start of a run says about rows of more tokens than the model's config has positions."""
    if seq_len <= positions:
        return []
    return [
        f"rows have up to {seq_len:,} tokens (data.seq_len), more than the {positions:,} positions of the model's "
        "config (max_position_embeddings), which the exported model keeps: raise it there for a model of longer rows"
    ]


#: What a `LengthRule` counts.
_COUNTS = ("documents", "too_long", "longest", "unanswered")


class LengthRule:
    """Applies `data.too_long` to the documents of a source.

    Attributes:
        documents: the number of documents that were read.
        too_long: the number of those with more than `seq_len` tokens.
        longest: the tokens of the longest.
        unanswered: the number of those of examples that truncation left with nothing to learn.
    """

    def __init__(self, rule: Literal["split", "truncate", "drop"], seq_len: int, *, whole: bool = False) -> None:
        """`whole`: documents stay in one row, so that they are truncated where they would be split."""
        self._rule, self._seq_len = "truncate" if whole and rule == "split" else rule, seq_len
        self.documents = self.too_long = self.longest = self.unanswered = 0

    @property
    def longest_kept(self) -> int | None:
        """The tokens of the longest document that is kept whole; None: of any length."""
        return None if self._rule == "split" else self._seq_len

    def state(self) -> dict[str, int]:
        """The counts, as JSON."""
        return {name: getattr(self, name) for name in _COUNTS}

    def restore(self, state: dict[str, int]) -> None:
        """Goes on from a `state`."""
        self.documents, self.too_long, self.longest, self.unanswered = (state[name] for name in _COUNTS)

    def apply(self, examples: Iterable[tuple[Any, Example]]) -> Iterator[tuple[Any, Example]]:
        """The examples to write, each with what came with it.

        Split documents are left whole: packing continues them in the next row.

        An example of which several documents are compared is left out where one of them has nothing learned any more.
        """
        for name, example in examples:
            self.documents += len(example.documents)
            longest = max(len(turns.ids) for turns in example.documents)
            self.longest = max(self.longest, longest)
            if longest > self._seq_len:
                self.too_long += sum(len(turns.ids) > self._seq_len for turns in example.documents)
                if self._rule == "drop":
                    continue
                if self._rule == "truncate":
                    cut = tuple(turns.first(self._seq_len) for turns in example.documents)
                    if len(cut) > 1 and not all(turns.learned.any() for turns in cut):
                        self.unanswered += len(cut)
                        continue
                    example = dataclasses.replace(example, documents=cut)
            yield name, example

    def notes(self, source: str) -> list[str]:
        """What the start of a run says about the long documents; nothing where there are none."""
        if not self.too_long:
            return []
        done = {"split": "split over rows", "truncate": "truncated", "drop": "left out"}[self._rule]
        lines = [
            f"{self.too_long:,} of {self.documents:,} documents of {source} are longer than a row of {self._seq_len} "
            f"tokens (the longest has {self.longest:,}): {done} (data.too_long)"
        ]
        if self.unanswered:
            lines.append(
                f"{self.unanswered:,} documents of {source} were left out: truncated to {self._seq_len} tokens, "
                "they or those they are compared with have no token of their answers; a larger data.seq_len keeps them"
            )
        return lines
