"""The abort queue as a plain object: when a batch leaves, what is in it, in which order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.outputs import AbortCause
from frontend.requests.abort_queue import (
    CALM_S,
    FEW_REQUESTS,
    LINGER_S,
    MAX_IDS_PER_FRAME,
    MAX_LINGER_S,
    AbortQueue,
)

DROPPED, STOPPED = AbortCause.DROPPED_STREAM, AbortCause.STOP_STRING

CROWD = 1000


def filled(*ids: str, cause: AbortCause = DROPPED) -> AbortQueue:
    queue = AbortQueue()
    for request_id in ids:
        queue.push(request_id, cause, 0.0, num_live=CROWD)
    return queue


def test_an_empty_queue_is_never_due() -> None:
    queue = AbortQueue()
    assert queue.due_at is None
    assert queue.drain(lambda _: 0) == ([], {})


def test_L7_a_lone_drop_waits_a_millisecond() -> None:
    queue = AbortQueue()
    queue.push("a", DROPPED, 5.0, num_live=CROWD)
    assert queue.due_at == 5.0 + LINGER_S
    assert len(queue) == 1


def test_L7_after_a_calm_a_drop_among_few_waits_for_its_turn_of_the_loop_only() -> None:
    queue = AbortQueue()
    queue.push("a", DROPPED, 5.0, num_live=FEW_REQUESTS - 1)
    queue.push("b", DROPPED, 5.0, num_live=FEW_REQUESTS - 2)
    assert queue.due_at == 5.0
    assert [frame.request_ids for frame in queue.drain(lambda _: 0)[0]] == [["a", "b"]]


def test_L7_the_last_of_a_storm_are_not_few_but_late() -> None:
    queue = AbortQueue()
    queue.push("a", DROPPED, 5.0, num_live=FEW_REQUESTS)
    queue.drain(lambda _: 0)
    queue.push("b", DROPPED, 5.0 + CALM_S, num_live=0)
    assert queue.due_at == 5.0 + CALM_S + LINGER_S


def test_L7_each_newcomer_extends_the_wait_but_never_beyond_ten_milliseconds() -> None:
    queue = AbortQueue()
    for number in range(100):
        queue.push(str(number), DROPPED, 0.0005 * number, num_live=CROWD)
    assert queue.due_at == MAX_LINGER_S


def test_L7_ids_are_grouped_by_engine_in_drop_order() -> None:
    queue = filled("b0", "a1", "c0", "d1")
    frames, counts = queue.drain(lambda request_id: int(request_id[1]))
    assert [(frame.engine_index, frame.request_ids) for frame in frames] == [
        (0, ["b0", "c0"]),
        (1, ["a1", "d1"]),
    ]
    assert counts == {DROPPED: 4}
    assert queue.due_at is None


def test_L7_ids_no_longer_active_when_the_batch_leaves_are_skipped() -> None:
    queue = filled("gone", "alive")
    frames, _ = queue.drain(lambda request_id: None if request_id == "gone" else 2)
    assert [frame.request_ids for frame in frames] == [["alive"]]


def test_L7_a_batch_of_inactive_ids_sends_nothing() -> None:
    assert filled("a", "b").drain(lambda _: None) == ([], {})


@pytest.mark.parametrize(
    ("num_ids", "sizes"), [(1024, [1024]), (1025, [1024, 1]), (3000, [1024, 1024, 952])]
)
def test_L7_long_lists_are_split(num_ids: int, sizes: list[int]) -> None:
    ids = [str(number) for number in range(num_ids)]
    frames, _ = filled(*ids).drain(lambda _: 0)
    assert [len(frame.request_ids) for frame in frames] == sizes
    assert [request_id for frame in frames for request_id in frame.request_ids] == ids


def test_causes_are_counted_apart() -> None:
    queue = filled("a", "b")
    queue.push("c", STOPPED, 0.0, num_live=CROWD)
    assert queue.drain(lambda _: 0)[1] == {DROPPED: 2, STOPPED: 1}


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40))
def test_L7_every_active_id_leaves_exactly_once_and_no_other_does(
    drops: list[tuple[int, bool]],
) -> None:
    queue = AbortQueue()
    engine_of = {f"r{n}": engine for n, (engine, is_active) in enumerate(drops) if is_active}
    for number in range(len(drops)):
        queue.push(f"r{number}", DROPPED, 0.0, num_live=CROWD)
    frames, _ = queue.drain(engine_of.get)
    assert sorted(i for frame in frames for i in frame.request_ids) == sorted(engine_of)
    for frame in frames:
        assert all(engine_of[request_id] == frame.engine_index for request_id in frame.request_ids)
        assert 1 <= len(frame.request_ids) <= MAX_IDS_PER_FRAME
