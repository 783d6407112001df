"""The life of the serving process: take the port, start the engines, serve, end all in order.

Invariants
- The port is taken before the engines start, so that a port in use is told at once.
- The first SIGINT or SIGTERM ends all requests, each with an answer, then the engines, then the
  server; the second one ends the process at once, and the engines with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from frontend.async_engine import AsyncEngine
from frontend.config import FrontendConfig, HttpConfig
from frontend.http.server import create_app
from ipc.sockets import remove_private_directories

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 65
"""Longer than the usual 60 s of load balancers, so that they are the ones to close."""
_GRACE_S = 5
_BACKLOG = 4096
_INTERRUPTED_STATUS = 130


async def serve(config: FrontendConfig, http: HttpConfig) -> None:
    """Serve until a signal comes. Raises OSError, ValueError or EngineStartupError if it cannot."""
    with _listener(http) as listener:
        stop = _stop_on_signals()
        _log_start(config)
        starting = asyncio.create_task(AsyncEngine.start(config))
        events: set[asyncio.Future[Any]] = {starting, stop}
        await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
        if stop.done():
            starting.cancel()
        try:
            engine = await starting
        except asyncio.CancelledError:
            return
        async with engine:
            await serve_on(listener, engine, http, stop)


def _log_start(config: FrontendConfig) -> None:
    num_local = config.num_local_engines
    if num_local:
        logger.info("starting %d engines with %s", num_local, config.engine.model)
    if num_others := config.data_parallel_size - num_local:
        where = config.handshake_tcp_address
        logger.info("waiting for %d engines of other launchers at %s", num_others, where)


async def serve_on(
    listener: socket.socket, engine: AsyncEngine, http: HttpConfig, stop: asyncio.Future[None]
) -> None:
    """Serve a started engine until `stop` is done; then end its requests, it and the server."""
    server = _Server(
        uvicorn.Config(
            create_app(engine, http.api_key),
            http="httptools",
            ws="none",
            lifespan="off",
            interface="asgi3",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_config=None,
            log_level="warning",
            backlog=_BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=_GRACE_S,
        )
    )
    listener.listen(_BACKLOG)  # From here on connections wait to be accepted, none is refused.
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    logger.info("serving %s at %s", engine.served_model_name, _url(listener))
    await asyncio.wait({serving, stop}, return_when=asyncio.FIRST_COMPLETED)
    # Requests end while the server still runs, so that each one's answer goes out.
    logger.info("shutting down: %d requests are running", engine.num_live_requests)
    await engine.shutdown()
    server.should_exit = True
    await serving


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours."""
        yield


def _stop_on_signals() -> asyncio.Future[None]:
    """Done when a signal asks to stop."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def on_signal() -> None:
        if stop.done():
            remove_private_directories()
            os._exit(_INTERRUPTED_STATUS)
        stop.set_result(None)

    for signal_number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signal_number, on_signal)
    return stop


@contextlib.contextmanager
def _listener(http: HttpConfig) -> Iterator[socket.socket]:
    """A bound socket that does not listen yet. Raises OSError saying what is taken or wrong."""
    if http.uds is not None:
        path = Path(http.uds)
        _remove_stale_socket(path)
        with socket.socket(socket.AF_UNIX) as listener:
            _bind(listener, http.uds, f"the socket {http.uds}", "--uds", "--uds")
            try:
                yield listener
            finally:
                path.unlink(missing_ok=True)
        return
    where = f"port {http.port} of {http.host}"
    try:
        family, *_, address = socket.getaddrinfo(http.host, http.port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise OSError(f"host {http.host!r} is unknown ({error.strerror}); check --host") from None
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(listener, address, where, "--port", "--host and --port")
        yield listener


def _bind(listener: socket.socket, address: object, where: str, flag: str, all_flags: str) -> None:
    try:
        listener.bind(address)  # type: ignore[arg-type]  # as getaddrinfo returned it, or a path
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"{where} is in use; choose another with {flag}") from None
        reason = error.strerror or error  # Python's own, as for too long a path, has only a text.
        raise OSError(f"cannot listen at {where}: {reason}; check {all_flags}") from None


def _remove_stale_socket(path: Path) -> None:
    """Remove what a killed server left, but not the socket of one that runs."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()


def _url(listener: socket.socket) -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
