"""The text of compiled programs: groups of devices in all their forms, loops, and what instructions cost."""

import pytest

from qwen_moe_jax.plan.collectives import collectives_of, mesh_axes, replica_groups
from qwen_moe_jax.plan.hlo import Module
from qwen_moe_jax.plan.hlo_text import Instruction

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
    assert gather.bytes == 3 * 8 * 16 * 4 and gather.shape == (32, 16) and gather.asynchronous
    assert module.matmul_flops() == 5 * 2 * 8 * 8 * 16


def test_a_loop_that_does_not_say_is_not_guessed():
    text = PROGRAM.replace("direction=LT", "direction=NE")
    [gather] = collectives_of(Module(text), MESH, "tpu")
    assert gather.count is None and Module(text).matmul_flops() is None
    assert collectives_of(Module(text, open_loop_times=1), MESH, "tpu")[0].count == 1


CHAIN = """HloModule x

%first (p: bf16[64,64]) -> (bf16[64,64], bf16[64,128]) {
  %p = bf16[64,64]{1,0:T(8,128)} parameter(0)
  %g = bf16[64,128]{1,0:T(8,128)} all-gather(%p), replica_groups=[4,2]<=[8], frontend_attributes={chain_id="0"}
  ROOT %c = (bf16[64,64]{1,0}, bf16[64,128]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%second (p: bf16[64,64], q: bf16[64,128], w: f32[32,32]) -> (f32[32,32], bf16[64,64], bf16[64,128]) {
  %p = bf16[64,64]{1,0:T(8,128)} parameter(0)
  %q = bf16[64,128]{1,0:T(8,128)} parameter(1)
  %w = f32[32,32]{1,0:T(8,128)} parameter(2)
  %g = bf16[64,128]{1,0:T(8,128)} all-gather(%p), replica_groups=[4,2]<=[8], frontend_attributes={chain_id="0"}
  %y = f32[32,32]{1,0:T(8,128)} dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (f32[32,32]{1,0}, bf16[64,64]{1,0}, bf16[64,128]{1,0}) tuple(%y, %p, %g)
}

%last (p: bf16[64,64], q: bf16[64,128]) -> bf16[64,128] {
  %p = bf16[64,64]{1,0:T(8,128)} parameter(0)
  %q = bf16[64,128]{1,0:T(8,128)} parameter(1)
  %g = bf16[64,128]{1,0:T(8,128)} all-gather(%p), replica_groups=[4,2]<=[8], frontend_attributes={chain_id="0"}
  ROOT %c = bf16[64,128]{1,0} custom-call(%p, %q, %g), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[64,64], w: f32[32,32]) -> bf16[64,128] {
  %a = bf16[64,64]{1,0:T(8,128)} parameter(0)
  %w = f32[32,32]{1,0:T(8,128)} parameter(1)
  %f = (bf16[64,64]{1,0:T(8,128)}, bf16[64,128]{1,0:T(8,128)}) fusion(%a), kind=kCustom, calls=%first
  %a.1 = bf16[64,64]{1,0:T(8,128)} get-tuple-element(%f), index=0
  %b.1 = bf16[64,128]{1,0:T(8,128)} get-tuple-element(%f), index=1
  %s = (f32[32,32]{1,0:T(8,128)}, bf16[64,64]{1,0:T(8,128)}, bf16[64,128]{1,0:T(8,128)}) fusion(%a.1, %b.1, %w), kind=kOutput, calls=%second
  %a.2 = bf16[64,64]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %b.2 = bf16[64,128]{1,0:T(8,128)} get-tuple-element(%s), index=2
  ROOT %d = bf16[64,128]{1,0:T(8,128)} fusion(%a.2, %b.2), kind=kCustom, calls=%last
}
"""  # noqa: E501, lines of a compiler


def test_a_chain_of_fusions_is_one_asynchronous_collective_sent_read_and_written_once():
    module = Module(CHAIN)
    [gather] = collectives_of(module, MESH, "tpu")
    assert (gather.kind, gather.count, gather.asynchronous) == ("all-gather", 1, True)
    assert gather.bytes == 64 * 64 * 2
    assert module.memory_bytes() == 64 * 64 * 2 + 64 * 128 * 2 + 2 * 32 * 32 * 4  # and the product of the second fusion
    assert module.matmul_flops() == 2 * 32**3


