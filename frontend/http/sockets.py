"""What the server asks of its clients' sockets and sets on them, whichever loop owns them."""

from __future__ import annotations

import asyncio
import socket

NOT_SENT_LOW_WATER_BYTES = 128 * 1024
"""What the kernel may hold of a stream that its client does not read; Linux's default is megabytes
of tokens that nobody may ever want."""
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)


def peer_is_local(transport: asyncio.BaseTransport) -> bool:
    """Whether the client is on this machine."""
    peer = transport.get_extra_info("peername")
    if not isinstance(peer, tuple):
        return True  # A Unix socket.
    host: str = peer[0]
    return host == "::1" or host.removeprefix("::ffff:").startswith("127.")


def limit_unsent(transport: asyncio.BaseTransport) -> None:
    """Let a slow reader be felt here early, where outputs merge and aborts act."""
    raw = transport.get_extra_info("socket")
    if raw is not None and raw.family != socket.AF_UNIX:
        raw.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, NOT_SENT_LOW_WATER_BYTES)
