"""The search over meshes: what is admitted, what is compiled, in which order it is shown. Plans are made by hand."""

import dataclasses
import io
import math

import pytest
from rich.console import Console

from qwen_moe_jax.config import ModelConfig
from qwen_moe_jax.errors import ConfigError, ShardingError
from qwen_moe_jax.plan.chips import CHIPS
from qwen_moe_jax.plan.draft import Outline, draft_of
from qwen_moe_jax.plan.promise import in_turns
from qwen_moe_jax.plan.result import Group, PlacedArray, Work
from qwen_moe_jax.plan.search import draft_meshes, meshes_of, search_meshes
from qwen_moe_jax.plan.search_table import print_search, progress_line
from qwen_moe_jax.text import format_mesh
from tests.plan.samples import GB, collective, memory, plan, roofline
from tests.plan.samples import refused as refused_plan

CHIP = next(chip for chip in CHIPS if chip.name == "TPU v5p")
CONFIG = ModelConfig.from_pretrained(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
)
EXPERTS = (2, 4, 32, 64)  # layers, experts, ffn, embed
DENSE = (2, 64, 64)


def target(devices, **changes):
    return dataclasses.replace(plan().target, devices=devices, **changes)


def work(**changes):
    fields = dict(
        purpose="train",
        rows=16,
        tokens_per_row=128,
        context=0,
        accumulation_steps=1,
        dtype="bfloat16",
        param_dtype="float32",
        sharding="expert+fsdp",
        execution={"dispatch": "dropless", "buffer_factor": 2.0, "exchange": "all_to_all", "remat": "none"},
    )
    return Work(**{**fields, **changes})


def describe(mesh, **changes):
    """Two weights sharded by the rules, with the rules' refusals."""

    def placed(name, shape, spec):
        ways = [math.prod(mesh[axis] for axis in axes) for axes in spec]
        for size, over in zip(shape, ways, strict=True):
            if size % over:
                raise ShardingError(f"{name}: {size} does not divide over {over}.")
        return PlacedArray(
            name=name, shape=shape, dtype="float32", spec=spec, bytes=4 * math.prod(shape) // math.prod(ways)
        )

    experts = placed("layers.mlp.experts.up_proj", EXPERTS, ((), ("expert",), ("tensor",), ("fsdp",)))
    dense = placed("layers.self_attn.q_proj", DENSE, ((), ("tensor",), ("fsdp", "expert")))
    parameters = Group(name="parameters", arrays=(experts, dense))
    return Outline(config=CONFIG, work=work(**changes), flops=1e12, groups=(parameters,))


def planned(**by_mesh):
    """A compiler: by the words of a mesh, seconds, or a plan; 9 seconds for any other."""

    def compile_plan(mesh, settings):
        found = by_mesh.get(format_mesh(mesh).replace(", ", "_").replace("=", ""), 9.0)
        if isinstance(found, Exception):
            raise found
        return found if not isinstance(found, float) else plan(roofline=roofline(seconds_without_overlap=found))

    return compile_plan


def search(compile_plan, *, devices=4, keep=99, **changes):
    return search_meshes(target(devices, **changes), CHIP.networks, describe, compile_plan, keep=keep)


def order(found):
    return [format_mesh(candidate.mesh) for candidate in found.compiled]


@pytest.mark.parametrize("devices", [1, 6, 8])
def test_all_meshes_of_so_many_devices_are_tried_once(devices):
    meshes = list(meshes_of(devices))
    assert len({tuple(mesh.values()) for mesh in meshes}) == len(meshes)
    assert all(math.prod(mesh.values()) == devices for mesh in meshes)
    every = [sizes for sizes in range(1, devices + 1) if devices % sizes == 0]
    assert {mesh["expert"] for mesh in meshes} == set(every)
    assert len(meshes) == {1: 1, 6: 25, 8: 35}[devices]


def test_no_devices_are_refused():
    with pytest.raises(ConfigError, match="0 devices"):
        list(meshes_of(0))


def test_only_meshes_that_divide_are_drafted_and_the_others_say_why():
    drafts, refused = draft_meshes(target(8), CHIP.networks, describe)
    assert len(drafts) + len(refused) == 35
    assert all(4 % draft.mesh["expert"] == 0 for draft in drafts)
    assert [reason for mesh, reason in refused if mesh["expert"] == 8] == [
        "layers.mlp.experts.up_proj: 4 does not divide over 8."
    ]


