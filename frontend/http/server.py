"""The HTTP server of an engine: every dialect's routes over one set of connections."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

from frontend.async_engine import AsyncEngine
from frontend.config import HttpConfig
from frontend.http import fastdeploy, openai, openapi, sglang, status, vllm
from frontend.http.access import AccessRules
from frontend.http.connection import Connections
from frontend.http.control import control_routes
from frontend.http.pauses import pause_routes
from frontend.http.router import Route, Router
from frontend.http.weights import weight_routes

logger = logging.getLogger(__name__)

BACKLOG = 4096
CLOSE_TIMEOUT_S = 5.0
"""How long clients may take, at the end, to read what they were sent."""
_HOUSEKEEPING_S = 1.0


def all_routes(engine: AsyncEngine, http: HttpConfig) -> list[Route]:
    """Everything that is served."""
    routes = [
        *openai.routes(engine),
        *control_routes(engine),
        *pause_routes(engine),
        *weight_routes(engine),
        *sglang.routes(engine),
        *vllm.routes(
            engine,
            strict_selectors=http.strict_selectors,
            hold_while_paused=http.hold_while_paused,
        ),
        *fastdeploy.routes(engine),
        *status.routes(engine),
    ]
    return [*routes, *openapi.routes(routes)]


class HttpServer:
    """A listening server. Create it with `start`."""

    def __init__(self, server: asyncio.Server, connections: Connections) -> None:
        self._server = server
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._housekeeping = self._loop.call_later(_HOUSEKEEPING_S, self._keep_house)

    @classmethod
    async def start(
        cls, listener: socket.socket, engine: AsyncEngine, http: HttpConfig
    ) -> HttpServer:
        """Serve `engine` on a socket that is bound and prepared (`prepare_listener`)."""
        router = Router(all_routes(engine, http), AccessRules(http.api_key, http.admin_api_key))
        connections = Connections(
            router,
            max_body_bytes=http.max_body_bytes,
            max_connections=http.max_connections,
            max_unread_tokens=http.max_unread_tokens,
            metrics=engine.metrics,
        )
        engine.metrics.num_connections = lambda: len(connections.open)
        if http.log_requests:
            engine.log_requests()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(connections, sock=listener, backlog=BACKLOG)
        return cls(server, connections)

    def _keep_house(self) -> None:
        self._connections.close_overdue(self._loop.time())
        self._housekeeping = self._loop.call_later(_HOUSEKEEPING_S, self._keep_house)

    async def close(self) -> None:
        """Close every connection, once its client has read what it was sent or had the time."""
        self._server.close()
        self._connections.close_idle()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._connections.all_closed.wait(), CLOSE_TIMEOUT_S)
        self._connections.abort_all()
        self._housekeeping.cancel()
