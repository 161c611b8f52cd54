"""Numbers, lists and meshes as people read them."""

import numpy as np
import pytest

from qwen_moe_jax.rounding import ceil_div, next_power_of_two, previous_power_of_two, round_up
from qwen_moe_jax.text import format_mesh, join_words
from qwen_moe_jax.units import format_bytes, format_clock, format_seconds, parse_bytes


def test_bytes_are_said_for_people():
    said = [format_bytes(size) for size in (12, 1500, 2_000_000, 3_140_000_000)]
    assert said == ["12 B", "1.50 kB", "2.00 MB", "3.14 GB"]
    assert (format_bytes(-1500), format_bytes(None)) == ("−1.50 kB", "unknown")


def test_sizes_are_read_as_transformers_writes_them():
    assert [parse_bytes(size) for size in (7, "7", "40KB", "1.5 GB")] == [7, 7, 40_000, 1_500_000_000]


@pytest.mark.parametrize("size", [0, -1, True, "", "0GB", "5 GiB", "GB", "0.1", "²"])
def test_what_is_no_positive_size_is_refused(size):
    with pytest.raises(ValueError, match="expected bytes, or for example '500MB' or '5GB'"):
        parse_bytes(size)


def test_durations_are_said_in_the_unit_that_fits():
    said = [format_seconds(seconds) for seconds in (0, 3e-8, 0.04518, 2.3071, 99.96, 754, 3599.9, 9000)]
    assert said == ["0 s", "30 ns", "45.2 ms", "2.31 s", "100 s", "12 min 34 s", "60 min 0 s", "2 h 30 min"]
    assert [format_clock(seconds) for seconds in (5, 754, 3723)] == ["0:05", "12:34", "1:02:03"]


def test_a_mesh_is_said_by_the_axes_that_split():
    assert format_mesh({"data": 2, "fsdp": 1, "expert": 4}) == "data=2, expert=4"
    assert format_mesh({"data": 2, "expert": 4}, separator=",") == "data=2,expert=4"
    assert format_mesh({"data": 1}) == format_mesh({}) == "one device"


def test_words_are_joined_by_commas_and_an_and():
    assert [join_words(list(words)) for words in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]


def test_numbers_are_rounded_up_and_to_powers_of_two():
    assert [ceil_div(number, 3) for number in range(5)] == [0, 1, 1, 1, 2]
    assert [round_up(number, 4) for number in (0, 1, 4, 5)] == [0, 4, 4, 8]
    assert round_up(np.array([1, 8]), 4).tolist() == [4, 8]
    assert [next_power_of_two(number) for number in (0, 1, 2, 3, 8, 9)] == [1, 1, 2, 4, 8, 16]
    assert [previous_power_of_two(number) for number in (0, 1, 2, 3, 8, 9)] == [1, 1, 2, 2, 8, 8]