def test_a_collective_of_the_sparsecores_is_asynchronous_and_moves_its_bytes_once():
    text = """HloModule x

%own (p: bf16[64,64]) -> bf16[64,128] {
  %p = bf16[64,64]{1,0} parameter(0)
  ROOT %g = bf16[64,128]{1,0} all-gather(%p), replica_groups=[4,2]<=[8], dimensions={1}
}

ENTRY %main (a: bf16[64,64]) -> bf16[64,128] {
  %a = bf16[64,64]{1,0} parameter(0)
  %s = ((bf16[64,64]{1,0}), bf16[64,128]{1,0}, u32[]) call-start(%a), async_execution_thread="sparsecore", to_apply=%own
  ROOT %d = bf16[64,128]{1,0} call-done(%s)
}
"""
    module = Module(text)
    [gather] = collectives_of(module, MESH, "tpu")
    assert (gather.kind, gather.bytes, gather.asynchronous) == ("all-gather", 64 * 64 * 2, True)
    assert module.memory_bytes() == 64 * 64 * 2 + 64 * 128 * 2


def test_a_ragged_exchange_moves_and_sends_the_rows_of_a_balanced_load():
    text = """HloModule x

ENTRY %main (a: bf16[64,2,8], s: s32[4]) -> bf16[64,2,8] {
  %a = bf16[64,2,8]{2,1,0} parameter(0)
  %s = s32[4]{0} parameter(1)
  %empty = bf16[64,2,8]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %r = bf16[64,2,8]{2,1,0} ragged-all-to-all(%a, %empty, %s, %s, %s, /*index=5*/%s), replica_groups=[2,4]<=[8]
}
"""
    for rows, share in ((None, 1), (32, 2)):
        module = Module(text, balanced_rows=rows)
        [exchange] = collectives_of(module, MESH, "tpu")
        size = 64 * 16 * 2 // share
        assert exchange.bytes == size * 3 // 4
        assert module.memory_bytes() == 2 * size, "read once and written once, and nothing is made for it to fill"


def test_an_all_reduce_sliced_in_its_fusion_is_a_reduce_scatter():
    text = """HloModule x

%fused (x.1: f32[30,16]) -> f32[8,16] {
  %x.1 = f32[30,16]{1,0} parameter(0)
  %zero.1 = f32[] constant(0)
  %padded = f32[32,16]{1,0} pad(%x.1, %zero.1), padding=0_2x0_0
  %r = f32[32,16]{1,0} all-reduce(%padded), replica_groups=[2,4]<=[8], to_apply=%add
  %i = s32[] constant(0)
  ROOT %own = f32[8,16]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={8,16}
}

ENTRY %main (a: f32[30,16]) -> f32[8,16] {
  %a = f32[30,16]{1,0} parameter(0)
  %whole = f32[30,16]{1,0} all-reduce(%a), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = f32[8,16]{1,0} fusion(%whole), kind=kCustom, calls=%fused
}
"""
    found = {one.kind: one.bytes for one in collectives_of(Module(text), MESH, "tpu")}
    assert found == {"all-reduce": 2 * 30 * 16 * 4 * 3 // 4, "reduce-scatter": 32 * 16 * 4 * 3 // 4}


def test_a_grouped_product_counts_the_tiles_that_a_balanced_load_fills():
    text = """HloModule x

ENTRY %main (n: s32[], first: s32[5], tiles: s32[19], x: bf16[2048,64], w: bf16[4,32,64]) -> bf16[2048,32] {
  %n = s32[] parameter(0)
  %first = s32[5]{0} parameter(1)
  %tiles = s32[19]{0} parameter(2)
  %x = bf16[2048,64]{1,0} parameter(3)
  %w = bf16[4,32,64]{2,1,0} parameter(4)
  ROOT %y = bf16[2048,32]{1,0} custom-call(%n, %first, %tiles, %x, %w), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/jit(gmm)/pallas_call"}, backend_config={"cost_estimate":{"flops":"8388608"}}
}
"""
    filled = (1024 + 3 * 128) / 2048  # 16 tiles of 128 rows, and three that are multiplied for two experts
    module, whole = Module(text, balanced_rows=1024), Module(text)
    assert whole.matmul_flops() == 8388608 and module.matmul_flops() == 8388608 * filled
    rows, others = 2048 * (64 + 32) * 2, 4 * 32 * 64 * 2 + (1 + 5 + 19) * 4
    assert whole.memory_bytes() == rows + others and module.memory_bytes() == rows * filled + others
