"""Sends the auto-aborts of dropped streams and matched stop strings: the abort queue's timer, and
its way to the engines.

Invariant: a failed send is logged with its engine and ids, and the other engines get theirs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from frontend.errors import EngineDeadError
from frontend.metrics import Metrics
from frontend.outputs import AbortCause
from frontend.requests.abort_queue import AbortFrame, AbortQueue
from frontend.requests.registry import RequestRegistry
from ipc.abort import encode_abort

logger = logging.getLogger(__name__)

NUM_IDS_LOGGED = 4
"""Flushes of so few ids name them in their log line; larger ones do at debug level."""


class AutoAborts:
    """The aborts of one front end that nobody asked for by name."""

    def __init__(
        self,
        registry: RequestRegistry,
        metrics: Metrics,
        foreign_engines: set[int],
        send: Callable[[int, Sequence[bytes]], None],
    ) -> None:
        """`send(engine_index, frames)` raises EngineDeadError. A foreign engine does not say when a
        request has left it: there it has when its abort was sent.
        """
        self._registry = registry
        self._metrics = metrics
        self._foreign_engines = foreign_engines
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._queue = AbortQueue()
        self._timer: asyncio.TimerHandle | None = None

    def push(self, internal_id: str, cause: AbortCause) -> None:
        """A request has ended here and its engine is to know; it leaves with others, soon."""
        self._queue.push(internal_id, cause, self._loop.time(), num_live=len(self._registry))
        if self._timer is None:
            self._start_timer()

    def flush(self) -> None:
        """Send everything that waits, now."""
        frames, num_by_cause = self._queue.drain(self._registry.claim_for_abort)
        for frame in frames:
            self._send_frame(frame)
        if frames:
            causes = ", ".join(f"{cause.value}: {count}" for cause, count in num_by_cause.items())
            ids = [request_id for frame in frames for request_id in frame.request_ids]
            named = f": {', '.join(ids)}" if len(ids) <= NUM_IDS_LOGGED else ""
            logger.info(
                "aborted %d requests, %d frames (%s)%s", len(ids), len(frames), causes, named
            )

    def _start_timer(self) -> None:
        due_at = self._queue.due_at
        assert due_at is not None
        self._timer = self._loop.call_at(due_at, self._flush_if_due)

    def _flush_if_due(self) -> None:
        self._timer = None
        due_at = self._queue.due_at
        if due_at is None:
            return
        if due_at > self._loop.time():
            self._start_timer()
        else:
            self.flush()

    def _send_frame(self, frame: AbortFrame) -> None:
        engine_index, ids = frame.engine_index, frame.request_ids
        try:
            self._send(engine_index, encode_abort(ids))
        except EngineDeadError as error:
            logger.warning(
                "abort frame to engine %d failed (%s); ids: %s", engine_index, error, ", ".join(ids)
            )
            return
        self._metrics.on_abort_frame(len(ids))
        logger.debug("abort frame to engine %d: %s", engine_index, ids)
        if engine_index in self._foreign_engines:
            for internal_id in ids:
                self._registry.end(internal_id)
