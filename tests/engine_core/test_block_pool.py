"""The block pool: no block is lost, shared by mistake or found under a wrong name."""

from __future__ import annotations

import random

import pytest

from engine_core.block_pool import BlockPool
from engine_core.prefix_hash import block_hash, root_hash


def digest(number: int) -> bytes:
    return block_hash(root_hash(0, None), [number])


def test_a_fresh_pool_hands_out_consecutive_blocks() -> None:
    assert BlockPool(8).allocate(4) == [0, 1, 2, 3]


def test_allocating_more_than_is_available_is_a_bug_of_the_caller() -> None:
    pool = BlockPool(2)
    pool.allocate(2)
    with pytest.raises(AssertionError, match="num_available"):
        pool.allocate(1)


def test_released_blocks_count_as_freed_or_as_cached_by_whether_their_contents_are_known() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    pool.publish(blocks[0], digest(0))
    assert pool.release(blocks) == (2, 1)
    assert (pool.num_free, pool.num_cached) == (3, 1)


def test_a_block_that_others_still_hold_counts_as_cached_when_one_lets_go() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(1)
    pool.publish(blocks[0], digest(0))
    pool.share(blocks)
    assert pool.release(blocks) == (0, 1)
    assert pool.num_available == 3
    assert pool.release(blocks) == (0, 1)
    assert pool.num_available == 4


def test_finding_stops_at_the_first_unknown_block_of_a_chain() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    pool.publish(blocks[0], digest(0))
    pool.publish(blocks[2], digest(2))
    assert pool.find([digest(0), digest(1), digest(2)]) == [blocks[0]]


def test_two_blocks_with_equal_contents_keep_one_name() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.publish(first, digest(0))
    pool.publish(second, digest(0))
    assert pool.find([digest(0)]) == [first]
    assert pool.release([second]) == (1, 0)


def test_the_block_released_longest_ago_is_evicted_first_and_a_sequences_tail_before_its_head() -> (
    None
):
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for number, block_id in enumerate(blocks):
        pool.publish(block_id, digest(number))
    pool.release(blocks)
    assert pool.allocate(1) == [blocks[2]]
    assert pool.find([digest(0), digest(1), digest(2)]) == blocks[:2]


def test_a_flush_forgets_all_names_and_keeps_held_blocks_held() -> None:
    pool = BlockPool(4)
    held, loose = pool.allocate(1), pool.allocate(1)
    pool.publish(held[0], digest(0))
    pool.publish(loose[0], digest(1))
    pool.release(loose)
    pool.flush()
    assert pool.find([digest(0)]) == []
    assert (pool.num_free, pool.num_cached) == (3, 0)
    assert pool.release(held) == (1, 0)


def test_chains_under_another_epoch_or_salt_never_match() -> None:
    roots = {root_hash(0, None), root_hash(1, None), root_hash(0, "salt"), root_hash(1, "salt")}
    assert len(roots) == 4


def test_L11_integrity_errors_name_the_block() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    assert pool.check_integrity([blocks]) == []
    assert "block 0 has 1 references, but 0 sequences hold it" in pool.check_integrity([[1]])


def test_L11_damaged_books_are_noticed() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.publish(blocks[0], digest(0))
    pool._free.append(blocks[0])
    errors = pool.check_integrity([blocks])
    assert any("held + free + cached" in error for error in errors)
    assert any("lost its contents" in error for error in errors)
    pool._free.append(blocks[0])
    assert any("free twice" in error for error in pool.check_integrity([blocks]))


@pytest.mark.parametrize("seed", range(20))
def test_L11_random_use_never_loses_a_block(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(16)
    held: list[list[int]] = []
    for _ in range(400):
        action = rng.random()
        if action < 0.4 and (room := pool.num_available):
            held.append(pool.allocate(rng.randint(1, room)))
        elif action < 0.7 and held:
            pool.release(held.pop(rng.randrange(len(held))))
        elif action < 0.9 and held:
            pool.publish(rng.choice(rng.choice(held)), digest(rng.randrange(12)))
        elif found := pool.find([digest(rng.randrange(12))]):
            pool.share(found)
            held.append(found)
        assert pool.check_integrity(held) == []
    for blocks in held:
        pool.release(blocks)
    assert pool.num_available == pool.num_blocks
