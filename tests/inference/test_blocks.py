"""Blocks are shared by texts that begin alike, and given away in the order in which they were used last."""

import numpy as np

from qwen_moe_jax.inference.blocks import BlockPool, StateCopies, digests


def test_digests_are_of_all_tokens_up_to_the_end_of_a_block():
    text = list(range(23))
    found = digests(text, 4)
    assert len(found) == 5 == len(set(found))
    assert digests(text[:9], 4) == found[:2] == digests([*text[:8], 99], 4)
    assert digests([99, *text[1:]], 4)[4] != found[4], "a change at the start changes all"
    assert digests(text, 4, known=found[:3]) == found
    assert not set(digests(text, 4, salt="adapter")) & set(found)


def test_blocks_are_given_to_one_text_or_to_those_that_begin_alike_and_all_come_back():
    """Random texts come and go: no block has two owners with other tokens, none is lost."""
    numbers, pool, texts = np.random.default_rng(0), BlockPool(17), {}
    holds: dict[int, bytes] = {}  # what a block has, as the device would
    for number in range(2000):
        if texts and numbers.random() < 0.5:
            pool.release(texts.pop(numbers.choice(list(texts))))
            continue
        text = [int(numbers.integers(3))] * 4 + numbers.integers(0, 2, 4 * int(numbers.integers(0, 5))).tolist()
        marks = digests(text, 4)
        blocks = pool.matching(marks)
        assert [holds[block] for block in blocks] == marks[: len(blocks)]
        pool.share(blocks)
        if len(marks) - len(blocks) > pool.available:
            pool.release(blocks)
            continue
        for mark in marks[len(blocks) :]:
            block = pool.take()
            assert block and not any(block in others for others in [*texts.values(), blocks])
            blocks.append(block)
            holds[block] = mark
            pool.remember(block, mark)
        texts[number] = blocks
        in_use = {block for others in texts.values() for block in others}
        assert pool.available == 16 - len(in_use)
    for blocks in texts.values():
        pool.release(blocks)
    assert pool.available == 16


def test_the_end_of_the_text_that_was_not_used_for_longest_goes_first():
    pool = BlockPool(5)
    first, second = [pool.take(), pool.take()], [pool.take(), pool.take()]
    for index, block in enumerate([*first, *second]):
        pool.remember(block, bytes([index]))
    pool.release(first)
    pool.release(second)
    pool.share(pool.matching([bytes([0])]))  # the first block of the first text is used again
    pool.release([first[0]])
    assert [pool.take() for _ in range(4)] == [first[1], second[1], second[0], first[0]]
    assert pool.take() is None and pool.matching([bytes([2])]) == []


def test_spoiled_blocks_are_never_found_again():
    pool = BlockPool(4)
    own, shared = pool.take(), pool.take()
    pool.remember(own, b"own")
    pool.remember(shared, b"shared")
    pool.share([shared])
    assert pool.unusable([own, shared]) == [own], "another text has the other"
    assert pool.matching([b"own"]) == pool.matching([b"shared"]) == []


def test_copies_of_states_give_way_to_newer_ones():
    copies = StateCopies(2)
    assert [copies.place(digest) for digest in (b"a", b"b", b"a")] == [0, 1, None]
    copies.row(b"a")
    assert copies.place(b"c") == 1 and b"b" not in copies and copies.row(b"a") == 0
    assert StateCopies(0).place(b"a") is None
