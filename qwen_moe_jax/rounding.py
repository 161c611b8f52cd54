"""Integers rounded up, and to powers of two. The first two take arrays of integers as well."""


def ceil_div(number, divisor):
    """How many parts of size `divisor` cover `number`: 7 over 3 is 3."""
    return -(-number // divisor)


def round_up(number, multiple):
    """The least multiple that is not below `number`: 7 to a multiple of 3 is 9."""
    return ceil_div(number, multiple) * multiple


def next_power_of_two(number: int) -> int:
    """The least power of two that is not below `number`, which may be 0: 5 gives 8, 8 gives 8, 0 gives 1."""
    return 1 << max(number - 1, 0).bit_length()


def previous_power_of_two(number: int) -> int:
    """The largest power of two that is not above `number`; 1 for a number below 1: 5 gives 4, 8 gives 8."""
    return 1 << max(number.bit_length() - 1, 0) if number > 0 else 1
