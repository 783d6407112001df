"""Drives the synchronous core: one boundary, one step, one boundary, one step, for the life of the
process.

Invariants
- At each boundary everything that has arrived takes effect, and its frames leave before the next
  step begins.
- Jobs that the core hands out run one after the other on a thread of their own.
- A message that could not be decoded is logged, now and then, and otherwise the core's affair.
- The loop ends in one of two ways: `run` returns after a shutdown has ended every request, or it
  raises.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from engine_core.core import EngineCore, Input
from engine_core.jobs import Job
from engine_core.outbox import Outgoing
from engine_core.process.intake import Failure, Intake, Received, Shutdown
from ipc.frames import InputError
from ipc.logs import RateLimitedLog

logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 1.0


class StepLoop:
    """The only thread that touches the core."""

    def __init__(
        self,
        core: EngineCore,
        intake: Intake,
        send: Callable[[Outgoing], None],
        start_job: Callable[[Job], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`send` and `start_job` must not block; `clock` is monotonic, in seconds."""
        self._core = core
        self._intake = intake
        self._send = send
        self._start_job = start_job
        self._clock = clock
        self._malformed_log = RateLimitedLog(logger)

    def run(self) -> None:
        """Serve until a shutdown. Raises what the core or another thread raised."""
        while not self.turn():
            pass

    def turn(self) -> bool:
        """One boundary and one step; returns whether it was the last.

        With nothing to compute it waits for input first, for a bounded time.
        """
        items = self._intake.drain(wait_s=0.0 if self._core.has_work else self._idle_wait_s())
        inputs: list[tuple[int, Input]] = []
        shutdown: Shutdown | None = None
        for item in items:
            match item:
                case Received(client_index, message):
                    if isinstance(message, InputError):
                        self._malformed_log.warning(
                            "malformed message from client %d: %s", client_index, message
                        )
                    inputs.append((client_index, message))
                case Failure(error):
                    raise error
                case Shutdown():
                    shutdown = item
        if inputs or self._core.lease_ends_s is not None:
            self._send_all(self._core.apply(inputs, self._clock()))
            for job in self._core.take_jobs():
                self._start_job(job)
        if shutdown is not None:
            logger.info("shutting down: %s", shutdown.reason)
            self._send_all(self._core.abort_everything(self._clock()))
            return True
        if self._core.has_work:
            self._send_all(self._core.step(self._clock(), self._clock))
        return False

    def _idle_wait_s(self) -> float:
        lease_ends_s = self._core.lease_ends_s
        if lease_ends_s is None:
            return _IDLE_WAIT_S
        return min(_IDLE_WAIT_S, max(0.0, lease_ends_s - self._clock()))

    def _send_all(self, outgoing: list[Outgoing]) -> None:
        for frame in outgoing:
            self._send(frame)
