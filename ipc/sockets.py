"""ZeroMQ sockets as the wire wants them; what travels over them is not known here.

Invariants: no high-water marks (a full queue must never block or drop; back-pressure is the
scheduler's work); nothing lingers on close unless the closer says so (`socket.close(linger=...)`,
as for a death notice); a ROUTER raises `zmq.ZMQError` (EHOSTUNREACH) for a peer that is not there,
and hands an identity over to the newest connection, so that a restarted engine takes its place
back.

Every function takes a `zmq.Context` or a `zmq.asyncio.Context` and returns the socket of its kind.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import zmq

_Socket = TypeVar("_Socket", bound="zmq.Socket[Any]")

KERNEL_BUFFER_BYTES = 4 * 1024 * 1024
"""Asked of the kernel for each direction; it grants what its own limits allow."""
MAX_IPC_PATH_BYTES = 107
"""Longest path of a Unix domain socket on Linux."""


def private_directory() -> tempfile.TemporaryDirectory[str]:
    """A new directory for ipc:// sockets that only this user can enter (mode 0700).

    `cleanup()` removes it, with the sockets that a crash may have left in it.
    """
    directory = tempfile.TemporaryDirectory(prefix="caesura-", ignore_cleanup_errors=True)
    _private_directories.add(directory)
    return directory


def remove_private_directories() -> None:
    """Remove those that are left, before an `os._exit`, which skips Python's own cleaning up."""
    for directory in list(_private_directories):
        directory.cleanup()


_private_directories: weakref.WeakSet[tempfile.TemporaryDirectory[str]] = weakref.WeakSet()


def check_address(address: str) -> str:
    """`address`, if ZeroMQ can dial or bind it. Raises ValueError naming what is wrong."""
    scheme, separator, rest = address.partition("://")
    if not separator or scheme not in ("tcp", "ipc", "inproc") or not rest:
        raise ValueError(
            f"address {address!r} must be tcp://HOST:PORT, ipc://PATH or inproc://NAME"
        )
    if scheme == "ipc" and len(rest.encode()) > MAX_IPC_PATH_BYTES:
        raise ValueError(
            f"address {address!r} has a path of more than {MAX_IPC_PATH_BYTES} bytes; "
            "set TMPDIR to a shorter directory"
        )
    if scheme == "tcp":
        host, _, port = rest.rpartition(":")
        if not host or not (
            port == "*" or (port.isascii() and port.isdigit() and int(port) < 2**16)
        ):
            raise ValueError(
                f"address {address!r} must be tcp://HOST:PORT with a port from 0 to 65535"
            )
        if ":" in host and not (host.startswith("[") and host.endswith("]")):
            raise ValueError(
                f"address {address!r}: write an IPv6 host in brackets, tcp://[{host}]:{port}"
            )
    return address


def bind_router(context: zmq.Context[_Socket], address: str) -> _Socket:
    """A front end's handshake or input socket."""
    return _bind(_open(context, zmq.ROUTER), address)


def bind_pull(context: zmq.Context[_Socket], address: str) -> _Socket:
    """A front end's output socket."""
    return _bind(_open(context, zmq.PULL), address)


def connect_dealer(context: zmq.Context[_Socket], address: str, identity: bytes) -> _Socket:
    """An engine's handshake or input socket."""
    return _connect(_open(context, zmq.DEALER, identity), address)


def connect_push(context: zmq.Context[_Socket], address: str) -> _Socket:
    """An engine's output socket, to a front end or to a coordinator."""
    return _connect(_open(context, zmq.PUSH), address)


def connect_xsub(context: zmq.Context[_Socket], address: str, identity: bytes) -> _Socket:
    """An engine's ear for a coordinator."""
    return _connect(_open(context, zmq.XSUB, identity), address)


def bound_address(socket: zmq.Socket[Any]) -> str:
    """The address to dial a bound socket at, with the port that was chosen for `tcp://HOST:*`."""
    return socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")


def _open(context: zmq.Context[_Socket], kind: int, identity: bytes | None = None) -> _Socket:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.SNDBUF, KERNEL_BUFFER_BYTES)
    socket.setsockopt(zmq.RCVBUF, KERNEL_BUFFER_BYTES)
    if kind == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    if identity is not None:
        socket.setsockopt(zmq.IDENTITY, identity)
    return socket


def _bind(socket: _Socket, address: str) -> _Socket:
    _attach(socket, address, socket.bind)
    return socket


def _connect(socket: _Socket, address: str) -> _Socket:
    _attach(socket, address, socket.connect)
    return socket


def _attach(socket: zmq.Socket[Any], address: str, attach: Callable[[str], object]) -> None:
    try:
        check_address(address)
        if "[" in address:
            socket.setsockopt(zmq.IPV6, 1)
        attach(address)
    except BaseException:
        socket.close()
        raise
