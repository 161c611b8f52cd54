"""Which rows a call decodes, how many tokens, and how long a chunk of a prompt is."""

import numpy as np
import pytest

from qwen_moe_jax.inference.chunks import ChunkChoice, chunk_shapes
from qwen_moe_jax.inference.decode_rows import CALL_SECONDS, Pace, choose_rows, row_counts


@pytest.mark.parametrize("rows", [1, 3, 4, 17, 32, 128])
@pytest.mark.parametrize("factor", [2, 4])
def test_there_are_few_programs_and_one_for_all_rows_and_one_for_a_single_one(rows, factor):
    counts = row_counts(rows, factor)
    assert counts[0] == 1 and counts[-1] == rows and sorted(set(counts)) == list(counts)
    assert len(counts) <= 2 + np.log(rows) / np.log(factor)


@pytest.mark.parametrize("slots", [[0], [7], [5, 1], [0, 1, 2, 4], [0, 1, 2, 3, 6]])
def test_every_slot_has_a_row_on_its_shard_and_the_other_rows_are_none(slots):
    choice = choose_rows(slots, rows=4, shards=2, counts=(1, 2, 4))
    assert sorted(choice.position) == sorted(slots) and len(set(choice.position.values())) == len(slots)
    of_shard = len(choice.slot_R) // 2
    assert of_shard == {1: 1, 2: 2, 3: 4, 4: 4}[np.bincount([slot // 4 for slot in slots]).max()], "the fewest"
    for slot, position in choice.position.items():
        assert position // of_shard == slot // 4 and choice.slot_R[position] == slot
        assert choice.rows_R is None or choice.rows_R[position] == slot % 4
    if choice.rows_R is None:
        assert len(choice.slot_R) == 8
    else:
        unused = np.delete(choice.rows_R, list(choice.position.values()))
        assert (unused == 4).all() and (choice.slot_R // 4 == np.arange(2 * of_shard) // of_shard).all()


def test_a_call_decodes_as_many_tokens_as_take_its_time_lately():
    pace = Pace(8)
    assert pace.steps == 8
    pace.add(4, 4 * CALL_SECONDS / 2.5)
    assert pace.steps == 2
    pace.add(0, 9.0)
    assert pace.steps == 2
    for _ in range(20):
        pace.add(1, 10 * CALL_SECONDS)
    assert pace.steps == 1
    for _ in range(20):
        pace.add(8, CALL_SECONDS / 100)
    assert pace.steps == 8


def test_every_length_of_a_chunk_has_a_program_of_one_row():
    assert chunk_shapes(32, 512, 32) == [(1, 32), (1, 64), (1, 128), (1, 256), (1, 512), (4, 128), (16, 32)]
    assert chunk_shapes(32, 128, 3) == [(1, 32), (1, 64), (1, 128), (2, 32)]
    assert chunk_shapes(32, 16, 5) == [(1, 16)]


@pytest.mark.parametrize("unread, length", [(1, 32), (33, 64), (64, 64), (65, 128), (200, 256), (257, 256), (900, 512)])
def test_half_of_a_chunk_of_a_prompt_is_no_padding(unread, length):
    choice = ChunkChoice(chunk_shapes(32, 512, 32), 32)
    assert choice.best([(0, unread)]) == (1, length)


@pytest.mark.parametrize("weights", [32, 512])
def test_prompts_are_never_read_at_a_higher_cost_than_one_by_one(weights):
    choice, numbers = ChunkChoice(chunk_shapes(32, 512, 32), weights), np.random.default_rng(0)
    for _ in range(50):
        left = numbers.integers(1, 300, numbers.integers(1, 12)).tolist()
        alone, paid = sum(map(choice.cost, left)), 0
        while left:
            count, length = choice.best([(0, tokens) for tokens in left])
            paid += count * length + weights
            left = [max(0, tokens - length) if row < count else tokens for row, tokens in enumerate(left)]
            left = [tokens for tokens in left if tokens]
        assert paid <= alone
    assert choice.best([(0, 30)] * 12) == (16, 32), "many short prompts share a call"
