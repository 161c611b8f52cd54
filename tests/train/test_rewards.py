"""Rewards run in processes of their own: one that raises, hangs or dies is a counted zero, and the others go on."""

import subprocess
import sys
import time

import numpy as np
import pytest

from qwen_moe_jax.errors import ConfigError
from train.rewards.builtin import BUILTIN, value_of
from train.rewards.pool import RewardPool, Sample

FUNCTIONS = """
import os, sys, time
print("what a module prints is not an answer")

def behave(prompt, completion, row):
    print("nor is what a function prints")
    if completion == "raise":
        raise KeyError("a column")
    if completion == "hang":
        while True:
            pass
    if completion == "die":
        os._exit(3)
    if completion == "leave":
        sys.exit(4)
    return float("nan") if completion == "nan" else "text" if completion == "text" else row["value"]

def length(prompt, completion, row):
    return len(completion)

def has_jax(prompt, completion, row):
    return "jax" in sys.modules or "numpy" in sys.modules
"""


def samples(*completions):
    return [
        Sample(prompt="?", completion=completion, row={"value": number / 2})
        for number, completion in enumerate(completions)
    ]


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)


def test_a_reward_that_fails_is_a_counted_zero_and_the_others_keep_their_places(here):
    completions = ["a", "raise", "bb", "hang", "ccc", "die", "leave", "nan", "text", "d", "hang", "ee"]
    with RewardPool(["own_rewards:behave", "own_rewards:length"], timeout=1.0, workers=2) as pool:
        began = time.monotonic()
        scores = pool.score(samples(*completions))
        assert time.monotonic() - began < 30
        again = pool.score(samples("a", "bb", "ccc"))
    works = [0, 2, 4, 9, 11]
    expected = np.zeros(len(completions))
    expected[works] = np.array(works) / 2
    assert scores.rewards[:, 0].tolist() == expected.tolist()
    assert scores.rewards[:, 1].tolist() == [len(completion) for completion in completions]
    assert scores.failures == {"KeyError": 1, "TimeoutError": 2, "died": 2, "ValueError": 2}
    assert "own_rewards:behave: TimeoutError: no answer within 1 s" == scores.example["TimeoutError"]
    assert again.rewards[:, 0].tolist() == [0, 0.5, 1.0] and not again.failures


def test_a_worker_has_no_jax_and_ends_with_its_parent_even_while_it_hangs(here):
    with RewardPool(["own_rewards:has_jax"], timeout=10.0, workers=1) as pool:
        assert pool.score(samples("a")).rewards.tolist() == [[0.0]]
    with subprocess.Popen(
        [sys.executable, "-m", "train.rewards.worker", "own_rewards:behave"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONPATH": ":".join(sys.path)},
    ) as worker:
        assert worker.stdout.readline() == b'{"ready": true}\n'
        worker.stdin.write(b'[0, "?", "hang", {}]\n')
        worker.stdin.close()
        assert worker.wait(10) == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_rewards:none", "has no function none"),
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("exact", "no such reward: expected package.module:function, or one of exact_match"),
    ],
)
def test_a_reward_that_cannot_be_imported_is_refused_at_the_start(here, name, said):
    with pytest.raises(ConfigError, match=said):
        RewardPool([name], timeout=1.0, workers=1)


@pytest.mark.parametrize(
    ("name", "completion", "row", "expected"),
    [
        ("exact_match", " Paris\n", {"answer": "Paris"}, 1),
        ("exact_match", "Paris.", {"answer": "Paris"}, 0),
        ("exact_match", "46", {"answer": 46}, 1),
        ("regex", "the answer is 46", {"pattern": r"\b46$"}, 1),
        ("regex", "the answer is 46.", {"pattern": r"\b46$"}, 0),
        ("arithmetic", "12 + 34 = 46", {"expression": "12 + 34"}, 1),
        ("arithmetic", "-1,234.50", {"expression": "-(1234 + 1/2)"}, 1),
        ("arithmetic", "0.3", {"expression": "0.1 + 0.2"}, 1),
        ("arithmetic", "46 is not 47", {"expression": "12+34"}, 0),
        ("arithmetic", "no number", {"expression": "12+34"}, 0),
        ("balanced_brackets", ")]", {"text": "[("}, 1),
        ("balanced_brackets", "])", {"text": "[("}, 0),
        ("balanced_brackets", "{}<>", {}, 1),
    ],
)
def test_the_builtin_rewards_say_what_they_check(name, completion, row, expected):
    assert BUILTIN[name]("?", completion, row) == expected


@pytest.mark.parametrize("expression", ["2 ** 9", "__import__('os')", "a + 1", "1 / 0", "1 +", "'a' * 9", "[1][0]"])
def test_an_expression_is_nothing_but_arithmetic(expression):
    with pytest.raises(ValueError):
        value_of(expression)
