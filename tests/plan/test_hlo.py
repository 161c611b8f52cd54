"""Compiled programs are read as XLA writes them: here a kernel's call with metadata of its own, as on TPUs."""

import pytest

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
