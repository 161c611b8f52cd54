"""The text of compiled programs: groups of devices in all their forms, loops, and what instructions cost."""

import pytest

from qwen_moe_jax.plan.collectives import collectives_of, mesh_axes, replica_groups
from qwen_moe_jax.plan.hlo import Instruction, Module

MESH = {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}


def groups_of(text: str, devices: int = 8) -> list[list[int]]:
    return replica_groups(
        Instruction("x", "all-reduce", (), (), f"channel_id=1, replica_groups={text}, x=y", False), devices
    )


@pytest.mark.parametrize(
    "text, groups, axes",
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", [[0, 4], [1, 5], [2, 6], [3, 7]], ("data",)),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]], ("data",)),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]], ("expert",)),
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]], ("expert",)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]], ("data",)),
        ("mesh['a'=8] {'a':(2)4}", [[0, 1, 2, 3], [4, 5, 6, 7]], ("expert",)),
        ("mesh['a'=2,'b'=4] {'a','b'}", [list(range(8))], ("data", "expert")),
        ("{}", [list(range(8))], ("data", "expert")),
    ],
)
def test_groups_are_read_in_all_their_forms(text, groups, axes):
    assert groups_of(text) == groups
    assert mesh_axes(groups, MESH) == axes


PROGRAM = """HloModule x

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %g = (f32[8,16]{1,0}, f32[32,16]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %d = f32[32,16]{1,0} all-gather-done(%g)
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%i, %x)
}

%cond (p.1: (s32[], f32[8,16])) -> pred[] {
  %p.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %n = s32[]{:T(128)} constant(5), metadata={op_name="a"}
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,16]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[8,16]{1,0}) while(%start), condition=%cond, body=%body
  ROOT %out = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_counts_its_rounds_from_its_condition():
    module = Module(PROGRAM, frozenset({5}))
    [gather] = collectives_of(module, MESH, "tpu")
    assert (gather.kind, gather.axes, gather.count, gather.in_layers) == ("all-gather", ("expert",), 5, True)
    assert gather.bytes == 3 * 8 * 16 * 4 and gather.shape == (32, 16)
    assert module.matmul_flops() == 5 * 2 * 8 * 8 * 16


def test_a_loop_that_does_not_say_is_not_guessed():
    text = PROGRAM.replace("direction=LT", "direction=NE")
    [gather] = collectives_of(Module(text), MESH, "tpu")
    assert gather.count is None and Module(text).matmul_flops() is None
    assert collectives_of(Module(text, open_loop_times=1), MESH, "tpu")[0].count == 1
