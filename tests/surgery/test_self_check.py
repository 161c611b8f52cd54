"""One checkpoint for itself: clean ones of every family pass, and each fault is named."""

import json

import numpy as np
import pytest

from qwen_moe_jax.cli.main import main
from qwen_moe_jax.surgery.self_check import check_checkpoint
from tests.surgery.folders import arrays_of, config_of, fp8_config, in_float8, write

CASE = "qwen3_moe-plain"
GATE = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
ROUTER = "model.layers.{}.mlp.gate.weight"


@pytest.mark.parametrize("case", [CASE, "qwen2_moe-plain", "mixtral-plain", "qwen3_next-plain", "qwen3_5_moe-plain"])
def test_nothing_is_found_in_clean_checkpoints(case, tmp_path):
    assert check_checkpoint(write(tmp_path, arrays_of(case), config_of(case))).findings == ()


def test_nothing_is_found_in_a_clean_quantised_checkpoint(tmp_path):
    folder = write(tmp_path, in_float8(arrays_of(CASE)), fp8_config(config_of(CASE)))
    assert check_checkpoint(folder).findings == ()


def test_faults_are_named_by_layer_and_expert(tmp_path, capsys):
    arrays = {name: value.copy() for name, value in arrays_of(CASE).items()}
    for matrix in ("gate", "up", "down"):
        arrays[GATE.format(0, 5, matrix)] = arrays[GATE.format(0, 2, matrix)]
    arrays[GATE.format(1, 3, "down")][:] = 0
    arrays[GATE.format(2, 4, "up")][3, 3] = np.inf
    arrays[ROUTER.format(0)][6] = 0
    arrays[ROUTER.format(2)][1] = arrays[ROUTER.format(2)][7]
    arrays["model.layers.1.self_attn.o_proj.weight"] *= 100
    del arrays["model.norm.weight"]
    folder = write(tmp_path, arrays, config_of(CASE))
    found = {(finding.kind, finding.layer, finding.experts) for finding in check_checkpoint(folder).findings}
    assert found == {
        ("unreadable", None, ()),
        ("duplicate", 0, (2, 5)),
        ("dead", 1, (3,)),
        ("not finite", 2, ()),
        ("dead", 0, ()),
        ("duplicate", 2, ()),
        ("suspicious", 1, ()),
    }
    assert main(["verify", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "Something is wrong" in printed and "experts 2,5 are equal to one another" in printed
    assert "rows 1,7" not in printed and "equal to one another: 1,7" in printed


def test_what_stands_out_is_a_remark_alone(tmp_path, capsys):
    arrays = {**arrays_of(CASE)}
    name = "model.layers.1.self_attn.o_proj.weight"
    folder = write(tmp_path, arrays | {name: arrays[name] * 100}, config_of(CASE))
    assert main(["verify", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sound"] and [finding["kind"] for finding in result["findings"]] == ["suspicious"]
    assert "101 times the median of its kind" in result["findings"][0]["words"]
