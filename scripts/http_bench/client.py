"""Clients of /v1/completions, cheap enough that many of them fit beside the server they measure.

A connection is one asyncio protocol over a raw socket: it counts server-sent events by their first
bytes and notes when each arrived; it decodes no JSON. Times are CLOCK_MONOTONIC, in seconds.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection as MultiprocessingConnection
from typing import Any, Self, cast

import uvloop

EVENT_START = b"\ndata: "
"""Inside JSON a newline is escaped, so this begins an event and nothing else."""
LAST_EVENT = b"data: [DONE]"
LAST_CHUNK = b"0\r\n\r\n"
LONGEST_TAIL = 64
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER, on, 0 s: closing such a socket resets the connection."""
CONNECT_TIMEOUT_S = 60.0
LOAD_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Call:
    """What every request of a load asks for."""

    port: int
    model: str
    max_tokens: int
    num_prompt_tokens: int = 16

    def request(self, number: int, *, stream: bool, name: str | None = None) -> bytes:
        """The bytes of one request; `number` makes its prompt its own, `name` is its id."""
        prompt = [300 + (7 * number + 31 * place) % 3000 for place in range(self.num_prompt_tokens)]
        body = json.dumps(
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": self.max_tokens,
                "ignore_eos": True,
                "temperature": 0.0,
                "stream": stream,
            }
        ).encode()
        lines = [
            "POST /v1/completions HTTP/1.1",
            "Host: 127.0.0.1",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            *([] if name is None else [f"X-Request-Id: {name}"]),
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass(slots=True)
class Reply:
    """One answer, as it arrived."""

    sent_s: float
    status: int = 0
    """0 until the head has come."""
    arrivals_s: list[float] = field(default_factory=list)
    """One for each event of a stream, without the closing [DONE]."""
    end_s: float = 0.0
    """0 if the answer did not come to its end."""
    is_length: bool = False
    """Whether it ended as asked: with its `max_tokens`-th token."""

    @property
    def is_good(self) -> bool:
        return self.status == 200 and self.end_s > 0 and self.is_length


class Connection(asyncio.Protocol):
    """One keep-alive connection; one request at a time."""

    def __init__(self) -> None:
        self.reply = Reply(0.0)
        self.first_event: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done at the first event of the first reply, or when the connection is lost."""
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[Reply] | None = None
        self._head = b""
        self._tail = b""
        self._num_left: int | None = None
        """Bytes of a body whose length is known."""

    @classmethod
    async def open(cls, port: int, *, reset_on_close: bool = False) -> Self:
        """Connect to a server of this machine. Raises OSError."""
        loop = asyncio.get_running_loop()
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if reset_on_close:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await loop.sock_connect(sock, ("127.0.0.1", port))
        _, connection = await loop.create_connection(cls, sock=sock)
        return connection

    def send(self, request: bytes) -> asyncio.Future[Reply]:
        """Send one request; the future is done when its answer has ended or the connection has."""
        assert self._transport is not None
        self.reply = Reply(time.monotonic())
        self._head = self._tail = b""
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._done

    def close(self) -> None:
        """Drop the connection at once."""
        assert self._transport is not None
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._finish()

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        reply = self.reply
        if not reply.status:
            self._head += data
            head, separator, data = self._head.partition(b"\r\n\r\n")
            if not separator:
                return
            reply.status = int(head.split(b" ", 2)[1])
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            self._num_left = None if length is None else int(length[1])
            self._tail = b"\n"
        window = self._tail + data
        num_events = window.count(EVENT_START, max(0, len(self._tail) - len(EVENT_START) + 1))
        if num_events:
            reply.arrivals_s.extend([now] * num_events)
            if not self.first_event.done():
                self.first_event.set_result(None)
        if b'"length"' in window:
            reply.is_length = True
        self._tail = window[-LONGEST_TAIL:]
        if self._num_left is not None:
            self._num_left -= len(data)
            if self._num_left <= 0:
                reply.end_s = now
                self._finish()
        elif window.endswith(LAST_CHUNK):
            reply.end_s = now
            if LAST_EVENT in window and reply.arrivals_s:
                reply.arrivals_s.pop()
            self._finish()

    def _finish(self) -> None:
        if not self.first_event.done():
            self.first_event.set_result(None)
        if self._done is not None and not self._done.done():
            self._done.set_result(self.reply)


async def closed_loop(
    call: Call, *, num_requests: int, concurrency: int, stream: bool = True
) -> list[Reply]:
    """So many requests over `concurrency` connections, each sending its next when one is done.

    The connections are open before the first request is sent.
    """
    connections = [await Connection.open(call.port) for _ in range(min(concurrency, num_requests))]
    requests = [call.request(number, stream=stream) for number in range(num_requests)]
    replies: list[Reply] = []

    async def work(connection: Connection) -> None:
        while requests:
            replies.append(await connection.send(requests.pop()))

    await asyncio.gather(*map(work, connections))
    for connection in connections:
        connection.close()
    return replies


def gaps_s(replies: Iterable[Reply], begin_s: float = 0.0, end_s: float = 1e18) -> list[float]:
    """Inter-token latencies: the times between a stream's events, of gaps that end in a window."""
    return [
        after - before
        for reply in replies
        for before, after in zip(reply.arrivals_s, reply.arrivals_s[1:], strict=False)
        if begin_s <= after < end_s
    ]


def run_clients(main: Any, *arguments: Any, **options: Any) -> Any:
    """Run `main(*arguments, **options)`, a coroutine, in a process of its own; returns its result.

    Raises TimeoutError if it takes too long, and EOFError if it fails: the process says why.
    """
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(
        target=_send_result, args=(theirs, main, arguments, options), daemon=True
    )
    process.start()
    theirs.close()
    try:
        if not ours.poll(LOAD_TIMEOUT_S):
            raise TimeoutError(f"the clients did not come to an end in {LOAD_TIMEOUT_S:.0f} s")
        return ours.recv()
    finally:
        process.kill()
        process.join()


def _send_result(
    to: MultiprocessingConnection, main: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        to.send(runner.run(main(*arguments, **options)))
