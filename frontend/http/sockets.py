"""What the server asks of its clients' sockets, and sets on its own for them to inherit."""

from __future__ import annotations

import asyncio
import socket

NOT_SENT_LOW_WATER_BYTES = 128 * 1024
"""What the kernel may hold of a stream that its client does not read; Linux's default is megabytes
of tokens that nobody may ever want."""
KEEP_ALIVE_IDLE_S = 60
KEEP_ALIVE_INTERVAL_S = 15
KEEP_ALIVE_PROBES = 4
"""A client that vanished is noticed after the idle time and so many silent probes."""


def prepare_listener(listener: socket.socket) -> None:
    """Set what every accepted connection inherits (on Linux): a slow reader is felt early, where
    outputs merge and aborts act, and a client that vanished is noticed.

    For TCP, before the socket listens: a connection made earlier inherits nothing.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_NOTSENT_LOWAT", NOT_SENT_LOW_WATER_BYTES),
        ("TCP_KEEPIDLE", KEEP_ALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEP_ALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEP_ALIVE_PROBES),
    ):
        listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name, _ON_LINUX[name]), value)


_ON_LINUX = {
    "TCP_NOTSENT_LOWAT": 25,
    "TCP_KEEPIDLE": 4,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 6,
}
"""Older Pythons have no names for some of them."""


def peer_is_local(transport: asyncio.BaseTransport) -> bool:
    """Whether the client is on this machine."""
    peer = transport.get_extra_info("peername")
    if not isinstance(peer, tuple):
        return True  # A Unix socket.
    host: str = peer[0]
    return host == "::1" or host.removeprefix("::ffff:").startswith("127.")
