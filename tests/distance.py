"""Distances between arrays, and the one way in which the suite states that two of them agree."""

import numpy as np


def relative_l2(found, expected) -> float:
    """|found - expected| / |expected|, in float64; NaN where either holds one, which fails every comparison."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, f"found shape {found.shape}, expected {expected.shape}"
    scale = np.linalg.norm(expected)
    distance = np.linalg.norm(found - expected)
    return float(distance / scale) if scale > 0 else float(distance)


def assert_near(found, expected, tolerance: float, what: str) -> None:
    distance = relative_l2(found, expected)
    assert distance <= tolerance, f"{what}: relative L2 distance {distance:.3g}, allowed {tolerance:.3g}"
