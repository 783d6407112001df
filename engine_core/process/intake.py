"""The one FIFO through which everything reaches the step loop: messages of clients, and the
process's own events.

Invariant: arrival order is kept, across all producers; `drain` hands over everything there is, so
that control never waits behind more than one step.
"""

from __future__ import annotations

from dataclasses import dataclass
from queue import Empty, SimpleQueue

from engine_core.core import Input


@dataclass(frozen=True, slots=True)
class Received:
    """A message from a client, or what is known of one that could not be decoded."""

    client_index: int
    """Index of the input socket it arrived on: the client that is answered."""
    message: Input


@dataclass(frozen=True, slots=True)
class Shutdown:
    """The engine is asked to end: a signal came, or the launcher is gone."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failure:
    """One of the engine's threads met an error from which it cannot go on."""

    error: Exception


Item = Received | Shutdown | Failure


class Intake:
    """Filled by any thread or signal handler, emptied by the step loop."""

    def __init__(self) -> None:
        # Its put() may interrupt itself, which is what allows signal handlers to use it.
        self._queue: SimpleQueue[Item] = SimpleQueue()

    def put(self, item: Item) -> None:
        self._queue.put(item)

    def drain(self, *, wait_s: float = 0.0) -> list[Item]:
        """Everything that has arrived, in order; waits up to `wait_s` if that is nothing."""
        items: list[Item] = []
        try:
            if wait_s > 0:
                items.append(self._queue.get(timeout=wait_s))
            while True:
                items.append(self._queue.get_nowait())
        except Empty:
            return items