def test_a_batch_that_does_not_divide_is_refused_with_its_numbers():

    def few(mesh):
        return describe(mesh, rows=8, accumulation_steps=4)

    drafts, refused = draft_meshes(target(4), CHIP.networks, few)
    assert all(draft.mesh["tensor"] >= 2 for draft in drafts)
    assert any(
        "8 rows" in reason and "4 micro-batches" in reason and "multiple of 16" in reason for _, reason in refused
    )


def test_where_no_mesh_divides_the_refusal_has_a_reason():
    with pytest.raises(
        ShardingError, match=r"no mesh of 7 devices .* tensor=7, for example: .* does not divide over 7"
    ):
        draft_meshes(target(7), CHIP.networks, describe)


def test_argument_bytes_are_exact_and_traffic_goes_by_the_formulas():
    mesh = {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}
    draft = draft_of(describe(mesh), mesh, target(8), CHIP.networks)
    experts, dense = 4 * math.prod(EXPERTS) // 4, 4 * math.prod(DENSE) // 4
    assert draft.arguments == experts + dense
    hidden = 16 * 128 // 8 * 64 * 2  # bytes of a device's tokens
    assert draft.traffic == {
        ("fsdp",): 3 * experts // 2,  # gathered twice, scattered once, in half of float32's bytes
        ("fsdp", "expert"): 3 * dense * 3 // 2,
        ("data",): (experts + dense) // 2,  # an all-reduce over two is twice a half
        ("expert",): 2 * 2 * 2 * hidden * 2,  # there and back, two passes, two layers, two rows a token, half leave
    }
    seconds = 1e12 / (8 * CHIP.peak_flops) + draft.sent / 200e9
    assert seconds < draft.seconds < 1.01 * seconds + 1e-4, "what is left is memory"


def test_over_tensor_the_rows_of_the_experts_are_summed_and_not_the_tokens_alone():
    mesh = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 2}
    draft = draft_of(describe(mesh), mesh, target(2), CHIP.networks)
    hidden = 16 * 128 * 64 * 2
    # Two layers; forward and backward, 4 sums of hidden rows in attention and 3 of the 2 * 2 rows of a token
    # in the experts' buffers; an all-reduce over two sends what it sums once.
    assert draft.traffic == {("tensor",): 2 * (4 + 3 * 4) * hidden}
    mesh["tensor"], mesh["data"] = 1, 2
    dense = dataclasses.replace(describe(mesh), work=work(purpose="decode", tokens_per_row=1))
    assert draft_of(dense, mesh, target(2), CHIP.networks).traffic == {}, "no gradients, nothing gathered"


def test_one_device_sends_nothing():
    found = search(planned(), devices=1)
    assert [candidate.draft.traffic for candidate in found.candidates] == [{}]
    assert order(found) == ["one device"] and found.best is found.candidates[0]


def test_plans_are_in_the_order_of_their_seconds_whatever_the_drafts_said():
    found = search(planned(fsdp4=2.0, expert4=1.0, data2_fsdp2=3.0))
    assert order(found)[:3] == ["expert=4", "fsdp=4", "data=2, fsdp=2"]
    assert format_mesh(found.best.mesh) == "expert=4"


def test_what_fits_comes_first_however_slow_and_the_rest_by_what_is_missing():
    too_large = plan(roofline=roofline(seconds_without_overlap=0.1), memory=memory(temporaries=120 * GB))
    silent = plan(memory=memory(temporaries=None, padding=None, outputs=None, code=None), roofline=None, refusal="no")
    found = search(planned(fsdp4=too_large, expert4=refused_plan(), data4=silent))
    assert order(found)[-3:] == ["fsdp=4", "expert=4", "data=4"]
    assert found.best.plan.memory.fits


