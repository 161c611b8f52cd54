"""Numbers as people read them."""

from collections.abc import Sequence


def count(number: int) -> str:
    """30532122624 as 30.53 B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def in_bytes(number: int) -> str:
    """61064245248 as 61.06 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"


def in_seconds(seconds: float) -> str:
    """0.04518 as 45.2 ms, 2.3071 as 2.31 s, 754 as 12 min 34 s."""
    if seconds >= 3600:
        hours, rest = divmod(round(seconds / 60), 60)
        return f"{hours} h {rest} min"
    if seconds >= 100:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{three_digits(seconds / size)} {unit}"
    return "0 s" if seconds == 0 else f"{seconds / 1e-9:.2g} ns"


def in_flops(number: float) -> str:
    """1.93e18 as 1.93 EFLOP."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{three_digits(number / size)} {unit}FLOP"
    return f"{number:,.0f} FLOP"


def three_digits(number: float) -> str:
    """2.3071 as 2.31, 45.18 as 45.2, 451.8 as 452."""
    return f"{number:.2f}" if number < 9.995 else f"{number:.1f}" if number < 99.95 else f"{number:,.0f}"


def in_words(parts: Sequence[str]) -> str:
    """["a", "b", "c"] as "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))
