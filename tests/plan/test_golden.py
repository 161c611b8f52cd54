"""Shardings and collectives are those that were reviewed: `python -m tests.plan.golden --write` renews them."""

import pytest

from tests.plan import golden


@pytest.mark.parametrize("name", golden.cases())
def test_nothing_moved_unseen(name):
    reviewed = (golden.FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert golden.cases()[name]() == reviewed, "if it should be so: python -m tests.plan.golden --write"


def test_there_is_no_file_that_nothing_is_compared_with():
    assert {path.stem for path in golden.FOLDER.glob("*.txt")} == set(golden.cases())
