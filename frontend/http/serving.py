"""The life of the serving process: take the port, start the engines, serve, end all in order.

Invariants
- The port is taken before the engines start, so that a port in use is told at once.
- The first SIGINT or SIGTERM stops admission and lets requests finish for a while; then, or at the
  second signal, all requests end, each with an answer and told to its engine, then the engines,
  then the server. The third signal ends the process at once, and the engines with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import zmq

from frontend.async_engine import AsyncEngine
from frontend.config import FrontendConfig, HttpConfig
from frontend.errors import EngineStartupError
from frontend.http.server import HttpServer
from frontend.http.sockets import prepare_listener
from ipc.sockets import remove_private_directories

logger = logging.getLogger(__name__)

_INTERRUPTED_STATUS = 130
_NUM_OTHER_FILES = 100
"""What the server opens besides its clients' connections."""
_GC_THRESHOLDS = (20_000, 50, 100)
"""A server makes thousands of objects a second and hardly any cycles."""


async def serve(config: FrontendConfig, http: HttpConfig) -> None:
    """Serve until a signal comes. Raises OSError, ValueError or EngineStartupError if it cannot."""
    _raise_file_limit(http.max_connections + _NUM_OTHER_FILES)
    with _listener(http) as listener:
        stop = StopSignal()
        stop.install()
        _log_start(config)
        starting = asyncio.create_task(AsyncEngine.start(config))
        stopping = asyncio.create_task(stop.requested.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            starting.cancel()
        stopping.cancel()
        try:
            engine = await starting
        except asyncio.CancelledError:
            return
        except zmq.ZMQError as error:
            raise EngineStartupError(
                f"cannot open the sockets of data_parallel_size={config.data_parallel_size} "
                f"engines ({error}); choose fewer, or raise the limit of `ulimit -n`"
            ) from None
        async with engine:
            await serve_on(listener, engine, http, stop)


def _raise_file_limit(num_needed: int) -> None:
    """Let this process open as many files as it may; warn if that is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard or hard == resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft != resource.RLIM_INFINITY and soft < num_needed:
        logger.warning(
            "max_connections needs %d open files and the limit is %d; raise it with `ulimit -n`, "
            "or lower --max-connections",
            num_needed,
            soft,
        )


def _log_start(config: FrontendConfig) -> None:
    num_local = config.num_local_engines
    if num_local:
        logger.info("starting %d engines with %s", num_local, config.engine.model)
    if num_others := config.data_parallel_size - num_local:
        where = config.handshake_tcp_address
        logger.info("waiting for %d engines of other launchers at %s", num_others, where)


async def serve_on(
    listener: socket.socket, engine: AsyncEngine, http: HttpConfig, stop: StopSignal
) -> None:
    """Serve a started engine until told to stop; then end its requests, it and the server."""
    server = await HttpServer.start(listener, engine, http)
    gc.freeze()  # What is here now stays: later collections need not look at it.
    gc.set_threshold(*_GC_THRESHOLDS)
    logger.info("serving %s at %s", engine.served_model_name, _url(listener))
    await stop.requested.wait()
    if num_live := engine.num_live_requests:
        logger.info(
            "shutting down: %d requests may finish within %g s; a second signal ends them now",
            num_live,
            http.shutdown_timeout_s,
        )
    # Meanwhile connections are served, so that every answer goes out, probes learn that this server
    # is not ready, and an abort can shorten the wait.
    ending = asyncio.create_task(engine.shutdown(http.shutdown_timeout_s))
    hurry = asyncio.create_task(stop.hurried.wait())
    await asyncio.wait({ending, hurry}, return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    await engine.shutdown()
    await server.close()


class StopSignal:
    """A request to stop, which may become urgent."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.hurried = asyncio.Event()

    def stop(self) -> None:
        """Stop, and the second time: now."""
        (self.hurried if self.requested.is_set() else self.requested).set()

    def install(self) -> None:
        """Let SIGINT and SIGTERM ask. The third one ends the process on the spot."""

        def on_signal(signal_number: signal.Signals) -> None:
            if self.hurried.is_set():
                logger.warning("received a third signal, %s: ending at once", signal_number.name)
                remove_private_directories()
                os._exit(_INTERRUPTED_STATUS)
            now = "ending all requests now" if self.requested.is_set() else "stopping"
            logger.info("received %s: %s", signal_number.name, now)
            self.stop()

        for signal_number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signal_number, on_signal, signal_number)


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
        prepare_listener(listener)
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