def test_of_equals_the_one_with_more_room_comes_first():
    roomy = plan(roofline=roofline(seconds_without_overlap=1.0), memory=memory(temporaries=3 * GB))
    found = search(planned(fsdp4=1.0, expert4=roomy, data4=1.0))
    assert order(found)[0] == "expert=4"
    drafted = [format_mesh(draft.mesh) for draft in in_turns(draft_meshes(target(4), CHIP.networks, describe)[0])]
    ties = [mesh for mesh in drafted if mesh in ("fsdp=4", "data=4")]
    assert order(found)[1:3] == ties, "and then the more promising draft"


def test_without_a_chip_s_numbers_fewer_bytes_sent_are_better():
    unknown = dict(peak_flops=None, memory_bytes=None)
    drafts, _ = draft_meshes(target(4, **unknown), (), describe)
    assert {draft.seconds for draft in drafts} == {None} and {draft.fits for draft in drafts} == {None}
    assert [draft.sent for draft in drafts] == sorted(draft.sent for draft in drafts)
    more, less = (plan(roofline=None, collectives=(collective(bytes=size),)) for size in (2000, 1000))
    found = search_meshes(
        target(4, **unknown), (), describe, lambda mesh, _: less if mesh["expert"] == 4 else more, keep=99
    )
    assert order(found)[0] == "expert=4"
    assert "no chip to estimate" in shown(found) and "sends" in shown(found)


def test_only_so_many_are_compiled_and_the_others_keep_their_drafts():
    said = []
    found = search_meshes(target(8), CHIP.networks, describe, planned(), keep=3, progress=said.append)
    assert len(found.compiled) == 3 and all(candidate.plan is None for candidate in found.candidates[3:])
    assert [(step.number, step.of) for step in said] == [(1, 3), (2, 3), (3, 3)]
    assert said[0].seconds_left is None and said[1].seconds_left >= 0
    assert progress_line(said[0]).startswith("compiling 1 of 3: ")


def test_forms_take_turns_two_at_a_time():
    drafts, _ = draft_meshes(target(16), CHIP.networks, lambda mesh: describe(mesh, rows=64))
    forms = [tuple(axis for axis, size in draft.mesh.items() if size > 1) for draft in in_turns(drafts)]
    first = forms[: 2 * 3]
    assert max(first.count(form) for form in first) <= 2 and len(set(first)) >= 3
    assert sorted(map(str, in_turns(drafts))) == sorted(map(str, drafts)), "none is lost"


def test_what_may_not_fit_waits_for_all_that_may():
    drafts, _ = draft_meshes(target(4), CHIP.networks, describe)
    limit = sorted(draft.total for draft in drafts)[3]
    tight, _ = draft_meshes(target(4, memory_bytes=limit), CHIP.networks, describe)
    fits = [draft.fits for draft in in_turns(tight)]
    assert fits == sorted(fits, reverse=True) and True in fits and False in fits


def test_a_mesh_that_the_program_refuses_gives_its_place_to_the_next():
    first = format_mesh(in_turns(draft_meshes(target(4), CHIP.networks, describe)[0])[0].mesh)
    found = search(planned(**{first.replace(", ", "_").replace("=", ""): ShardingError("no")}), keep=2)
    assert first not in order(found) and len(found.compiled) == 2
    assert "no" in [reason for _, reason in found.refused]


def shown(found):
    console = Console(file=io.StringIO(), width=80)
    print_search(found, console, lambda mesh, _: (f"--mesh.expert {mesh['expert']}", ""))
    return console.file.getvalue()


def test_the_table_marks_drafts_and_ends_with_the_words_that_set_the_best():
    first = in_turns(draft_meshes(target(4), CHIP.networks, describe)[0])[0]
    text = shown(search(planned(**{format_mesh(first.mesh).replace(", ", "_").replace("=", ""): 1.0}), keep=3))
    lines = text.splitlines()
    assert "3 compiled" in text and "estimates" in text
    assert lines[-1] == f"Best: --mesh.expert {first.mesh['expert']}"
    assert sum("~" in line for line in lines if line.lstrip().startswith(("·", "2", "4"))) >= 4
    assert max(map(len, lines[:-2])) <= 80


def test_where_none_fits_the_table_says_what_is_missing():
    too_large = plan(memory=memory(temporaries=120 * GB))
    found = search(lambda mesh, _: too_large, keep=2)
    assert found.best is None
    assert "None of the compiled ones fits" in shown(found) and "20.80 GB a device are missing" in shown(found)
