"""An `argparse` parser whose refusal of an unknown option or choice names the known one that is spelt most like it."""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from qwen_moe_jax.suggest import did_you_mean

Names = TypeVar("Names", bound=argparse.Namespace)


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` without abbreviated options. Its subparsers are of this class, too.

    Unknown options are refused before anything else is parsed: their values would be taken for positional arguments,
    and the message would be about those.

    Args:
        also_known: options that are taken out of the words before they are parsed, for suggestions alone.
        settings: as `argparse.ArgumentParser` takes them.
    """

    def __init__(self, *, also_known: Iterable[str] = (), **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})
        self._also_known = tuple(also_known)

    def parse_known_args(  # type: ignore[override]  # of several overloads; `parse_args` and subparsers call this one
        self, args: Sequence[str] | None = None, namespace: Names | None = None
    ) -> tuple[Any, list[str]]:
        """As argparse's. Exits with 2 and one message where an option is unknown or a word is left."""
        self._refuse_unknown_options(sys.argv[1:] if args is None else args)
        parsed, extra = super().parse_known_args(args, namespace)
        if extra and not self._passes_on:
            positionals = " ".join(str(action.metavar or action.dest) for action in self._get_positional_actions())
            found, expected = " ".join(map(repr, extra)), f"{positionals} and options" if positionals else "options"
            self.error(f"found {found} too many; expected {expected}. {self.prog} --help lists all.")
        return parsed, extra

    @property
    def _passes_on(self) -> bool:
        """Whether another parser reads the rest of the words."""
        return any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions)

    def _refuse_unknown_options(self, words: Sequence[str]) -> None:
        known = [*self._option_string_actions, *self._also_known]
        for word in words:
            option = word.partition("=")[0]
            if word == "--" or (self._passes_on and not _is_option(word)):
                return  # all that follows is positional, or of another parser
            if _is_option(word) and option not in self._option_string_actions:
                self.error(f"unknown option {option}; {did_you_mean(option, known)}{self.prog} --help lists all.")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            question = did_you_mean(str(value), map(str, action.choices or ())).strip()
            text = f"{error.message}; {question}" if question else error.message
            raise argparse.ArgumentError(action, text) from None


def _is_option(word: str) -> bool:
    """Whether argparse takes a word for an option: it begins with a dash, and is neither a number nor a sentence."""
    return len(word) > 1 and word.startswith("-") and " " not in word and not re.fullmatch(r"-\d+|-\d*\.\d+", word)
