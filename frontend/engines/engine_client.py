"""The front end's sockets: bytes to and from any number of engines.

One ROUTER carries everything to the engines. Each engine answers on an endpoint of its own, so that
whatever arrives there, even a frame that cannot be decoded, has a known sender.

Invariants
- Runs on one event loop; all methods are called on its thread, callbacks run on it.
- Messages to one engine arrive in the order of `send` and `start_call`; so do its frames here.
- After `disconnect(rank)` nothing of that engine is delivered any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import zmq
from zmq.utils.monitor import parse_monitor_message

from frontend.engines.engine_calls import EngineCalls, EngineEvents
from frontend.engines.handshake import Handshake
from frontend.engines.socket_reader import SocketReader
from frontend.errors import EngineDeadError, EngineStartupError
from ipc import sockets
from ipc.errors import WireError
from ipc.handshake import Init, Registration, engine_identity

logger = logging.getLogger(__name__)

_CONNECTION_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
# As plain integers: pyzmq's own flags are enums, which cost more to combine than a send.
_LAST = int(zmq.NOBLOCK)
_NOT_LAST = int(zmq.NOBLOCK) | int(zmq.SNDMORE)


@dataclass(slots=True)
class _Engine:
    identity: bytes
    reader: SocketReader
    monitor: SocketReader
    """Hears when the peer of this engine's endpoint goes away, as it does when its process dies."""
    address: str
    calls: EngineCalls
    is_connected: bool = True
    newcomer_fd: int | None = None
    """Of the last peer that connected to `address`, whoever it was."""
    connection_fd: int | None = None
    """Of the engine, once it shook hands there."""


