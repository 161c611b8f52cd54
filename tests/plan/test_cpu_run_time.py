"""What XLA's run time takes on CPUs next to a program is bounded by its threads and its products."""

import pytest

from qwen_moe_jax.plan.cpu_run_time import (
    BLOCKS,
    LISTS,
    OF_A_DOT,
    OWN_TASK,
    QUEUE,
    TASK,
    fresh_bytes,
    queued_bytes,
    run_time_bytes,
)
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
    settings = {"devices": 8, "cores": 2, **settings}
    module = Module(PROGRAM.replace("PRODUCT", product))
    return run_time_bytes(module, **settings) - queued_bytes(module, settings["devices"], 1) - LISTS


def test_threads_pack_columns_of_plain_products_and_the_operands_of_others():
    """Measured: 131,135 and 4,194,367 bytes at once, of 512 numbers contracted and of a batch."""
    assert packed(PLAIN) == 2 * (64 * 256 * 4 + 64)
    assert packed(OF_ROWS) == 2 * 4 * 40 * 256 + BLOCKS
    assert packed(BATCHED) == 4 * 16 * (40 + 384) * 256 + BLOCKS
    assert packed("f32[40,256]{1,0} add(%x, %x)") == 0


def test_a_device_has_its_share_of_the_threads():
    """Eight cores for two devices are five threads that multiply."""
    assert packed(PLAIN, devices=2, cores=8) == 5 * (64 * 256 * 4 + 64)
    assert packed(PLAIN, devices=8, cores=4) == packed(PLAIN)


LOOP = """HloModule step

%body (state: (s32[], f32[8,256])) -> (s32[], f32[8,256]) {
  %state = (s32[], f32[8,256]{1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%state), index=0
  %x = f32[8,256]{1,0} get-tuple-element(%state), index=1
  %y = INSTRUCTION
  ROOT %next = (s32[], f32[8,256]{1,0}) tuple(%turn, %y)
}

%condition (state: (s32[], f32[8,256])) -> pred[] {
  %state = (s32[], f32[8,256]{1,0}) parameter(0)
  ROOT %goes = pred[] custom-call(%state), custom_call_target="goes"
}

ENTRY %main (start: (s32[], f32[8,256])) -> (s32[], f32[8,256]) {
  %start = (s32[], f32[8,256]{1,0}) parameter(0)
  ROOT %end = (s32[], f32[8,256]{1,0}) while(%start), condition=%condition, body=%body, LOOP
}
"""
IN_PARTS = """f32[8,256]{1,0} negate(%x), backend_config={"outer_dimension_partitions":["2","3"]}"""
OVERFLOW = 'metadata={op_name="jit(step)/overflow_rounds/while"}'


@pytest.mark.parametrize(
    ("instruction", "bytes"),
    [
        (IN_PARTS, 5 * TASK),
        ("f32[8,256]{1,0} negate(%x)", 0),
        ('f32[8,256]{1,0} custom-call(%x), custom_call_target="qwen_moe_jax_softmax"', 7 * OWN_TASK),
        ("f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}", OF_A_DOT * TASK),
    ],
)
def test_tasks_add_up_over_a_step_until_the_queue_is_full(instruction, bytes):
    def queued(loop, rounds=0):
        module = Module(LOOP.replace("INSTRUCTION", instruction).replace("LOOP", loop))
        return queued_bytes(module.with_overflow(rounds), pool=8, queues=1)

    full = QUEUE * TASK
    assert queued('backend_config={"known_trip_count":{"n":"3"}}') == 3 * bytes
    assert queued('backend_config={"known_trip_count":{"n":"5000"}}') == (full if bytes else 0)
    assert queued("metadata={}") == (full if bytes else 0), "a loop that ends when its data says so"
    assert [queued(OVERFLOW, rounds) for rounds in (0, 3)] == [0, 3 * bytes]


@pytest.mark.parametrize(
    ("product", "left", "right", "result", "groups", "bytes"),
    [
        ("outer", "f32[128,2048]", "f32[128,256]", "f32[1,2048,256]", 1, 4 * (256 + 256) * 128),
        # All 640 rows may be of one group: its panels are of 256 columns, and of as many numbers as 2**18 bytes hold.
        ("outer", "f32[640,256]", "f32[640,256]", "f32[16,256,256]", 16, 4 * (256 + 256) * 256),
        ("plain", "f32[128,2048]", "f32[1,2048,256]", "f32[128,256]", 1, 4 * 128 * 512),
        ("transposed", "f32[128,256]", "f32[1,2048,256]", "f32[128,2048]", 1, 4 * 256 * 256),
    ],
)
def test_own_products_pack_panels_in_each_thread(product, left, right, result, groups, bytes):
    text = f"""HloModule step

ENTRY %main (a: {left}, b: {right}, sizes: s32[{groups}]) -> {result} {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  %sizes = s32[{groups}] parameter(2)
  ROOT %y = {result} custom-call(%a, %b, %sizes), custom_call_target="qwen_moe_jax_{product}_matmul_float32_14x2"
}}
"""
    assert run_time_bytes(Module(text), devices=8, cores=2) == 2 * (bytes + 64) + 7 * OWN_TASK + LISTS


def test_temporaries_are_handed_out_anew_from_32_mb_on():
    """Measured: a step of 34.4 MB a device had a page fault for every 4096 bytes of eight devices' temporaries."""
    assert [fresh_bytes(size) for size in (31_300_000, 34_400_000)] == [0, 34_400_000]
