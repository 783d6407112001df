"""HTTP/1.1 on one socket: requests in, answers out, hang-ups noticed the moment they happen.

A protocol of our own on httptools' parser, for two reasons: a token of a stream costs one write and
no task, and a client that goes away, by FIN, RST or a half-close, ends its request within the very
callback that tells of it.

Invariants
- Requests on one connection are answered one at a time, in order; pipelined ones wait, also for
  the client to read the answers before theirs.
- Reading never stops while a request is being answered, so that a hang-up is seen.
- What a client may make the server hold is bounded: head, body, pipelined requests, unread answers,
  idle time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from email.utils import formatdate
from typing import Protocol, cast

from frontend.errors import OVERLOADED
from frontend.http.errors import ApiError
from frontend.http.exchange import Exchange
from frontend.http.request_reader import RequestReader
from frontend.http.sockets import peer_is_local
from frontend.metrics import Metrics
from ipc.logs import RateLimitedLog

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 65.0
"""Longer than the usual 60 s of load balancers, so that they are the ones to close."""
REQUEST_TIMEOUT_S = 60.0
"""A request must have arrived within this time from its first byte."""
STALL_TIMEOUT_S = 300.0
"""A client that lets an answer wait for so long, without reading any of it, is gone."""
DRAIN_TIMEOUT_S = 30.0
"""A client may take this long to read what is left of the last answer on its connection."""
MAX_PIPELINED = 16
MAX_TURNED_AWAY = 16
"""Connections beyond the limit that are kept until their client has read why."""


class Service(Protocol):
    """What answers requests."""

    def screen(self, exchange: Exchange) -> None:
        """A request's head arrived. Raises ApiError to refuse it before its body is read."""

    def handle(self, exchange: Exchange) -> None:
        """A request arrived; its answer may come later. Must not raise."""


class Connections:
    """The open connections of a server."""

    def __init__(
        self,
        service: Service,
        *,
        max_body_bytes: int,
        max_connections: int,
        max_unread_tokens: int,
        metrics: Metrics,
    ) -> None:
        self.service = service
        self.metrics = metrics
        self.max_unread_tokens = max_unread_tokens
        self.max_body_bytes = max_body_bytes
        self.max_connections = max_connections
        self.open: set[Connection] = set()
        self.turned_away: set[Connection] = set()
        """Beyond the limit; told so, and not closed yet."""
        self._refusals = RateLimitedLog(logger)
        self.is_closing = False
        self.all_closed = asyncio.Event()
        """Set when none is open, once the server is stopping."""
        self._date = (0, b"")

    def __call__(self) -> Connection:
        """The protocol of a new connection, for `loop.create_server`."""
        return Connection(self)

    def date_header(self) -> bytes:
        now = int(time.time())
        if now != self._date[0]:
            self._date = (now, f"date: {formatdate(now, usegmt=True)}\r\n".encode())
        return self._date[1]

    def close_overdue(self, now: float) -> None:
        """End connections that are idle or too slow; to be called about once a second."""
        for connection in [one for one in self.open | self.turned_away if one.due_s < now]:
            connection.expire()

    def close_idle(self) -> None:
        """The server is stopping: close every connection, once what it answers is answered."""
        self.is_closing = True
        for connection in list(self.open):
            connection.close_when_idle()
        self._note_closed()

    def add(self, connection: Connection) -> None:
        """Raises ApiError if there are too many."""
        if len(self.open) < self.max_connections:
            self.open.add(connection)
            return
        self.metrics.on_refused("max_connections")
        message = f"all max_connections={self.max_connections} connections are open"
        self._refusals.warning("refused a connection: %s; raise --max-connections", message)
        raise ApiError(
            503,
            f"{message}; try again later, or start the server with a larger --max-connections",
            code=OVERLOADED,
        )

    def remove(self, connection: Connection) -> None:
        self.open.discard(connection)
        self.turned_away.discard(connection)
        self._note_closed()

    def _note_closed(self) -> None:
        if self.is_closing and not self.open:
            self.all_closed.set()

    def abort_all(self) -> None:
        for connection in self.open | self.turned_away:
            connection.abort()


