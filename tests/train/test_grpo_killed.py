"""A GRPO run that is killed in the middle of a rollout and in the middle of an update ends bit-equal."""

import json
import signal
import time

import pytest

from tests.train.commands import after_steps, finish, said, start, steps_of
from tests.train.grpo_runs import STEPS, command, write_place


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A whole run, and one that its reward kills in a rollout, and that is killed once more in a later step."""
    place = tmp_path_factory.mktemp("grpo")
    config = write_place(place)
    killed = command(config, place / "killed")
    process = start(place, {"whole": command(config, place / "whole"), "killed once": killed})
    while process.poll() is None and not (place / "whole.code").exists():
        time.sleep(0.01)
    (place / "kill").write_text("23")  # 3 completions of held-out prompts, and 8 in each rollout: in the third of those
    finish(process)
    in_rollout = steps_of(place / "killed")
    process = start(place, {"killed twice": killed})
    after_steps(process, place / "killed", 2)  # it begins with the second half of a rollout, which step 3 has saved
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert finish(start(place, {"killed": killed})) == 0
    return place, in_rollout


def records(folder, key):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if key in line}


def test_a_run_that_is_killed_in_a_rollout_and_in_an_update_ends_bit_equal(runs):
    place, in_rollout = runs
    assert (said(place, "whole").code, said(place, "killed").code) == (0, 0), said(place, "killed").err
    assert said(place, "killed once").code is said(place, "killed twice").code is None
    assert 3 <= in_rollout <= 4
    weights = [(place / name / "hub" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    whole, killed = (records(place / name, "policy_loss") for name in ("whole", "killed"))
    for step, record in whole.items():
        for key in ("loss", "entropy", "sampling_kl", "routing_difference"):
            assert record[key] == killed[step][key], (step, key)


def test_a_reward_that_raises_is_a_counted_zero(runs):
    place, _ = runs
    steps = records(place / "whole", "policy_loss")
    failed = sum(record.get("rewards_failed", 0) for record in steps.values())
    assert failed > 0
    assert "rewards failed and are 0: " in said(place, "whole").out
    assert "tests.train.grpo_runs:reward: ValueError: now and then" in said(place, "whole").out


def test_every_second_step_learns_from_the_rollout_before_it(runs):
    place, _ = runs
    steps = records(place / "whole", "policy_loss")
    assert all(steps[step]["reward"] == steps[step + 1]["reward"] for step in range(1, STEPS, 2))
    on_policy, after_a_step = ([steps[step]["sampling_kl"] for step in range(first, STEPS + 1, 2)] for first in (1, 2))
    assert max(on_policy) < 1e-5 and min(after_a_step[1:]) > max(on_policy)  # the first has rate 0
    assert all(steps[step]["routing_difference"] <= 1e-3 for step in range(1, STEPS + 1, 2))


def test_held_out_prompts_are_continued_and_shown_with_their_rewards(runs):
    place, _ = runs
    heldout = records(place / "whole", "heldout_reward")
    assert sorted(heldout) == [0, 6, 12]
    assert all(record["heldout_loss"] == -record["heldout_reward"] for record in heldout.values())
    [first, *_] = [record["completions"] for record in records(place / "whole", "completions").values()]
    assert set(first[0]) == {"prompt", "completion", "reward"}
    start_record = records(place / "whole", "start")[0]["start"]
    assert start_record["objective"] == "GRPO"
    # Keys and values of 2 layers, 1 head of 16 numbers, 8 rows of the smallest cache, of 64 tokens, in float32.
    assert start_record["other_bytes"]["cache"] == pytest.approx(2 * 2 * 16 * 8 * 64 * 4, rel=0.2)
