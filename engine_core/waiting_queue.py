"""The requests that wait to run, first by priority, then by arrival.

A preempted request comes back with the order it had, so it stands before everything that arrived
after it. Removal (an abort) only marks; the entry falls out when it reaches the top, or with the
others once most are dead, so aborting thousands of queued requests is cheap and leaves nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from engine_core.request import Request


class WaitingQueue:
    """A priority queue of requests with amortised O(1) removal."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Request]] = []
        self._live: dict[tuple[int, int], Request] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, request: Request) -> bool:
        return self._live.get(request.order) is request

    def __iter__(self) -> Iterator[Request]:
        """In arrival, not priority, order."""
        return iter(self._live.values())

    def push(self, request: Request) -> None:
        self._live[request.order] = request
        heapq.heappush(self._heap, (request.order, request))

    def peek(self) -> Request | None:
        """The next request to run, or None."""
        while self._heap:
            order, request = self._heap[0]
            if self._live.get(order) is request:
                return request
            heapq.heappop(self._heap)
        return None

    def remove(self, request: Request) -> None:
        del self._live[request.order]
        if len(self._heap) > 2 * len(self._live):
            self._heap = list(self._live.items())
            heapq.heapify(self._heap)
