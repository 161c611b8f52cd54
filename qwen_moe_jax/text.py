"""Lists and meshes in words."""

from collections.abc import Mapping, Sequence


def join_words(words: Sequence[str]) -> str:
    """["a", "b", "c"] as "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def format_mesh(sizes: Mapping[str, int], *, separator: str = ", ") -> str:
    """{"data": 2, "fsdp": 1, "expert": 4} as "data=2, expert=4"; "one device" where all sizes are 1.

    Args:
        sizes: of the mesh axes.
        separator: between axes; "," gives the value of `--mesh`.
    """
    return separator.join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"
