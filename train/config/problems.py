"""What is wrong with a key of a TOML file."""

from collections.abc import Iterable
from dataclasses import dataclass

from qwen_moe_jax.config.checks import Problem


@dataclass(frozen=True)
class KeyProblem:
    """What is wrong with one key.

    Attributes:
        path: section, key, and what leads further in: ("data", "sources", 1, "weight").
        text: what was found and what was expected.
        given: dotted keys that this follows from.
    """

    path: tuple[str | int, ...]
    text: str
    given: tuple[str, ...] = ()

    @classmethod
    def of(cls, problem: Problem, prefix: tuple[str | int, ...] = ()) -> "KeyProblem":
        """A problem that a config class found, with the path to what it was found in."""
        text = f"found {problem.found}, expected {problem.expected}"
        given = tuple(dotted((*prefix, field)) for field in problem.given)
        return cls((*prefix, *problem.field.split(".")), text, given)

    @property
    def key(self) -> str:
        """The path as a file's reader knows it: `data.sources[1].weight`."""
        return dotted(self.path)

    def follows_from(self, wrong: Iterable[str]) -> bool:
        """Whether this may be so only because other keys are wrong."""
        about = [dotted(self.path[:2]), *self.given]
        return any(key == other or key.startswith(f"{other}.") for key in about for other in wrong)


def dotted(path: tuple[str | int, ...]) -> str:
    """("data", "sources", 1, "weight") as `data.sources[1].weight`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
