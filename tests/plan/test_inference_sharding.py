"""Commands that run a model forward start with shardings that gather no weights, and say what else would fit."""

import dataclasses
import json
import math

import pytest

from qwen_moe_jax.cli.main import _parser, main
from qwen_moe_jax.config import INFERENCE_SHARDING
from qwen_moe_jax.plan.remarks import remarks_on
from tests.plan import golden
from tests.plan.samples import GB, memory, plan

ROWS = 32
#: Sizes by which no activation has as many numbers as a weight.
MODEL = {**golden.TINY, "moe_intermediate_size": 40, "vocab_size": 480}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODEL))
    return str(path)


def planned(config: str, capsys, *words: str) -> dict:
    """The plan of a command line, compiled for simulated devices."""
    assert main(["plan", config, "--batch", str(ROWS), "--context", "64", "--json", "-", *words]) == 0
    return json.loads(capsys.readouterr().out)


def weight_gathers(found: dict) -> list[dict]:
    """All-gathers of a weight or one layer of it. What is gathered is whole, but for the axes that a layer uses."""
    expert, tensor = found["mesh"]["expert"], found["mesh"]["tensor"]
    sizes: set[int] = set()
    [parameters] = [group for group in found["memory"]["groups"] if group["name"] == "parameters"]
    for array in parameters["arrays"]:
        layers = array["shape"][0] if "layers" in array["name"] else 1
        if len(array["shape"]) - (layers > 1) >= 2:  # norms are vectors, and never gathered
            sharded_by = {1, tensor, expert, expert * tensor} if ".experts." in array["name"] else {1, tensor}
            whole = math.prod(array["shape"])
            sizes |= {whole // times // part for part in sharded_by for times in (1, layers)}
    return [one for one in found["collectives"] if one["kind"] == "all-gather" and math.prod(one["shape"]) in sizes]


@pytest.mark.parametrize("mesh", ["expert=8", "fsdp=2,expert=4", "data=2,expert=2,tensor=2"])
def test_no_weight_is_gathered_in_decoding_unless_it_is_asked_for(config, capsys, mesh):
    words = ["--target", "cpu:8", "--mesh", mesh, "--for", "decode"]
    found = planned(config, capsys, *words)
    assert found["work"]["sharding"] == INFERENCE_SHARDING
    assert weight_gathers(found) == []
    assert "collectives" not in {remark["about"] for remark in found["remarks"]}
    replicated = [remark["text"] for remark in found["remarks"] if remark["about"] == "replicated"]
    expected = [] if "tensor" in mesh else ["of weights are replicated on every device, so that none are gathered"]
    assert len(replicated) == len(expected) and all(words in replicated[0] for words in expected)


def test_an_explicit_sharding_wins_and_its_gathers_are_remarked_on(config, capsys):
    words = ["--target", "cpu:8", "--mesh", "expert=8", "--for", "decode", "--sharding", "expert+fsdp"]
    found = planned(config, capsys, *words)
    assert found["work"]["sharding"] == "expert+fsdp"
    assert weight_gathers(found), "or the test above sees nothing"
    [text] = [remark["text"] for remark in found["remarks"] if remark["about"] == "collectives"]
    assert "are gathered over expert for every token" in text and "--sharding expert+tensor" in text


@pytest.mark.parametrize("command", ["generate", "chat", "score", "route", "plan"])
def test_commands_that_run_a_model_forward_share_the_default(tmp_path, command):
    needed = {
        "score": [str(tmp_path), "x.txt"],
        "route": [str(tmp_path), "--prompt", "x"],
        "plan": [str(tmp_path), "--target", "cpu:1"],
    }
    arguments = _parser().parse_args([command, *needed.get(command, [str(tmp_path)])])
    assert arguments.sharding == INFERENCE_SHARDING


def test_the_harness_shares_the_default():
    import inspect

    from qwen_moe_jax.inference.harness import Harness

    assert inspect.signature(Harness.from_folder).parameters["sharding"].default == INFERENCE_SHARDING


def test_what_does_not_fit_replicated_names_the_sharding_that_takes_less():
    decode = dataclasses.replace(plan().work, purpose="decode", sharding=INFERENCE_SHARDING)
    replicated = dataclasses.replace(
        plan().memory.groups[0].arrays[0], name="model.embed_tokens.weight", spec=((), ()), bytes=2 * GB
    )
    group = dataclasses.replace(plan().memory.groups[0], arrays=(replicated,))
    over = plan(work=decode, memory=memory(groups=(group,), temporaries=120 * GB))
    [text] = [remark.text for remark in remarks_on(over) if remark.about == "memory"]
    assert "are missing" in text and "2.00 GB of weights on several devices" in text
    assert "--sharding expert+fsdp" in text and "tensor" in text
    asked = dataclasses.replace(over, work=dataclasses.replace(decode, sharding="expert+fsdp"))
    [text] = [remark.text for remark in remarks_on(asked) if remark.about == "memory"]
    assert "--sharding" not in text
