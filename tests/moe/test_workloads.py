"""Skewed routings: what each name promises, and that they depend on name, seed and step alone."""

import numpy as np
import pytest

import qwen_moe_jax as qmj
from qwen_moe_jax.moe.workloads import WORKLOADS, workload

E, A = 16, 3


def drawn(name: str, **settings) -> np.ndarray:
    return workload(name, (4, 32), num_experts=E, chosen=A, devices=4, **settings)


def loads(experts_BTA: np.ndarray) -> np.ndarray:
    return np.bincount(experts_BTA.ravel(), minlength=E)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_token_has_different_experts_and_a_draw_is_repeated_exactly(name):
    experts_BTA = drawn(name, seed=3, step=5)
    assert experts_BTA.dtype == np.int32 and experts_BTA.min() >= 0 and experts_BTA.max() < E
    assert (np.diff(np.sort(experts_BTA, axis=-1), axis=-1) > 0).all()
    np.testing.assert_array_equal(drawn(name, seed=3, step=5), experts_BTA)
    assert name == "balanced" or (drawn(name, seed=4, step=5) != experts_BTA).any()


def test_every_name_is_the_skew_that_it_says():
    assert np.ptp(loads(drawn("balanced"))) == 0
    assert (drawn("hot_expert")[..., 0] == 0).all()
    assert (drawn("hot_device") < E // 4).all()
    assert (loads(drawn("empty")) == 0).sum() == E // 2
    assert np.argmax(loads(drawn("zipf"))) == 0
    assert len(set(loads(drawn("ragged")).tolist())) > E // 2
    for step in (0, 1, E + 2):
        assert (drawn("rotating", step=step)[..., 0] == step % E).all()
    hot = [bool((drawn("bursts", step=step)[..., 0] == 0).all()) for step in range(8)]
    assert hot == [False, False, False, True] * 2


def test_a_device_with_too_few_experts_is_helped_by_its_neighbour():
    experts_BTA = workload("hot_device", (1, 8), num_experts=8, chosen=3, devices=8)
    assert (np.sort(experts_BTA, axis=-1) == [0, 1, 2]).all()


def test_an_unknown_name_is_refused_with_the_ones_there_are():
    with pytest.raises(qmj.RequestError, match="did you mean 'hot_expert'"):
        drawn("hot_experts")
