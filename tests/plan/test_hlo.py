"""Compiled programs are read as XLA writes them: here a kernel's call with metadata of its own, as on TPUs."""

import pytest

from qwen_moe_jax.moe.dispatch.overflow import SCOPE
from qwen_moe_jax.plan.hlo import Module

PROGRAM = """HloModule step, is_scheduled=true

ENTRY %main (q: bf16[4,256,128]) -> bf16[4,256,128] {
  %q = bf16[4,256,128]{2,1,0} parameter(0)
  %call = (f32[128,128]{1,0}, bf16[4,256,128]{2,1,0}) custom-call(%q), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128, \\"block_kv\\": 128}"
}}, metadata={op_name="jit(f)/jvp(product_flops_1000)/jit(_splash_attention)/splash_mha_KERNEL_segmented/pallas_call"}
  ROOT %out = bf16[4,256,128]{2,1,0} get-tuple-element(%call), index=1, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128, \\"block_kv\\": 128}"
}}
}
"""


@pytest.mark.parametrize("kernel, products", [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_attention_kernels_count_their_products(kernel, products):
    """The forward pass multiplies twice; backward both kernels compute the scores and the weights' gradient again."""
    assert Module(PROGRAM.replace("KERNEL", kernel)).matmul_flops() == products * 1000


def test_a_kernel_that_nobody_knows_is_not_guessed():
    assert Module(PROGRAM.replace("product_flops_1000", "attend")).matmul_flops() is None


def test_an_instruction_on_several_lines_is_one():
    call, out = list(Module(PROGRAM).computations["main"].values())[1:]
    assert (call.opcode, call.source[-11:], out.root) == ("custom-call", "pallas_call", True)


LAYERS = """HloModule step

%slice (stack: f32[10,64,8], index: s32[]) -> f32[64,8] {
  %stack = f32[10,64,8]{2,1,0:T(8,128)} parameter(0)
  %index = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,64,8]{2,1,0} dynamic-slice(%stack, %index, %zero, %zero), dynamic_slice_sizes={1,64,8}
  ROOT %layer = f32[64,8]{1,0} bitcast(%one)
}

%product (weights: f32[10,64,8], which: s32[], x: f32[4,8]) -> f32[4,64] {
  %weights = f32[10,64,8]{2,1,0:T(8,128)} parameter(0)
  %which = s32[]{:T(128)S(6)} parameter(1)
  %x = f32[4,8]{1,0:T(8,128)S(1)} parameter(2)
  %matrix = f32[64,8]{1,0} fusion(%weights, %which), kind=kLoop, calls=%slice
  ROOT %y = f32[4,64]{1,0} dot(%x, %matrix), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%again (state: (s32[], f32[4,64])) -> pred[] {
  %state = (s32[], f32[4,64]) parameter(0)
  %turn = s32[] get-tuple-element(%state), index=0
  %rounds = s32[] constant(3)
  ROOT %more = pred[] compare(%rounds, %turn), direction=GT
}

%round (carry: (s32[], f32[4,64])) -> (s32[], f32[4,64]) {
  %carry = (s32[], f32[4,64]) parameter(0)
  %number = s32[] get-tuple-element(%carry), index=0
  %sum = f32[4,64] get-tuple-element(%carry), index=1
  %square = f32[4,4] dot(%sum, %sum), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %next = (s32[], f32[4,64]) tuple(%number, %sum)
}

ENTRY %main (w: f32[10,64,8], i: s32[], h: f32[4,8]) -> f32[4,64] {
  %w = f32[10,64,8]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %h = f32[4,8]{1,0:T(8,128)} parameter(2)
  %start = (f32[4,8]{1,0:T(8,128)S(1)}, f32[4,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%h)
  %near = f32[4,8]{1,0:T(8,128)S(1)} copy-done(%start)
  %out = f32[4,64]{1,0:T(8,128)} fusion(%w, %i, %near), kind=kOutput, calls=%product
  %first = (s32[], f32[4,64]) tuple(%i, %out)
  %loop = (s32[], f32[4,64]) while(%first), condition=%again, body=%round, metadata={op_name="experts/SCOPE/while"}
  ROOT %result = f32[4,64]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_traffic_is_a_layer_of_a_stack_and_not_what_stays_on_the_chip():
    """A copy to the chip, then a product of that with one of ten matrices, sliced in a fusion within the fusion."""
    module = Module(LAYERS.replace("SCOPE", SCOPE))
    assert module.memory_bytes() == 4 * (4 * 8 + 64 * 8 + 4 * 64)


_HOST = """
ENTRY %main (p: f32[6,8], q: f32[1,8], i: s32[]) -> f32[1,8] {
  %p = f32[6,8]{1,0:S(5)} parameter(0)
  %q = f32[1,8] parameter(1)
  %i = s32[] parameter(2)
  %out = ((f32[6,8]{:S(5)}, f32[1,8], s32[], s32[]), f32[6,8]{:S(5)}, u32[]) dynamic-update-slice-start(%p, %q, %i, %i)
  %stack = f32[6,8]{1,0:S(5)} dynamic-update-slice-done(%out)
  %in = ((f32[6,8]{1,0:S(5)}, s32[], s32[]), f32[1,8], u32[]) dynamic-slice-start(%stack, %i, %i)
  ROOT %row = f32[1,8] dynamic-slice-done(%in)
}
"""


def test_what_is_copied_to_the_host_and_back_is_read_and_written_once_and_the_hosts_stack_is_not():
    assert Module(_HOST, frozenset()).memory_bytes() == 2 * 8 * 4


def test_rounds_beyond_the_first_are_not_counted():
    product = 2 * 4 * 64 * 8
    assert Module(LAYERS.replace("SCOPE", SCOPE)).matmul_flops() == product
    assert Module(LAYERS.replace("SCOPE", "somewhere")).matmul_flops() is None


IN_PLACE = """HloModule step

%slice (stack: bf16[10,64,8], index: s32[]) -> f32[64,8] {
  %stack = bf16[10,64,8]{2,1,0} parameter(0)
  %index = s32[] parameter(1)
  %bits = u16[10,64,8]{2,1,0} bitcast-convert(%stack)
  %wide = f32[10,64,8]{2,1,0} convert(%bits)
  %zero = s32[] constant(0)
  %one = f32[1,64,8]{2,1,0} dynamic-slice(%wide, %index, %zero, %zero), dynamic_slice_sizes={1,64,8}
  ROOT %layer = f32[64,8]{1,0} bitcast(%one)
}

%body (state: (s32[], f32[10,32], bf16[10,64,8])) -> (s32[], f32[10,32], bf16[10,64,8]) {
  %state = (s32[], f32[10,32]{1,0}, bf16[10,64,8]{2,1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%state), index=0
  %cache = f32[10,32]{1,0} get-tuple-element(%state), index=1
  %weights = bf16[10,64,8]{2,1,0} get-tuple-element(%state), index=2
  %matrix = f32[64,8]{1,0} fusion(%weights, %turn), kind=kLoop, calls=%slice
  %new = f32[16]{0} custom-call(), custom_call_target="AllocateBuffer"
  %call = (f32[4]{0}, f32[10,32]{1,0}) custom-call(%new, %cache), custom_call_target="TARGET", \
output_to_operand_aliasing={{1}: (1, {})}
  %stored = f32[10,32]{1,0} get-tuple-element(%call), index=1
  ROOT %next = (s32[], f32[10,32]{1,0}, bf16[10,64,8]{2,1,0}) tuple(%turn, %stored, %weights)
}

%condition (state: (s32[], f32[10,32], bf16[10,64,8])) -> pred[] {
  %state = (s32[], f32[10,32]{1,0}, bf16[10,64,8]{2,1,0}) parameter(0)
  ROOT %goes = pred[] constant(true)
}

ENTRY %main (start: (s32[], f32[10,32], bf16[10,64,8])) -> (s32[], f32[10,32], bf16[10,64,8]) {
  %start = (s32[], f32[10,32]{1,0}, bf16[10,64,8]{2,1,0}) parameter(0)
  ROOT %end = (s32[], f32[10,32]{1,0}, bf16[10,64,8]{2,1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"10"}}
}
"""


@pytest.mark.parametrize(
    ("target", "written"), [("qwen_moe_jax_delta_rule_float32", 32), ("qwen_moe_jax_attention_float32", 0)]
)
def test_a_call_in_the_loop_over_layers_updates_one_layer_in_place_and_slices_are_converted_alone(target, written):
    """A layer's matrix as bfloat16, its index, and as float32; the call's small operand, layer and first result."""
    slices, call = 2 * 64 * 8 + 4 + 4 * 64 * 8, 4 * (16 + 32 + 4 + written)
    assert Module(IN_PLACE.replace("TARGET", target), frozenset({10})).memory_bytes() == 10 * (slices + call)


def test_copies_into_another_order_are_counted_and_those_that_keep_rows_are_not():
    """Of [4, 1, 8] numbers, an axis of one has no order: twice 128 bytes, three times."""
    module = Module("""HloModule copies

%body (x: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %x = (s32[], f32[4,8]{1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%x), index=0
  %y = f32[4,8]{1,0} get-tuple-element(%x), index=1
  %turned = f32[4,8]{0,1} copy(%y)
  %transposed = f32[8,4]{0,1} transpose(%y), dimensions={1,0}
  ROOT %next = (s32[], f32[4,8]{1,0}) tuple(%turn, %y)
}

%condition (x: (s32[], f32[4,8])) -> pred[] {
  %x = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %goes = pred[] custom-call(%x), custom_call_target="goes"
}

ENTRY %main (x: (s32[], f32[4,8]), z: f32[4,1,8]) -> f32[4,1,8] {
  %x = (s32[], f32[4,8]{1,0}) parameter(0)
  %z = f32[4,1,8]{2,1,0} parameter(1)
  %end = (s32[], f32[4,8]{1,0}) while(%x), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %same = f32[4,1,8]{1,2,0} copy(%z)
}
""")
    assert module.transposed_bytes() == 3 * 2 * 128
