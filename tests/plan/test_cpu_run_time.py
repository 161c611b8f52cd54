"""What XLA's run time takes on CPUs next to a program is bounded by its threads and its products."""

import pytest

from qwen_moe_jax.plan.cpu_run_time import BLOCKS, QUEUE, TASK, run_time_bytes
from qwen_moe_jax.plan.hlo import Module

PROGRAM = """HloModule step

ENTRY %main (x: f32[40,256], w: f32[256,768], many: f32[16,40,256], matrices: f32[16,384,256]) -> f32[40,768] {
  %x = f32[40,256]{1,0} parameter(0)
  %w = f32[256,768]{1,0} parameter(1)
  %many = f32[16,40,256]{2,1,0} parameter(2)
  %matrices = f32[16,384,256]{2,1,0} parameter(3)
  ROOT %y = PRODUCT
}
"""
PLAIN = "f32[40,768]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
OF_ROWS = "f32[256,256]{1,0} dot(%x, %x), lhs_contracting_dims={0}, rhs_contracting_dims={0}"
BATCHED = (
    "f32[16,40,384]{2,1,0} dot(%many, %matrices), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
    "rhs_contracting_dims={2}"
)


def packed(product, **settings):
    found = run_time_bytes(Module(PROGRAM.replace("PRODUCT", product)), **{"devices": 8, "cores": 2, **settings})
    return found - QUEUE * TASK


def test_threads_pack_columns_of_plain_products_and_the_operands_of_others():
    """Measured: 131,135 and 4,194,367 bytes at once, of 512 numbers contracted and of a batch."""
    assert packed(PLAIN) == 2 * (64 * 256 * 4 + 64)
    assert packed(OF_ROWS) == 2 * 4 * 40 * 256 + BLOCKS
    assert packed(BATCHED) == 4 * 16 * (40 + 384) * 256 + BLOCKS
    assert packed("f32[40,256]{1,0} add(%x, %x)") == 0


def test_a_device_has_the_queues_of_its_threads():
    """Eight cores for two devices are four queues a device, and five threads that multiply."""
    assert packed(PLAIN, devices=2, cores=8) == 3 * QUEUE * TASK + 5 * (64 * 256 * 4 + 64)
    assert packed(PLAIN, devices=8, cores=4) == packed(PLAIN)


@pytest.mark.parametrize(
    ("product", "left", "right", "result", "measured"),
    [
        ("outer", "f32[128,2048]", "f32[128,256]", "f32[1,2048,256]", 1_048_640),
        ("plain", "f32[128,2048]", "f32[1,2048,256]", "f32[128,256]", 262_208),
        ("transposed", "f32[128,256]", "f32[1,2048,256]", "f32[128,2048]", 524_352),
    ],
)
def test_own_products_pack_what_was_measured_in_each_thread(product, left, right, result, measured):
    text = f"""HloModule step

ENTRY %main (a: {left}, b: {right}, sizes: s32[1]) -> {result} {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  %sizes = s32[1] parameter(2)
  ROOT %y = {result} custom-call(%a, %b, %sizes), custom_call_target="qwen_moe_jax_{product}_matmul_float32_14x2"
}}
"""
    assert run_time_bytes(Module(text), devices=8, cores=2) - QUEUE * TASK == 2 * measured
