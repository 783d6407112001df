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
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from frontend.async_engine import AsyncEngine
from frontend.config import FrontendConfig, HttpConfig
from frontend.http.serving import StopSignal, serve_on
from frontend.http.sockets import prepare_listener
from ipc.engine_config import EngineConfig

FAKE_MODEL = "fake"
PROMPT = [5, 6, 7]


def fake(**fields: Any) -> FrontendConfig:
    """An engine whose tokens are arithmetic; `fields` are of EngineConfig."""
    engine = EngineConfig(model="none", runner="fake", **fields)
    return FrontendConfig(engine=engine, served_model_name=FAKE_MODEL)


@dataclass(frozen=True, slots=True)
class ServedEngine:
    """A running server."""

    engine: AsyncEngine
    http: httpx.AsyncClient
    """Its base URL is the server's; requests time out after 20 s."""
    port: int
    stop: StopSignal
    """What a signal would trip."""
    serving: asyncio.Task[None]
    """Ends when the server has."""

    async def connect(self, *, receive_buffer_bytes: int | None = None) -> socket.socket:
        """A plain connection, for clients that misbehave in some special way."""
        connection = socket.socket()
        connection.setblocking(False)
        if receive_buffer_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.port))
        return connection

    async def send(self, connection: socket.socket, data: bytes) -> None:
        await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(connection, data), 10)

    async def post(self, connection: socket.socket, path: str, body: object) -> None:
        """Send a request over a plain connection, without awaiting the answer."""
        await self.send(connection, post_bytes(path, body))

    async def receive(self, connection: socket.socket, timeout_s: float = 5.0) -> bytes:
        """What the server sent meanwhile; b"" at its end."""
        loop = asyncio.get_running_loop()
        return await asyncio.wait_for(loop.sock_recv(connection, 1 << 20), timeout_s)

    async def receive_until(
        self, connection: socket.socket, mark: bytes, timeout_s: float = 5.0
    ) -> bytes:
        """Everything up to the data that holds `mark`, or to the end."""
        received = b""
        async with asyncio.timeout(timeout_s):
            while mark not in received:
                data = await self.receive(connection, timeout_s)
                received += data
                if not data:
                    break
        return received

    async def receive_all(self, connection: socket.socket, timeout_s: float = 5.0) -> bytes:
        """Everything until the server closes."""
        received = b""
        async with asyncio.timeout(timeout_s):
            while data := await self.receive(connection, timeout_s):
                received += data
        return received

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
                    assert not any(status.integrity_errors for status in statuses)
                    return
                await asyncio.sleep(0.005)


def post_bytes(path: str, body: object, headers: Mapping[str, str] | None = None) -> bytes:
    """A request as it goes over the wire."""
    payload = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: test", f"Content-Length: {len(payload)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + payload


def reset(connection: socket.socket) -> None:
    """Close with RST: so it goes with a linger time of zero."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@asynccontextmanager
async def served_engine(config: FrontendConfig, **http: Any) -> AsyncIterator[ServedEngine]:
    """Start an engine and serve it; both end with the block. `http` are fields of HttpConfig."""
    async with serving(await AsyncEngine.start(config), **http) as served:
        yield served


@asynccontextmanager
async def serving(engine: AsyncEngine, **http: Any) -> AsyncIterator[ServedEngine]:
    """Serve an engine, and shut both down with the block."""
    http = {"shutdown_timeout_s": 0.0} | http
    with socket.socket() as listener:
        prepare_listener(listener)
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.listen(1024)  # The server listens too, but a test may be faster.
        stop = StopSignal()
        task = asyncio.create_task(serve_on(listener, engine, HttpConfig(port=port, **http), stop))
        base_url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=base_url, timeout=20.0) as client:
            try:
                yield ServedEngine(engine, client, port, stop, task)
            finally:
                stop.stop()
                await client.aclose()
                await asyncio.wait_for(task, 20)
