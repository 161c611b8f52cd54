"""Speeds that were measured take the place of published ones: saved, read, refused for other devices, used by plans."""

import json

import jax
import numpy as np
import pytest

from qwen_moe_jax.errors import ConfigError
from qwen_moe_jax.plan import calibration
from qwen_moe_jax.plan.calibration import Calibration, calibration_for, fit_shares, measure
from qwen_moe_jax.plan.roofline import traffic_of
from qwen_moe_jax.plan.search import Candidate, draft_meshes, ranked
from qwen_moe_jax.plan.targets import parse_target
from tests.plan import samples
from tests.plan.samples import collective, roofline
from tests.plan.test_search import CHIP, describe, target
from train.main import main as train

MEASURED = Calibration(
    date="2026-11-28 12:00",
    platform="cpu",
    device_kind="cpu",
    devices=2,
    flops={"float32": 2e9, "bfloat16": 1e9},
    memory_bandwidth=1e9,
    transposed_bandwidth=2e8,
    fresh_bandwidth=2e8,
    network_bandwidth=5e8,
    collective_seconds=1e-5,
    operation_seconds=1e-6,
    memory_bytes=10**9,
    versions={"jax": jax.__version__},
    shares={"compute": 2.0, "memory": 0.5, "network": 1.0, "operations": 3.0, "pages": 1.0},
)

SMALL = """
[model]
model_type = "qwen3_moe"
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2
head_dim = 8
num_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 16
[data]
vocab_size = 512
batch_size = 2
seq_len = 16
"""


@pytest.fixture
def file(tmp_path):
    MEASURED.save(tmp_path / "speeds.json")
    return tmp_path / "speeds.json"


def test_every_speed_is_measured_and_is_that_of_devices_that_work_at_once(monkeypatch):
    monkeypatch.setitem(calibration._SIZES, "cpu", (64, 2**12, 2**10))
    monkeypatch.setattr(calibration, "_FRESH", 2**12)
    monkeypatch.setattr(calibration, "_TRANSPOSED", (2, 16, 32))
    found = measure(jax.devices()[:2])
    assert found.devices == 2 and found.date and found.versions["jax"] == jax.__version__
    speeds = [*found.flops.values(), found.memory_bandwidth, found.network_bandwidth]
    speeds += [found.transposed_bandwidth, found.fresh_bandwidth]
    assert set(found.flops) == {"float32", "bfloat16"} and all(speed > 1e5 for speed in speeds)
    assert 0 < found.operation_seconds < 0.1 and 0 < found.collective_seconds < 1
    assert found.memory_bytes > 2**20


def test_it_is_read_as_it_was_written_and_says_what_and_when(file):
    assert Calibration.load(file) == MEASURED
    assert MEASURED.name == "2 × simulated CPU on 2026-11-28 12:00"
    chip = MEASURED.chip("bfloat16")
    assert (chip.peak_flops, chip.memory_bytes, chip.networks[0].bandwidth) == (1e9, 10**9, 5e8)


def test_collectives_take_their_bytes_and_for_each_the_time_of_a_small_one():
    [found] = traffic_of([collective(bytes=1000, count=3)], MEASURED.chip("float32").networks, {"fsdp": 2})
    assert found.seconds == pytest.approx(3000 / 5e8 + 3 * 1e-5)


def test_shares_of_measured_steps_are_found_and_what_they_do_not_show_stays_whole():
    parts = np.random.default_rng(0).uniform(0.1, 1, (400, 5))
    shares = np.array([1.9, 0.5, 0.0, 2.5, 1.2])
    assert [*fit_shares(parts, parts @ shares).values()] == pytest.approx(shares, abs=0.05)
    parts[:, 3] = 0
    found = fit_shares(parts, parts[:, 0])
    assert [*found] == ["compute", "memory", "network", "operations", "pages"] and found["operations"] == pytest.approx(
        1.0
    )


def test_plans_are_ranked_by_what_is_expected_where_steps_were_measured():
    assert roofline().likely == roofline().seconds_without_overlap
    slow, fast = roofline(expected=2.0, seconds_without_overlap=1.0), roofline(expected=1.0)
    drafts, _ = draft_meshes(target(2), CHIP.networks, describe)
    candidates = [Candidate(draft=drafts[0], plan=samples.plan(roofline=line)) for line in (slow, fast)]
    assert ranked(candidates)[0].compiled_plan.roofline is fast


@pytest.mark.parametrize(
    "text, words", [("", "measure again"), ("[]", "measure again"), ('{"date": "today"}', "measure again")]
)
def test_a_file_of_another_form_is_refused(tmp_path, text, words):
    file = tmp_path / "speeds.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        Calibration.load(file)


def test_other_devices_dtypes_and_files_are_refused_with_what_was_found(file, tmp_path):
    with pytest.raises(ConfigError, match=r"found one of 2 × simulated CPU .*, expected one of cpu:8"):
        MEASURED.check_target(parse_target("cpu:8"), 8)
    with pytest.raises(ConfigError, match="expected float16"):
        MEASURED.chip("float16")
    with pytest.raises(ConfigError, match="found both"):
        calibration_for(parse_target("cpu:2"), measure_to="a", read_from="b")
    with pytest.raises(ConfigError, match="cannot be read"):
        calibration_for(parse_target("cpu:2"), measure_to=None, read_from=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="no folder"):
        calibration_for(parse_target("cpu:2"), measure_to=str(tmp_path / "no" / "speeds.json"), read_from=None)
    with pytest.raises(ConfigError, match="expected devices of gpu:h200:8"):
        calibration_for(parse_target("gpu:h200:8"), measure_to=str(file), read_from=None)
    assert calibration_for(parse_target("cpu:2"), measure_to=None, read_from=None) is None


def test_a_search_by_measured_speeds_prints_what_is_read_back(file, tmp_path, capsys):
    """The exchange alone is left open: two compilations of a model of one layer."""
    config = tmp_path / "small.toml"
    config.write_text(SMALL, encoding="utf-8")
    fixed = {"mesh.expert": 2, "execution.remat": "full", "execution.dispatch": "dropless"}
    fixed |= {"run.gradient_accumulation_steps": 1, "execution.buffer_factor": 2.0}
    words = [f"--{key}={value}" for key, value in fixed.items()]
    plan = tmp_path / "plan.json"
    asked = ["--plan", "cpu:2", "--search", "--calibration", str(file), "--json", str(plan)]
    assert train([str(config), *asked, *words]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "speeds measured on 2 × simulated CPU on 2026-11-28 12:00" in out and "1.00 GB a device" in out
    assert 'exchange = "all_gather"' in out and "--execution.exchange all_gather" in out
    assert "expert=2 was asked for" in out and "none do" in out and "Assumed: " in out
    line = json.loads(plan.read_text(encoding="utf-8"))["roofline"]
    assert line["seconds"] == max(line["compute"], line["memory"], line["network"])
    parts = line["compute"] + line["memory"] + line["network"] + line["operations"]
    assert line["seconds_without_overlap"] == pytest.approx(parts) and line["operations"] > 0
    expected = 2 * line["compute"] + line["memory"] / 2 + line["network"] + 3 * line["operations"]
    assert line["expected"] == line["likely"] == pytest.approx(expected) and "Expected: " in out
