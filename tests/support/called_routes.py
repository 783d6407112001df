"""Calls HTTP routes through the real router, with no socket in between.

client = RouteClient(sglang.routes(engine))
answer = await client.post("/generate", {"input_ids": [1]})
assert answer.status == 200
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from frontend.http.access import AccessRules
from frontend.http.exchange import Exchange
from frontend.http.router import Route, Router

TIMEOUT_S = 10.0


class Call:
    """A request under way: the outlet of its exchange, and what came out of it so far."""

    is_writable = True
    peer_is_local = True
    max_unread_tokens = 1_000_000

    def __init__(self) -> None:
        self.data = bytearray()
        self._is_answered = asyncio.Event()
        self._news = asyncio.Event()
        self.exchange: Exchange | None = None

    def write(self, data: bytes) -> None:
        self.data += data
        self._news.set()

    def on_answered(self, exchange: Exchange) -> None:
        self._is_answered.set()

    def date_header(self) -> bytes:
        return b""

    def abort(self) -> None:
        raise AssertionError(f"the server broke the connection off after {bytes(self.data)!r}")

    def hang_up(self) -> None:
        """As the connection does when the client is gone."""
        assert self.exchange is not None
        self.exchange.hang_up()

    async def begun(self) -> None:
        """Return when the first bytes of the answer are there."""
        async with asyncio.timeout(TIMEOUT_S):
            await self._news.wait()

    async def answer(self) -> Answer:
        """Return when the answer is complete."""
        async with asyncio.timeout(TIMEOUT_S):
            await self._is_answered.wait()
        head, _, rest = bytes(self.data).partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        if b"transfer-encoding: chunked" in head:
            rest = _unchunk(rest)
        return Answer(status, head.decode("latin-1"), rest)


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    head: str
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The data of all server-sent events; the last must be, and is not among them, [DONE]."""
        *events, done, nothing = self.body.split(b"\n\n")
        assert (done, nothing) == (b"data: [DONE]", b"")
        return [json.loads(event.removeprefix(b"data: ")) for event in events]


class RouteClient:
    """Puts requests to a set of routes."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._router = Router(routes, AccessRules(None, None))

    def start(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Call:
        """Send a request; `body` is JSON, or bytes as they are."""
        call = Call()
        path, _, query = path.partition("?")
        exchange = Exchange(call, method, path, query, headers or {}, "1.1", True)
        exchange.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        call.exchange = exchange
        self._router.screen(exchange)
        self._router.handle(exchange)
        return call

    async def post(
        self, path: str, body: object, headers: Mapping[str, str] | None = None
    ) -> Answer:
        return await self.start("POST", path, body, headers).answer()

    async def get(self, path: str) -> Answer:
        return await self.start("GET", path, b"").answer()


def _unchunk(data: bytes) -> bytes:
    parts = []
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        parts.append(data[:length])
        data = data[length + 2 :]
    return b"".join(parts)