class EngineClient:
    """Sockets, handshake and utility calls. Knows frames, but no requests."""

    def __init__(
        self, ranks: range, *, handshake_address: str | None, host: str, events: EngineEvents
    ) -> None:
        """Bind everything; must run inside the event loop.

        Without a `handshake_address` all engines are local, and all sockets are `ipc://` ones in a
        private directory. With one (`tcp://host:port`) the data sockets are bound to free ports of
        `host`.
        """
        self._loop = asyncio.get_running_loop()
        self._events = events
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._host = f"[{host}]" if ":" in host else host
        self._directory = sockets.private_directory() if handshake_address is None else None
        self._handshake = Handshake(ranks, self._init_for)
        self._all_up = self._loop.create_future()
        self._handshake_socket = self._bind_handshake(handshake_address)
        self._input_socket = sockets.bind_router(self._context, self._address("input"))
        self.handshake_address = sockets.bound_address(self._handshake_socket)
        self._handshake_reader = SocketReader(
            self._loop, self._handshake_socket, self._on_handshake
        )
        self._input_reader = SocketReader(self._loop, self._input_socket, self._on_input)
        self._engines = {rank: self._open_engine(rank) for rank in ranks}

    @property
    def registrations(self) -> dict[int, Registration]:
        """What each engine that is up told about itself."""
        return self._handshake.registrations

    async def wait_until_up(self, timeout_s: float) -> None:
        """Return when all engines are up. Raises EngineStartupError naming those that are not."""
        try:
            await asyncio.wait_for(asyncio.shield(self._all_up), timeout_s)
        except TimeoutError:
            missing = ", ".join(map(str, self._handshake.missing_ranks))
            raise EngineStartupError(
                f"engines {missing} were not ready after {timeout_s:g} s; they must dial "
                f"{self.handshake_address}"
            ) from None

    @property
    def is_up(self) -> bool:
        """Whether all engines came up (they may have died since)."""
        return self._all_up.done() and self._all_up.exception() is None

    def fail_startup(self, reason: str) -> None:
        """Make `wait_until_up` raise: an engine will never come. Only the first reason counts."""
        if not self._all_up.done():
            self._all_up.set_exception(EngineStartupError(reason))

    # -- sockets -------------------------------------------------------------------------------

    def _bind_handshake(self, address: str | None) -> zmq.Socket[bytes]:
        try:
            return sockets.bind_router(self._context, address or self._address("handshake"))
        except (ValueError, zmq.ZMQError) as error:
            self._context.term()
            raise EngineStartupError(f"cannot listen for engines on {address}: {error}") from None

    def _address(self, name: str) -> str:
        """Where to bind a data socket: a file of ours, or any free port."""
        return (
            f"ipc://{self._directory.name}/{name}" if self._directory else f"tcp://{self._host}:*"
        )

    def _open_engine(self, rank: int) -> _Engine:
        socket = sockets.bind_pull(self._context, self._address(f"output-{rank}"))
        calls = EngineCalls(rank, self._events, self.send)
        reader = SocketReader(self._loop, socket, calls.on_frames, self._events.on_turn_end)
        monitor = SocketReader(
            self._loop,
            socket.get_monitor_socket(_CONNECTION_EVENTS),
            partial(self._on_connection_event, rank),
        )
        address = sockets.bound_address(socket)
        return _Engine(engine_identity(rank), reader, monitor, address, calls)

    def _init_for(self, rank: int) -> Init:
        return Init(
            inputs=(sockets.bound_address(self._input_socket),),
            outputs=(self._engines[rank].address,),
        )

    # -- to engines ----------------------------------------------------------------------------

    def send(self, rank: int, frames: Sequence[bytes]) -> None:
        """Send one message. Raises EngineDeadError if the engine is gone, and reports its death:
        one that cannot be told anything cannot be controlled.
        """
        engine = self._engines[rank]
        if not engine.is_connected:
            raise EngineDeadError(f"engine {rank} is dead")
        try:
            send = self._input_socket.send
            send(engine.identity, _NOT_LAST)
            for frame in frames[:-1]:
                send(frame, _NOT_LAST)
            send(frames[-1], _LAST)
        except zmq.ZMQError as error:
            reason = f"engine {rank} cannot be reached: {error}"
            self._loop.call_soon(self._events.on_engine_dead, rank, reason)
            raise EngineDeadError(reason) from None
        self._input_reader.poke()

    def start_call(self, rank: int, method: str, *args: object) -> asyncio.Future[object]:
        """Send a utility call now; the future brings its result, UtilityCallError or
        EngineDeadError.
        """
        return self._engines[rank].calls.start(method, *args)

    def disconnect(self, rank: int, reason: str) -> None:
        """The engine is gone: fail its calls, and let whatever it may still send fall away."""
        engine = self._engines[rank]
        if engine.is_connected:
            engine.is_connected = False
            engine.monitor.close()
            engine.reader.close()
            engine.calls.fail(reason)

    def close(self) -> None:
        """Close all sockets and remove the private directory."""
        for rank in self._engines:
            self.disconnect(rank, "the front end is shutting down")
        self._input_reader.close()
        self._handshake_reader.close()
        self._context.term()
        if self._directory is not None:
            self._directory.cleanup()
        # Nobody waits any more: neither warn of a failed start, nor of what still fails later.
        self.fail_startup("the front end gave up")
        self._all_up.exception()

    # -- from engines --------------------------------------------------------------------------

    def _on_handshake(self, frames: list[bytes]) -> None:
        if len(frames) != 2:
            logger.warning("ignored a handshake message of %d frames, not 2", len(frames))
            return
        identity, payload = frames
        try:
            answer = self._handshake.on_handshake(identity, payload)
            if answer is not None:
                self._handshake_socket.send_multipart([identity, answer], zmq.NOBLOCK)
                self._handshake_reader.poke()
        except (WireError, zmq.ZMQError) as error:
            logger.warning("refused a handshake message: %s", error)
        self._note_progress()

    def _on_input(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 2:
                raise WireError(f"a registration has 1 payload frame, not {len(frames) - 1}")
            self._handshake.on_registration(frames[0], frames[1])
        except WireError as error:
            logger.warning("refused a registration: %s", error)
        self._note_progress()

    def _note_progress(self) -> None:
        if not self._handshake.missing_ranks and not self._all_up.done():
            self._all_up.set_result(None)

    def _on_connection_event(self, rank: int, frames: list[bytes]) -> None:
        """The first peer that shakes hands is the engine; others may knock at its port and go."""
        engine = self._engines[rank]
        event = parse_monitor_message(frames)
        match event["event"]:
            case zmq.EVENT_ACCEPTED:
                engine.newcomer_fd = event["value"]
            case zmq.EVENT_HANDSHAKE_SUCCEEDED if engine.connection_fd is None:
                engine.connection_fd = engine.newcomer_fd
            case zmq.EVENT_DISCONNECTED if event["value"] == engine.connection_fd:
                engine.reader.read_all()  # What it said before it went still counts.
                if engine.is_connected:
                    self._events.on_engine_dead(rank, f"engine {rank} closed its connection")
