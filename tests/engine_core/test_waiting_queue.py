"""The queue of waiting requests, where the order of its entries does not show from outside."""

from __future__ import annotations

from engine_core.request import Request
from engine_core.waiting_queue import WaitingQueue
from ipc.request import SamplingParams


def waiting_request(priority: int, arrival: int) -> Request:
    return Request(
        request_id=f"r{arrival}",
        client_index=0,
        token_ids=[1],
        num_prompt_tokens=1,
        sampling=SamplingParams(),
        max_output_tokens=1,
        order=(priority, arrival),
    )


def test_L11_aborted_requests_do_not_pile_up_behind_one_that_still_waits() -> None:
    queue = WaitingQueue()
    head = waiting_request(0, 0)
    queue.push(head)
    for arrival in range(1, 1000):
        request = waiting_request(1, arrival)
        queue.push(request)
        queue.remove(request)
        assert len(queue._heap) <= 3
    assert queue.peek() is head
    queue.remove(head)
    assert queue._heap == []


def test_requests_leave_by_priority_and_arrival_whichever_others_were_removed() -> None:
    queue = WaitingQueue()
    requests = [waiting_request(arrival % 3, arrival) for arrival in range(60)]
    for request in requests:
        queue.push(request)
    for request in requests[::2] + requests[1::4]:
        queue.remove(request)
    left = []
    while (request := queue.peek()) is not None:  # type: ignore[assignment]
        queue.remove(request)
        left.append(request)
    assert left == sorted(requests[3::4], key=lambda request: request.order)
