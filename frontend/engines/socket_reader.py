"""Delivers the messages of a ZeroMQ socket on the event loop's thread, without a task or a future
for each.

ZeroMQ's file descriptor is edge-triggered: it tells of a change, not of a state. Every wake-up
therefore reads until the socket is empty, and whoever uses the same socket otherwise (sends on it)
calls `poke`, for that may swallow an edge.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

MESSAGES_PER_TURN = 64
"""Then other work of the loop gets its turn."""


class SocketReader:
    """Calls `on_message(frames)` for each message until closed, and `on_turn_end()` when it has
    read what there is, for now. The callbacks must not raise.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        socket: zmq.Socket[bytes],
        on_message: Callable[[list[bytes]], None],
        on_turn_end: Callable[[], None] | None = None,
    ) -> None:
        self._loop = loop
        self._socket = socket
        self._on_message = on_message
        self._on_turn_end = on_turn_end
        self._is_closed = False
        self._is_poked = False
        self._fd = int(socket.getsockopt(zmq.FD))
        loop.add_reader(self._fd, self._drain)
        loop.call_soon(self._drain)

    def poke(self) -> None:
        """Look, in the next turn of the loop, for messages whose edge another use of the socket may
        have swallowed. Any number of pokes in one turn is one look.
        """
        if not self._is_poked:
            self._is_poked = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._is_poked = False
        if not self._is_closed and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._drain()

    def close(self) -> None:
        """Stop reading and close the socket; messages not yet delivered fall away."""
        if not self._is_closed:
            self._is_closed = True
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=0)

    def read_all(self) -> None:
        """Deliver everything that has arrived, however much it is."""
        while self._read_one():
            pass
        self._end_turn()

    def _drain(self) -> None:
        is_empty = False
        try:
            for _ in range(MESSAGES_PER_TURN):
                if is_empty := not self._read_one():
                    break
        finally:
            # Whatever happened: no edge will tell again of what is still there.
            if not is_empty:
                self._loop.call_soon(self._drain)
            self._end_turn()

    def _end_turn(self) -> None:
        if self._on_turn_end is not None:
            self._on_turn_end()

    def _read_one(self) -> bool:
        if self._is_closed:
            return False
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        self._on_message(frames)
        return True
