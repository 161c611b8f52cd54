"""Numbers with their units, as people read and write them."""

import re

_BYTE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def format_count(number: int) -> str:
    """30532122624 as "30.53 B"."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def format_bytes(number: int | None) -> str:
    """61064245248 as "61.06 GB"; negative numbers with a minus sign; None as "unknown"."""
    if number is None:
        return "unknown"
    if number < 0:
        return f"−{format_bytes(-number)}"
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"


def parse_bytes(text: int | str) -> int:
    """5_000_000_000 from "5GB", the size of a Hub shard as transformers writes it; an integer is itself.

    Raises:
        ValueError: it is not a positive size.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    parsed = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]B)?", str(text))
    number = int(float(parsed[1]) * _BYTE_UNITS[parsed[2] or ""]) if parsed else 0
    if number < 1:
        raise ValueError(f"found {text!r}, expected bytes, or for example '500MB' or '5GB'")
    return number


def format_rate(bytes_per_second: float) -> str:
    """2.765e12 as "2,765 GB/s"."""
    return f"{three_digits(bytes_per_second / 1e9)} GB/s"


def format_seconds(seconds: float) -> str:
    """0.04518 as "45.2 ms", 2.3071 as "2.31 s", 754 as "12 min 34 s", 9000 as "2 h 30 min"."""
    if seconds >= 3600:
        hours, rest = divmod(round(seconds / 60), 60)
        return f"{hours} h {rest} min"
    if seconds >= 100:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{three_digits(seconds / size)} {unit}"
    return "0 s" if seconds == 0 else f"{seconds / 1e-9:.2g} ns"


def format_clock(seconds: float) -> str:
    """3723 as "1:02:03", 754 as "12:34": a duration that is updated while it is shown."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_flops(number: float) -> str:
    """1.93e18 as "1.93 EFLOP"."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{three_digits(number / size)} {unit}FLOP"
    return f"{number:,.0f} FLOP"


def three_digits(number: float) -> str:
    """2.3071 as "2.31", 45.18 as "45.2", 451.8 as "452"."""
    return f"{number:.2f}" if number < 9.995 else f"{number:.1f}" if number < 99.95 else f"{number:,.0f}"
