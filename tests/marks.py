"""Which tests get the markers `torch`, `multiprocess` and `slow`. The first two are read off the code of the tests."""

import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

#: Modules that come with the extra `test` on one Python version alone, or not at all.
REFEREES = {"torch", "transformers", "peft", "datasets", "lm_eval", "tests.referee"}

#: Tests of more than about 1 CPU second, or 2.5 in all of their cases, as `pytest --durations=0` lists them.
SLOW = tuple(Path(__file__).with_name("slow_tests.txt").read_text(encoding="utf-8").split())


def mark(item: pytest.Item) -> None:
    """Adds the markers to one collected test."""
    if item.nodeid.split("[")[0].startswith(SLOW):
        item.add_marker("slow")
    if not isinstance(item, pytest.Function):
        return
    fixtures = [definitions[-1].func for definitions in item._fixtureinfo.name2fixturedefs.values()]
    used = set(_used(item.function, *fixtures))
    values = vars(item.module).values()
    modules = {value.__name__ for value in values if isinstance(value, types.ModuleType)}
    origins = {getattr(value, "__module__", None) for value in values}
    if (modules | origins | used) & REFEREES:
        item.add_marker("torch")
    if "subprocess" in used:
        item.add_marker("multiprocess")


def _used(*functions: Callable) -> Iterator[str]:
    """Every name and every string in these functions and in the functions of `tests` that they call."""
    open_ones: list[object] = [inspect.unwrap(function) for function in functions]
    seen = set()
    while open_ones:
        function = open_ones.pop()
        if not isinstance(function, types.FunctionType) or function in seen:
            continue
        seen.add(function)
        names = set(_names(function.__code__))
        yield from names
        found = (function.__globals__.get(name) for name in names)
        for value in found:
            if getattr(value, "__module__", "").startswith("tests."):
                open_ones += vars(value).values() if isinstance(value, type) else [inspect.unwrap(value)]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
