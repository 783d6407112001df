"""One engine as the front end talks with it, without its sockets: the utility calls that wait for a
reply, and the frames that it sends.

Invariants
- A call ends: by its reply, by its engine's death, or by being cancelled (a time-out).
- Whatever a frame holds, it harms only its engine.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from frontend.errors import EngineDeadError, UtilityCallError
from ipc.errors import WireError
from ipc.output import EngineCoreOutputs, decode_outputs, is_dead
from ipc.utility import UtilityCall, UtilityReply, encode_utility

logger = logging.getLogger(__name__)

CLIENT_INDEX = 0
"""The front end is one process."""
_CALL_NAME = re.compile(r"^Call to \S+ method failed: ")


class EngineEvents(Protocol):
    """Who hears what engines send."""

    def on_outputs(self, rank: int, outputs: EngineCoreOutputs) -> None:
        """A frame with request outputs, statistics or both."""

    def on_turn_end(self) -> None:
        """Everything that had arrived from an engine was handed over, for now."""

    def on_bad_frame(self, rank: int, error: WireError) -> None:
        """A frame that could not be decoded: whatever it said is lost."""

    def on_engine_dead(self, rank: int, reason: str) -> None:
        """The engine said that it is dead."""


class EngineCalls:
    """The calls to one engine, and its answers."""

    def __init__(
        self, rank: int, events: EngineEvents, send: Callable[[int, Sequence[bytes]], None]
    ) -> None:
        """`send(rank, frames)` sends one message, or raises EngineDeadError."""
        self._rank = rank
        self._events = events
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._next_call_id = 1
        self._calls: dict[int, asyncio.Future[object]] = {}

    def __len__(self) -> int:
        """Calls that have not ended."""
        return len(self._calls)

    def start(self, method: str, *args: object) -> asyncio.Future[object]:
        """Send a utility call now; the future brings its result, UtilityCallError (the engine's own
        words) or EngineDeadError.
        """
        call_id, self._next_call_id = self._next_call_id, self._next_call_id + 1
        frames = encode_utility(UtilityCall(CLIENT_INDEX, call_id, method, args))

        def forget(call: asyncio.Future[object]) -> None:
            del self._calls[call_id]
            if not call.cancelled():
                call.exception()  # A caller that no longer waits must not cause a warning.

        future = self._calls[call_id] = self._loop.create_future()
        future.add_done_callback(forget)
        try:
            self._send(self._rank, frames)
        except EngineDeadError as error:
            future.set_exception(error)
        return future

    def fail(self, reason: str) -> None:
        """The engine is gone, and with it the answers to all calls."""
        for future in list(self._calls.values()):
            if not future.done():
                future.set_exception(EngineDeadError(reason))

    def on_frames(self, frames: list[bytes]) -> None:
        """The engine sent a message."""
        rank = self._rank
        if is_dead(frames):
            self._events.on_engine_dead(rank, f"engine {rank} reported a fatal error; see its log")
            return
        try:
            outputs = decode_outputs(frames)
        except WireError as error:
            self._events.on_bad_frame(rank, error)
            return
        if outputs.utility_output is not None:
            self._finish(outputs.utility_output)
        if outputs.outputs or outputs.finished_requests or outputs.scheduler_stats is not None:
            self._events.on_outputs(rank, outputs)

    def _finish(self, reply: UtilityReply) -> None:
        future = self._calls.get(reply.call_id)
        if future is None or future.done():
            logger.debug(
                "engine %d answered call %d, which nobody awaits", self._rank, reply.call_id
            )
        elif reply.failure_message is not None:
            future.set_exception(UtilityCallError(_reason(reply.failure_message)))
        else:
            future.set_result(reply.result)


def _reason(failure_message: str) -> str:
    """What an engine said, without the name of the call, which nobody knows who did not make it."""
    return _CALL_NAME.sub("", failure_message, count=1)
