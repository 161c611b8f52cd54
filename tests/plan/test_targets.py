"""Targets are read as they are written; a compiler that is missing is named with the way to it."""

import importlib.util

import jax
import pytest

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.plan.chips import CHIPS, chip_of
from qwen_moe_jax.plan.targets import parse_target


@pytest.mark.parametrize(
    "text, platform, chip, shape",
    [
        ("cpu:8", "cpu", "cpu", (8,)),
        ("tpu:v5p:4x8x8", "tpu", "v5p", (4, 8, 8)),
        ("tpu:v5e:4x4", "tpu", "v5e", (4, 4)),
        ("gpu:H200:16", "gpu", "h200", (16,)),
    ],
)
def test_targets_are_read(text, platform, chip, shape):
    request = parse_target(text)
    assert (request.name, request.platform, request.chip, request.shape) == (text, platform, chip, shape)


@pytest.mark.parametrize(
    "text", ["", "cpu", "cpu:0", "cpu:x", "tpu:v5p", "tpu:v9:2x2", "tpu:v5p:2xx2", "gpu:h200", "gpu:gtx:1", "cpu:8:9"]
)
def test_what_is_no_target_is_refused_with_examples(text):
    with pytest.raises(ConfigError, match="expected one like cpu:8, tpu:v5p:4x8x8"):
        parse_target(text)


def test_a_slice_has_the_dimensions_of_its_torus():
    with pytest.raises(ConfigError, match="found a slice of 4x4, expected 3 dimensions for v5p, as in tpu:v5p:4x4x4"):
        parse_target("tpu:v5p:4x4")


def test_simulated_devices_are_the_target_cpu():
    assert len(jax.devices()) >= 4  # the suite's are up before: a target takes some of them
    assert len(parse_target("cpu:4").devices()) == 4


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_missing_compiler_says_what_brings_it():
    with pytest.raises(ConfigError, match=r"pip install 'qwen-moe-jax\[plan\]'"):
        parse_target("tpu:v5p:2x2x1").devices()


def test_no_two_chips_answer_to_one_kind():
    for chip in CHIPS:
        for kind in chip.device_kinds:
            assert chip_of(kind) is chip
