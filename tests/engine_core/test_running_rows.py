"""The table of running requests against a plain sorted list, and what it says when it is wrong."""

from __future__ import annotations

import random

import pytest

from engine_core.request import Request
from engine_core.running_rows import NEVER, RunningRows
from ipc.request import SamplingParams

BLOCK_SIZE = 4


def make_request(number: int, priority: int = 0, num_tokens: int = 3) -> Request:
    return Request(
        request_id=f"r{number}",
        client_index=number % 3,
        token_ids=list(range(num_tokens)),
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(),
        max_output_tokens=7,
        order=(priority, number),
        slot=number,
        block_ids=[number],
    )


def insert(rows: RunningRows, request: Request) -> None:
    rows.insert(request, num_new=3, num_fitting=BLOCK_SIZE, publishes_at=NEVER)


def test_rows_stay_in_order_and_columns_with_their_requests() -> None:
    chance, rows = random.Random(0), RunningRows(40)
    expected: list[Request] = []
    for number in range(400):
        if expected and (len(expected) == 40 or chance.random() < 0.5):
            gone = chance.choice(expected)
            expected.remove(gone)
            rows.remove(gone)
        else:
            one = make_request(number, chance.randrange(4), chance.randrange(1, 5))
            expected = sorted([*expected, one], key=lambda request: request.order)
            insert(rows, one)
        assert list(rows) == rows.requests == expected
        assert len(rows) == len(rows.slots) == len(expected)
        assert rows.slots.tolist() == [request.slot for request in expected]
        assert rows.clients.tolist() == [request.client_index for request in expected]
        assert rows.ends_at.tolist() == [len(request.token_ids) + 7 for request in expected]
        assert rows.num_by_client.total() == len(expected)
        assert all(rows.num_by_client.values())
        assert rows.check_integrity(BLOCK_SIZE) == []


def test_the_last_in_order_is_popped_whenever_it_came() -> None:
    rows = RunningRows(3)
    for request in (make_request(1), make_request(2, priority=5), make_request(3)):
        insert(rows, request)
    assert [rows.pop().request_id for _ in range(3)] == ["r2", "r3", "r1"]


def test_a_request_that_does_not_run_cannot_be_removed() -> None:
    rows = RunningRows(3)
    insert(rows, make_request(1))
    for number in (0, 2):
        with pytest.raises(ValueError, match=f"r{number} does not run"):
            rows.remove(make_request(number))


def test_a_row_that_fell_behind_its_request_is_found() -> None:
    rows = RunningRows(3)
    insert(rows, make_request(1))
    rows.requests[0].token_ids.append(9)
    (error,) = rows.check_integrity(BLOCK_SIZE)
    assert "r1 has (1, 0, 3, 4), not (1, 0, 4, 4)" in error
