"""The front end's side of the start-up handshake, as a plain object: frames in, frames out.

Each engine says HELLO on the handshake socket, gets INIT with its addresses, registers on the input
socket and says READY on the handshake socket, the last two in either order. An engine is up when
both are in.

Invariant: whatever one peer does wrong is answered by leaving that peer out, with a reason; the
others come up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ipc.errors import WireError
from ipc.handshake import Hello, Init, Registration, decode_handshake, rank_of

State = Literal["awaited", "initialised", "up"]


@dataclass(slots=True)
class _Peer:
    state: State = "awaited"
    is_ready: bool = False
    registration: Registration | None = None


@dataclass(slots=True)
class Handshake:
    """Brings up the engines of `ranks`; `init_for(rank)` supplies each one's addresses."""

    ranks: range
    init_for: Callable[[int], Init]
    _peers: dict[int, _Peer] = field(init=False)

    def __post_init__(self) -> None:
        self._peers = {rank: _Peer() for rank in self.ranks}

    @property
    def missing_ranks(self) -> list[int]:
        """Ranks that are not up yet."""
        return [rank for rank, peer in self._peers.items() if peer.state != "up"]

    @property
    def registrations(self) -> dict[int, Registration]:
        return {
            rank: peer.registration
            for rank, peer in self._peers.items()
            if peer.state == "up" and peer.registration is not None
        }

    def on_handshake(self, identity: bytes, payload: bytes) -> bytes | None:
        """A frame on the handshake socket; returns the payload to answer with. Raises WireError to
        refuse it.
        """
        peer = self._peer(identity)
        if isinstance(decode_handshake(payload), Hello):
            if peer.state != "awaited":
                raise WireError(
                    f"engine {rank_of(identity)} said HELLO again; two engines may share this rank"
                )
            peer.state = "initialised"
            return self.init_for(rank_of(identity)).encode()
        if peer.state != "initialised":
            raise WireError(f"engine {rank_of(identity)} said READY out of turn ({peer.state})")
        peer.is_ready = True
        self._settle(peer)
        return None

    def on_registration(self, identity: bytes, payload: bytes) -> None:
        """The first frame on the input socket. Raises WireError to refuse it."""
        peer = self._peer(identity)
        if peer.state != "initialised":
            raise WireError(f"engine {rank_of(identity)} registered out of turn ({peer.state})")
        peer.registration = Registration.decode(payload)
        self._settle(peer)

    def _peer(self, identity: bytes) -> _Peer:
        rank = rank_of(identity)
        if rank not in self._peers:
            raise WireError(
                f"an engine of rank {rank} called, but this front end has ranks "
                f"{self.ranks.start} to {self.ranks.stop - 1}; "
                f"check --data-parallel-size and the engine's rank"
            )
        return self._peers[rank]

    def _settle(self, peer: _Peer) -> None:
        if peer.is_ready and peer.registration is not None:
            peer.state = "up"
