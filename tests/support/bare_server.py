"""The HTTP layer without an engine: connections, a router and a few routes of a test's own.

    async with bare_server([Route(...)]) as server:
        client = await server.connect()
        client.write(b"GET /now HTTP/1.1\\r\\n\\r\\n")
        assert (await client.answer()).status == 200

Every wait is bounded.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from frontend.http.access import AccessRules
from frontend.http.connection import Connections
from frontend.http.router import Route, Router
from frontend.http.sockets import prepare_listener
from frontend.metrics import Metrics

TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, as it came over the wire."""

    version: str
    status: int
    headers: dict[str, str]
    """By lower-case name."""
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object of an OpenAI-shaped answer."""
        error: dict[str, Any] = self.json["error"]
        return error


class RawClient:
    """A client that sends what it is told to, and reads answers one by one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    async def write_slowly(self, data: bytes, at: int) -> None:
        """In two segments, split there."""
        self.write(data[:at])
        await asyncio.sleep(0.001)
        self.write(data[at:])

    async def answer(self, *, to_head: bool = False) -> Answer:
        """The next answer; `to_head` says that it has no body."""
        async with asyncio.timeout(TIMEOUT_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
            version, status, _ = first.split(" ", 2)
            headers = {
                name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
            }
            assert len(headers) == len(lines), f"a header is repeated: {lines}"
            body = b""
            if to_head or status.startswith("1"):
                pass
            elif headers.get("transfer-encoding") == "chunked":
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                assert await self.reader.readexactly(2) == b"\r\n"
            elif "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                body = await self.reader.read()
            return Answer(version, int(status), headers, body)

    async def rest(self) -> bytes:
        """Whatever else the server sends, until it closes."""
        return await asyncio.wait_for(self.reader.read(), TIMEOUT_S)

    def close(self) -> None:
        self.writer.close()


async def raw_client(port: int) -> RawClient:
    """A client of any server on this machine."""
    return RawClient(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 26))


@dataclass(frozen=True, slots=True)
class BareServer:
    connections: Connections
    router: Router
    port: int

    async def connect(self) -> RawClient:
        return await raw_client(self.port)

    async def wait_for_connections(self, number: int) -> None:
        """Return when exactly so many are open."""
        async with asyncio.timeout(TIMEOUT_S):
            while len(self.connections.open) != number:  # noqa: ASYNC110  # no event to await
                await asyncio.sleep(0.002)


@asynccontextmanager
async def bare_server(
    routes: Sequence[Route],
    rules: AccessRules | None = None,
    *,
    max_body_bytes: int = 1 << 20,
    max_connections: int = 100,
    max_unread_tokens: int = 4096,
) -> AsyncIterator[BareServer]:
    router = Router(routes, rules or AccessRules(None, None))
    connections = Connections(
        router,
        max_body_bytes=max_body_bytes,
        max_connections=max_connections,
        max_unread_tokens=max_unread_tokens,
        metrics=Metrics(),
    )
    with socket.socket() as listener:
        prepare_listener(listener)
        listener.bind(("127.0.0.1", 0))
        loop = asyncio.get_running_loop()
        server = await loop.create_server(connections, sock=listener, backlog=128)
        try:
            yield BareServer(connections, router, listener.getsockname()[1])
        finally:
            server.close()
            connections.abort_all()
            connections.close_idle()
            await asyncio.wait_for(connections.all_closed.wait(), TIMEOUT_S)
            assert not router.running, "a handler's task is left"