class Connection(asyncio.Protocol):
    """The server's side of one connection; the `Outlet` of its exchanges."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._reader = RequestReader(self, max_body_bytes=connections.max_body_bytes)
        self._transport: asyncio.Transport
        self.is_writable = True
        self.due_s = float("inf")
        """When to end the connection, unless something happens."""
        self._active: Exchange | None = None
        self._waiting: deque[tuple[Exchange, ApiError | None]] = deque()
        """Requests whose turn has not come, some with an error to be answered with."""
        self._is_open = False
        """Answers may be written; what is written later goes nowhere."""
        self._is_half_closed = False
        """By the client."""

    # -- the socket ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        if self._connections.is_closing:
            self._transport.abort()
            return
        self._is_open = True
        try:
            self._connections.add(self)
        except ApiError as error:
            self._turn_away(error)
        else:
            self._set_due(REQUEST_TIMEOUT_S)

    def _turn_away(self, error: ApiError) -> None:
        self._reader.refuse(error)
        if len(self._connections.turned_away) < MAX_TURNED_AWAY:
            self._connections.turned_away.add(self)
        else:  # Its client may miss the answer, if its request is still on the way.
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)

    def eof_received(self) -> bool:
        """A half-close is a hang-up; but what no hang-up stops, as a control call, is answered."""
        self._is_half_closed = True
        self._lose_client()
        if self._active is None:
            self._close()
        else:
            self._active.keep_alive = False
        return True  # The transport is closed here.

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_open = False
        self._connections.remove(self)
        self._lose_client()
        del self._reader  # It refers back to here.

    def _lose_client(self) -> None:
        """The client went away: whoever asked to be told is told."""
        self._reader.stop()
        self._waiting.clear()
        active = self._active
        if active is not None and (active.on_hang_up is not None or not self._is_open):
            self._active = None
            active.hang_up()

    def pause_writing(self) -> None:
        self.is_writable = False
        if self._active is not None:
            self._set_due(STALL_TIMEOUT_S)

    def resume_writing(self) -> None:
        self.is_writable = True
        if self._active is None:
            self._begin_next()
            return
        self.due_s = float("inf")
        if self._active.on_writable is not None:
            self._active.on_writable()

    # -- requests ------------------------------------------------------------------------------

    def on_request_begins(self) -> None:
        if self._active is None and not self._waiting:
            self._set_due(REQUEST_TIMEOUT_S)

    def screen(self, exchange: Exchange) -> None:
        self._connections.service.screen(exchange)

    def on_expectation(self) -> None:
        if self._active is None and not self._waiting:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_request(self, exchange: Exchange, refusal: ApiError | None) -> None:
        if refusal is None and self._waiting:
            num_bytes = sum(len(waiting.body) for waiting, _ in self._waiting) + len(exchange.body)
            most = self._connections.max_body_bytes
            if len(self._waiting) >= MAX_PIPELINED or num_bytes > most:
                raise ApiError(
                    429, f"more than {MAX_PIPELINED} requests or {most} bytes wait; await answers"
                )
        self._waiting.append((exchange, refusal))
        if len(self._waiting) == 1:
            self._begin_next()

    def _begin_next(self) -> None:
        """Begin the next request, if it is time and there is one."""
        if self._active is None and self._waiting and self.is_writable:
            exchange, refusal = self._waiting.popleft()
            self._active = exchange
            self.due_s = float("inf")
            if refusal is not None:
                refusal.answer(exchange)
            else:
                self._connections.service.handle(exchange)

    # -- answers -------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self._is_open:
            self._transport.write(data)

    @property
    def peer_is_local(self) -> bool:
        return peer_is_local(self._transport)

    @property
    def max_unread_tokens(self) -> int:
        return self._connections.max_unread_tokens

    def date_header(self) -> bytes:
        return self._connections.date_header()

    def on_answered(self, exchange: Exchange) -> None:
        self._active = None
        if not exchange.keep_alive or (self._connections.is_closing and not self._waiting):
            self._close()
            return
        self._set_due(KEEP_ALIVE_S)
        if self._waiting:
            # Not from within the answer: a thousand pipelined requests are no recursion.
            self._loop.call_soon(self._begin_next)

    # -- the end -------------------------------------------------------------------------------

    def _close(self) -> None:
        """Send what is left and close. A client that does not read it is cut off in the end."""
        self._reader.stop()
        self._waiting.clear()
        self._set_due(DRAIN_TIMEOUT_S)
        self._is_open = False
        if self._reader.was_cut_off and not self._is_half_closed:
            # The client may be sending still: closed now, its socket would throw our answer away.
            try:
                self._transport.write_eof()
            except OSError:  # It is gone already.
                self._transport.abort()
        else:
            self._transport.close()

    def close_when_idle(self) -> None:
        """The server is stopping."""
        self._reader.stop()
        if self._active is None and not self._waiting:
            self._is_open = False
            self._transport.close()
        else:
            last = self._waiting[-1][0] if self._waiting else self._active
            assert last is not None
            last.keep_alive = False

    def expire(self) -> None:
        """It is overdue."""
        if self._active is None and not self._waiting and self._reader.is_amid_request:
            error = ApiError(408, f"the request did not arrive within {REQUEST_TIMEOUT_S:g} s")
            self._reader.refuse(error)
        else:
            self.abort()

    def abort(self) -> None:
        self._is_open = False
        self._transport.abort()

    def _set_due(self, timeout_s: float) -> None:
        self.due_s = self._loop.time() + timeout_s
