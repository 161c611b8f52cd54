"""Numbers as people read them."""

from qwen_moe_jax.units import in_bytes


def test_bytes_are_said_for_people():
    said = [in_bytes(size) for size in (12, 1500, 2_000_000, 3_140_000_000)]
    assert said == ["12 B", "1.50 kB", "2.00 MB", "3.14 GB"]
