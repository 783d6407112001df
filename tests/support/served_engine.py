"""An engine and its HTTP server on the test's own event loop, over a real TCP socket.

    async with served_engine(FrontendConfig()) as served:
        answer = await served.http.post("/v1/completions", json={"prompt": "def "})
        assert served.engine.num_live_requests == 0

What a client sees and what the engine holds can be asserted side by side. For clients that
misbehave, `served.connect` gives a plain socket.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

from frontend.async_engine import AsyncEngine
from frontend.config import FrontendConfig, HttpConfig
from frontend.http.serving import serve_on


@dataclass(frozen=True, slots=True)
class ServedEngine:
    """A running server."""

    engine: AsyncEngine
    http: httpx.AsyncClient
    """Its base URL is the server's; requests time out after 20 s."""
    port: int
    stop: asyncio.Future[None]
    """Set its result to shut the server down, as a signal does."""

    async def connect(self) -> socket.socket:
        """A plain connection, for clients that hang up in some special way."""
        connection = socket.socket()
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.port))
        return connection

    async def post(self, connection: socket.socket, path: str, body: object) -> None:
        """Send a request over a plain connection, without awaiting the answer."""
        payload = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(payload)}\r\n\r\n"
        await asyncio.get_running_loop().sock_sendall(connection, head.encode() + payload)

    async def wait_for_live_requests(self, number: int, timeout_s: float = 5.0) -> None:
        """Return when the front end has exactly so many requests."""
        async with asyncio.timeout(timeout_s):
            while self.engine.num_live_requests != number:  # noqa: ASYNC110  # no event to await
                await asyncio.sleep(0.005)

    async def wait_until_idle(self, timeout_s: float = 5.0) -> None:
        """Return when neither the front end nor an engine has a request any more."""
        async with asyncio.timeout(timeout_s):
            while True:
                statuses = (await self.engine.status()).values()
                num_held = sum(status.num_running + status.num_waiting for status in statuses)
                if not self.engine.num_live_requests and not num_held:
                    return
                await asyncio.sleep(0.005)


@asynccontextmanager
async def served_engine(
    config: FrontendConfig, *, api_key: str | None = None
) -> AsyncIterator[ServedEngine]:
    """Start an engine and serve it; both end with the block."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        engine = await AsyncEngine.start(config)
        listener.listen()  # The server listens too, but a test may be faster.
        serving = asyncio.create_task(
            serve_on(listener, engine, HttpConfig(port=port, api_key=api_key), stop)
        )
        base_url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=base_url, timeout=20.0) as http:
            try:
                yield ServedEngine(engine, http, port, stop)
            finally:
                if not stop.done():
                    stop.set_result(None)
                await http.aclose()
                await asyncio.wait_for(serving, 20)
