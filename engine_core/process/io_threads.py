"""The two threads between the engine's sockets and its step loop.

Invariants
- A socket belongs to one thread: inputs to the input thread, outputs to the output thread.
- Nothing a peer sends ends a thread: what cannot be decoded becomes an `InputError` on the intake.
- A frame for a client that does not exist, or a result that cannot be encoded, harms nobody else.
- ENGINE_CORE_DEAD, if it is sent, is the last frame on every output socket.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from enum import Enum, auto
from queue import SimpleQueue

import zmq

from engine_core.core import Input
from engine_core.outbox import Outgoing
from engine_core.process.intake import Failure, Intake, Received
from ipc.errors import WireError
from ipc.frames import InputError, decode_input
from ipc.logs import RateLimitedLog
from ipc.output import ENGINE_CORE_DEAD, EngineCoreOutputs, encode_outputs
from ipc.utility import UtilityReply

logger = logging.getLogger(__name__)

_MAX_MESSAGES_A_TURN = 256
"""So that a flood on one input socket does not keep the others waiting."""
_FLUSH_TIME_MS = 1000
"""How long the last frames may take to leave once the sockets are closed."""


class InputThread:
    """Receives on every input socket, decodes, and puts the messages on the intake."""

    def __init__(
        self,
        inputs: Sequence[zmq.Socket[bytes]],
        intake: Intake,
        coordinator: zmq.Socket[bytes] | None = None,
    ) -> None:
        """Takes over the sockets. What a coordinator publishes is discarded: it concerns
        mixture-of-experts models.
        """
        self._inputs = list(inputs)
        self._coordinator = coordinator
        self._intake = intake
        self._thread = threading.Thread(target=self._run, name="engine-input", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Wait for its end, which terminating the sockets' context brings about."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._receive_forever()
        except zmq.ContextTerminated:
            pass  # The process ends.
        except Exception as error:
            self._intake.put(Failure(error))
        finally:
            for socket in (*self._inputs, self._coordinator):
                if socket is not None:
                    socket.close(linger=0)

    def _receive_forever(self) -> None:
        poller = zmq.Poller()
        client_indices: dict[zmq.Socket[bytes], int] = {}
        for client_index, socket in enumerate(self._inputs):
            client_indices[socket] = client_index
            poller.register(socket, zmq.POLLIN)
        if self._coordinator is not None:
            poller.register(self._coordinator, zmq.POLLIN)
        while True:
            for socket, _ in poller.poll():
                if socket is self._coordinator:
                    socket.recv_multipart()
                else:
                    self._receive_some(socket, client_indices[socket])

    def _receive_some(self, socket: zmq.Socket[bytes], client_index: int) -> None:
        for _ in range(_MAX_MESSAGES_A_TURN):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._intake.put(Received(client_index, _decode(frames)))


def _decode(frames: list[bytes]) -> Input:
    try:
        return decode_input(frames)
    except InputError as error:
        return error
    except Exception as error:
        logger.exception("a decoder failed in an unforeseen way")
        return InputError(f"the message could not be decoded: {error}")


class Farewell(Enum):
    """The last item of the output thread's queue."""

    IN_ORDER = auto()
    DEAD = auto()
    """The engine met a fatal error; every client is told."""


class OutputThread:
    """Encodes frames and sends each to its client."""

    def __init__(
        self,
        outputs: Sequence[zmq.Socket[bytes]],
        intake: Intake,
        coordinator: zmq.Socket[bytes] | None = None,
    ) -> None:
        """Takes over the sockets; client i listens behind `outputs[i]`.

        A coordinator gets a copy of all statistics.
        """
        self._outputs = list(outputs)
        self._coordinator = coordinator
        self._intake = intake
        self._queue: SimpleQueue[Outgoing | Farewell] = SimpleQueue()
        self._bad_index_log = RateLimitedLog(logger)
        self._thread = threading.Thread(target=self._run, name="engine-output", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, outgoing: Outgoing) -> None:
        """Queue a frame; never blocks."""
        self._queue.put(outgoing)

    def finish(self, farewell: Farewell) -> None:
        """Send what is queued and the farewell, and close the sockets; returns when all is done."""
        self._queue.put(farewell)
        self._thread.join()

    def _run(self) -> None:
        try:
            while isinstance(item := self._queue.get(), tuple):
                self._send(*item)
            if item is Farewell.DEAD:
                self._send_dead()
        except Exception as error:
            self._send_dead()
            self._intake.put(Failure(error))
        finally:
            for socket in (*self._outputs, self._coordinator):
                if socket is not None:
                    socket.close(linger=_FLUSH_TIME_MS)

    def _send(self, client_index: int, outputs: EngineCoreOutputs) -> None:
        if not 0 <= client_index < len(self._outputs):
            self._bad_index_log.warning(
                "dropped a frame for client %d; there are %d clients",
                client_index,
                len(self._outputs),
            )
            return
        self._outputs[client_index].send_multipart(_encode(outputs))
        if self._coordinator is not None and outputs.scheduler_stats is not None:
            stats = EngineCoreOutputs(
                engine_index=outputs.engine_index,
                scheduler_stats=outputs.scheduler_stats,
                timestamp=outputs.timestamp,
            )
            self._coordinator.send_multipart(encode_outputs(stats))

    def _send_dead(self) -> None:
        for socket in self._outputs:
            socket.send(ENGINE_CORE_DEAD)


def _encode(outputs: EngineCoreOutputs) -> list[bytes]:
    try:
        return encode_outputs(outputs)
    except WireError as error:
        reply = outputs.utility_output
        if reply is None:
            raise
        failure = UtilityReply(reply.call_id, f"the result cannot be sent: {error}")
        return encode_outputs(
            EngineCoreOutputs(
                engine_index=outputs.engine_index,
                timestamp=outputs.timestamp,
                utility_output=failure,
            )
        )
